"""Finds weights that are not finite: one of them makes every answer meaningless."""

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.model import MossAudio
from moss_audio_jax.sharding import on_host
from moss_audio_jax.weights.names import adapter_leaves, released_leaves
from moss_audio_jax.weights.parameters import parameters_of


def first_nonfinite(model: MossAudio) -> str | None:
    """Returns the released name of the first tensor that holds NaN or infinity; None if all are finite.

    Reads the weights once, on their devices, a parameter at a time; one flag per layer comes to the host.
    """
    leaves = released_leaves(model.config) | (adapter_leaves(model.config) if model.config.lora else {})
    for path, parameter in parameters_of(model).items():
        if not jnp.issubdtype(parameter.dtype, jnp.floating):  # int8 kernels are finite; their scales are checked
            continue
        leaf = leaves.get(path)
        flags = np.atleast_1d(on_host(_finite(parameter, leaf is not None and leaf.stacked)))
        if not flags.all():
            return path if leaf is None else leaf.names[int(np.argmin(flags))]
    return None


@jax.jit(static_argnums=1)
def _finite(parameter: jax.Array, stacked: bool) -> jax.Array:
    """True if all values are finite: [], or [layers] for a stack."""
    return jnp.isfinite(parameter).all(range(1, parameter.ndim) if stacked else None)
