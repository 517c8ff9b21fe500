"""Finds weights that are not finite, which make every answer meaningless."""

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.model import MossAudio
from moss_audio_jax.sharding import on_host
from moss_audio_jax.weights.checkpoint import parameters_of
from moss_audio_jax.weights.released import adapter_leaves, released_leaves


def first_nonfinite(model: MossAudio) -> str | None:
    """The released name of the model's first tensor that holds NaN or infinity; None if all are finite.

    One pass over the weights where they are, a parameter at a time: of each, one flag a layer comes to the host.
    """
    leaves = released_leaves(model.config) | (adapter_leaves(model.config) if model.config.lora else {})
    for path, parameter in parameters_of(model).items():
        if not jnp.issubdtype(parameter.dtype, jnp.floating):  # int8 kernels are finite, their scales are looked at
            continue
        leaf = leaves.get(path)
        flags = np.atleast_1d(on_host(_finite(parameter, leaf is not None and leaf.stacked)))
        if not flags.all():
            return path if leaf is None else leaf.names[int(np.argmin(flags))]
    return None


@jax.jit(static_argnums=1)
def _finite(parameter: jax.Array, stacked: bool) -> jax.Array:
    """One flag or, of a stack, one a layer."""
    return jnp.isfinite(parameter).all(range(1, parameter.ndim) if stacked else None)
