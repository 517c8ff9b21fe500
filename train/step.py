"""One step of training: a batch and a state in, a state and its metrics out.

    loss = sum over supervised tokens / their number, both over the global batch and all its microbatches
    gradients by the trainable parameters alone, added up over the microbatches, in float32 unless said otherwise
    AdamW or another optimizer, unless the loss or the gradient is not finite or far above its recent values: then
        nothing moves

The masters are float32; the network computes in a copy of them in the compute dtype. On a mesh that `jax.set_mesh` made
current, parameters, gradients and moments lie as `sharding.RULES` says.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Int, UInt32

from moss_audio_jax.config import ADAPTER_LEAVES, LoraConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.layers import set_masters
from moss_audio_jax.lora import set_adapter_dropout
from moss_audio_jax.model import MossAudio
from moss_audio_jax.sharding import constrain, num_parts, partition_spec
from moss_audio_jax.weights.checkpoint import abstract_parameters, parameters_of, unflatten
from train.config import StepConfig
from train.data.packing import TrainingBatch
from train.loss import LossSums, chunked_cross_entropy
from train.optimizer import (
    OptimizerConfig,
    Parameters,
    apply_gradients,
    by_part,
    gradient_transformation,
    learning_rate,
    moving_average,
    split_frozen,
)

Metrics = dict[str, jax.Array]
LEAST_PROGRESS = 1e-6  # a batch may hold nothing but the beginnings of long texts, none of which is behind then
ADAPTER_DROPOUT = 1  # makes its keys others than the encoder's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentValues:
    """Mean and variance of a metric: of all its values at first, then weighted towards the last `window`."""

    count: Int[Array, ""]
    mean: Float[Array, ""]
    variance: Float[Array, ""]

    @classmethod
    def empty(cls) -> "RecentValues":
        return cls(jnp.int32(0), jnp.float32(0), jnp.float32(0))

    def limit(self, config: StepConfig) -> Float[Array, ""]:
        """Above this a value is a spike. The rule of OLMo's SkipStepOptimizer, with running moments."""
        if config.spike_sigma == 0:
            return jnp.float32(jnp.inf)
        highest = self.mean + config.spike_sigma * jnp.sqrt(self.variance)
        return jnp.where(self.count >= config.spike_window // 2, highest, jnp.inf)

    def record(self, value: Float[Array, ""], config: StepConfig) -> "RecentValues":
        """A spike is recorded as the limit: one can't hide the next, and a lasting rise is let through in time."""
        share = 1 / jnp.minimum(self.count + 1, config.spike_window)
        distance = jnp.minimum(value, self.limit(config)) - self.mean
        recorded = RecentValues(
            self.count + 1, self.mean + share * distance, (1 - share) * (self.variance + share * distance**2)
        )
        return _select(jnp.isfinite(value), recorded, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and the frozen parameters, which it hands on as they are.

    step: batches read so far, skipped ones included; it sets the learning rate and the dropout.
    trainable: float32 masters by path; frozen: in the dtype they came in.
    rng: key data of the run's dropout, the same at every step.
    phase: the latest of the mixture so far. spikes_in_a_row: those that were skipped just before.
    ema: float32 moving averages of the trainable parameters by path, where `OptimizerConfig.ema_decay` asks for them.
    """

    step: Int[Array, ""]
    trainable: Parameters
    frozen: Parameters
    moments: optax.OptState
    rng: UInt32[Array, "2"]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    recent_loss: RecentValues
    recent_norm: RecentValues
    phase: Int[Array, ""]
    spikes_in_a_row: Int[Array, ""]
    ema: Parameters | None = None


def initial_parameters(config: MossAudioConfig, *, seed: int = 0, mesh: Mesh | None = None) -> Parameters:
    """Random float32 parameters, each made where it will lie; the same on every mesh."""
    shardings = {path: leaf.sharding for path, leaf in abstract_parameters(config, jnp.float32, mesh).items()}
    return jax.jit(lambda: parameters_of(MossAudio(config, rngs=nnx.Rngs(seed))), out_shardings=shardings)()


def new_state(
    parameters: Parameters,
    config: MossAudioConfig,
    optimizer: OptimizerConfig,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step.

    It takes the parameters over: `train_step` donates its state, so arrays that are in place and of the right dtype
    become the masters themselves and can't be used elsewhere.
    """
    state = _first_state(parameters, config.lora, optimizer, seed)
    dtypes = {path: leaf.dtype for path, leaf in state.frozen.items()}
    target = abstract_state(config, optimizer, frozen_dtypes=dtypes, mesh=mesh)
    return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), state, target)


