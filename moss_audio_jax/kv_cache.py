"""Keys and values of the tokens so far, for decoding: in the dtype of the weights, or rounded to int8."""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

from moss_audio_jax.config import LanguageConfig
from moss_audio_jax.sharding import constrain, on_cpu

STACK_AXES = ("layers", "batch", "heads", None, None)  # of keys or values, and without the last of scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Slots:
    """Keys or values as steps * scale, with a scale for each token of a head: its largest |x| / 127."""

    steps: Int8[Array, "layers b kv slots d"]
    scales: Float32[Array, "layers b kv slots"]

    @classmethod
    def of(cls, x: Float[Array, "layers b kv slots d"]) -> "Int8Slots":
        x = x.astype(jnp.float32)
        largest = jnp.abs(x).max(-1)
        scales = jnp.where(largest > 0, largest / jnp.iinfo(jnp.int8).max, 1)
        return cls(jnp.round(x / scales[..., None]).astype(jnp.int8), scales)


Slots: TypeAlias = Float[Array, "layers b kv slots d"] | Int8Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of the tokens so far: token i of a sequence is in its slot i.

    lengths: tokens of each sequence. What the slots from there on hold is never read.
    """

    keys: Slots
    values: Slots
    lengths: Int[Array, " b"]

    @classmethod
    def empty(cls, config: LanguageConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        """Makes a cache without tokens. dtype: that of the weights, or int8."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)

        def stack() -> Slots:
            if jnp.dtype(dtype) == jnp.int8:
                return Int8Slots(sharded(jnp.zeros(shape, jnp.int8)), sharded(jnp.ones(shape[:-1], jnp.float32)))
            return sharded(jnp.zeros(shape, dtype))

        return cls(stack(), stack(), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[3]

    def extended(
        self,
        keys: Float[Array, "layers b kv t d"],
        values: Float[Array, "layers b kv t d"],
        counts: Int[Array, " b"],
        read: Float[Array, "..."],
    ) -> "KVCache":
        """Returns the cache with t more slots of each sequence written, of which the first `counts` hold its tokens.

        read: what was computed from this cache. It is written, in place, after that: one loop over the sequences.
        """
        write, start = _written, self.lengths
        if on_cpu():
            write, start = _written_on_cpu, _known_after(read, start)

        def written(stack: Slots, new: Float[Array, "layers b kv t d"]) -> Slots:
            return jax.tree.map(lambda old, new: write(old, new, start), stack, kept_as(stack, new))

        return KVCache(written(self.keys, keys), written(self.values, values), self.lengths + counts)


def kept_as(stack: Slots, x: Slots) -> Slots:
    """Returns keys or values in the form that the stack has."""
    return Int8Slots.of(x) if isinstance(stack, Int8Slots) and not isinstance(x, Int8Slots) else x


def sharded(stack: Array) -> Array:
    """Shards an array of a stack."""
    return constrain(stack, *STACK_AXES[: stack.ndim])


@functools.partial(jax.vmap, in_axes=(1, 1, 0), out_axes=1)
def _written(stack: Array, new: Array, length: Int[Array, ""]) -> Array:
    """Writes the new tokens of each sequence into its slots from `length` on. stack: [layers, b, kv, slots, ...]."""
    zero = jnp.zeros_like(length)
    return jax.lax.dynamic_update_slice(stack, new, (zero, zero, length, zero)[: stack.ndim])


def _written_on_cpu(stack: Array, new: Array, lengths: Int[Array, " b"]) -> Array:
    """Computes the same. `vmap` moves the batch axis, for which XLA's CPU backend copies the cache in every step."""
    window = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(axis for axis in range(stack.ndim) if axis != 1),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(3,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        stack, lengths[:, None], new, window, unique_indices=True, indices_are_sorted=True, mode="clip"
    )


def _known_after(x: Float[Array, "..."], numbers: Int[Array, "..."]) -> Int[Array, "..."]:
    """Returns the numbers, in a form that XLA's CPU backend can't compute before x.

    It drops `optimization_barrier` before it orders reads and writes. Where a read may follow a write, it copies.
    """
    return numbers + jnp.minimum(jnp.isnan(x.ravel()[0]).astype(numbers.dtype), 0)
