"""Grouped-query attention, the masks of packed sequences, and rotary position embedding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.splash import serves, splash_attend

# Longer queries are cut into blocks of this many, so that scores never take [heads, tokens, tokens] of memory.
QUERY_BLOCK = 512


def attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b s kv d"],
    value: Float[Array, "b s kv d"],
    mask: Bool[Array, "b t s"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b t heads d"]:
    """softmax(q k^T / sqrt(d)) v, with `heads // kv` query heads sharing each key-value head. Softmax in float32.

    A query whose mask is all False gets a finite value that nobody reads. Dropout is applied to the weights where a
    key is given.
    """
    batch, queries, _, head_dim = query.shape
    grouped = query.reshape(batch, queries, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, dropout_key).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def self_attend(
    query: Float[Array, "b t heads d"],
    key: Float[Array, "b t kv d"],
    value: Float[Array, "b t kv d"],
    segment_ids: Int[Array, "b t"],
) -> Float[Array, "b t heads d"]:
    """Causal attention of whole sequences, within their segments: in training and scoring, and to read a prompt.

    A TPU runs splash attention where that serves (`splash.serves`), all else is `causal_attend`. Segment 0 is
    padding: what its queries get is finite, and nobody reads it.
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
    """Attention of each query to the keys of its own segment in slots up to its own, in blocks of queries.

    query_slots: where the queries stand among the keys (slot i is key i). Segment 0 is padding.
    """

    def block(inputs):
        query, slots, segments = inputs  # [b, t', ...], [t'], [b, t']
        causal = slots[:, None] >= jnp.arange(key.shape[1])
        same_segment = segments[:, :, None] == key_segments[:, None, :]
        return attend(query, key, value, causal & same_segment)

    tokens = query.shape[1]
    if tokens <= QUERY_BLOCK:
        return block((query, query_slots, query_segments))
    padding = -tokens % QUERY_BLOCK

    def blocks(x, axis):
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # Recomputed in the backward pass: else every block's scores would be kept.
    out = jax.lax.map(jax.checkpoint(block), (blocks(query, 1), blocks(query_slots, 0), blocks(query_segments, 1)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :tokens]


def rotary_phases(
    positions: Int[Array, "b t"], head_dim: int, theta: float
) -> tuple[Float[Array, "b t 1 d/2"], Float[Array, "b t 1 d/2"]]:
    """cos and sin of position * theta^(-2i/d), in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t heads d"], phases: tuple[Float[Array, "b t 1 d/2"], Float[Array, "b t 1 d/2"]]
) -> Float[Array, "b t heads d"]:
    """Rotary embedding with the two halves of a head paired (Llama's and Qwen's convention), in float32."""
    cos, sin = phases
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of `x` and scales up the rest; without a key, `x` unchanged."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
