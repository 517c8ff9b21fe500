"""A model's parameters as a dict by path: their shapes and shardings, and a model built around them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.model import MossAudio, parameter_specs
from moss_audio_jax.sharding import automatic, check_heads, named_sharding
from moss_audio_jax.tree import dotted


def abstract_parameters(
    config: MossAudioConfig, dtype: Any, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding of every parameter: the target of a restore.

    dtype: of all but int8 kernels. mesh: None places all parameters on the first device.
    Raises MossAudioError for a mesh that would split a dimension, or the attention's heads, into unequal parts.
    """
    if mesh is not None:
        language = config.language_config
        check_heads(
            mesh,
            heads_of_the_encoder=config.audio_config.encoder_attention_heads,
            heads_of_queries=language.num_attention_heads,
            heads_of_keys=language.num_key_value_heads,
        )
        mesh = automatic(mesh)

    def sharding(path: str, spec: nnx.Variable) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return named_sharding(path, spec.shape, spec.get_metadata("logical_axes"), mesh)

    specs = parameter_specs(config)
    dtypes = dict.fromkeys(specs, dtype) | dict.fromkeys(int8_kernels(specs), jnp.int8)
    return {
        path: jax.ShapeDtypeStruct(spec.shape, dtypes[path], sharding=sharding(path, spec))
        for path, spec in specs.items()
    }


def parameters_of(model: MossAudio) -> dict[str, jax.Array]:
    """Returns a model's parameters by path; the arrays are not copied."""
    return {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def build_model(config: MossAudioConfig, parameters: dict[str, Any]) -> MossAudio:
    """Builds a model around the given parameters, by path; initializes nothing."""
    model = nnx.eval_shape(lambda: MossAudio(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    flat = {path: spec.replace(parameters[dotted(path)]) for path, spec in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
