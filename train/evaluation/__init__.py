"""Asks a model questions with known answers and measures how right its answers are; start at `evaluate`.

config             options of an evaluation
question_files     question files of MMAU, MMAU-Pro, MMAR and MMSU
questions          questions of manifests, sound scenes and those files
answers            questions -> prompts -> generated answers
metrics            scores of answers against references
measures           questions and answers -> a table of scores by source and task
evaluate           a checkpoint -> results, predictions and a plot: the command `evaluate`
plots              timelines of true and predicted events; ranges of compared runs
"""
