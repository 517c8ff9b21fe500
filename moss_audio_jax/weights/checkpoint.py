"""Loads and saves models: the functions that users call.

`locate` resolves the path, `orbax` and `safetensors_reader` read the two layouts, `names` has the table between them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.model import MossAudio, adapter_specs, parameter_specs
from moss_audio_jax.storage.paths import AnyPath, absolute, require_empty
from moss_audio_jax.weights import checksums, orbax
from moss_audio_jax.weights.locate import PARAMS, Location, copy_tokenizer, locate
from moss_audio_jax.weights.names import SAFETENSORS_DTYPES
from moss_audio_jax.weights.parameters import abstract_parameters, build_model, parameters_of
from moss_audio_jax.weights.peft import PeftAdapter, adapted_config
from moss_audio_jax.weights.quantized import read_parameters
from moss_audio_jax.weights.safetensors_reader import ReleasedCheckpoint, assemble


def load_model(
    path: AnyPath, *, dtype: Any = None, mesh: Mesh | None = None, int8: Sequence[str] = (), verify: bool = False
) -> MossAudio:
    """Loads the model of a checkpoint onto its devices.

    path: one of
        a released PyTorch directory, on a disk of this machine; the others may be on gs://;
        an Orbax directory that `moss-audio-convert to-orbax` or `save_model` wrote;
        a training run (its newest checkpoint), one of its checkpoints, or RUN/best, RUN/ema (see `locate`);
        a LoRA adapter: the model that it names is loaded, then the adapter.
    dtype: of the parameters, and so of the computation; None takes bfloat16 on accelerators, and float32 on the CPU,
        where bfloat16 is slow.
    mesh: parameters are sharded over it by their logical axes (`sharding.RULES`); None takes the first device.
    int8: globs over the paths of linear layers whose kernels are rounded to int8, such as
        `language_model.layers.*_proj`; the computation stays in `dtype`. An adapter's are not.
    verify: compare all stored values with the checksums that they were written with; raises MossAudioError, which names
        the parameter, if one changed, and for a checkpoint without checksums. Released and PEFT's files have none.
    Orbax reads each shard straight onto its device. A released directory is read one stacked parameter at a time, so
    the host holds at most the largest one.
    """
    dtype = _compute_dtype(dtype)
    location = locate(path)
    if not location.is_adapter:
        return _load_whole(location, dtype, mesh, tuple(int8), verify)
    return _load_adapter(_load_whole(location.base(), dtype, mesh, tuple(int8), verify), location, verify)


def _load_whole(
    location: Location, dtype: np.dtype, mesh: Mesh | None, int8: tuple[str, ...], verify: bool
) -> MossAudio:
    if location.layout() == "released":
        if verify:
            raise checksums.none_in(location.path)
        released = ReleasedCheckpoint(location.path)
        stored, read = released.config, functools.partial(assemble, released)
    else:
        stored = MossAudioConfig.from_hf(location.files)
        read = functools.partial(orbax.restore, location, stored, verify=verify)
    config = dataclasses.replace(stored, int8=int8)
    return build_model(config, read_parameters(read, abstract_parameters(config, dtype, mesh)))


def _compute_dtype(dtype: Any) -> np.dtype:
    """Returns a dtype that the model computes in, from its name or type; None takes the backend's default."""
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    names = ("bfloat16", "float16", "float32", *(["float64"] if jax.config.read("jax_enable_x64") else []))
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in names:
        raise MossAudioError(f"dtype must be one of {', '.join(names)}, not {dtype!r}")
    return found


def load_adapter(model: MossAudio, path: AnyPath, *, verify: bool = False) -> MossAudio:
    """Returns the model with a LoRA adapter: PEFT's directory, one of `convert from-peft`, or a training run's.

    The new model shares all arrays but the adapter's with the given one, so many adapters can be loaded at once:

        models = {name: load_adapter(base, path) for name, path in adapters.items()}
        generate(models["events"], inputs)

    Adapters of equal configuration share their compiled programs. verify: as of `load_model`.
    """
    return _load_adapter(model, locate(path), verify)


def _load_adapter(model: MossAudio, location: Location, verify: bool) -> MossAudio:
    if model.config.lora is not None:
        raise MossAudioError(
            f"{location.path}: the model has an adapter already; load this one onto the model without it"
        )
    location.require_adapter()
    config = adapted_config(location.files, model.config)
    parameters = parameters_of(model)
    norm = parameters["language_model.norm.scale"]
    mesh: Any = norm.sharding.mesh if isinstance(norm.sharding, NamedSharding) else None
    names = adapter_specs(config)
    wanted = {name: leaf for name, leaf in abstract_parameters(config, norm.dtype, mesh).items() if name in names}
    if location.params is None:
        if verify:
            raise checksums.none_in(location.path)
        adapter = assemble(PeftAdapter(location.path, model.config), wanted)
    else:
        adapter = orbax.restore(location, config, wanted, verify=verify)
    return build_model(config, parameters | adapter)


def merge_adapter(model: MossAudio) -> MossAudio:
    """Returns a model without adapters and with the same outputs: its kernels are W + scale A B.

    The sum is taken in float32 and rounded once. The given model stays as it is: adapted kernels are in memory twice.
    """
    lora = model.config.lora
    if lora is None:
        raise MossAudioError("the model has no adapter to merge: load one with load_adapter")
    parameters = parameters_of(model)
    if int8_kernels(parameters):
        raise MossAudioError(
            "the model has int8 kernels, to which nothing can be added: load its base without them, then the adapter"
        )
    for path in list(parameters):
        if path.endswith(".lora_a"):
            layer, a = path.removesuffix(".lora_a"), parameters.pop(path)
            kernel, b = parameters[f"{layer}.kernel"], parameters.pop(f"{layer}.lora_b")
            parameters[f"{layer}.kernel"] = _merged(kernel, a, b, lora.scale)
    return build_model(dataclasses.replace(model.config, lora=None), parameters)


@functools.partial(jax.jit, static_argnums=3)
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    # Layer by layer: the float32 sum of a whole stack would be too large.
    return merge(kernel, a, b) if kernel.ndim == 2 else jax.lax.map(lambda layer: merge(*layer), (kernel, a, b))


def save_model(model: MossAudio, path: AnyPath, *, tokenizer: AnyPath | None = None) -> None:
    """Writes parameters, configuration and tokenizer files, for `load_model` and `load_processor`.

    path: a new or empty directory.
    tokenizer: a checkpoint whose tokenizer files are copied; None takes the one that the model was loaded from, if any.
    Raises MossAudioError for a model with an adapter or with int8 kernels, which could not be loaded again.
    """
    if model.config.lora is not None:
        raise MossAudioError(f"{path}: a model with an adapter can't be saved whole; merge it with merge_adapter first")
    parameters = parameters_of(model)
    others = [f"{name} {leaf.dtype}" for name, leaf in parameters.items() if leaf.dtype not in _STORABLE]
    others += sorted(parameters.keys() - parameter_specs(model.config).keys())
    if others:
        raise MossAudioError(
            f"{path}: a saved model has floating-point parameters of its configuration alone, not "
            f"{', '.join(others[:5])}; load its base by load_model, and save that"
        )
    path = absolute(path)
    require_empty(path)
    path.mkdir(parents=True, exist_ok=True)
    source = model.config.directory if tokenizer is None else tokenizer
    if source is not None:
        copy_tokenizer(source, path)
    model.config.save_hf(path)
    orbax.save(path / PARAMS, parameters)


_STORABLE = frozenset(SAFETENSORS_DTYPES.values())
