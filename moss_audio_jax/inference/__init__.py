"""Many questions to one model at once, and recordings of any length.

engine    Engine, Request, Reply: a queue, and the thread that answers it
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
