"""Many questions to one model at once.

engine    Engine: a queue, and the thread that answers it
requests  Request, Reply, and the handle of a reply that is coming
sessions  several questions about the same clips; prefixes: what was read of them
thinking  thoughts, told from answers
choices   a choice among given answers
slots     the compiled part: answers in progress, one in each slot
"""
