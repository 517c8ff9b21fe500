"""Splits tensors for streaming: chunks that Orbax stores, and blocks of rows that are in memory at a time."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.weights.names import ReleasedLeaf

PIECE_BYTES = 64 << 20  # one read, and one commit of an Orbax checkpoint
# A shard narrower than a chunk reads the whole chunk, so small chunks limit the excess of a sharded restore.
CHUNK_BYTES = 2 << 20


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of an array's chunks: one layer of a stack, halved until it is at most CHUNK_BYTES.

    Each time the even axis that has been halved least is halved.
    """
    chunk = list(shape)
    if len(chunk) >= 3 and math.prod(chunk) * itemsize > CHUNK_BYTES:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        even = [axis for axis, size in enumerate(chunk) if size % 2 == 0]
        if not even:
            break
        axis = min(even, key=lambda axis: (shape[axis] // chunk[axis], -shape[axis]))
        chunk[axis] //= 2
    return tuple(chunk)


def row_blocks(leaf: ReleasedLeaf, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yields rows [start, stop) of each released tensor of `leaf`: at most PIECE_BYTES, whole chunks if possible."""
    rows = leaf.tensor_shape[0]
    most = PIECE_BYTES // (itemsize * math.prod(leaf.tensor_shape[1:]))
    chunk = chunk_shape(leaf.shape, itemsize)[leaf.rows_axis]
    step = max(most // chunk * chunk, min(most, chunk), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts to another floating-point type, rounding to nearest even; raises MossAudioError if a value overflows."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if np.isinf(converted).sum() != np.isinf(array).sum():
        raise MossAudioError(f"{name} holds values too large for {dtype}: convert to a wider type")
    return converted
