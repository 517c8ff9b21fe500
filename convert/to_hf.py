"""Converts an Orbax checkpoint, or a model and its adapter, to released safetensors files, streamed."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from convert.adapters import MergedCheckpoint
from convert.blocks import cast, row_blocks
from convert.model_card import write_model_card
from convert.orbax_files import OrbaxCheckpoint
from convert.safetensors_files import SHARD_BYTES, TensorBlocks, write_safetensors
from convert.staging import check_target, staged
from convert.tensor_source import by_released_name, copy_companions
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.locate import locate


def convert_to_hf(
    source: AnyPath,
    target: AnyPath,
    dtype: np.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    base: AnyPath | None = None,
    model_card: bool = False,
) -> None:
    """Writes `target`, a new directory, from the Orbax directory `source`.

    dtype: of all tensors; None keeps the stored type of each. shard_bytes: the most bytes of tensors in a file, unless
    one tensor is larger. base: the model that an adapter is merged into; None takes the one that it names.
    model_card: also write README.md for a hub.
    """
    target = check_target(target)
    location = locate(source)
    if base is not None and not location.is_adapter:
        raise MossAudioError(f"{source} is no adapter that could be merged into {base}: leave --base out")
    if location.is_adapter:
        checkpoint = MergedCheckpoint(source, base, dtype)
    elif location.layout() == "released":
        raise MossAudioError(f"{source} is a released directory already: give one that to-orbax or training wrote")
    else:
        checkpoint = OrbaxCheckpoint(source)
    leaves = by_released_name(checkpoint.leaves)

    def blocks(name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        for start, stop in row_blocks(leaves[name], checkpoint.dtype(name).itemsize):
            yield cast(checkpoint.read(name, start, stop), dtype, name)

    tensors = []
    for name, leaf in leaves.items():
        stored_as = dtype or checkpoint.dtype(name)
        tensors.append(TensorBlocks(name, leaf.tensor_shape, stored_as, partial(blocks, name, stored_as)))
    with staged(target, sum(tensor.nbytes for tensor in tensors)) as work:
        copy_companions(checkpoint, work, dtype, export=True)
        write_safetensors(work, tensors, shard_bytes)
        if model_card:
            write_model_card(work, location, target.name)
