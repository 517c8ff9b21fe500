"""Cross-entropy over a large vocabulary without ever holding the logits of a whole batch, nor the whole head.

At 8192 tokens and 151,936 entries, float32 logits are 5 GB, and their gradient as much again; the head of the 8B is
1.2 GB in bfloat16, and its gradient 2.5 GB in float32. Here the sequence is cut into chunks and the vocabulary into
blocks, and of both one at a time is there: on a mesh, a block of the head is gathered while its turn lasts, and its
gradient goes at once to where it lies. A softmax needs all blocks before the first gradient, so the logits are
computed twice: a first pass over the blocks finds each token's log-partition, a second one the gradients, which the
backward pass of the program then only scales.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.sharding import constrain, num_parts

# Positions of each sequence whose logits are held at a time. More of them make the matmuls faster, until memory ends.
CHUNK = 512
# Entries of the vocabulary, on one device, whose part of the head is gathered at a time.
VOCABULARY_BLOCK = 16_384

# The head's kernel by block, [blocks, hidden, t, v], and the ids of its columns, [blocks, t, v]: t is the part of the
# vocabulary that `tensor` gives a device, v what the block takes of it.
Blocks = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Weighted sums over tokens, to be added up over microbatches and divided by `weight` in the end."""

    loss: Float[Array, ""]  # -log p(target)
    z: Float[Array, ""]  # log(sum(exp(logits)))^2
    correct: Float[Array, ""]  # 1 where the target is the likeliest token
    weight: Float[Array, ""]  # the number of supervised tokens, if all weights are 0 or 1
    by_group: Float[Array, "2 groups"] | None = None  # `loss` and `weight` of each group, where they are told apart

    @classmethod
    def zero(cls, num_groups: int = 0) -> "LossSums":
        by_group = jnp.zeros((2, num_groups), jnp.float32) if num_groups else None
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero, zero, by_group)


def chunked_cross_entropy(
    hidden: Float[Array, "b s hidden"],
    head: Float[Array, "hidden vocab"],
    targets: Int[Array, "b s"],
    weights: Float[Array, "b s"],
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
    groups: Int[Array, "b s"] | None = None,
    num_groups: int = 0,
) -> tuple[Float[Array, ""], LossSums]:
    """What to differentiate, `sums.loss + z_loss * sums.z`, and the sums, which carry no gradient.

    targets: what each position predicts (already shifted); where the weight is 0, anything.
    z_loss: keeps the logits near a partition function of 1 (PaLM used 1e-4).
    groups: of each position, 0 to num_groups - 1; the sums are taken by group too unless num_groups is 0.
    Matmuls are in the dtype of `hidden` and `head` and accumulate in float32; everything else is float32.
    """
    in_group = None if not num_groups or groups is None else groups[..., None] == jnp.arange(num_groups)
    losses: Any = _cross_entropy(z_loss, min(chunk, targets.shape[1]), hidden, head, targets, weights, in_group)
    objective, sums = losses
    return objective, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss: float, chunk: int, hidden, head, targets, weights, in_group) -> tuple[jax.Array, LossSums]:
    x, targets, weights, in_group = _chunks((hidden, targets, weights, in_group), chunk)
    sums, _ = _sums(x, _blocks(head), targets, weights, in_group)
    return sums.loss + z_loss * sums.z, sums


def _forward(z_loss: float, chunk: int, hidden, head, targets, weights, in_group):
    """As `_cross_entropy`, and with it the gradients by `hidden` and `head`."""
    batch, length = targets.shape
    x, targets, weights, in_group = _chunks((hidden, targets, weights, in_group), chunk)
    blocks = _blocks(head)
    sums, log_z = _sums(x, blocks, targets, weights, in_group)
    # Every device adds up the gradient of its own sequences. Summed over devices here, it would be so in every chunk.
    parts = _batch_parts(batch)

    def split_batch(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(parts, -1, *x.shape[1:]), "batch")

    def add_block(x_gradient, block):
        kernel, ids = _gathered(block)

        def add_chunk(by_kernel, tokens):
            x, targets, weights, log_z, x_gradient = tokens
            # d(-log p)/d(logits) = softmax - onehot; d(log_z^2)/d(logits) = 2 log_z softmax
            softmax = jnp.exp(_logits(x, kernel) - log_z[..., None, None])
            gradient = softmax * (1 + 2 * z_loss * log_z)[..., None, None] - _is_target(ids, targets)
            gradient = (gradient * weights[..., None, None]).astype(x.dtype)
            x_gradient += jnp.einsum("bctv,dtv->bcd", gradient, kernel, preferred_element_type=jnp.float32)
            by_part = (split_batch(x), split_batch(gradient))
            by_kernel += jnp.einsum("pbcd,pbctv->pdtv", *by_part, preferred_element_type=jnp.float32)
            return constrain(by_kernel, "batch", None, "vocab", None), x_gradient

        start = constrain(jnp.zeros((parts, *kernel.shape), jnp.float32), "batch", None, "vocab", None)
        by_kernel, x_gradient = jax.lax.scan(add_chunk, start, (x, targets, weights, log_z, x_gradient))
        return x_gradient, constrain(by_kernel.sum(0), "embed", "vocab", None)

    x_gradient, by_block = jax.lax.scan(add_block, jnp.zeros(x.shape, jnp.float32), blocks)
    head_gradient = constrain(by_block.transpose(1, 2, 0, 3).reshape(head.shape), "embed", "vocab")
    x_gradient = x_gradient.swapaxes(0, 1).reshape(batch, -1, hidden.shape[-1])[:, :length].astype(hidden.dtype)
    # An empty array tells the backward pass the head's dtype.
    return (sums.loss + z_loss * sums.z, sums), (x_gradient, head_gradient, jnp.zeros((0,), head.dtype))


