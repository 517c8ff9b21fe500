"""The programs of post-training by reward on packed answers: an update, and log-probabilities of drawn tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moss_audio_jax.model import MossAudio
from train.config import OptimizerConfig, StepConfig
from train.loss import blockwise_logprobs
from train.optimizer import Parameters, learning_rate
from train.reinforce.config import ObjectiveConfig
from train.reinforce.objective import PolicyBatch, Sums, policy_loss
from train.state import TrainState, model_of
from train.step import Metrics, hidden_states, sums_and_gradients, updated

COUNTS = ("loss", "tokens", "ratio", "clipped_low", "clipped_high", "rollout_ratio", "rollout_gap", "rollout_cut", "kl")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 7), donate_argnums=5)
def policy_step(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    temperature: float,
    state: TrainState,
    batch: PolicyBatch,
    is_last: bool,
) -> tuple[TrainState, Metrics]:
    """Returns the state after an update, and its metrics: means over the drawn tokens.

    batch: in microbatches. temperature: that the tokens were drawn at. is_last: of the updates of a step; the state
    counts it. There is no dropout: the ratio to old probabilities would be mostly that of two masks.
    """
    sums, gradients = policy_sums(graphdef, config, objective, temperature, state.trainable, state.frozen, batch)
    step, rate = state.step, learning_rate(optimizer, state.step)
    state, of_update = updated(graphdef, config, optimizer, state, sums["loss"], gradients, rate)
    if not is_last:
        state = dataclasses.replace(state, step=step)
    means = {name: value / sums["tokens"] for name, value in sums.items() if name not in ("loss", "tokens")}
    return state, {"loss": sums["loss"], "tokens": sums["tokens"], **means, **of_update}


def policy_sums(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    objective: ObjectiveConfig,
    temperature: float,
    trainable: Parameters,
    frozen: Parameters,
    batch: PolicyBatch,
) -> tuple[Sums, Parameters]:
    """Returns the sums of `policy_loss` and of the entropy over all microbatches, and the gradients by path."""

    def part(
        model: MossAudio, microbatch: PolicyBatch, key: jax.Array, trainable: Parameters
    ) -> tuple[jax.Array, Sums]:
        hidden = hidden_states(model, microbatch.inputs, config, trainable, None).last
        logprobs, entropy = _logprobs(model, hidden, microbatch, config, temperature)
        total, sums = policy_loss(logprobs, microbatch, objective)
        return total, sums | {"entropy": jnp.sum(jnp.where(microbatch.loss_mask > 0, entropy, 0))}

    start = {name: jnp.float32(0) for name in (*COUNTS, "entropy")}
    return sums_and_gradients(graphdef, config, trainable, frozen, batch, jax.random.key(0), part, start)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def policy_logprobs(
    graphdef: nnx.GraphDef, config: StepConfig, temperature: float, parameters: Parameters, batch: PolicyBatch
) -> Float[Array, "microbatches b s"]:
    """Computes the log-probabilities of all targets. parameters: in the compute dtype. batch: in microbatches."""

    def of_microbatch(microbatch: PolicyBatch) -> jax.Array:
        model = model_of(graphdef, parameters)
        hidden = model.hidden_states(microbatch.inputs).last
        return _logprobs(model, hidden, microbatch, config, temperature)[0]

    return jax.lax.map(of_microbatch, batch)


def _logprobs(
    model: MossAudio, hidden: jax.Array, batch: PolicyBatch, config: StepConfig, temperature: float
) -> tuple[jax.Array, jax.Array]:
    return blockwise_logprobs(hidden, model.head, batch.targets, temperature=temperature, block=config.loss_chunk)
