"""Cross-entropy over a large vocabulary without ever holding the logits of a whole batch.

At 8192 tokens and 151,936 entries, float32 logits are 5 GB, and their gradient as much again. Here the sequence is cut
into chunks; the logits of one chunk live only while its loss and, at once, its gradients are computed. The backward
pass then has nothing left to do but scale, so the logits are computed once rather than twice.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_audio_jax.sharding import constrain, partition_spec

# Positions of each sequence whose logits are held at a time. More of them make the matmuls faster, until memory ends.
CHUNK = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Weighted sums over tokens, to be added up over microbatches and divided by `weight` in the end."""

    loss: Float[Array, ""]  # -log p(target)
    z: Float[Array, ""]  # log(sum(exp(logits)))^2
    correct: Float[Array, ""]  # 1 where the target is the likeliest token
    weight: Float[Array, ""]  # the number of supervised tokens, if all weights are 0 or 1

    @classmethod
    def zero(cls) -> "LossSums":
        return cls(*(jnp.zeros((), jnp.float32) for _ in dataclasses.fields(cls)))


def chunked_cross_entropy(
    hidden: Float[Array, "b s hidden"],
    head: Float[Array, "hidden vocab"],
    targets: Int[Array, "b s"],
    weights: Float[Array, "b s"],
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], LossSums]:
    """What to differentiate, `sums.loss + z_loss * sums.z`, and the sums, which carry no gradient.

    targets: what each position predicts (already shifted); where the weight is 0, anything.
    z_loss: keeps the logits near a partition function of 1 (PaLM used 1e-4).
    Matmuls are in the dtype of `hidden` and `head` and accumulate in float32; everything else is float32.
    """
    losses: Any = _cross_entropy(z_loss, min(chunk, targets.shape[1]), hidden, head, targets, weights)
    objective, sums = losses
    return objective, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss: float, chunk: int, hidden, head, targets, weights) -> tuple[jax.Array, LossSums]:
    head = constrain(head, None, "vocab")

    def body(sums, tokens):
        x, chunk_targets, chunk_weights = tokens
        logits = _logits(x, head)
        return _add(sums, _sums(logits, _log_partition(logits), chunk_targets, chunk_weights)), None

    sums, _ = jax.lax.scan(body, LossSums.zero(), _chunks((hidden, targets, weights), chunk))
    return sums.loss + z_loss * sums.z, sums


def _forward(z_loss: float, chunk: int, hidden, head, targets, weights):
    """As `_cross_entropy`, and with it the gradients by `hidden` and `head`."""
    gathered = constrain(head, None, "vocab")  # once, not in every chunk
    # Every device adds up the gradient of its own sequences. Summed over devices here, it would be so in every chunk.
    parts = _batch_parts(targets.shape[0])

    def split_batch(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(parts, -1, *x.shape[1:]), "batch")

    def body(carry, tokens):
        sums, head_gradient = carry
        x, chunk_targets, chunk_weights = tokens
        logits = _logits(x, gathered)
        log_z = _log_partition(logits)
        sums = _add(sums, _sums(logits, log_z, chunk_targets, chunk_weights))

        # d(-log p)/d(logits) = softmax - onehot; d(log_z^2)/d(logits) = 2 log_z softmax
        softmax = jnp.exp(logits - log_z[..., None])
        gradient = softmax * (1 + 2 * z_loss * log_z)[..., None] - _is_target(logits, chunk_targets)
        gradient = (gradient * chunk_weights[..., None]).astype(x.dtype)
        x_gradient = jnp.einsum("bcv,dv->bcd", gradient, gathered, preferred_element_type=jnp.float32)
        by_part = (split_batch(x), split_batch(gradient))
        by_head = jnp.einsum("pbcd,pbcv->pdv", *by_part, preferred_element_type=jnp.float32)
        return (sums, constrain(head_gradient + by_head, "batch", None, "vocab")), x_gradient.astype(x.dtype)

    start = (LossSums.zero(), constrain(jnp.zeros((parts, *head.shape), jnp.float32), "batch", None, "vocab"))
    (sums, head_gradient), x_gradient = jax.lax.scan(body, start, _chunks((hidden, targets, weights), chunk))
    head_gradient = constrain(head_gradient.sum(0), "embed", "vocab")
    batch, length = targets.shape
    x_gradient = x_gradient.swapaxes(0, 1).reshape(batch, -1, hidden.shape[-1])[:, :length]
    # An empty array tells the backward pass the head's dtype.
    return (sums.loss + z_loss * sums.z, sums), (x_gradient, head_gradient, jnp.zeros((0,), head.dtype))


def _backward(z_loss: float, chunk: int, residuals, cotangents):
    x_gradient, head_gradient, head_like = residuals
    scale, _ = cotangents
    by_hidden = (scale * x_gradient.astype(jnp.float32)).astype(x_gradient.dtype)
    return by_hidden, (scale * head_gradient).astype(head_like.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _batch_parts(batch: int) -> int:
    """Over how many devices of the current mesh the batch is cut."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = partition_spec(("batch",), mesh)[0] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.gcd(batch, math.prod(mesh.shape[axis] for axis in axes))


def _chunks(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """[b, s, ...] -> [chunks, b, chunk, ...], zeros at the end. The batch, which is sharded, is never cut."""

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(cut, arrays))


def _logits(x: Float[Array, "b c hidden"], head: Float[Array, "hidden vocab"]) -> Float[Array, "b c vocab"]:
    logits = jnp.einsum("bcd,dv->bcv", x, head, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", None, "vocab")


def _log_partition(logits: Float[Array, "b c vocab"]) -> Float[Array, "b c"]:
    return jax.nn.logsumexp(logits, axis=-1)


def _is_target(logits: Float[Array, "b c vocab"], targets: Int[Array, "b c"]) -> Array:
    """One-hot by comparison: unlike a gather, it leaves a vocabulary that is cut over devices where it is."""
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _sums(
    logits: Float[Array, "b c vocab"],
    log_z: Float[Array, "b c"],
    targets: Int[Array, "b c"],
    weights: Float[Array, "b c"],
) -> LossSums:
    at_target = jnp.sum(logits, axis=-1, where=_is_target(logits, targets))
    per_token = (log_z - at_target, jnp.square(log_z), jnp.argmax(logits, axis=-1) == targets, 1.0)
    return LossSums(*(jnp.sum(values * weights) for values in per_token))


def _add(first: LossSums, second: LossSums) -> LossSums:
    return jax.tree.map(jnp.add, first, second)
