"""Frozen kernels in int8, a byte a parameter: y = (x Q) * s, Q int8 [in, out] and s one scale for each output.

Q = round(W / s) and s = max |W| / 127 over the inputs, itself rounded to the compute dtype first. Since s belongs to an
output it is applied to the product, and Q is exact in bfloat16: the forward pass is that of the kernel Q * s.

(The library qwix works at a layer's call, which here is inside a scan: `lora` says why that fails.)
"""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moss_audio_jax.layers import Linear
from moss_audio_jax.patterns import matches, require_matches

LARGEST = 127
_KERNEL, _SCALE = ".kernel", ".kernel_scale"


def declare_scales(linears: dict[str, Linear], patterns: Sequence[str]) -> None:
    """Gives the linear layers that the patterns name a scale for each output, so that their kernels may be int8."""
    require_matches("lora.int8", patterns, linears, what="linear layer whose kernel can be int8")
    for path, layer in linears.items():
        if matches(path, patterns):
            *stack, _, outputs = layer.kernel.get_metadata("logical_axes")
            ones = jnp.ones((*layer.kernel.shape[:-2], layer.kernel.shape[-1]), jnp.float32)
            layer.kernel_scale = nnx.Param(ones, logical_axes=(*stack, outputs))


def int8_kernels(paths: Collection[str]) -> dict[str, str]:
    """Path of each kernel that is int8 -> that of its scales, among a model's parameters."""
    scales = (path for path in paths if path.endswith(_SCALE))
    return {scale.removesuffix(_SCALE) + _KERNEL: scale for scale in scales}


def quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and s of kernels [..., in, out]; s, [..., out], in their dtype."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.abs(wide).max(-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1).astype(kernel.dtype)
    steps = jnp.round(wide / scale.astype(jnp.float32))  # the scale may have been rounded down
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), scale.squeeze(-2)
