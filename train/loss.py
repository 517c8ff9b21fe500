"""Cross-entropy over a large vocabulary that never holds all logits, nor the whole head.

At 8192 tokens and 151,936 entries, float32 logits take 5 GB, and their gradient as much again. The head of the 8B takes
1.2 GB in bfloat16, and its gradient 2.5 GB in float32. Here the sequence is cut into token blocks and the vocabulary
into vocabulary blocks, and the logits of one block x one block are live at a time. On a mesh, a vocabulary block of the
head is all-gathered only while it is used, and its gradient is reduce-scattered at once.

A softmax needs all vocabulary blocks before the first gradient, so the logits are computed twice:

    for each vocabulary block, for each token block:
        1st pass: logits -> running log-partition, target's logit, largest logit
        2nd pass: logits -> softmax - onehot -> gradients with respect to hidden states and head

Both passes run in the forward pass of training; its backward pass only scales the gradients.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.sharding import constrain, num_parts

# Positions of each sequence in a token block. More make the matmuls faster, and take more memory.
TOKEN_BLOCK = 512
# Vocabulary entries in a block, on each device.
VOCABULARY_BLOCK = 16_384

# The head's kernel by vocabulary block, [blocks, hidden, t, v], and the ids of its columns, [blocks, t, v]: t is the
# parts that the mesh axis `tensor` cuts the vocabulary into, v a block's entries of each part.
VocabularyBlocks = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over the tokens of a loss mask, weighted by it; added over microbatches, then divided by `tokens`."""

    loss: Float[Array, ""]  # -log p(target)
    z: Float[Array, ""]  # log(sum(exp(logits)))^2
    correct: Float[Array, ""]  # 1 where the target has the largest logit
    tokens: Float[Array, ""]  # sum of the mask: the number of supervised tokens
    by_group: Float[Array, "2 groups"] | None = None  # `loss` and `tokens` of each group

    @classmethod
    def zero(cls, num_groups: int = 0) -> "LossSums":
        by_group = jnp.zeros((2, num_groups), jnp.float32) if num_groups else None
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero, zero, by_group)


def blockwise_cross_entropy(
    hidden: Float[Array, "b s hidden"],
    head: Float[Array, "hidden vocab"],
    targets: Int[Array, "b s"],
    loss_mask: Float[Array, "b s"],
    *,
    z_loss: float = 0.0,
    block: int = TOKEN_BLOCK,
    groups: Int[Array, "b s"] | None = None,
    num_groups: int = 0,
) -> tuple[Float[Array, ""], LossSums]:
    """Returns the objective, `sums.loss + z_loss * sums.z`, and the sums, which carry no gradient.

    targets: the id that each position predicts (already shifted); any value where the mask is 0.
    loss_mask: 1 at supervised tokens, 0 elsewhere; a fraction weighs its token.
    z_loss: weight of log(Z)^2, which keeps the softmax normalizer Z near 1 (PaLM used 1e-4).
    block: positions of each sequence in a token block.
    groups: of each position, 0 to num_groups - 1; with num_groups above 0 the sums are also by group.
    Matmuls are in the dtype of `hidden` and `head` and accumulate in float32; all else is float32.
    """
    in_group = None if not num_groups or groups is None else groups[..., None] == jnp.arange(num_groups)
    losses: Any = _cross_entropy(z_loss, min(block, targets.shape[1]), hidden, head, targets, loss_mask, in_group)
    objective, sums = losses
    return objective, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss: float, block: int, hidden, head, targets, loss_mask, in_group) -> tuple[jax.Array, LossSums]:
    """Computes the objective and the sums without gradients: the first pass alone."""
    x, targets, loss_mask, in_group = _token_blocks((hidden, targets, loss_mask, in_group), block)
    sums, _ = _sums(x, _vocabulary_blocks(head), targets, loss_mask, in_group)
    return sums.loss + z_loss * sums.z, sums


def _forward(z_loss: float, block: int, hidden, head, targets, loss_mask, in_group):
    """Computes `_cross_entropy`, and its gradients with respect to `hidden` and `head`."""
    batch, length = targets.shape
    # x [n, b, c, hidden], the others [n, b, c]: n token blocks of c positions.
    x, targets, loss_mask, in_group = _token_blocks((hidden, targets, loss_mask, in_group), block)
    vocabulary_blocks = _vocabulary_blocks(head)
    sums, log_z = _sums(x, vocabulary_blocks, targets, loss_mask, in_group)
    # Each device first adds up the head's gradient over its own sequences, [parts, hidden, t, v]: a sum over devices in
    # here would be one for every token block.
    parts = _batch_parts(batch)

    def split_batch(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(parts, -1, *x.shape[1:]), "batch")

    def add_vocabulary_block(x_gradient, vocabulary_block):
        kernel, ids = _gathered(vocabulary_block)

        def add_token_block(kernel_gradient, tokens):
            x, targets, loss_mask, log_z, x_gradient = tokens
            # d(-log p)/d(logits) = softmax - onehot; d(log_z^2)/d(logits) = 2 log_z softmax
            softmax = jnp.exp(_logits(x, kernel) - log_z[..., None, None])
            gradient = softmax * (1 + 2 * z_loss * log_z)[..., None, None] - _is_target(ids, targets)
            gradient = (gradient * loss_mask[..., None, None]).astype(x.dtype)  # [b, c, t, v]
            x_gradient += jnp.einsum("bctv,dtv->bcd", gradient, kernel, preferred_element_type=jnp.float32)
            by_part = (split_batch(x), split_batch(gradient))
            kernel_gradient += jnp.einsum("pbcd,pbctv->pdtv", *by_part, preferred_element_type=jnp.float32)
            return constrain(kernel_gradient, "batch", None, "vocab", None), x_gradient

        start = constrain(jnp.zeros((parts, *kernel.shape), jnp.float32), "batch", None, "vocab", None)
        tokens = (x, targets, loss_mask, log_z, x_gradient)
        kernel_gradient, x_gradient = jax.lax.scan(add_token_block, start, tokens)
        return x_gradient, constrain(kernel_gradient.sum(0), "embed", "vocab", None)

    x_gradient, by_block = jax.lax.scan(add_vocabulary_block, jnp.zeros(x.shape, jnp.float32), vocabulary_blocks)
    # [blocks, hidden, t, v] -> [hidden, vocab]
    head_gradient = constrain(by_block.transpose(1, 2, 0, 3).reshape(head.shape), "embed", "vocab")
    # [n, b, c, hidden] -> [b, s, hidden]
    x_gradient = x_gradient.swapaxes(0, 1).reshape(batch, -1, hidden.shape[-1])[:, :length].astype(hidden.dtype)
    # An empty array tells the backward pass the head's dtype.
    return (sums.loss + z_loss * sums.z, sums), (x_gradient, head_gradient, jnp.zeros((0,), head.dtype))


