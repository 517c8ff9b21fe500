"""Merges LoRA adapters into their model, and converts them between PEFT's files and Orbax."""

import functools
import math
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from convert.blocks import cast, row_blocks
from convert.orbax_files import OrbaxCheckpoint, save_streamed
from convert.safetensors_files import TensorBlocks, write_file
from convert.staging import check_target, staged
from convert.tensor_source import by_released_name, open_checkpoint
from convert.to_orbax import leaf_dtypes, streamed_parameters
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.locate import ADAPTER_CONFIG, ADAPTER_FILE, PARAMS, Location, locate
from moss_audio_jax.weights.names import PEFT_PREFIX, adapter_leaves
from moss_audio_jax.weights.peft import PeftAdapter, adapted_config


class MergedCheckpoint:
    """A model with an adapter merged into it, as released tensors that are read in rows: a `Checkpoint`.

    base: the model's directory; None takes the one that the adapter names.
    dtype: of the tensors that `read` returns; None takes the model's own types. The method `dtype` gives the latter.
    W + scale B A is summed in float32 and rounded once, to the returned type.
    """

    def __init__(self, adapter: AnyPath, base: AnyPath | None = None, dtype: np.dtype | None = None):
        location = locate(adapter)
        base_location = location.base() if base is None else locate(base)
        if base_location.is_adapter:
            raise MossAudioError(f"{base} holds an adapter, not a model: give the model that {adapter} is for")
        location.require_adapter()
        self._base, self._read_as = open_checkpoint(base_location.path), dtype
        self._adapter = _open_adapter(location, self._base.config)
        assert self._adapter.config.lora is not None
        self._scale = self._adapter.config.lora.scale
        self._names = by_released_name(self._adapter.leaves)
        # A run's own configuration and tokenizer files may differ from the base's in the time markers.
        run = location if (location.files / "config.json").exists() else base_location
        self.directory, self.config, self.leaves = run.path, self._base.config, self._base.leaves

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows [start, stop) of a tensor, all by default."""
        dtype = self._read_as or self.dtype(name)
        if PEFT_PREFIX + name in self._names:
            return cast(self._adapter.read(PEFT_PREFIX + name, start, stop), dtype, name)
        rows = self._base.read(name, start, stop)
        layer = PEFT_PREFIX + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in self._names:
            return cast(rows, dtype, name)
        a, b = (self._adapter.read(f"{layer}.lora_A.weight"), self._adapter.read(f"{layer}.lora_B.weight", start, stop))
        product = b.astype(np.float32) @ a.astype(np.float32)
        return cast(rows.astype(np.float32) + np.float32(self._scale) * product, dtype, name)


def convert_to_peft(source: AnyPath, target: AnyPath, dtype: np.dtype | None = None) -> None:
    """Writes `target`, a new directory that PEFT loads, from a run of LoRA or a result of `convert_from_peft`.

    dtype: of all tensors; None keeps the stored type of each.
    """
    target = check_target(target)
    location = locate(source)
    if location.params is None or not location.is_adapter:
        raise MossAudioError(f"{source} holds no adapter in Orbax: give a training run of LoRA, or one of from-peft")
    adapter = OrbaxCheckpoint(source)
    leaves = by_released_name(adapter.leaves)

    def blocks(name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        for start, stop in row_blocks(leaves[name], adapter.dtype(name).itemsize):
            yield cast(adapter.read(name, start, stop), dtype, name)

    tensors = []
    for name in sorted(leaves):
        stored_as = dtype or adapter.dtype(name)
        tensors.append(
            TensorBlocks(name, leaves[name].tensor_shape, stored_as, functools.partial(blocks, name, stored_as))
        )
    size = sum(tensor.nbytes for tensor in tensors)
    with staged(target, size) as work:
        (location.files / ADAPTER_CONFIG).copy(work / ADAPTER_CONFIG)
        with tqdm(total=size, unit="B", unit_scale=True, disable=None) as progress:
            write_file(work / ADAPTER_FILE, tensors, progress)


def convert_from_peft(source: AnyPath, target: AnyPath, base: AnyPath | None = None) -> None:
    """Writes `target`, a new directory with an adapter in Orbax, from one that PEFT wrote.

    base: the model that it is for, whose configuration and tokenizer files are copied; None takes the one that the
    adapter names. The types of tensors and adapter_config.json stay as they are.
    """
    target = check_target(target)
    location = locate(source)
    if not location.is_released:  # otherwise the error below says what it is
        location.require_adapter()
    if not location.is_adapter or location.params is not None:
        raise MossAudioError(f"{source} is no adapter of PEFT's: give a directory with {ADAPTER_CONFIG}")
    base_location = location.base() if base is None else locate(base)
    adapter = PeftAdapter(location.path, open_checkpoint(base_location.path).config)
    dtypes = leaf_dtypes(adapter, None)
    size = sum(math.prod(leaf.shape) * dtypes[path].itemsize for path, leaf in adapter.leaves.items())
    with staged(target, size) as work:
        for file in [*base_location.companion_files(), location.path / ADAPTER_CONFIG]:
            file.copy(work / file.name)
        save_streamed(work / PARAMS, streamed_parameters(adapter, dtypes))


def _open_adapter(location: Location, config: MossAudioConfig) -> OrbaxCheckpoint | PeftAdapter:
    """Opens an adapter of either layout. config: of the model that it is merged into."""
    if location.params is None:
        return PeftAdapter(location.path, config)
    adapter = OrbaxCheckpoint(location.path)
    fitting = adapter_leaves(adapted_config(location.files, config))
    shapes, found = ({path: leaf.shape for path, leaf in leaves.items()} for leaves in (fitting, adapter.leaves))
    if shapes != found:
        raise MossAudioError(f"{location.path} holds an adapter for a model of other sizes: give its own model as base")
    return adapter
