"""Sound files as mono waves, decoded by libsndfile through soundfile.

    decode     read(), blocks(), lengths(): the samples, at once or in pieces, and warnings about what is missing
    streams    a stream as libsndfile decodes it; rates, lengths, unfinished headers
    spans      the streams of files that were joined one behind the other
    files      opening; what a file is if it is no sound

libsndfile stops where the first header of a file says. These modules find what it would leave out: joined files (mp3,
FLAC, chained Ogg), mp3 without its number of frames, recordings whose header was never finished.
"""
