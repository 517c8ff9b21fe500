"""Writes random weights in the released layout, to try a conversion, a demo or a pod before a download."""

import math
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.blocks import row_blocks
from convert.safetensors_files import SHARD_BYTES, TensorBlocks, write_safetensors
from convert.staging import check_target, staged
from convert.tensor_source import by_released_name
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.storage.paths import AnyPath, require_empty
from moss_audio_jax.weights.names import ReleasedLeaf, released_leaves

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EMBEDDING_STD = 0.02


def rehearse(preset: str, target: AnyPath, seed: int = 0) -> None:
    """Writes `target`, a new directory: random weights of a preset and, for `tiny`, a tokenizer."""
    config = MossAudioConfig.preset(preset)
    target = check_target(target)
    parameters = sum(math.prod(leaf.shape) for leaf in released_leaves(config).values())
    with staged(target, parameters * BFLOAT16.itemsize) as work:
        write_random_checkpoint(config, work, seed)
        if preset == "tiny":
            write_small_tokenizer(work)


def write_random_checkpoint(
    config: MossAudioConfig, directory: AnyPath, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes configuration and bfloat16 weights, scaled like an initialization, into a new or empty directory.

    Equal seeds give equal weights: each tensor has a generator seeded with its name.
    """
    directory = Path(directory)
    require_empty(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_hf(directory)
    tensors = [
        TensorBlocks(name, leaf.tensor_shape, BFLOAT16, partial(_random_rows, name, leaf, seed))
        for name, leaf in by_released_name(released_leaves(config)).items()
    ]
    write_safetensors(directory, tensors, shard_bytes)


def _random_rows(name: str, leaf: ReleasedLeaf, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    mean, std = _moments(name, leaf.tensor_shape)
    for start, stop in row_blocks(leaf, np.dtype(np.float32).itemsize):
        block = generator.standard_normal((stop - start, *leaf.tensor_shape[1:]), np.float32)
        block *= std
        block += mean
        yield block.astype(BFLOAT16)


def _moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns mean and standard deviation: matrices keep the scale of their inputs; norms and biases vary a little."""
    if name.endswith(".bias"):
        return 0.0, 0.02
    if len(shape) == 1:  # the scale of a norm
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, EMBEDDING_STD
    return 0.0, math.prod(shape[1:]) ** -0.5
