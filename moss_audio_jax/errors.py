"""The one exception that stands for a user's mistake rather than a defect of the program."""


class MossAudioError(ValueError):
    """Bad input from outside: a file, a tensor, an option.

    Its message is one sentence that names the thing, what was expected, what was found and what to do. The command-line
    doors print it without a traceback and exit with code 2.
    """


class StorageError(MossAudioError):
    """Storage that failed for a moment, and again each time it was tried: no fault of a file, and none of the user's.

    The same command may well work later, so the commands exit with code 75 (EX_TEMPFAIL).
    """


def shown(value: object, length: int = 80) -> str:
    """A value from outside as a message can hold it: in one line, of printable characters, cut if it is long."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
