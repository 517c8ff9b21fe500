"""Cross-entropy over a large vocabulary that never holds all logits, nor the whole head.

At 8192 tokens and 151,936 entries, float32 logits take 5 GB, and their gradient as much again. The head of the 8B takes
1.2 GB in bfloat16, and its gradient 2.5 GB in float32. Here the sequence is cut into token blocks and the vocabulary
into vocabulary blocks, and the logits of one block x one block are live at a time. On a mesh, a vocabulary block of the
head is all-gathered only while it is used, and its gradient is reduce-scattered at once.

A softmax needs all vocabulary blocks before the first gradient, so the logits are computed twice:

    for each vocabulary block, for each token block:
        1st pass: logits -> running log-partition, target's logit, largest or mean logit
        2nd pass: logits -> softmax - onehot -> gradients with respect to hidden states and head

Both passes of a cross-entropy run in the forward pass of training; its backward pass only scales the gradients. Those
of `blockwise_logprobs`, which an objective may do anything with, run in the forward and the backward pass.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

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
    # x [n, b, c, hidden], the others [n, b, c]: n token blocks of c positions.
    x, targets, loss_mask, in_group = _token_blocks((hidden, targets, loss_mask, in_group), block)
    vocabulary_blocks = _vocabulary_blocks(head)
    sums, log_z = _sums(x, vocabulary_blocks, targets, loss_mask, in_group)
    # d(-log p)/d(logits) = softmax - onehot; d(log_z^2)/d(logits) = 2 log_z softmax
    of_softmax = (1 + 2 * z_loss * log_z) * loss_mask
    gradients = _gradients(x, vocabulary_blocks, targets, log_z, of_softmax, loss_mask)
    x_gradient, head_gradient = _unblocked(gradients, hidden, head)
    # An empty array tells the backward pass the head's dtype.
    return (sums.loss + z_loss * sums.z, sums), (x_gradient, head_gradient, jnp.zeros((0,), head.dtype))


def _backward(z_loss: float, block: int, residuals, cotangents):
    """Scales the gradients by the objective's cotangent; the sums have none."""
    x_gradient, head_gradient, head_like = residuals
    scale, _ = cotangents
    by_hidden = (scale * x_gradient.astype(jnp.float32)).astype(x_gradient.dtype)
    return by_hidden, (scale * head_gradient).astype(head_like.dtype), None, None, None


_cross_entropy.defvjp(_forward, _backward)


