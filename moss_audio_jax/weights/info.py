"""Lists what a checkpoint holds, from its headers alone: `moss-audio info` and `convert inspect`."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.text_table import align
from moss_audio_jax.weights.locate import Location, locate, processor_directories
from moss_audio_jax.weights.names import ReleasedLeaf, adapter_leaves, released_leaves
from moss_audio_jax.weights.orbax import check_stored, stored_shapes
from moss_audio_jax.weights.peft import PeftAdapter, adapted_config
from moss_audio_jax.weights.safetensors_reader import ReleasedCheckpoint

# The parts of the model: the first names of their parameters' paths.
MODEL_PARTS = ("audio_encoder", "audio_adapter", "deepstack_audio_merger_list", "language_model", "lm_head")
LAYOUTS = {"orbax": "Orbax", "released": "released PyTorch layout", "peft": "adapter in PEFT's layout"}


@dataclass(frozen=True)
class Contents:
    """The parameters of a checkpoint, stacked as this port stores them.

    layout: a key of LAYOUTS. dtypes: path -> types of the parameter's tensors, one for each of `leaf.names`.
    """

    path: str
    layout: str
    config: MossAudioConfig
    leaves: dict[str, ReleasedLeaf]
    dtypes: dict[str, list[np.dtype]]

    def count(self, path: str) -> int:
        """Returns the number of values of a parameter."""
        return math.prod(self.leaves[path].shape)

    def bytes(self, path: str) -> int:
        leaf = self.leaves[path]
        return sum(math.prod(leaf.tensor_shape) * dtype.itemsize for dtype in self.dtypes[path])

    def dtype(self, path: str) -> str:
        return "/".join(sorted({str(dtype) for dtype in self.dtypes[path]}))


def contents(path: AnyPath) -> Contents:
    """Reads the headers of a checkpoint of any layout, checked against its configuration."""
    location = locate(path)
    if location.params is not None:
        return _orbax_contents(location, str(path))
    if location.is_adapter:
        layout, reader = "peft", PeftAdapter(location.path, MossAudioConfig.from_hf(processor_directories(path)[1]))
    else:
        layout, reader = location.layout(), ReleasedCheckpoint(location.path)
    dtypes = {path: [reader.dtype(name) for name in leaf.names] for path, leaf in reader.leaves.items()}
    return Contents(str(path), layout, reader.config, reader.leaves, dtypes)


def _orbax_contents(location: Location, path: str) -> Contents:
    assert location.params is not None
    config = MossAudioConfig.from_hf(location.files)
    if location.is_adapter:
        config = adapted_config(location.files, config)
    check_stored(location.params, config)
    stored = stored_shapes(location.params)
    stored |= {} if location.averages is None else stored_shapes(location.averages)
    leaves = released_leaves(config) if config.lora is None else adapter_leaves(config)
    dtypes = {path: [stored[path][1]] * len(leaf.names) for path, leaf in leaves.items()}
    return Contents(path, "orbax", config, leaves, dtypes)


def contents_json(found: Contents) -> dict[str, Any]:
    """Returns the contents as JSON: layout, totals, and a list of parameters."""
    parameters = [
        {
            "path": path,
            "released_name": _common_name(leaf),
            "shape": list(leaf.shape),
            "dtype": found.dtype(path),
            "count": found.count(path),
            "bytes": found.bytes(path),
        }
        for path, leaf in found.leaves.items()
    ]
    return {
        "path": found.path,
        "layout": found.layout,
        "model_type": found.config.model_type,
        "tensors": sum(len(leaf.names) for leaf in found.leaves.values()),
        "total_parameters": sum(map(found.count, found.leaves)),
        "total_bytes": sum(map(found.bytes, found.leaves)),
        "parameters": parameters,
    }


def contents_table(found: Contents) -> str:
    """Returns the contents as a table with a sum for each part of the model."""

    def totals(paths: list[str]) -> tuple[str, str]:
        return f"{sum(map(found.count, paths)):,}", f"{sum(map(found.bytes, paths)):,}"

    rows: list[tuple[str, ...]] = [("released name", "stored here as", "shape", "dtype", "parameters", "bytes")]
    for part in MODEL_PARTS:
        paths = [path for path in found.leaves if path.startswith(part + ".")]
        for path in paths:
            leaf = found.leaves[path]
            rows.append((_common_name(leaf), path, "x".join(map(str, leaf.shape)), found.dtype(path), *totals([path])))
        rows.append((f"{part}: sum", "", "", "", *totals(paths)))
    rows.append(("all", "", "", "", *totals([*found.leaves])))
    return f"{_heading(found)}\n{align(rows)}"


def describe(path: AnyPath) -> str:
    """Reads the headers of a checkpoint and returns them as a table."""
    return contents_table(contents(path))


def _heading(found: Contents) -> str:
    config = found.config
    audio, language = config.audio_config, config.language_config
    tensors = sum(len(leaf.names) for leaf in found.leaves.values())
    chunk = "whole clips" if audio.chunk_frames is None else f"chunks of {audio.chunk_frames} frames"
    return (
        f"{found.path}: {config.model_type}, {LAYOUTS[found.layout]}, {tensors} released tensors\n"
        f"encoder: {audio.encoder_layers} layers of {audio.d_model}, {chunk}, "
        f"taps after layers {', '.join(map(str, audio.deepstack_encoder_layer_indexes))} (from 0)\n"
        f"language model: {language.num_hidden_layers} layers of {language.hidden_size}, "
        f"{config.num_deepstack} of them with DeepStack, vocabulary {language.vocab_size:,}"
    )


def _common_name(leaf: ReleasedLeaf) -> str:
    """Returns the released name, for a stack such as `language_model.layers.{0..35}.mlp.up_proj.weight`."""
    if not leaf.stacked:
        return leaf.names[0]
    first, last = leaf.names[0].split("."), leaf.names[-1].split(".")
    return ".".join(f"{{{a}..{b}}}" if a.isdigit() else a for a, b in zip(first, last, strict=True))
