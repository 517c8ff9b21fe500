"""Writes safetensors files in blocks of rows, with transformers' layout and names of shards."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moss_audio_jax.weights.locate import INDEX_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import SAFETENSORS_DTYPES

SHARD_BYTES = 5 * 10**9  # transformers' default, in decimal gigabytes
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorBlocks:
    """A tensor to write. blocks: returns its rows, in order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(directory: Path, tensors: list[TensorBlocks], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes one file if `shard_bytes` are enough, else shards in the given order and their index."""
    shards = plan_shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
        if len(shards) == 1:
            write_file(directory / SINGLE_FILE, shards[0], progress)
            return
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_file(directory / file, shard, progress)
            weight_map |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def plan_shards(tensors: list[TensorBlocks], shard_bytes: int) -> list[list[TensorBlocks]]:
    """Distributes tensors over shards, in order, as many as fit; a larger tensor has a shard of its own."""
    shards: list[list[TensorBlocks]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_file(path: Path, tensors: list[TensorBlocks], progress: tqdm) -> None:
    """Writes one file, with the bytes that safetensors itself would write if the tensors are sorted by name."""
    # Wide types first, as in safetensors itself, so that every tensor is aligned for its type.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                assert block.dtype == tensor.dtype, f"{tensor.name}: {block.dtype} instead of {tensor.dtype}"
                written += file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                progress.update(block.nbytes)
            assert written == tensor.nbytes, f"{tensor.name}: {written} of {tensor.nbytes} bytes"
        file.flush()
        os.fsync(file.fileno())
