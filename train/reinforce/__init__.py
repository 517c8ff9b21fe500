"""Post-training by reward: questions -> answers drawn from the model -> rewards -> updates.

config     options
questions  questions with known answers, in the order of a run
objective  loss of drawn tokens: DAPO, GRPO, GSPO
rewards    rewards of answers, by name and weight; a user's own
rollout    groups of answers to questions, drawn from the present model, and their rewards
packing    groups of answers -> packed batches of an update
step       an update, and log-probabilities of drawn tokens, as compiled programs
loop       a run: answers, updates, checkpoints, evaluations
"""
