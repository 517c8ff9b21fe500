"""Rules for the fields of a configuration, declared in their types and checked when the configuration is made.

@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    d_model: Size = 1280

    def __post_init__(self):
        check_fields(self)
"""

import dataclasses
import functools
import numbers
import typing
from collections.abc import Callable
from typing import Annotated, Any

from moss_audio_jax.errors import MossAudioError, shown

INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on a value. expected: its description, after 'must be'."""

    expected: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raises MossAudioError, which names the field, for a value that breaks the rule."""
        if not self.accepts(value):
            raise MossAudioError(f"{name} must be {self.expected}, not {shown(value)}")


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # Python counts True among the integers


def integer(least: int, most: int) -> Rule:
    def accepts(value: Any) -> bool:
        return _is_a(numbers.Integral, value) and least <= value <= most

    return Rule(f"an integer from {least:,} to {most:,}", accepts)


def number(least: float, most: float, *, below: bool = False) -> Rule:
    """Returns a rule for a finite number from `least` to `most`; `below` excludes `most`."""

    def accepts(value: Any) -> bool:
        # NaN is in no range.
        return _is_a(numbers.Real, value) and bool(least <= value <= most) and not (below and value == most)

    return Rule(f"a number from {least:g} to {'below ' if below else ''}{most:g}", accepts)


def none_or(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.accepts(value))


def each(rule: Rule) -> Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and all(map(rule.accepts, value))

    return Rule(f"a list, and each in it {rule.expected}", accepts)


SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str))

# Bounds beyond any model: without them a damaged file could make a loop over layers take hours.
Size = Annotated[int, integer(1, 2**20)]
Layers = Annotated[int, integer(1, 2**10)]
TokenId = Annotated[int, integer(0, INT32)]
TokenIds = Annotated[tuple[int, ...], each(integer(0, INT32))]
Indexes = Annotated[tuple[int, ...], each(integer(0, 2**10))]
Switch = Annotated[bool, SWITCH]
Text = Annotated[str, TEXT]
Share = Annotated[float, number(0, 1, below=True)]
Epsilon = Annotated[float, number(1e-20, 1)]  # below, its square root is 0 in float32


@functools.cache
def _rules(kind: type) -> dict[str, Rule]:
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: rules[0] for name, rules in found.items() if rules}


def check_fields(config: Any, prefix: str = "") -> None:
    """Raises MossAudioError for the first field of a dataclass that breaks the rule of its type."""
    for name, rule in _rules(type(config)).items():
        rule.check(prefix + name, getattr(config, name))


def check_keys(content: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    """Raises MossAudioError for the first key of a JSON object that breaks its rule; null counts as absent."""
    for name, rule in rules.items():
        if content.get(name) is not None:
            rule.check(f"{where}.{name}", content[name])
