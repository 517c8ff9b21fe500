"""Converts released safetensors files to an Orbax checkpoint of the stacked tree, streamed."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from convert.blocks import PIECE_BYTES, cast, row_blocks
from convert.orbax_files import save_streamed
from convert.orbax_hooks import Piece, StreamedArray
from convert.staging import check_target, staged
from convert.tensor_source import Checkpoint, copy_companions
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.locate import PARAMS, locate
from moss_audio_jax.weights.names import ReleasedLeaf
from moss_audio_jax.weights.safetensors_reader import ReleasedCheckpoint, SafetensorsCheckpoint


def convert_to_orbax(source: AnyPath, target: AnyPath, dtype: np.dtype | None = None) -> None:
    """Writes `target`, a new directory, from the released directory `source`.

    dtype: of all parameters; None keeps the stored type of each.
    """
    target = check_target(target)
    location = locate(source)
    if location.layout() == "orbax":
        raise MossAudioError(f"{source} is an Orbax checkpoint already: give a released directory")
    released = ReleasedCheckpoint(location.path)
    dtypes = leaf_dtypes(released, dtype)
    size = sum(math.prod(leaf.shape) * dtypes[path].itemsize for path, leaf in released.leaves.items())
    with staged(target, size) as work:
        copy_companions(released, work, dtype)
        save_streamed(work / PARAMS, streamed_parameters(released, dtypes))


def leaf_dtypes(released: Checkpoint | SafetensorsCheckpoint, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """Returns path -> type of each parameter; raises MossAudioError if the layers of a stack differ in type."""
    if dtype is not None:
        return dict.fromkeys(released.leaves, dtype)
    dtypes, problems = {}, []
    for path, leaf in released.leaves.items():
        found = sorted({str(released.dtype(name)) for name in leaf.names})
        if len(found) > 1:
            problems.append(f"{leaf.names[0]} and its like in other layers are {' and '.join(found)}")
        dtypes[path] = released.dtype(leaf.names[0])
    if problems:
        raise MossAudioError(
            f"{released.directory} mixes types within stacks of layers ({'; '.join(problems[:5])}): "
            "choose one with --dtype"
        )
    return dtypes


def streamed_parameters(
    source: Checkpoint | SafetensorsCheckpoint, dtypes: dict[str, np.dtype]
) -> dict[str, StreamedArray]:
    """Returns path -> our array of every parameter, whose pieces are read from `source` while they are written."""
    return {
        path: StreamedArray(leaf.shape, dtypes[path], partial(_pieces, source, leaf, dtypes[path]))
        for path, leaf in source.leaves.items()
    }


def _pieces(released: Checkpoint | SafetensorsCheckpoint, leaf: ReleasedLeaf, dtype: np.dtype) -> Iterator[Piece]:
    """Yields our array in pieces of whole layers or, if a layer is larger than a piece, of its released rows."""

    def block(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return leaf.layout.from_released(cast(released.read(name, start, stop), dtype, name))

    layers_at_once = PIECE_BYTES // (math.prod(leaf.tensor_shape) * dtype.itemsize)
    if not layers_at_once:
        for index, name in enumerate(leaf.names):
            for start, stop in row_blocks(leaf, dtype.itemsize):
                yield leaf.region(index, start, stop), block(name, start, stop)
    elif not leaf.stacked:
        yield ..., block(leaf.names[0])
    else:
        for first in range(0, len(leaf.names), layers_at_once):
            names = leaf.names[first : first + layers_at_once]
            layers = np.empty((len(names), *leaf.shape[1:]), dtype)
            for layer, name in zip(layers, names, strict=True):
                layer[...] = block(name)
            yield slice(first, first + len(names)), layers
