"""The table between released tensors and our parameters: names, shapes and array layouts.

Our names follow the released ones, so the table is short: equal layers are stacked, the last part of a name changes,
and an array is transposed. Every change is invertible. Adapters in PEFT's layout use the same table; stock Qwen3
weights use it under other names.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

import ml_dtypes
import numpy as np
from flax import nnx

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.model import adapter_specs, parameter_specs

# MOSS-Music stores the encoder's sinusoids, which are recomputed in float32 here.
IGNORED_TENSORS = frozenset({"audio_encoder.embed_positions.inv_timescales"})
# PEFT wraps the model twice before it names its tensors.
PEFT_PREFIX = "base_model.model."
HEAD_TENSOR = "lm_head.weight"  # a released tensor; it has this name in every layout
EMBEDDING = "language_model.embed_tokens.embedding"  # a path of ours

# Type of a tensor in a safetensors header -> NumPy's.
SAFETENSORS_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """Converts one released tensor to one of our arrays, and back.

    Both functions also convert a block of rows (the released tensor's first axis, `rows_axis` of our array), so a
    conversion can stream.
    """

    from_released: Callable[[np.ndarray], np.ndarray]
    to_released: Callable[[np.ndarray], np.ndarray]
    rows_axis: int


SAME = ArrayLayout(lambda x: x, lambda x: x, rows_axis=0)
# [out, in] -> [in, out]
LINEAR = ArrayLayout(lambda x: x.T, lambda x: x.T, rows_axis=-1)
# [out, in, frequency, time] -> [time, frequency, in, out]
CONV = ArrayLayout(lambda x: x.transpose(3, 2, 1, 0), lambda x: x.transpose(3, 2, 1, 0), rows_axis=-1)


def stem_layout(channels: int) -> ArrayLayout:
    """[out, channel * frequency] -> [frequency * channel, out]: each side flattens the conv stem in its own order."""

    def from_released(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], channels, -1).transpose(2, 1, 0).reshape(-1, x.shape[0])

    def to_released(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, channels, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1)

    return ArrayLayout(from_released, to_released, rows_axis=-1)


# Layers that are stacked in our tree and numbered in the released names.
STACKS = ("audio_encoder.layers", "deepstack_audio_merger_list", "language_model.layers")

# Pattern of our path -> the last part of the released name, and the layout. The first match counts.
TABLE: tuple[tuple[str, str, Callable[[int], ArrayLayout]], ...] = (
    (r"audio_encoder\.conv\d\.kernel", "weight", lambda channels: CONV),
    (r"audio_encoder\.stem_proj\.kernel", "weight", stem_layout),
    (r"audio_encoder\.stem_proj\.lora_a", "lora_A.weight", stem_layout),
    (r".*\.lora_a", "lora_A.weight", lambda channels: LINEAR),
    (r".*\.lora_b", "lora_B.weight", lambda channels: LINEAR),
    (r".*\.kernel", "weight", lambda channels: LINEAR),
    (r".*\.(scale|embedding)", "weight", lambda channels: SAME),
    (r".*\.bias", "bias", lambda channels: SAME),
)


@dataclasses.dataclass(frozen=True)
class ReleasedLeaf:
    """One of our parameters, and the released tensor that it holds, or one tensor for each layer of a stack.

    shape: of our array, [layers, ...] if stacked. names: of the released tensors, layer by layer.
    tensor_shape: of each released tensor.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    tensor_shape: tuple[int, ...]
    layout: ArrayLayout
    stacked: bool

    @property
    def rows_axis(self) -> int:
        """The axis of our array that holds the rows of the released tensors."""
        return self.stacked + self.layout.rows_axis % len(self.tensor_shape)

    def region(self, index: int, start: int, stop: int) -> tuple[int | slice, ...]:
        """Index of rows [start, stop) of `names[index]` in our array."""
        region: list[int | slice] = [slice(None)] * len(self.shape)
        region[self.rows_axis] = slice(start, stop)
        if self.stacked:
            region[0] = index
        return tuple(region)


def released_leaves(config: MossAudioConfig) -> dict[str, ReleasedLeaf]:
    """Path -> released tensors of every parameter, LoRA's left out; no released tensor is used twice."""
    return _leaves(config, parameter_specs(dataclasses.replace(config, lora=None)))


def adapter_leaves(config: MossAudioConfig) -> dict[str, ReleasedLeaf]:
    """Path -> tensors, by PEFT's names, of every parameter that a LoRA adapter holds."""
    leaves = _leaves(config, adapter_specs(config))
    return {
        path: dataclasses.replace(leaf, names=tuple(PEFT_PREFIX + name for name in leaf.names))
        for path, leaf in leaves.items()
    }


def _leaves(config: MossAudioConfig, specs: dict[str, nnx.Variable]) -> dict[str, ReleasedLeaf]:
    channels = config.audio_config.downsample_hidden_size
    leaves = {path: _released_leaf(path, spec.shape, channels) for path, spec in specs.items()}
    uses = Counter(name for leaf in leaves.values() for name in leaf.names)
    doubled = [name for name, count in uses.items() if count > 1]
    assert not doubled, f"TABLE takes {doubled} for more than one parameter"
    return leaves


def _released_leaf(path: str, shape: tuple[int, ...], channels: int) -> ReleasedLeaf:
    rows = [(leaf, make(channels)) for pattern, leaf, make in TABLE if re.fullmatch(pattern, path)]
    assert rows, f"TABLE has no row for {path}"
    leaf, layout = rows[0]
    stack = next((stack for stack in STACKS if path.startswith(stack + ".")), None)
    parent = path.rpartition(".")[0]
    if stack is None:
        names, one = (f"{parent}.{leaf}",), shape
    else:
        inside = parent[len(stack) + 1 :]
        names, one = tuple(f"{stack}.{i}.{inside}.{leaf}" for i in range(shape[0])), shape[1:]
    # Converts an array that takes no memory, for its shape alone.
    tensor_shape = layout.to_released(np.broadcast_to(np.int8(0), one)).shape
    return ReleasedLeaf(path, shape, names, tensor_shape, layout, stacked=stack is not None)
