"""Reads config.json of a run back into dataclasses, under the present names of options."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from moss_audio_jax.commands.renamed import current_content
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, to_path
from train.config import Config, ModelSource, RunConfig
from train.running.directory import CONFIG_FILE

NAMED = "named"  # field of a mixture that holds its named groups
RECORD = ("starts", "versions", "history")  # keys of config.json beside the configuration


def stored_config(run: AnyPath, kind: type[Config] = RunConfig) -> Config:
    """Reads the configuration of a run from its config.json. kind: that of the run's command."""
    return read_config(to_path(run) / CONFIG_FILE, kind)


def stored_source(run: AnyPath) -> ModelSource:
    """Reads the source of a run's first parameters from its config.json."""
    return read_back(ModelSource, read_content(to_path(run) / CONFIG_FILE)["model"])


def read_config(path: AnyPath, kind: type[Config] = RunConfig) -> Config:
    """Reads the configuration in a config.json; raises MossAudioError if it holds none of this kind."""
    content = read_content(path)
    is_of_reinforce = "rollout" in content
    if is_of_reinforce != any(field.name == "rollout" for field in dataclasses.fields(kind)):
        command, other = ("run", "reinforce") if is_of_reinforce else ("reinforce", "run")
        raise MossAudioError(f"{path} is of `{other}`: give it to that command, and not to `{command}`")
    try:
        return read_back(kind, content)
    except (TypeError, KeyError, AttributeError) as error:
        raise MossAudioError(
            f"{path} must be the config.json of a run ({error}): restore it from a copy, or name another one"
        ) from error


def read_content(path: AnyPath) -> dict[str, Any]:
    """Reads a config.json as JSON, under the present names of options."""
    return current_content(read_json(to_path(path)))


def options_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the configuration in the content of a config.json, by dotted path."""
    return by_path({name: value for name, value in content.items() if name not in RECORD})


def by_path(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to one by dotted path. Drops NAMED from paths, as in names of options."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        path = prefix + ("" if name == NAMED else f"{name}.")
        flat |= by_path(value, path) if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def read_back(kind: Any, content: Mapping[str, Any]) -> Any:
    """Builds a configuration from the content of a config.json. Options that it lacks get their defaults."""
    return _from_json(kind, {name: value for name, value in content.items() if name not in RECORD})


def _from_json(hint: Any, value: Any, default: Any = dataclasses.MISSING) -> Any:
    """Builds a value of this type from its JSON, the inverse of `dataclasses.asdict`. Drops unknown fields.

    default: an instance with the values of missing fields; otherwise the dataclass gives them.
    """
    kind, arguments = _dataclass_of(hint), get_args(_plain(hint))
    if kind is not None and isinstance(value, dict):
        hints, fields = _hints(kind), {field.name: field for field in dataclasses.fields(kind)}
        known = {
            name: _from_json(hints[name], content, _default_of(fields[name], default))
            for name, content in value.items()
            if name in fields
        }
        return dataclasses.replace(default, **known) if isinstance(default, kind) else kind(**known)
    if isinstance(value, list):
        inner = arguments[0] if get_origin(_plain(hint)) is tuple else Any
        return tuple(_from_json(inner, item) for item in value)
    if isinstance(value, dict):
        inner = arguments[1] if get_origin(_plain(hint)) is dict else Any
        return {name: _from_json(inner, item) for name, item in value.items()}
    return value


def _default_of(field: dataclasses.Field, parent: Any) -> Any:
    if parent is not dataclasses.MISSING and hasattr(parent, field.name):
        return getattr(parent, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _plain(hint: Any) -> Any:
    """Removes None from a type: `tuple[str, ...] | None` becomes `tuple[str, ...]`."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arm for arm in get_args(hint) if arm is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _dataclass_of(hint: Any) -> type | None:
    hint = _plain(hint)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _option_type(kind: Any, name: str) -> Any:
    """Type of the option at a dotted path of a dataclass; None if there is none."""
    first, _, rest = name.partition(".")
    dataclass = _dataclass_of(kind)
    if dataclass is not None:
        hints = _hints(dataclass)
        hint = hints.get(first) or (_option_type(hints[NAMED], first) if NAMED in hints else None)
    else:
        hint = get_args(_plain(kind))[1] if get_origin(_plain(kind)) is dict else None
    return hint if hint is None or not rest else _option_type(hint, rest)


def is_option(kind: Any, name: str) -> bool:
    """Returns True if a dataclass has a field at this dotted path."""
    return _option_type(kind, name) is not None


def is_group(kind: Any, name: str) -> bool:
    """Returns True if a dataclass has a field at this dotted path and that is a dataclass itself."""
    return _dataclass_of(_option_type(kind, name)) is not None
