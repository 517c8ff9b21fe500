"""Timestamps as data: from the model's text to segments, to subtitles, labels and pictures.

timeline  Timeline, joined: segments, what could not be read, and which times can't be right
segment   Segment: a text and its times
reading   the parser, also of the evaluation
formats   text, CSV, SubRip, WebVTT, labels of Audacity
prompts   questions that are answered with times
picture   waveform, mel, and segments with their texts
command   `moss-audio timeline`
"""
