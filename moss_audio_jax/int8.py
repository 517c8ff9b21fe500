"""Kernels in int8, one byte per parameter: y = (x Q) * s, with Q int8 [in, out] and a scale s per output.

s = max |W| / 127 over the inputs, rounded to the compute dtype, and then Q = round(W / s). The scale of an output can
be applied to the product, and Q is exact in bfloat16: the forward pass is that of the kernel Q * s.

(The library qwix works at a layer's call, which here is inside a scan: see `lora`.)
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.layers import Linear
from moss_audio_jax.patterns import matches, require_matches

LARGEST = 127
_KERNEL, _SCALE = ".kernel", ".kernel_scale"


def declare_scales(linears: dict[str, Linear], config: MossAudioConfig) -> None:
    """Declares a scale per output at the linear layers that the configuration names for int8."""
    patterns, option = config.int8_layers, "int8" if config.int8 else "lora.int8"
    require_matches(option, patterns, linears, what="linear layer whose kernel can be int8")
    for path, layer in linears.items():
        if matches(path, patterns):
            *stack, _, outputs = layer.kernel.get_metadata("logical_axes")
            ones = jnp.ones((*layer.kernel.shape[:-2], layer.kernel.shape[-1]), jnp.float32)
            layer.kernel_scale = nnx.Param(ones, logical_axes=(*stack, outputs))


def int8_kernels(paths: Collection[str]) -> dict[str, str]:
    """Returns path of each int8 kernel -> path of its scales, among the paths of a model's parameters."""
    scales = (path for path in paths if path.endswith(_SCALE))
    return {scale.removesuffix(_SCALE) + _KERNEL: scale for scale in scales}


def quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Q [..., in, out], int8, and s [..., out], in the kernel's dtype, of kernels [..., in, out]."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.abs(wide).max(-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1).astype(kernel.dtype)
    steps = jnp.round(wide / scale.astype(jnp.float32))  # beyond 127 if the scale was rounded down
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), scale.squeeze(-2)
