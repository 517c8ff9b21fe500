"""Compares the values of an Orbax checkpoint with the checksums that were written with them, in pieces."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorstore as ts
from tqdm import tqdm

from convert.blocks import PIECE_BYTES
from convert.orbax_files import open_leaves
from moss_audio_jax.storage.paths import AnyPath, Path, absolute
from moss_audio_jax.storage.retries import summary
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights import checksums
from moss_audio_jax.weights.locate import PARAMS, RUN_EMA, locate
from moss_audio_jax.weights.orbax import stored_shapes

AT_ONCE = 2  # arrays; one is read while the other is summed


@dataclasses.dataclass(frozen=True)
class ChecksumReport:
    """The result for one checkpoint. sound: number of arrays that are as they were written. damaged: the others."""

    directory: str
    sound: int
    damaged: list[str]


def check_checksums(path: AnyPath) -> ChecksumReport | None:
    """Checks all arrays of a checkpoint, a run's optimizer state included; None if it was written without checksums.

    Raises MossAudioError if its record of them, or a description of its arrays, can't be read.
    """
    location = locate(path)
    if location.params is None:
        return None
    directory = absolute(location.params).parent
    recorded = checksums.recorded(directory)
    if recorded is None:
        return None
    expected = {item: recorded.get(item, {}) for item in (PARAMS, *recorded)}
    shapes = {item: stored_shapes(directory / item) for item in expected}
    sound, damaged = 0, []
    total = sum(math.prod(shape) * dtype.itemsize for leaves in shapes.values() for shape, dtype in leaves.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
        for item, leaves in shapes.items():
            found = _found(directory / item, list(leaves), progress)
            different = checksums.differences(expected[item], found)
            sound += len(found) - len(different)
            damaged += [f"{item}: {difference}" for difference in different]
            damaged += [f"{item}: {name} is missing" for name in expected[item] if name not in leaves]
    return ChecksumReport(str(directory), sound, damaged)


def _found(tree: Path, names: list[str], progress: tqdm) -> dict[str, str]:
    """Returns the checksum of each array of a tree, or why it can't be read."""
    stores = open_leaves(
        tree, unflatten(dict.fromkeys(names)) if tree.name in (PARAMS, RUN_EMA) else dict.fromkeys(names)
    )
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return dict(zip(names, pool.map(lambda name: _checksum(stores[name], progress), names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _checksum(store: ts.TensorStore, progress: tqdm) -> str:
    dtype = store.dtype.numpy_dtype
    total = checksums.Sum(store.shape, dtype)
    try:
        for region in regions(store.shape, _chunk(store), dtype.itemsize):
            piece = store[region].read().result()
            total.add(region, piece)
            progress.update(piece.nbytes)
    except (ValueError, OSError) as error:
        return f"not readable ({summary(error)})"
    return total.text()


def _chunk(store: ts.TensorStore) -> tuple[int, ...]:
    shape = store.chunk_layout.read_chunk.shape or ()  # None of an array without axes
    return tuple(max(1, size or whole) for size, whole in zip(shape, store.shape, strict=True))


def regions(shape: Sequence[int], chunk: Sequence[int], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Yields regions that cover an array: whole chunks, so that each is read once, of PIECE_BYTES where they fit."""
    block = list(chunk)
    for axis in reversed(range(len(block))):
        chunks = min(PIECE_BYTES // (itemsize * math.prod(block)), math.ceil(shape[axis] / block[axis]))
        block[axis] *= max(1, chunks)
    starts = [range(0, size, step) for size, step in zip(shape, block, strict=True)]
    for start in itertools.product(*starts):
        yield tuple(slice(a, min(a + step, size)) for a, step, size in zip(start, block, shape, strict=True))
