"""Options that the commands share, and checks of values. Messages name options as the command line spells them."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from moss_audio_jax.errors import MossAudioError


def option(path: str) -> str:
    """Spells the dotted path of a field as an option: `optimizer.learning_rate` is `--optimizer.learning-rate`."""
    return f"--{path.replace('_', '-')}"


def require(config: Any, prefix: str | None, names: Iterable[str], valid: Callable[[Any], bool], expected: str) -> None:
    """Raises MossAudioError for the first of these fields whose value is not valid. None is always valid.

    prefix: prefix of the options, such as `optimizer.`; None if commands differ in it, and the message names the field.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not valid(value):
            named = name if prefix is None else option(prefix + name)
            raise MossAudioError(f"{named} must be {expected}, not {value!r}")


def require_positive(config: Any, prefix: str | None, *names: str) -> None:
    """Raises MossAudioError for a field below 1."""
    require(config, prefix, names, lambda value: value >= 1, "1 or more")


def require_choice(config: Any, prefix: str | None, name: str, choices: Iterable[str]) -> None:
    """Raises MossAudioError for a value that is none of the choices."""
    known = tuple(choices)
    require(config, prefix, (name,), known.__contains__, f"one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh. A size of -1 takes the devices that are left."""

    replica: int = 1
    """Copies of the model, such as one for each TPU slice. Only gradients are exchanged between them."""
    fsdp: int = -1
    """Data-parallel devices that parameters and batch are sharded over."""
    tensor: int = 1
    """Devices that each layer is sharded over."""
