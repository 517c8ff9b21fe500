"""Grouped-query attention, the masks of packed sequences, and rotary position embedding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.inputs import coarse_buckets
from moss_audio_jax.kv_cache import Int8Slots, KVCache, Slots
from moss_audio_jax.splash import serves, splash_attend

# Queries in a block. Scores take [heads, block, tokens] of memory instead of [heads, tokens, tokens].
QUERY_BLOCK = 512
# The smallest number of cached slots that are read.
MIN_SLOTS = 512


def attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b s kv d"],
    value: Float[Array, "b s kv d"],
    mask: Bool[Array, "b t s"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b t heads d"]:
    """Computes softmax(q k^T / sqrt(d)) v. `heads // kv` query heads share each key-value head; softmax in float32.

    mask: True where a query attends to a key. A query with no key gets a finite value, which must not be used.
    dropout_key: applies dropout to the attention weights.
    """
    batch, queries, _, head_dim = query.shape
    # [b, t, heads, d] -> [b, t, kv, g, d]: the g query heads of each key-value head
    grouped = query.reshape(batch, queries, key.shape[2], -1, head_dim)
    # In this order of dimensions XLA's CPU backend transposes neither scores nor values.
    scores = jnp.einsum("btkgd,bskd->bktgs", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, :, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, dropout_key).astype(value.dtype)
    return jnp.einsum("bktgs,bskd->bktgd", weights, value).swapaxes(1, 2).reshape(query.shape)


def self_attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b t kv d"],
    value: Float[Array, "b t kv d"],
    segment_ids: Int[Array, "b t"],
) -> Float[Array, "b t heads d"]:
    """Computes causal attention within the segments of whole sequences: for training, scoring and prefill.

    Runs splash attention if `splash.serves`, else `causal_attend`. Segment 0 is padding; the outputs of its queries are
    finite and must not be used.
    """
    if serves(query):
        return splash_attend(query, key, value, segment_ids)
    return causal_attend(query, key, value, jnp.arange(query.shape[1]), segment_ids, segment_ids)


def causal_attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b s kv d"],
    value: Float[Array, "b s kv d"],
    query_slots: Int[Array, " t"],
    query_segments: Int[Array, "b t"],
    key_segments: Int[Array, "b s"],
) -> Float[Array, "b t heads d"]:
    """Computes attention of each query to the keys of its segment in slots up to its own, in blocks of queries.

    query_slots: slot of each query; slot i is that of key i. Segment 0 is padding.
    """

    def block(inputs):
        query, slots, segments = inputs  # [b, t', ...], [t'], [b, t']
        causal = slots[:, None] >= jnp.arange(key.shape[1])  # [t', s]
        same_segment = segments[:, :, None] == key_segments[:, None, :]  # [b, t', s]
        return attend(query, key, value, causal & same_segment)

    tokens = query.shape[1]
    if tokens <= QUERY_BLOCK:
        return block((query, query_slots, query_segments))
    padding = -tokens % QUERY_BLOCK

    def blocks(x, axis):
        """Cuts an axis into blocks and moves the axis of blocks to the front: [..., t, ...] -> [n, ..., t', ...]."""
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # The backward pass recomputes each block: otherwise the scores of all blocks would be stored.
    out = jax.lax.map(jax.checkpoint(block), (blocks(query, 1), blocks(query_slots, 0), blocks(query_segments, 1)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :tokens]


def choose_slots(slots: int, lengths: Int[Array, " b"]) -> Int[Array, ""]:
    """Returns the number of the smallest of `slot_buckets` that holds the longest of the sequences."""
    sizes = jnp.array(slot_buckets(slots), jnp.int32)
    return jnp.searchsorted(sizes, lengths.max(), side="left").astype(jnp.int32)


def slot_buckets(slots: int) -> tuple[int, ...]:
    """Returns the numbers of slots that `cached_attend` may read, of a cache of `slots`: 512, 768, 1024, 1536, ..."""
    return coarse_buckets(MIN_SLOTS, slots)


def cached_attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b t kv d"],
    value: Float[Array, "b t kv d"],
    cache: KVCache,
    layer: Int[Array, ""],
    choice: Int[Array, ""],
) -> Float[Array, "b t heads d"]:
    """Computes attention of the next tokens of each sequence to its cached tokens and, causally, to each other.

    choice: of `choose_slots`; no more slots than it says are read.
    """
    batch, tokens, _, head_dim = query.shape
    # [b, t, heads, d] -> [b, kv, t * g, d]: a key-value head is attended to by the g query heads of each of t tokens
    grouped = query.reshape(batch, tokens, key.shape[2], -1, head_dim).swapaxes(1, 2)
    groups = grouped.shape[3]
    grouped = grouped.reshape(batch, key.shape[2], tokens * groups, head_dim) * head_dim**-0.5
    least = jnp.finfo(jnp.float32).min

    def scores(
        keys: Float[Array, "b kv s d"], mask: Bool[Array, "b 1 x s"], scales: Float[Array, "b kv 1 s"] | float = 1.0
    ) -> Float[Array, "b kv tg s"]:
        found = jnp.einsum("bksd,bkxd->bkxs", keys, grouped, preferred_element_type=jnp.float32)
        return jnp.where(mask, found * scales, least)

    def summed(weights: Float[Array, "b kv tg s"], values: Float[Array, "b kv s d"]) -> Float[Array, "b kv tg d"]:
        return jnp.einsum("bkxs,bksd->bkxd", weights.astype(value.dtype), values, preferred_element_type=jnp.float32)

    order = jnp.arange(tokens)
    causal = jnp.repeat(order[:, None] >= order, groups, axis=0)[None, None]  # [1, 1, t * g, t]
    new_scores, new_values = scores(key.swapaxes(1, 2), causal), value.swapaxes(1, 2)

    def attend_to(slots: int) -> Float[Array, "b kv tg d"]:
        keys, key_scales = _first_slots(cache.keys, layer, slots, key.dtype)
        old_scores = scores(keys, (jnp.arange(slots) < cache.lengths[:, None])[:, None, None], key_scales)
        highest = jnp.maximum(old_scores.max(-1, keepdims=True), new_scores.max(-1, keepdims=True))
        old, new = jnp.exp(old_scores - highest), jnp.exp(new_scores - highest)
        total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
        values, value_scales = _first_slots(cache.values, layer, slots, value.dtype)
        return summed(old / total * value_scales, values) + summed(new / total, new_values)

    sizes = slot_buckets(cache.slots)
    out = jax.lax.switch(choice, [functools.partial(attend_to, size) for size in sizes])
    out = out.reshape(batch, -1, tokens, groups, head_dim).swapaxes(1, 2)  # [b, t, kv, g, d]
    return out.reshape(query.shape).astype(query.dtype)


def _first_slots(
    stack: Slots, layer: Int[Array, ""], slots: int, dtype: Any
) -> tuple[Float[Array, "b kv s d"], Float[Array, "b kv 1 s"] | float]:
    """Returns the first slots of a layer in that dtype, and the scales that its products need."""

    def first(array: Array) -> Array:
        shape = (1, *array.shape[1:3], slots, *array.shape[4:])
        return jax.lax.dynamic_slice(array, (layer, *[jnp.zeros_like(layer)] * (array.ndim - 1)), shape)[0]

    if isinstance(stack, Int8Slots):
        return first(stack.steps).astype(dtype), first(stack.scales)[:, :, None]
    return first(stack), 1.0


def rotary_phases(
    positions: Int[Array, "b t"], head_dim: int, theta: float
) -> tuple[Float[Array, "b t 1 d/2"], Float[Array, "b t 1 d/2"]]:
    """Computes cos and sin of position * theta^(-2i/d), in float32."""
    # JAX reads a Python integer as int32, which a large theta exceeds.
    frequencies = float(theta) ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t heads d"], phases: tuple[Float[Array, "b t 1 d/2"], Float[Array, "b t 1 d/2"]]
) -> Float[Array, "b t heads d"]:
    """Applies rotary embedding in float32, with the two halves of a head paired, as in Llama and Qwen."""
    cos, sin = phases
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of `x` and scales up the rest; without a key, returns `x` unchanged."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