def _backward(z_loss: float, chunk: int, residuals, cotangents):
    x_gradient, head_gradient, head_like = residuals
    scale, _ = cotangents
    by_hidden = (scale * x_gradient.astype(jnp.float32)).astype(x_gradient.dtype)
    return by_hidden, (scale * head_gradient).astype(head_like.dtype), None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _sums(
    x: Float[Array, "n b c hidden"],
    blocks: Blocks,
    targets: Int[Array, "n b c"],
    weights: Float[Array, "n b c"],
    in_group: Bool[Array, "n b c groups"] | None,
) -> tuple[LossSums, Float[Array, "n b c"]]:
    """The sums over all chunks, and every token's log-partition."""

    def add_block(carry, block):
        kernel, ids = _gathered(block)

        def of_chunk(tokens):
            x, targets = tokens
            logits = _logits(x, kernel)
            at_target = jnp.sum(logits, axis=(-2, -1), where=_is_target(ids, targets))
            return jax.nn.logsumexp(logits, axis=(-2, -1)), at_target, logits.max((-2, -1))

        found = jax.lax.map(of_chunk, (x, targets))
        return tuple(combine(*pair) for combine, *pair in zip(combining, carry, found, strict=True)), None

    combining = (jnp.logaddexp, jnp.add, jnp.maximum)
    least = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    (log_z, at_target, highest), _ = jax.lax.scan(add_block, (least, jnp.zeros_like(least), least), blocks)
    # Without a target among the entries, `at_target` stays 0: such tokens have a weight of 0.
    per_token = (log_z - at_target, jnp.square(log_z), at_target >= highest, 1.0)
    sums = LossSums(*(jnp.sum(values * weights) for values in per_token))
    if in_group is not None:
        tokens = [(values * weights)[..., None] for values in (per_token[0], 1.0)]
        by_group = jnp.stack([jnp.sum(values, axis=(0, 1, 2), where=in_group) for values in tokens])
        sums = dataclasses.replace(sums, by_group=by_group)
    return sums, log_z


def _blocks(head: Float[Array, "hidden vocab"]) -> Blocks:
    """The head cut into blocks of its vocabulary, each as wide on every device that `tensor` cuts it over."""
    vocabulary = head.shape[1]
    parts = num_parts("vocab", jax.sharding.get_abstract_mesh())
    count = _block_count(vocabulary // parts)

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], parts, count, -1), -2, 0)

    kernels = constrain(cut(constrain(head, "embed", "vocab")), None, "embed", "vocab", None)
    return kernels, cut(jnp.arange(vocabulary))


def _block_count(entries: int) -> int:
    """The fewest equal blocks of at most VOCABULARY_BLOCK entries; where it takes far more to be equal, just one."""
    fewest = -(-entries // VOCABULARY_BLOCK)
    return next((count for count in range(fewest, 4 * fewest + 1) if entries % count == 0), 1)


def _gathered(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    kernel, ids = block
    return constrain(kernel, None, "vocab", None), ids


def _batch_parts(batch: int) -> int:
    """Over how many devices of the current mesh the batch is cut."""
    return math.gcd(batch, num_parts("batch", jax.sharding.get_abstract_mesh()))


def _chunks(arrays: tuple[Any, ...], chunk: int) -> tuple[Any, ...]:
    """[b, s, ...] -> [chunks, b, chunk, ...], zeros at the end. The batch, which is sharded, is never cut."""

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _logits(x: Float[Array, "b c hidden"], kernel: Float[Array, "hidden t v"]) -> Float[Array, "b c t v"]:
    logits = jnp.einsum("bcd,dtv->bctv", x, kernel, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", None, "vocab", None)


def _is_target(ids: Int[Array, "t v"], targets: Int[Array, "b c"]) -> Bool[Array, "b c t v"]:
    """One-hot by comparison: unlike a gather, it leaves a vocabulary that is cut over devices where it is."""
    return ids == targets[..., None, None]
