"""Mistakes on the command line, each as one sentence: tyro's own boxes have several lines and its internal names."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tyro import _errors  # its hook for errors has no public name

from moss_audio_jax.errors import MossAudioError

_KINDS = {"INT": "a whole number", "FLOAT": "a number", "True|False": "True or False"}


@contextmanager
def mistakes_in_one_sentence(arguments: Sequence[str], options: Callable[[], list[str]]) -> Iterator[None]:
    """Inside, `tyro.cli` raises MossAudioError for a mistake in the arguments.

    options: returns all options of the command, to suggest the nearest one.
    """

    def refuse(event: _errors.ParseErrorEvent) -> None:
        if (sentence := _sentence(event, arguments, options)) is not None:
            raise MossAudioError(sentence) from None

    with _errors.on_parse_error(refuse):
        try:
            yield
        except MossAudioError as error:  # of options without a prefix, which tyro leaves as they are
            if (sentence := _spelled(str(error), arguments)) == str(error):
                raise
            raise type(error)(sentence) from error


def _sentence(event: _errors.ParseErrorEvent, arguments: Sequence[str], options: Callable[[], list[str]]) -> str | None:
    """Returns the sentence about a mistake; None leaves it to tyro."""
    match event:
        case _errors.UnrecognizedArgs():
            return _unrecognized(event.tokens, options())
        case _errors.MissingArgs():
            missing = [_name(context.arg) for context in event.missing_arguments]
            return (
                f"{', '.join(missing)} must be given: `{event.prog.split()[0]} {arguments[0]} --help` lists all options"
            )
        case _errors.InvalidChoice():
            return f"{_name(event.argument)} must be one of {', '.join(event.choices)}, not {event.value!r}"
        case _errors.BadValue():
            return f"{_name(event.argument)} must be followed by {_expected(event.argument)}"
        case _errors.InstantiationFailure(argument=None):
            return _spelled(event.message, arguments)
        case _errors.InstantiationFailure():
            name = _name(event.argument)
            return f"{name} must be {_expected(event.argument)}, not {_given(name, arguments)!r}"
    return None


def _name(argument: Any) -> str:
    """An option, or a positional argument by its metavar."""
    if argument.is_positional():
        return str(argument.lowered.metavar).strip("[] .").split()[0]
    return argument.lowered.name_or_flags[-1]


def _expected(argument: Any) -> str:
    """Description of a valid value: `INT` is a whole number, `None|INT` None or a whole number."""
    metavar = str(argument.lowered.metavar or "a value").replace("{", "").replace("}", "")
    words = [_KINDS.get(word, word) for word in metavar.split("|")]
    return " or ".join(words) if metavar not in _KINDS else _KINDS[metavar]


def _given(name: str, arguments: Sequence[str]) -> str:
    """Values that follow an option."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") == name:
            following = [value] if equals else _values(arguments[index + 1 :])
            return " ".join(following)
    return ""


def _values(arguments: Sequence[str]) -> list[str]:
    end = next((index for index, argument in enumerate(arguments) if argument.startswith("--")), len(arguments))
    return list(arguments[:end])


def _unrecognized(tokens: Sequence[str], options: Sequence[str]) -> str:
    unknown = next((token for token in tokens if token.startswith("--")), None)
    if unknown is None:
        return f"there is no argument {' '.join(tokens)!r}: leave it out"
    name = unknown.partition("=")[0]
    nearest = difflib.get_close_matches(name.replace("_", "-"), options, n=1)
    advice = f"did you mean {nearest[0]}" if nearest else "--help lists all options"
    return f"there is no option {name}: {advice}"


def _spelled(message: str, arguments: Sequence[str]) -> str:
    """Replaces a field's name at the beginning of a message by the option that was given for it, with its prefix."""
    match = re.match(r"(--)?([a-z0-9_.-]+) (?=must )", message)
    if match is None:
        return message
    field = match[2].replace("_", "-")
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    if f"--{field}" in given:
        return f"--{field} {message[match.end() :]}"
    named = [option for option in given if option.endswith(f".{field}")]
    return f"{named[-1]} {message[match.end() :]}" if named else message