def blockwise_logprobs(
    hidden: Float[Array, "b s hidden"],
    head: Float[Array, "hidden vocab"],
    targets: Int[Array, "b s"],
    *,
    temperature: float = 1.0,
    block: int = TOKEN_BLOCK,
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """Returns each target's log-probability, and the entropy of the distribution it is of, which has no gradient.

    The distribution is the softmax of logits / temperature. targets, block: as in `blockwise_cross_entropy`.
    """
    found: Any = _logprobs(temperature, min(block, targets.shape[1]), hidden, head, targets)
    return found[0], jax.lax.stop_gradient(found[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprobs(temperature: float, block: int, hidden, head, targets) -> tuple[jax.Array, jax.Array]:
    return _logprobs_forward(temperature, block, hidden, head, targets)[0]


def _logprobs_forward(temperature: float, block: int, hidden, head, targets):
    x, target_blocks = _token_blocks((hidden, targets), block)
    found = _first_pass(x, _vocabulary_blocks(head), target_blocks, temperature, of_mean=True)
    batch, length = targets.shape
    logprobs, entropy = (
        values.swapaxes(0, 1).reshape(batch, -1)[:, :length]
        for values in (found.at_target - found.log_z, found.log_z - found.summary)
    )
    return (logprobs, entropy), (hidden, head, targets, found.log_z)


def _logprobs_backward(temperature: float, block: int, residuals, cotangents):
    hidden, head, targets, log_z = residuals
    x, targets, of_logprobs = _token_blocks((hidden, targets, cotangents[0]), block)
    gradients = _gradients(x, _vocabulary_blocks(head), targets, log_z, -of_logprobs, -of_logprobs, temperature)
    by_hidden, by_head = _unblocked(gradients, hidden, head)
    return by_hidden, by_head.astype(head.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def _gradients(
    x: Float[Array, "n b c hidden"],
    vocabulary_blocks: VocabularyBlocks,
    targets: Int[Array, "n b c"],
    log_z: Float[Array, "n b c"],
    of_softmax: Float[Array, "n b c"],
    of_target: Float[Array, "n b c"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "n b c hidden"], Float[Array, "blocks hidden t v"]]:
    """Computes the second pass: float32 gradients with respect to x and to the vocabulary blocks' kernels.

    Those with respect to logits / temperature are of_softmax * softmax - of_target * onehot.
    """
    # Each device first adds up the head's gradient over its own sequences, [parts, hidden, t, v]: a sum over devices in
    # here would be one for every token block.
    parts = _batch_parts(x.shape[1])

    def split_batch(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(parts, -1, *x.shape[1:]), "batch")

    def add_vocabulary_block(x_gradient, vocabulary_block):
        kernel, ids = _gathered(vocabulary_block)

        def add_token_block(kernel_gradient, tokens):
            x, targets, log_z, of_softmax, of_target, x_gradient = tokens
            softmax = jnp.exp(_logits(x, kernel, temperature) - log_z[..., None, None])
            gradient = softmax * of_softmax[..., None, None]
            gradient -= jnp.where(_is_target(ids, targets), of_target[..., None, None], 0)
            gradient = (gradient / temperature).astype(x.dtype)  # [b, c, t, v]
            x_gradient += jnp.einsum("bctv,dtv->bcd", gradient, kernel, preferred_element_type=jnp.float32)
            by_part = (split_batch(x), split_batch(gradient))
            kernel_gradient += jnp.einsum("pbcd,pbctv->pdtv", *by_part, preferred_element_type=jnp.float32)
            return constrain(kernel_gradient, "batch", None, "vocab", None), x_gradient

        start = constrain(jnp.zeros((parts, *kernel.shape), jnp.float32), "batch", None, "vocab", None)
        tokens = (x, targets, log_z, of_softmax, of_target, x_gradient)
        kernel_gradient, x_gradient = jax.lax.scan(add_token_block, start, tokens)
        return x_gradient, constrain(kernel_gradient.sum(0), "embed", "vocab", None)

    return jax.lax.scan(add_vocabulary_block, jnp.zeros(x.shape, jnp.float32), vocabulary_blocks)


def _unblocked(gradients: tuple[jax.Array, jax.Array], hidden: jax.Array, head: jax.Array):
    """Reshapes gradients by block to those of `hidden`, in its dtype, and of `head`, in float32."""
    x_gradient, by_block = gradients
    batch, length, size = hidden.shape
    # [blocks, hidden, t, v] -> [hidden, vocab]
    head_gradient = constrain(by_block.transpose(1, 2, 0, 3).reshape(head.shape), "embed", "vocab")
    # [n, b, c, hidden] -> [b, s, hidden]
    x_gradient = x_gradient.swapaxes(0, 1).reshape(batch, -1, size)[:, :length].astype(hidden.dtype)
    return x_gradient, head_gradient


def _sums(
    x: Float[Array, "n b c hidden"],
    vocabulary_blocks: VocabularyBlocks,
    targets: Int[Array, "n b c"],
    loss_mask: Float[Array, "n b c"],
    in_group: Bool[Array, "n b c groups"] | None,
) -> tuple[LossSums, Float[Array, "n b c"]]:
    """Computes the sums over all token blocks, and every token's log-partition."""
    found = _first_pass(x, vocabulary_blocks, targets)
    log_z, at_target, highest = found.log_z, found.at_target, found.summary
    # A target outside the vocabulary leaves `at_target` 0; the mask is 0 there.
    per_token = (log_z - at_target, jnp.square(log_z), at_target >= highest, 1.0)
    sums = LossSums(*(jnp.sum(values * loss_mask) for values in per_token))
    if in_group is not None:
        tokens = [(values * loss_mask)[..., None] for values in (per_token[0], 1.0)]
        by_group = jnp.stack([jnp.sum(values, axis=(0, 1, 2), where=in_group) for values in tokens])
        sums = dataclasses.replace(sums, by_group=by_group)
    return sums, log_z


class _Logits(NamedTuple):
    """What the first pass finds of each token's logits. summary: the largest, or their mean by the softmax."""

    log_z: Float[Array, "n b c"]
    at_target: Float[Array, "n b c"]
    summary: Float[Array, "n b c"]


def _first_pass(
    x: Float[Array, "n b c hidden"],
    vocabulary_blocks: VocabularyBlocks,
    targets: Int[Array, "n b c"],
    temperature: float = 1.0,
    of_mean: bool = False,
) -> _Logits:
    """Computes the first pass. of_mean: the summary is the mean logit; otherwise it is the largest."""

    def add_vocabulary_block(before: _Logits, vocabulary_block):
        kernel, ids = _gathered(vocabulary_block)

        def of_token_block(tokens):
            x, targets = tokens
            logits = _logits(x, kernel, temperature)
            at_target = jnp.sum(logits, axis=(-2, -1), where=_is_target(ids, targets))
            log_z = jax.nn.logsumexp(logits, axis=(-2, -1))
            if of_mean:
                softmax = jnp.exp(logits - log_z[..., None, None])
                return _Logits(log_z, at_target, jnp.sum(softmax * logits, axis=(-2, -1)))
            return _Logits(log_z, at_target, logits.max((-2, -1)))

        block = jax.lax.map(of_token_block, (x, targets))
        log_z = jnp.logaddexp(before.log_z, block.log_z)
        if of_mean:
            first, second = (jnp.exp(part.log_z - log_z) * part.summary for part in (before, block))
            summary = first + second
        else:
            summary = jnp.maximum(before.summary, block.summary)
        return _Logits(log_z, before.at_target + block.at_target, summary), None

    least = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    start = _Logits(least, jnp.zeros_like(least), jnp.zeros_like(least) if of_mean else least)
    return jax.lax.scan(add_vocabulary_block, start, vocabulary_blocks)[0]


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


def _logits(
    x: Float[Array, "b c hidden"], kernel: Float[Array, "hidden t v"], temperature: float
) -> Float[Array, "b c t v"]:
    """Computes logits / temperature."""
    logits = jnp.einsum("bcd,dtv->bctv", x, kernel, preferred_element_type=jnp.float32) / temperature
    return constrain(logits, "batch", None, "vocab", None)


def _is_target(ids: Int[Array, "t v"], targets: Int[Array, "b c"]) -> Bool[Array, "b c t v"]:
    """One-hot of the targets, by comparison: unlike a gather, it leaves a sharded vocabulary in place."""
    return ids == targets[..., None, None]
