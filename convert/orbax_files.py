"""Writes and reads Orbax checkpoints in pieces, so that little is in memory.

Orbax itself saves and restores whole leaves, and the largest leaf of the 8B model has 3.6 GB. Here `orbax_hooks` writes
the same plain checkpoint from pieces, and opens a leaf without reading it.
"""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from tqdm import tqdm

from convert.orbax_hooks import Piece, StreamedArray, StreamedArrayHandler
from convert.orbax_hooks import checkpointer as _checkpointer
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, Path, absolute
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights import checksums
from moss_audio_jax.weights.locate import locate
from moss_audio_jax.weights.names import adapter_leaves, released_leaves
from moss_audio_jax.weights.orbax import check_stored, stored_shapes
from moss_audio_jax.weights.peft import adapted_config


def save_streamed(params: AnyPath, leaves: dict[str, StreamedArray]) -> None:
    """Writes `leaves` by path as the stacked tree that `load_model` restores, and their checksums beside it.

    After an interrupt the current piece is completed and nothing else is written. Signals reach only the main thread,
    so another thread writes.
    """
    stop = threading.Event()
    total = sum(leaf.nbytes for leaf in leaves.values())
    sums = {path: checksums.Sum(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def save() -> None:
        with (
            ThreadPoolExecutor(1) as adder,
            tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress,
            _checkpointer(StreamedArrayHandler(stop, progress)) as checkpointer,
        ):
            summed = {path: _summed(leaf, sums[path], adder) for path, leaf in leaves.items()}
            checkpointer.save(absolute(params), args=ocp.args.PyTreeSave(unflatten(summed)))
        checksums.write(absolute(params), {path: one.text() for path, one in sums.items()})

    with ThreadPoolExecutor(1) as worker:
        try:
            worker.submit(save).result()
        except MossAudioError:
            raise
        except ValueError as error:  # TensorStore's type for every error, also a full disk
            raise OSError(f"Orbax: {error}") from error
        finally:
            stop.set()


def _summed(leaf: StreamedArray, total: checksums.Sum, adder: ThreadPoolExecutor) -> StreamedArray:
    """Returns the array, whose pieces `adder` adds to its checksum while they are written."""

    def pieces() -> Iterator[Piece]:
        for region, block in leaf.pieces():
            added = adder.submit(total.add, region, block)
            yield region, block
            added.result()

    return dataclasses.replace(leaf, pieces=pieces)


class OrbaxCheckpoint:
    """An Orbax directory as released tensors that are read in rows: a `Checkpoint`, like `ReleasedCheckpoint`.

    An adapter's directory gives PEFT's tensors, like `PeftAdapter`.
    Raises MossAudioError if the stored tree does not fit the directory's configuration.
    """

    def __init__(self, directory: AnyPath):
        location = locate(directory)
        if location.params is None:
            raise MossAudioError(f"{directory} is no Orbax checkpoint: give one that to-orbax or training wrote")
        self.directory, self.params = location.path, absolute(location.params)
        self.config = MossAudioConfig.from_hf(location.files)
        if location.is_adapter:
            self.config = adapted_config(location.files, self.config)
        check_stored(self.params, self.config)
        self.leaves = released_leaves(self.config) if self.config.lora is None else adapter_leaves(self.config)
        self._places = {name: (leaf, i) for leaf in self.leaves.values() for i, name in enumerate(leaf.names)}
        self._stores = open_leaves(self.params, unflatten(dict.fromkeys(self.leaves)))
        if location.averages is not None:
            averages = absolute(location.averages)
            self._stores |= open_leaves(averages, unflatten(stored_shapes(averages)))

    def dtype(self, name: str) -> np.dtype:
        leaf, _ = self._places[name]
        return self._stores[leaf.path].dtype.numpy_dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows [start, stop) of the released tensor `name`, all by default."""
        leaf, index = self._places[name]
        start, stop, _ = slice(start, stop).indices(leaf.tensor_shape[0])
        try:
            block = self._stores[leaf.path][leaf.region(index, start, stop)].read().result()
        except (ValueError, OSError) as error:
            raise _damaged(self.params, error) from error
        return leaf.layout.to_released(block)


def open_leaves(params: Path, names: dict[str, Any]) -> dict[str, ts.TensorStore]:
    """Opens leaves of an Orbax tree, by path. names: a tree with their keys."""
    restore_args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=StreamedArray), names, is_leaf=lambda node: not isinstance(node, dict)
    )
    try:
        with _checkpointer(StreamedArrayHandler(threading.Event(), tqdm(disable=True))) as checkpointer:
            tree = checkpointer.restore(params, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    except (ValueError, OSError) as error:
        raise _damaged(params, error) from error
    return flatten(tree)


def _damaged(params: Path, error: Exception) -> MossAudioError:
    return MossAudioError(f"{params} can't be read, its files are damaged ({error}): convert it again")
