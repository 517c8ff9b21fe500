"""Post-training by reward: questions -> answers drawn from the model -> rewards -> updates.

config     options
objective  loss of drawn tokens: DAPO, GRPO, GSPO
rewards    rewards of answers, by name and weight; a user's own
step       an update, and log-probabilities of drawn tokens, as compiled programs
"""
