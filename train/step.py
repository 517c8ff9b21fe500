"""The training step: a state and a batch in, the next state and metrics out.

    loss = sum over supervised tokens / number of them, both over the global batch with all its microbatches
    gradients with respect to the trainable parameters, accumulated over microbatches, float32 by default
    AdamW or another optimizer; a step whose loss or gradient norm is not finite or a spike is skipped

The network computes in copies of the float32 masters in the compute dtype. On a mesh that `jax.set_mesh` made current,
all arrays are sharded as `sharding.RULES` says.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moss_audio_jax.config import ADAPTER_LEAVES
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.language_model import HiddenStates
from moss_audio_jax.model import MossAudio
from train.config import OptimizerConfig, StepConfig
from train.data.packing import TrainingBatch
from train.loss import LossSums, blockwise_cross_entropy
from train.optimizer import Parameters, apply_gradients, by_part, learning_rate, moving_average, select
from train.state import RecentValues, TrainState, constrain_to_rules, model_of

Metrics = dict[str, jax.Array]
Sums = TypeVar("Sums")
LEAST_PROGRESS = 1e-6  # a first batch may hold only beginnings of long texts, and then no example is finished


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5), donate_argnums=3)
def train_step(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    optimizer: OptimizerConfig,
    state: TrainState,
    batch: TrainingBatch,
    num_groups: int = 0,
    host_figures: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the next state, and scalar metrics of this step.

    graphdef: of a MossAudio with these parameters. state: donated.
    batch: in microbatches, see `split_microbatches`.
    num_groups: of the mixture; from 2 on, the metrics have the loss and the supervised tokens of each group, [groups].
    host_figures: two arrays [devices, figures], of which the metrics have the sums and the maxima over devices
        (`distributed.HostSums`).
    A step whose loss or gradient norm is a spike or not finite (a batch without supervised tokens has no loss) leaves
    parameters and moments unchanged, bit for bit, and counts as skipped.
    """
    dropout_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    arguments = (graphdef, config, state.trainable, state.frozen, batch, dropout_key)
    (sums, audio_sums), gradients = loss_and_gradients(*arguments, num_groups)
    loss = sums.loss / sums.tokens
    phase = state.phase if batch.phase is None else jnp.maximum(state.phase, batch.phase.max())
    rate = learning_rate(optimizer, state.step, expected_steps(state.step, batch.progress))
    state, of_update = updated(graphdef, config, optimizer, state, loss, gradients, rate, phase)
    metrics: Metrics = {
        "loss": loss,
        "z": sums.z / sums.tokens,
        "accuracy": sums.correct / sums.tokens,
        "tokens": sums.tokens,
        **of_update,
    }
    if sums.by_group is not None:
        group_loss, group_tokens = sums.by_group
        metrics |= {"loss_of_group": group_loss / group_tokens, "tokens_of_group": group_tokens}
    if config.audio_label_weight:
        metrics["audio_label_loss"] = audio_sums.loss / audio_sums.tokens
        metrics["audio_label_accuracy"] = audio_sums.correct / audio_sums.tokens
    if host_figures is not None:
        metrics |= {"host_sums": host_figures[0].sum(0), "host_greatest": host_figures[1].max(0)}
    return state, metrics


