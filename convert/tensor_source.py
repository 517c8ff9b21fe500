"""Opens a checkpoint of either layout as released tensors, with configuration and tokenizer files beside them."""

import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert.orbax_files import OrbaxCheckpoint
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.locate import locate
from moss_audio_jax.weights.names import ReleasedLeaf
from moss_audio_jax.weights.safetensors_reader import ReleasedCheckpoint

# Keys of config.json for the type of the weights; older files have the second.
DTYPE_KEYS = ("dtype", "torch_dtype")


class Checkpoint(Protocol):
    """Released tensors, read in rows from a checkpoint of any layout."""

    config: MossAudioConfig
    leaves: dict[str, ReleasedLeaf]

    @property
    def directory(self) -> AnyPath: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def open_checkpoint(path: AnyPath) -> Checkpoint:
    """Opens a checkpoint of either layout and checks it against its configuration; reads no tensor."""
    location = locate(path)
    return OrbaxCheckpoint(path) if location.layout() == "orbax" else ReleasedCheckpoint(location.path)


def by_released_name(leaves: dict[str, ReleasedLeaf]) -> dict[str, ReleasedLeaf]:
    """Returns released name -> parameter, in the order of the layers."""
    named = {name: leaf for leaf in leaves.values() for name in leaf.names}

    def numerically(name: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return {name: named[name] for name in sorted(named, key=numerically)}


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json's content with the rotary base where transformers 4 reads it; 5 writes rope_parameters."""
    language = config.get("language_config", {})
    theta = (language.get("rope_parameters") or {}).get("rope_theta")
    if theta is None or "rope_theta" in language:
        return config
    return config | {"language_config": language | {"rope_theta": theta}}


def copy_companions(source: Checkpoint, target: Path, dtype: np.dtype | None, *, export: bool = False) -> None:
    """Copies configuration and tokenizer files byte for byte; config.json gets the new type if it changes.

    export: config.json also gets the rotary base where transformers 4 reads it.
    """
    for file in locate(source.directory).companion_files():
        file.copy(target / file.name, overwrite=True)
    if dtype is not None and any(source.dtype(name) != dtype for name in by_released_name(source.leaves)):
        config = read_json(target / "config.json")
        keys = [key for key in DTYPE_KEYS if key in config] or DTYPE_KEYS[:1]
        config |= dict.fromkeys(keys, str(dtype))
        _write_config(config, target)
    if export and (exported := with_rope_theta(config := read_json(target / "config.json"))) != config:
        _write_config(exported, target)


def _write_config(config: dict[str, Any], target: Path) -> None:
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
