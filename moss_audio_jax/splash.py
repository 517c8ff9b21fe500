"""Splash attention, JAX's Pallas kernel for TPUs: causal attention of packed sequences that stores no scores.

The kernel walks over tiles of [queries, keys] with a running softmax, so memory is linear in the length. It skips tiles
above the diagonal, reads key-value heads without repeating them for each query head, and computes all three gradients
in one fused kernel.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Float, Int

from moss_audio_jax.sharding import device_kind, named_sharding, num_parts

LANES = 128  # a tile's sides are multiples of this
RESIDUALS = "attention"  # the checkpoint name of the kernel's output and log-sum-exp, for a policy that saves them


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sides of the largest tiles, in tokens.

    The fused backward kernel writes a gradient of the queries for every tile of keys, and these are summed after it:
    wider tiles of keys take less memory. In the forward pass, narrower tiles compute less above the diagonal.
    """

    queries: int
    keys: int
    keys_multiplied: int  # keys in one matmul, of the `keys` that were fetched
    queries_backward: int
    keys_backward: int
    keys_multiplied_backward: int

    def for_length(self, length: int) -> BlockSizes:
        """Returns the largest tiles that divide `length`, a multiple of LANES."""
        keys, keys_backward = _divisor(length, self.keys), _divisor(length, self.keys_backward)
        return BlockSizes(
            block_q=_divisor(length, self.queries),
            block_kv=keys,
            block_kv_compute=_divisor(keys, self.keys_multiplied),
            block_q_dkv=_divisor(length, self.queries_backward),
            block_kv_dkv=keys_backward,
            block_kv_dkv_compute=_divisor(keys_backward, self.keys_multiplied_backward),
            use_fused_bwd_kernel=True,
        )


# These fit in the VMEM that XLA gives a kernel on every chip since v4, also in a training step of several sequences: on
# a v6e, tiles of 2048 fit with one sequence and not with four. Their speed has not been measured.
TILES = Tiles(1024, 1024, 512, 1024, 2048, 512)


def serves(query: Float[Array, "b t heads d"]) -> bool:
    """Returns True if the kernel should compute this attention on the device that the program is traced for.

    It needs a TPU and at least as many tokens as the smallest tile. float32 and a raised `jax_default_matmul_precision`
    ask for exact sums, which the kernel does not compute. With several devices it needs a current mesh
    (`jax.set_mesh`): XLA can't partition a kernel, and the shardings of arrays are not known while tracing.
    """
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return False
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    exact = query.dtype != jnp.bfloat16 or precision not in (None, "default", "bfloat16")
    return device_kind().startswith("TPU") and not exact and query.shape[1] >= LANES


def splash_attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b t kv d"],
    value: Float[Array, "b t kv d"],
    segment_ids: Int[Array, "b t"],
    *,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> Float[Array, "b t heads d"]:
    """Computes `attention.causal_attend` for whole sequences. Segment 0 is padding.

    On a mesh each device computes its sequences and heads, without communication. If the mesh does not divide the
    batch, every device computes the whole batch; key-value heads must be divisible, or it is an error.

    interpret: runs the kernel step by step with JAX operations, on any device.
    """
    attend = functools.partial(_attend, tiles=tiles, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(query, key, value, segment_ids)
    batch = "batch" if query.shape[0] % num_parts("batch", mesh) == 0 else None
    heads = named_sharding("keys of attention", key.shape, (batch, None, "heads", None), mesh).spec
    segments = named_sharding("segment ids", segment_ids.shape, (batch, None), mesh).spec
    # check_vma needs to know how outputs vary over the mesh, which a Pallas call does not declare.
    specs = (heads, heads, heads, segments)
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, segment_ids)


def _attend(query, key, value, segment_ids, *, tiles: Tiles, interpret: bool):
    """Computes attention on one device, padded to whole lanes, or for long sequences to a multiple of larger tiles."""
    tokens, heads = query.shape[1:3]
    padding = -tokens % (LANES if tokens <= 1024 else 4 * LANES)
    # The kernel does not scale scores. Scaling the query rounds it to its dtype once more.
    query = query * query.shape[-1] ** -0.5
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    length = tokens + padding
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((length, length))] * heads),
        block_sizes=tiles.for_length(length),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    out: Any = _with_residuals_first(kernel, query, key, value, SegmentIds(segment_ids, segment_ids))
    return out.swapaxes(1, 2)[:, :tokens]


@jax.custom_vjp
def _with_residuals_first(kernel, query, key, value, segment_ids):
    """Computes the kernel for each sequence; what it keeps for its backward pass is ready with its result.

    The kernel writes each log-sum-exp 128 times, and one of them is kept. A TPU's compiler would take it out much
    later, and hold all until then.
    """
    return jax.vmap(kernel)(query, key, value, segment_ids)


def _forward(kernel, query, key, value, segment_ids):
    out, backward = jax.vjp(lambda *arrays: jax.vmap(kernel)(*arrays, segment_ids), query, key, value)
    return jax.lax.optimization_barrier((out, backward))


def _backward(backward, gradient):
    return (None, *backward(gradient), None)


_with_residuals_first.defvjp(_forward, _backward)


def _divisor(length: int, largest: int) -> int:
    """Returns the largest multiple of LANES that divides `length` and is at most `largest`."""
    return next(size for size in range(largest, 0, -LANES) if length % size == 0)