def updated(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    optimizer: OptimizerConfig,
    state: TrainState,
    loss: jax.Array,
    gradients: Parameters,
    rate: jax.Array,
    phase: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after a step of this loss and these gradients, and the update's metrics.

    rate: the schedule's. phase: the latest of the mixture; None: that of the state.
    """
    # 1. Is it a spike? The answer stays on the devices.
    gradients = {path: leaf.astype(jnp.float32) for path, leaf in gradients.items()}
    norm = optax.tree.norm(gradients)
    accepted, watched = _judged(state, state.phase if phase is None else phase, loss, norm, config)

    # 2. The update. A skipped step computes it as well, and keeps the old arrays.
    trainable, moments = apply_gradients(optimizer, state.trainable, state.moments, gradients, rate, accepted)
    ema = state.ema
    if ema is not None:
        ema = select(accepted, moving_average(optimizer, ema, trainable, state.step - state.skipped), ema)

    skipped = 1 - accepted.astype(jnp.int32)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        trainable=trainable,
        moments=moments,
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        ema=ema,
        **watched,
    )
    metrics: Metrics = {
        "grad_norm": norm,
        **{f"grad_norm/{part}": optax.tree.norm(leaves) for part, leaves in by_part(gradients).items()},
        "learning_rate": rate,
        "skipped": skipped,
        "skipped_total": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    return constrain_to_rules(graphdef, state.trainable | state.frozen, state), metrics


def expected_steps(step: jax.Array, progress: jax.Array | None) -> jax.Array | None:
    """Estimates the total steps of a run that ends with its data; None for a run of a given number of steps.

    step: counted from 0. progress: of the batch of that step (`TrainingBatch`).
    """
    return None if progress is None else (step + 1) / jnp.maximum(progress.mean(), LEAST_PROGRESS)


def _judged(
    state: TrainState, phase: jax.Array, loss: jax.Array, norm: jax.Array, config: StepConfig
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns True if a step is accepted, and the fields of the next state that define a spike."""
    sigma, window = config.spike_sigma, config.spike_window
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    empty = (RecentValues.empty(), RecentValues.empty())
    recent = select(phase > state.phase, empty, (state.recent_loss, state.recent_norm))
    spike = finite & ~((loss <= recent[0].limit(sigma, window)) & (norm <= recent[1].limit(sigma, window)))
    lasting = spike & (state.spikes_in_a_row >= config.spike_patience)
    recent = select(lasting, empty, recent)
    skipped_spike = spike & ~lasting
    return finite & ~skipped_spike, {
        "recent_loss": recent[0].record(loss, sigma, window),
        "recent_norm": recent[1].record(norm, sigma, window),
        "phase": phase,
        "spikes_in_a_row": (state.spikes_in_a_row + 1) * skipped_spike,
    }


class TokenCounts(NamedTuple):
    """Numbers of tokens in a global batch, which the losses are divided by."""

    supervised: jax.Array
    labelled: jax.Array | None  # audio tokens with a label, at least 1; None without the auxiliary loss


def loss_and_gradients(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    trainable: Parameters,
    frozen: Parameters,
    batch: TrainingBatch,
    dropout_key: jax.Array,
    num_groups: int = 0,
) -> tuple[tuple[LossSums, LossSums], Parameters]:
    """Returns the sums over all microbatches, of supervised tokens and of audio labels, and the gradients by path.

    The gradients are of `microbatch_loss`, summed over microbatches, with respect to `trainable`.
    num_groups: from 2 on, the sums of supervised tokens are by group of the mixture too.
    """
    num_groups = num_groups if num_groups > 1 else 0
    labelled = jnp.maximum((batch.audio_labels >= 0).sum(), 1) if config.audio_label_weight else None
    counts = TokenCounts(batch.loss_mask.sum(), labelled)

    def part(model: MossAudio, microbatch: TrainingBatch, key: jax.Array, trainable: Parameters):
        return microbatch_loss(
            model, microbatch, config, key, trainable=trainable, counts=counts, num_groups=num_groups
        )

    start = LossSums.zero(num_groups), LossSums.zero()
    return sums_and_gradients(graphdef, config, trainable, frozen, batch, dropout_key, part, start)


def sums_and_gradients(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    trainable: Parameters,
    frozen: Parameters,
    batch: Any,
    dropout_key: jax.Array,
    part: Callable[[MossAudio, Any, jax.Array, Parameters], tuple[jax.Array, Sums]],
    start: Sums,
) -> tuple[Sums, Parameters]:
    """Adds up an objective's gradients with respect to `trainable`, and what it counts, over microbatches.

    batch: in microbatches; all its arrays have them as their first axis.
    part: a microbatch's part of the objective: (model in the compute dtype, microbatch, its dropout key, masters) ->
        (value, sums). start: sums of nothing.
    """

    def objective(trainable: Parameters, microbatch: Any, key: jax.Array):
        # Cast here, so that the gradients are those of the float32 masters.
        return part(model_of(graphdef, in_compute_dtype(trainable | frozen, config)), microbatch, key, trainable)

    def add_microbatch(carry, item):
        index, microbatch = item
        key = jax.random.fold_in(dropout_key, index)
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(trainable, microbatch, key)
        gradients = {path: leaf.astype(config.gradient_dtype) for path, leaf in gradients.items()}
        gradients = constrain_to_rules(graphdef, trainable | frozen, gradients)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    zeros = {path: jnp.zeros_like(leaf, config.gradient_dtype) for path, leaf in trainable.items()}
    # A scan over microbatches holds the activations of one at a time.
    microbatches = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    return jax.lax.scan(add_microbatch, (start, zeros), (microbatches, batch))[0]


def microbatch_loss(
    model: MossAudio,
    batch: TrainingBatch,
    config: StepConfig,
    key: jax.Array,
    *,
    trainable: Parameters,
    counts: TokenCounts,
    num_groups: int = 0,
) -> tuple[jax.Array, tuple[LossSums, LossSums]]:
    """Computes a microbatch's part of the objective, and its sums over supervised tokens and over audio labels.

        sum over supervised tokens of (-log p(target) + z_loss log(Z)^2) / counts.supervised
        + audio_label_weight * sum over labelled audio tokens of -log p(label) / counts.labelled

    The second line is taken twice: of the embedded input and of the hidden states after half of the LM layers. Both
    pass through the model's last norm and head.

    model: in the compute dtype. batch: one microbatch. key: of this microbatch's dropout.
    trainable: masters of the parameters that get gradients, by path. counts: of the global batch.
    """
    hidden = hidden_states(model, batch.inputs, config, trainable, key, middle=bool(config.audio_label_weight))
    cross_entropy = functools.partial(blockwise_cross_entropy, head=model.head, block=config.loss_chunk)
    total, sums = cross_entropy(
        hidden.last,
        targets=batch.targets,
        loss_mask=batch.loss_mask,
        groups=batch.group,
        num_groups=num_groups,
        z_loss=config.z_loss,
    )
    total, label_sums = total / counts.supervised, LossSums.zero()
    if counts.labelled is not None:
        is_labelled = (batch.audio_labels >= 0).astype(jnp.float32)
        for states in (hidden.embedded, hidden.middle):
            assert states is not None  # as `middle` was given
            # The sums that are kept, for the metrics, are those of the middle layer.
            label_total, label_sums = cross_entropy(states, targets=batch.audio_labels, loss_mask=is_labelled)
            total += config.audio_label_weight * label_total / counts.labelled
    return total, (sums, label_sums)


def hidden_states(
    model: MossAudio,
    inputs: ModelInputs,
    config: StepConfig,
    trainable: Parameters,
    dropout_key: jax.Array | None,
    *,
    middle: bool = False,
) -> HiddenStates:
    """Runs the network as a training step does. dropout_key: None: no dropout. middle: with the middle layer's."""
    layers = model.config.language_config.num_hidden_layers
    float32_sums = config.reduce_dtype == "float32" and config.compute_dtype != "float32"
    return model.hidden_states(
        inputs,
        middle=(layers + 1) // 2 if middle else None,
        decoder_frozen=not any(map(_is_of_a_decoder_layer, trainable)),
        masters=trainable if float32_sums else None,
        dropout_key=dropout_key,
        encoder_dropout=config.encoder_dropout and any(path.startswith("audio_encoder.") for path in trainable),
        remat=config.remat,
    )


def in_compute_dtype(parameters: Parameters, config: StepConfig) -> Parameters:
    """Casts parameters to the dtype that the network computes in; int8 kernels stay as they are."""
    is_int8 = int8_kernels(parameters)
    return {path: leaf if path in is_int8 else leaf.astype(config.compute_dtype) for path, leaf in parameters.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def validation_sums(
    graphdef: nnx.GraphDef, config: StepConfig, parameters: Parameters, batch: TrainingBatch
) -> LossSums:
    """Computes the loss sums over the supervised tokens of a batch, without dropout.

    parameters: in the compute dtype. batch: without microbatches.
    """
    model = model_of(graphdef, parameters)
    hidden = model.hidden_states(batch.inputs).last
    return blockwise_cross_entropy(hidden, model.head, batch.targets, batch.loss_mask, block=config.loss_chunk)[1]


def _is_of_a_decoder_layer(path: str) -> bool:
    """True for a decoder layer's own parameter; an adapter beside it is not its own."""
    return path.startswith("language_model.layers.") and not path.endswith(ADAPTER_LEAVES)
