"""Many questions to one model at once.

engine    Engine, Request, Reply: a queue, and the thread that answers it
slots     the compiled part: answers in progress, one in each slot
"""
