"""Options that were renamed: old names still work on the command line and in config.json of older runs."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from moss_audio_jax.commands.options import option


class Renamed(NamedTuple):
    """An option by its old and new dotted path. command: the only one that had the old name; "" for all, and files."""

    command: str
    old: str
    new: str


RENAMED = (
    Renamed("", "loop.evaluate_every", "validation.every"),
    Renamed("", "loop.evaluate_data", "validation.data"),
    Renamed("", "loop.evaluate_objectives", "validation.objectives"),
    Renamed("", "loop.evaluate_count", "validation.count"),
    Renamed("", "loop.evaluate_tokens", "validation.max_new_tokens"),
    Renamed("", "loop.evaluate_batch", "validation.batch_size"),
    Renamed("", "loop.show_samples", "validation.show_samples"),
    Renamed("", "step.heard_weight", "step.audio_label_weight"),
    Renamed("generate", "fsdp", "mesh.fsdp"),
    Renamed("generate", "tensor", "mesh.tensor"),
    Renamed("evaluate", "fsdp", "mesh.fsdp"),
    Renamed("evaluate", "tensor", "mesh.tensor"),
    Renamed("evaluate", "out", "json"),
    Renamed("plan", "model", "preset"),
    Renamed("plan", "batch", "batch_size"),
    Renamed("plan", "seq", "tokens"),
    Renamed("plot", "out", "plot"),
)
OMITTED_PREFIX = "loop."  # options of the loop have no prefix
# Commands whose --json printed to stdout and took no value; it now takes a file, - for stdout.
_BARE_JSON = ("plan", "inspect", "verify")


def current_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command with new names for old ones; names each change in a line on stderr."""
    command = arguments[0] if arguments else ""
    names = {
        option(entry.old.removeprefix(OMITTED_PREFIX)): option(entry.new)
        for entry in RENAMED
        if entry.command in ("", command)
    }
    changed: list[str] = []
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        new = names.get(name.replace("_", "-")) if name.startswith("--") else None
        if new is not None:
            _say(name, new)
            argument = f"{new}{equals}{value}"
        changed.append(argument)
        last = index + 1 == len(arguments)
        if argument == "--json" and command in _BARE_JSON and (last or arguments[index + 1].startswith("--")):
            _say("--json", "--json -")
            changed.append("-")
    return changed


def current_content(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json with new names for old ones. New names win."""
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    for _, old, new in (entry for entry in RENAMED if not entry.command):
        (group, name), (new_group, new_name) = old.split("."), new.split(".")
        if isinstance(found.get(group), dict) and name in found[group]:
            value = found[group].pop(name)
            found.setdefault(new_group, {}).setdefault(new_name, value)
    return found


def current_path(path: str) -> str:
    """Returns the dotted path of an option under its new name."""
    return next((entry.new for entry in RENAMED if not entry.command and entry.old == path), path)


def _say(old: str, new: str) -> None:
    print(f"{old} is now {new}", file=sys.stderr)
