"""Streams leaves of an Orbax checkpoint through Orbax's hooks: every use of what its documentation leaves open is here.

Orbax documents handlers for types of one's own, and no way to write a leaf in pieces. Here a handler opens leaves by
TensorStore, with the layout that Orbax gives them. It needs the attributes HOOKS of `ParamInfo`, and it writes to
PROCESS, the directory from which Orbax adds the leaves of the first process to the checkpoint.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from tqdm import tqdm

from convert.blocks import chunk_shape
from moss_audio_jax.storage.paths import url

Piece = tuple[Any, np.ndarray]  # an index into the array, and the values there

HOOKS = ("name", "parent_dir", "ts_context", "use_zarr3")
PROCESS = "ocdbt.process_0"
# Of the files that Orbax writes.
OCDBT = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}
COMPRESSOR = {"id": "zstd", "level": 1}
_CACHED = {"recheck_cached_data": False, "recheck_cached_metadata": False}


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is produced in pieces, which together cover it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[Piece]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves `StreamedArray`s as plain array leaves; restores leaves as TensorStores, without reading values.

    stop: once set, saving ends before the next piece. progress: counts the written bytes.
    """

    def __init__(self, stop: threading.Event, progress: tqdm):
        super().__init__()
        self._stop = stop
        self._progress = progress

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            array = await ts.open(_written(value, info), create=True, open=True, context=info.ts_context)
            for region, block in value.pieces():
                if self._stop.is_set():
                    raise InterruptedError(f"stopped while writing {info.name}")
                await array[region].write(block, can_reference_source_data_indefinitely=True)
                self._progress.update(block.nbytes)
        return []

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> list[ts.TensorStore]:
        return [await ts.open(_stored(info), open=True, read=True, context=info.ts_context) for info in infos]


def checkpointer(handler: StreamedArrayHandler) -> ocp.Checkpointer:
    """Returns what saves and restores trees of `StreamedArray`s by this handler."""
    # Orbax warns without an entry for jax.Array.
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


def _written(value: StreamedArray, info: Any) -> ts.Spec:
    """Describes a leaf that is to be written, as Orbax would write it, but in our chunks."""
    metadata = {
        "shape": list(value.shape),
        "chunks": list(chunk_shape(value.shape, value.dtype.itemsize)),
        "compressor": COMPRESSOR,
    }
    return ts.Spec(
        {
            "driver": "zarr",
            "kvstore": {
                **_kvstore(f"{url(info.parent_dir)}/{PROCESS}/", info.name),
                "config": {**OCDBT, "manifest_kind": "single"},
                "assume_config": True,
            },
            "metadata": metadata,
            "dtype": value.dtype.name,
            "store_data_equal_to_fill_value": True,  # so that a chunk that is missing is damage, not zeros
            **_CACHED,
        }
    )


def _stored(info: Any) -> ts.Spec:
    """Describes a leaf that is there; a chunk that is missing is an error."""
    return ts.Spec(
        {
            "driver": "zarr3" if info.use_zarr3 else "zarr",
            "kvstore": _kvstore(f"{url(info.parent_dir)}/", info.name),
            "fill_missing_data_reads": False,
            **_CACHED,
        }
    )


def _kvstore(base: str, name: str) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
