"""The objective of post-training by reward, from the log-probabilities of drawn tokens.

    for each drawn token:    ratio = pi / pi_old                       (gspo: the geometric mean over the answer)
                             gain = min(ratio A, clip(ratio, low, high) A)
                             cut = min(pi_old / pi_rollout, cap)
                             loss = -cut gain + kl (pi_0 / pi - log(pi_0 / pi) - 1)
    objective                sum of weight * loss

A: the answer's advantage, its reward by mean and deviation of its group. pi_old: the trainer's model before the updates
of a step; pi_rollout: what the token was drawn from, with other numerics and, say, a top-k; pi_0: the first model.
weight: 1 / tokens of the update (dapo), or 1 / (answers * tokens of the answer) (grpo and gspo).

Papers: DAPO arXiv 2503.14476, GRPO 2402.03300, GSPO 2507.18071.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moss_audio_jax.inputs import ModelInputs
from train.reinforce.config import ObjectiveConfig

LEAST_DEVIATION = 1e-4  # added to that of a group
Sums = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Prompts with drawn answers, packed as a `TrainingBatch`: each of them is a segment of a sequence.

    loss_mask: 1 where the target is a drawn token. The next three are of the target, and 0 elsewhere.
    advantages: of its answer. drawn: its log-probability where it was drawn. weight: of its term in the objective.
    old, reference: its log-probability by the models before the updates of a step and before the run; None: that before
        the updates is the one which is differentiated, and there is no KL term.
    """

    inputs: ModelInputs
    targets: Int[Any, "b s"]
    loss_mask: Float[Any, "b s"]
    advantages: Float[Any, "b s"]
    drawn: Float[Any, "b s"]
    weight: Float[Any, "b s"]
    old: Float[Any, "b s"] | None = None
    reference: Float[Any, "b s"] | None = None


def advantages(rewards: Sequence[float]) -> Float[np.ndarray, " samples"]:
    """Returns (reward - mean) / (deviation + 1e-4) of the answers to one question.

    The deviation is that of a sample (n - 1), as in TRL and verl.
    """
    found = np.asarray(rewards, np.float64)
    return ((found - found.mean()) / (found.std(ddof=1) + LEAST_DEVIATION)).astype(np.float32)


def policy_loss(
    logprobs: Float[Array, "b s"], batch: PolicyBatch, config: ObjectiveConfig
) -> tuple[Float[Array, ""], Sums]:
    """Returns the objective, to be minimised, and sums over drawn tokens, which carry no gradient.

    logprobs: of the targets, by the model that is trained.
    """
    drawn = batch.loss_mask > 0

    def of_drawn(values: jax.Array) -> jax.Array:  # what is elsewhere, perhaps infinite, counts nothing
        return jnp.where(drawn, values, 0)

    logprobs = of_drawn(logprobs)
    old = jax.lax.stop_gradient(logprobs) if batch.old is None else of_drawn(batch.old)
    log_ratio = logprobs - old
    if config.algorithm == "gspo":
        log_ratio = _mean_of_answer(log_ratio, drawn, batch.inputs.segment_ids)
    ratio = jnp.exp(log_ratio)
    low, high = config.ratios
    gain = jnp.minimum(ratio * batch.advantages, jnp.clip(ratio, low, high) * batch.advantages)
    of_rollout = jnp.exp(old - of_drawn(batch.drawn))
    cut = jnp.minimum(of_rollout, config.rollout_cap) if config.rollout_cap else jnp.ones_like(of_rollout)
    loss = -jax.lax.stop_gradient(cut) * gain
    divergence = jnp.zeros_like(loss)
    if batch.reference is not None:
        towards = of_drawn(batch.reference) - logprobs
        divergence = jnp.exp(towards) - towards - 1
        loss += config.kl * divergence
    total = jnp.sum(of_drawn(loss * batch.weight))

    def count(values: jax.Array) -> jax.Array:
        return jnp.sum(of_drawn(values.astype(jnp.float32)))

    sums = {
        "loss": total,
        "tokens": count(drawn),
        "ratio": count(ratio),
        "clipped_low": count((ratio < low) & (batch.advantages < 0)),
        "clipped_high": count((ratio > high) & (batch.advantages > 0)),
        "rollout_ratio": count(of_rollout),
        "rollout_gap": count(jnp.abs(old - batch.drawn)),
        "rollout_cut": count(of_rollout > config.rollout_cap) if config.rollout_cap else jnp.float32(0),
        "kl": count(divergence),
    }
    return total, jax.lax.stop_gradient(sums)


def _mean_of_answer(values: jax.Array, drawn: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns at each drawn token the mean over the drawn tokens of its segment; [b, s]."""

    def of_row(values: jax.Array, drawn: jax.Array, segments: jax.Array) -> jax.Array:
        count = len(segments) + 1  # of segments, at most
        sums = jax.ops.segment_sum(jnp.where(drawn, values, 0), segments, count)
        numbers = jax.ops.segment_sum(drawn.astype(jnp.float32), segments, count)
        return (sums / jnp.maximum(numbers, 1))[segments]

    return jax.vmap(of_row)(values, drawn, segment_ids)
