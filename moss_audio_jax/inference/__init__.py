"""Many questions to one model at once, and recordings of any length.

engine    Engine: a queue, and the thread that answers it
requests  Request, Reply, and the handle of a reply that is coming
sessions  several questions about the same clips; prefixes: what was read of them
thinking  thoughts, told from answers
choices   a choice among given answers
turns     engines on the same devices, one at a time
slots     the compiled part: answers in progress, one in each slot

recordings        a recording: windows, answers as they come, one transcript
windows           where a recording is cut
seams             what two windows both say, once
transcription     `moss-audio transcribe`: many recordings through one engine
recording_files   files, folders, globs and lists of recordings, and names of their outputs
transcript_files  formats, and records of what is done
asking            `moss-audio generate` with several prompts, or a file of requests
loading           the engine of a command
batch_file        a file of requests, and its results
"""