def _backward(z_loss: float, block: int, residuals, cotangents):
    """Scales the gradients by the objective's cotangent; the sums have none."""
    x_gradient, head_gradient, head_like = residuals
    scale, _ = cotangents
    by_hidden = (scale * x_gradient.astype(jnp.float32)).astype(x_gradient.dtype)
    return by_hidden, (scale * head_gradient).astype(head_like.dtype), None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _sums(
    x: Float[Array, "n b c hidden"],
    vocabulary_blocks: VocabularyBlocks,
    targets: Int[Array, "n b c"],
    loss_mask: Float[Array, "n b c"],
    in_group: Bool[Array, "n b c groups"] | None,
) -> tuple[LossSums, Float[Array, "n b c"]]:
    """Computes the sums over all token blocks, and every token's log-partition."""

    def add_vocabulary_block(carry, vocabulary_block):
        kernel, ids = _gathered(vocabulary_block)

        def of_token_block(tokens):
            x, targets = tokens
            logits = _logits(x, kernel)
            at_target = jnp.sum(logits, axis=(-2, -1), where=_is_target(ids, targets))
            return jax.nn.logsumexp(logits, axis=(-2, -1)), at_target, logits.max((-2, -1))

        found = jax.lax.map(of_token_block, (x, targets))
        return tuple(combine(*pair) for combine, *pair in zip(combining, carry, found, strict=True)), None

    # Each token's log-partition, target's logit and largest logit, [n, b, c], over the vocabulary blocks so far.
    combining = (jnp.logaddexp, jnp.add, jnp.maximum)
    least = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    start = (least, jnp.zeros_like(least), least)
    (log_z, at_target, highest), _ = jax.lax.scan(add_vocabulary_block, start, vocabulary_blocks)
    # A target outside the vocabulary leaves `at_target` 0; the mask is 0 there.
    per_token = (log_z - at_target, jnp.square(log_z), at_target >= highest, 1.0)
    sums = LossSums(*(jnp.sum(values * loss_mask) for values in per_token))
    if in_group is not None:
        tokens = [(values * loss_mask)[..., None] for values in (per_token[0], 1.0)]
        by_group = jnp.stack([jnp.sum(values, axis=(0, 1, 2), where=in_group) for values in tokens])
        sums = dataclasses.replace(sums, by_group=by_group)
    return sums, log_z


def _vocabulary_blocks(head: Float[Array, "hidden vocab"]) -> VocabularyBlocks:
    """Cuts the head into vocabulary blocks, each with equally many entries of every `tensor` part."""
    vocabulary = head.shape[1]
    parts = num_parts("vocab", jax.sharding.get_abstract_mesh())
    count = _block_count(vocabulary // parts)

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], parts, count, -1), -2, 0)

    kernels = constrain(cut(constrain(head, "embed", "vocab")), None, "embed", "vocab", None)
    return kernels, cut(jnp.arange(vocabulary))


def _block_count(entries: int) -> int:
    """Returns the least number of equal blocks of at most VOCABULARY_BLOCK entries.

    1 if no number up to four times the least one divides the entries equally.
    """
    fewest = -(-entries // VOCABULARY_BLOCK)
    return next((count for count in range(fewest, 4 * fewest + 1) if entries % count == 0), 1)


def _gathered(vocabulary_block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """All-gathers a block's kernel over the mesh axis that its hidden axis is sharded over."""
    kernel, ids = vocabulary_block
    return constrain(kernel, None, "vocab", None), ids


def _batch_parts(batch: int) -> int:
    """Number of devices of the current mesh that the batch is cut over."""
    return math.gcd(batch, num_parts("batch", jax.sharding.get_abstract_mesh()))


def _token_blocks(arrays: tuple[Any, ...], block: int) -> tuple[Any, ...]:
    """Reshapes [b, s, ...] to [blocks, b, block, ...], padded with zeros; the sharded batch axis stays whole."""

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _logits(x: Float[Array, "b c hidden"], kernel: Float[Array, "hidden t v"]) -> Float[Array, "b c t v"]:
    logits = jnp.einsum("bcd,dtv->bctv", x, kernel, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", None, "vocab", None)


def _is_target(ids: Int[Array, "t v"], targets: Int[Array, "b c"]) -> Bool[Array, "b c t v"]:
    """One-hot of the targets, by comparison: unlike a gather, it leaves a sharded vocabulary in place."""
    return ids == targets[..., None, None]
