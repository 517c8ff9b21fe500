"""A `TrainingBatch` on its way to the devices: cut into microbatches, and sharded over the data-parallel axes."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.sharding import num_parts, partition_spec
from train.data import TrainingBatch

Batch = TypeVar("Batch")


def split_microbatches(batch: Batch, count: int) -> Batch:
    """Reshapes every array [b, ...] to [count, b / count, ...], for `train_step`; to be called on the host."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % count:
        raise MossAudioError(f"a batch of {rows} sequences can't be cut into {count} equal microbatches")
    return jax.tree.map(lambda x: x.reshape(count, rows // count, *x.shape[1:]), batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch in microbatches: its second axis over the data-parallel mesh axes."""
    return NamedSharding(mesh, partition_spec((None, "batch"), mesh))


def require_even_batch(sequences: int, microbatches: int, mesh: Mesh) -> None:
    """Raises MossAudioError unless all devices get equally many sequences of each microbatch."""
    parts = num_parts("batch", mesh)
    if sequences % (microbatches * parts):
        raise MossAudioError(
            f"a batch of {sequences} sequences in {microbatches} microbatches can't be cut over {parts} data-parallel "
            f"devices: make data.batch_size a multiple of {microbatches * parts}"
        )


def abstract_batch(
    model: MossAudioConfig, sequences: int, tokens: int, chunks: int, *, microbatches: int = 1, mesh: Mesh
) -> TrainingBatch:
    """Returns shape, dtype and sharding of every array of a batch in microbatches: compiling needs no data.

    tokens, chunks: of each sequence. Raises MossAudioError where `require_even_batch` does.
    """
    require_even_batch(sequences, microbatches, mesh)
    sharding = batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((microbatches, sequences // microbatches, *shape), dtype, sharding=sharding)

    ids, counts = array(jnp.int32, tokens), array(jnp.int32, chunks)
    frames = model.audio_config.chunk_frames
    assert frames is not None  # `SampleMaker` requires it
    audio = array(jnp.bfloat16, chunks, frames, model.audio_config.num_mel_bins)
    inputs = ModelInputs(ids, ids, ids, ids, audio, counts, counts)
    loss_mask = array(jnp.float32, tokens)
    return TrainingBatch(inputs, targets=ids, loss_mask=loss_mask, audio_labels=ids, group=ids, phase=array(jnp.int32))