def abstract_state(
    config: MossAudioConfig,
    optimizer: OptimizerConfig,
    *,
    frozen_dtypes: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Shape, dtype and sharding of every array of a state: what a restore is asked for.

    frozen_dtypes: by path; float32 where nothing is said. Moments and averages are sharded like their parameters;
    scalars, and moments of other shapes (Adafactor's rows and columns), are replicated.
    """
    parameters = abstract_parameters(config, jnp.float32, mesh)
    for path, dtype in (frozen_dtypes or {}).items():
        parameters[path] = parameters[path].update(dtype=dtype)
    everywhere = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def placed(keys: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parameter = parameters.get(_parameter_path(keys))
        if parameter is None or parameter.shape != leaf.shape:
            return leaf.update(sharding=everywhere)
        return leaf.update(sharding=parameter.sharding)

    state = jax.eval_shape(lambda arrays: _first_state(arrays, config.lora, optimizer, seed=0), parameters)
    return jax.tree_util.tree_map_with_path(placed, state)


def _first_state(parameters: Parameters, lora: LoraConfig | None, optimizer: OptimizerConfig, seed: int) -> TrainState:
    trainable, frozen = split_frozen(parameters, optimizer.freeze, lora)
    trainable = {path: leaf.astype(jnp.float32) for path, leaf in trainable.items()}
    return TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        frozen=frozen,
        moments=gradient_transformation(optimizer).init(trainable),
        rng=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
        recent_loss=RecentValues.empty(),
        recent_norm=RecentValues.empty(),
        phase=jnp.int32(0),
        spikes_in_a_row=jnp.int32(0),
        ema={path: jnp.copy(leaf) for path, leaf in trainable.items()} if optimizer.ema_decay else None,
    )


def with_new_data(state: TrainState) -> TrainState:
    """The state to resume from with other data than before: what counts as a spike is found out again."""
    watched: Any = {name: getattr(state, name) for name in ("recent_loss", "recent_norm", "phase", "spikes_in_a_row")}
    places: Any = jax.tree.map(lambda leaf: leaf.sharding, watched)
    fresh = jax.jit(lambda: jax.tree.map(jnp.zeros_like, watched), out_shardings=places)()
    return dataclasses.replace(state, **fresh)


def split_microbatches(batch: TrainingBatch, count: int) -> TrainingBatch:
    """[b, ...] -> [count, b / count, ...], for `train_step`. On the host, before the batch goes to its devices."""
    rows = batch.weights.shape[0]
    if rows % count:
        raise MossAudioError(f"a batch of {rows} sequences can't be cut into {count} equal microbatches")
    return jax.tree.map(lambda x: x.reshape(count, rows // count, *x.shape[1:]), batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where every array of a batch in microbatches lies: its sequences over the data-parallel axes."""
    return NamedSharding(mesh, partition_spec((None, "batch"), mesh))


def require_even_batch(sequences: int, microbatches: int, mesh: Mesh) -> None:
    """Raises MossAudioError unless every device gets as many sequences of a microbatch as any other."""
    parts = num_parts("batch", mesh)
    if sequences % (microbatches * parts):
        raise MossAudioError(
            f"a batch of {sequences} sequences in {microbatches} microbatches can't be cut over {parts} data-parallel "
            f"devices: make data.batch_size a multiple of {microbatches * parts}"
        )


def abstract_batch(
    model: MossAudioConfig, sequences: int, tokens: int, chunks: int, *, microbatches: int = 1, mesh: Mesh
) -> TrainingBatch:
    """Shape, dtype and place of every array of a batch in microbatches: to compile for, without any data."""
    require_even_batch(sequences, microbatches, mesh)
    sharding = batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((microbatches, sequences // microbatches, *shape), dtype, sharding=sharding)

    ids, counts = array(jnp.int32, tokens), array(jnp.int32, chunks)
    frames = model.audio_config.chunk_frames
    assert frames is not None  # as `SampleMaker` demands
    audio = array(jnp.bfloat16, chunks, frames, model.audio_config.num_mel_bins)
    inputs = ModelInputs(ids, ids, ids, ids, audio, counts, counts)
    weights = array(jnp.float32, tokens)
    return TrainingBatch(inputs, targets=ids, weights=weights, heard=ids, group=ids, phase=array(jnp.int32))


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
    """The next state, and scalars about this step.

    graphdef: of a MossAudio with these parameters. batch: in microbatches, see `split_microbatches`.
    host_figures: [devices, figures] to be summed, and of which the metrics have the greatest (`distributed.HostSums`).
    num_groups: of the mixture; from 2 on, the metrics have the loss of each and the tokens it was taken over, [groups].
    A step whose loss or gradient norm is not finite (a batch without supervised tokens has none) or a spike leaves
    parameters and moments as they were, bit for bit, and counts as skipped.
    """
    dropout_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    arguments = (graphdef, config, state.trainable, state.frozen, batch, dropout_key)
    (sums, heard), gradients = loss_and_gradients(*arguments, num_groups)
    gradients = {path: leaf.astype(jnp.float32) for path, leaf in gradients.items()}
    loss, norm = sums.loss / sums.weight, optax.tree.norm(gradients)
    phase = state.phase if batch.phase is None else jnp.maximum(state.phase, batch.phase.max())
    accepted, watched = _judged(state, phase, loss, norm, config)

    rate = learning_rate(optimizer, state.step, expected_steps(state.step, batch.progress))
    moved = apply_gradients(optimizer, state.trainable, state.moments, gradients, rate)
    trainable, moments = _select(accepted, moved, (state.trainable, state.moments))
    ema = state.ema
    if ema is not None:
        ema = _select(accepted, moving_average(optimizer, ema, trainable, state.step - state.skipped), ema)

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
        "loss": loss,
        "z": sums.z / sums.weight,
        "accuracy": sums.correct / sums.weight,
        "tokens": sums.weight,
        "grad_norm": norm,
        **{f"grad_norm/{part}": optax.tree.norm(leaves) for part, leaves in by_part(gradients).items()},
        "learning_rate": rate,
        "skipped": skipped,
        "skipped_total": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    if sums.by_group is not None:
        group_loss, group_tokens = sums.by_group
        metrics |= {"loss_of_group": group_loss / group_tokens, "tokens_of_group": group_tokens}
    if config.audio_label_weight:
        metrics |= {"heard_loss": heard.loss / heard.weight, "heard_accuracy": heard.correct / heard.weight}
    if host_figures is not None:
        metrics |= {"host_sums": host_figures[0].sum(0), "host_greatest": host_figures[1].max(0)}
    return _placed(graphdef, state.trainable | state.frozen, state), metrics


def expected_steps(step: jax.Array, progress: jax.Array | None) -> jax.Array | None:
    """How many steps a run will have that ends with its data, by what is behind; None if it ends by its steps.

    step: counted from 0. progress: of the batch of that step (`TrainingBatch`).
    """
    return None if progress is None else (step + 1) / jnp.maximum(progress.mean(), LEAST_PROGRESS)


def _judged(
    state: TrainState, phase: jax.Array, loss: jax.Array, norm: jax.Array, config: StepConfig
) -> tuple[jax.Array, dict[str, Any]]:
    """Whether a step is accepted, and all of the next state that says what a spike is."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    empty = (RecentValues.empty(), RecentValues.empty())
    recent = _select(phase > state.phase, empty, (state.recent_loss, state.recent_norm))
    spike = finite & ~((loss <= recent[0].limit(config)) & (norm <= recent[1].limit(config)))
    lasting = spike & (state.spikes_in_a_row >= config.spike_patience)
    recent = _select(lasting, empty, recent)
    skipped_spike = spike & ~lasting
    return finite & ~skipped_spike, {
        "recent_loss": recent[0].record(loss, config),
        "recent_norm": recent[1].record(norm, config),
        "phase": phase,
        "spikes_in_a_row": (state.spikes_in_a_row + 1) * skipped_spike,
    }


def loss_and_gradients(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    trainable: Parameters,
    frozen: Parameters,
    batch: TrainingBatch,
    dropout_key: jax.Array,
    num_groups: int = 0,
) -> tuple[tuple[LossSums, LossSums], Parameters]:
    """Sums over all microbatches, of answers and of what is heard, and the gradients by `trainable`.

    The gradients are of the mean over supervised tokens and, at its weight, of that over audio tokens with labels.
    num_groups: from 2 on, the sums of answers are by group of the mixture too.
    """
    num_groups = num_groups if num_groups > 1 else 0
    drops = config.encoder_dropout and any(path.startswith("audio_encoder.") for path in trainable)
    supervised = batch.weights.sum()
    labelled = jnp.maximum((batch.heard >= 0).sum(), 1) if config.audio_label_weight else None

    def objective(trainable: Parameters, microbatch: TrainingBatch, key: jax.Array):
        copies = in_compute_dtype(trainable | frozen, config)
        model, inputs = _model(graphdef, copies), microbatch.inputs
        if config.reduce_dtype == "float32" and config.compute_dtype != "float32":
            set_masters(model, trainable)
        model.language_model.frozen = not any(map(_is_of_a_decoder_layer, trainable))
        if model.config.lora is not None and model.config.lora.dropout:
            set_adapter_dropout(model, jax.random.fold_in(key, ADAPTER_DROPOUT))
        x, deepstack = model.embed(inputs, dropout_key=key if drops else None, remat=config.remat)
        rest = (inputs.positions, inputs.segment_ids, deepstack)
        language, total_layers = model.language_model, model.config.language_config.num_hidden_layers
        half = (total_layers + 1) // 2 if config.audio_label_weight else total_layers
        early = language.run_layers(range(half), x, *rest, remat=config.remat)
        hidden = language.norm(language.run_layers(range(half, total_layers), early, *rest, remat=config.remat))
        loss = functools.partial(chunked_cross_entropy, head=model.head, chunk=config.loss_chunk)
        answers = {"targets": microbatch.targets, "weights": microbatch.weights, "groups": microbatch.group}
        total, sums = loss(hidden, **answers, num_groups=num_groups, z_loss=config.z_loss)
        total, heard_sums = total / supervised, LossSums.zero()
        if labelled is not None:
            heard = microbatch.heard
            weights = (heard >= 0).astype(jnp.float32)
            for at_audio in (language.norm(x), language.norm(early)):
                heard_total, heard_sums = loss(at_audio, targets=heard, weights=weights)
                total += config.audio_label_weight * heard_total / labelled
        return total, (sums, heard_sums)

    def add_microbatch(carry, item):
        index, microbatch = item
        key = jax.random.fold_in(dropout_key, index)
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(trainable, microbatch, key)
        gradients = {path: leaf.astype(config.gradient_dtype) for path, leaf in gradients.items()}
        gradients = _placed(graphdef, trainable | frozen, gradients)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    start = (
        (LossSums.zero(num_groups), LossSums.zero()),
        {path: jnp.zeros_like(leaf, config.gradient_dtype) for path, leaf in trainable.items()},
    )
    return jax.lax.scan(add_microbatch, start, (jnp.arange(batch.weights.shape[0]), batch))[0]


def in_compute_dtype(parameters: Parameters, config: StepConfig) -> Parameters:
    """What the network computes with: copies of the masters, and kernels in int8 as they are."""
    is_int8 = int8_kernels(parameters)
    return {path: leaf if path in is_int8 else leaf.astype(config.compute_dtype) for path, leaf in parameters.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def validation_sums(
    graphdef: nnx.GraphDef, config: StepConfig, parameters: Parameters, batch: TrainingBatch
) -> LossSums:
    """Sums over the answers of a batch without microbatches: the loss of a step, with no dropout and no gradient.

    parameters: in the dtype to compute in.
    """
    model = _model(graphdef, parameters)
    hidden = model.hidden_states(batch.inputs)
    return chunked_cross_entropy(hidden, model.head, batch.targets, batch.weights, chunk=config.loss_chunk)[1]


def _is_of_a_decoder_layer(path: str) -> bool:
    """Whether a parameter is a layer's own: an adapter beside it is not."""
    return path.startswith("language_model.layers.") and not path.endswith(ADAPTER_LEAVES)


def _model(graphdef: nnx.GraphDef, parameters: Parameters) -> MossAudio:
    return nnx.merge(graphdef, nnx.State(unflatten(parameters)))


def _select(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, condition), if_true, if_false)


def _parameter_path(keys: KeyPath) -> str:
    """The parameter that an array of a state belongs to: what is kept by parameter is a dict by path, and innermost."""
    return str(getattr(keys[-1], "key", "")) if keys else ""


def _placed(graphdef: nnx.GraphDef, parameters: Parameters, tree: Any) -> Any:
    """Pins arrays to the current mesh, as `abstract_state` says where they lie."""
    declared = nnx.to_flat_state(nnx.state(_model(graphdef, parameters), nnx.Param))
    axes = {".".join(map(str, path)): leaf.get_metadata("logical_axes") for path, leaf in declared}

    def placed(keys: KeyPath, x: jax.Array) -> jax.Array:
        path = _parameter_path(keys)
        like_it = path in axes and x.shape == parameters[path].shape
        return constrain(x, *(axes[path] if like_it else ()))

    return jax.tree_util.tree_map_with_path(placed, tree)
