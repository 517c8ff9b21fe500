"""The exceptions for mistakes of the user, as opposed to defects of the program."""


class MossAudioError(ValueError):
    """Bad input: a file, a tensor, an option.

    The message is one sentence that names the input, what was expected, what was found and what to do. The commands
    print it without a traceback and exit with code 2.
    """


class StorageError(MossAudioError):
    """A transient failure of storage that outlasted all attempts; neither a file nor the user is at fault.

    The same command may work later, so the commands exit with code 75 (EX_TEMPFAIL).
    """


def shown(value: object, length: int = 80) -> str:
    """Formats a value from outside for a message: one line of printable characters, truncated to `length`."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
