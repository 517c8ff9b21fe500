"""The training state: everything a step changes, and the frozen parameters beside it.

The masters are float32. On a mesh, parameters, gradients and moments are sharded as `sharding.RULES` says; scalars are
replicated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Int, UInt32

from moss_audio_jax.config import LoraConfig, MossAudioConfig
from moss_audio_jax.model import MossAudio
from moss_audio_jax.sharding import constrain
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights.parameters import abstract_parameters
from train.config import OptimizerConfig
from train.optimizer import Parameters, gradient_transformation, select, split_frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentValues:
    """Running mean and variance of a metric, over about the last `window` values.

    The first `window` values all weigh the same; after them the weights decay exponentially.
    """

    count: Int[Array, ""]
    mean: Float[Array, ""]
    variance: Float[Array, ""]

    @classmethod
    def empty(cls) -> "RecentValues":
        return cls(jnp.int32(0), jnp.float32(0), jnp.float32(0))

    def limit(self, sigma: float, window: int) -> Float[Array, ""]:
        """Value above which the next one is a spike: mean + sigma * deviation, infinite before half a window.

        sigma: 0 makes every limit infinite. The rule is that of OLMo's SkipStepOptimizer, with running moments.
        """
        if sigma == 0:
            return jnp.float32(jnp.inf)
        highest = self.mean + sigma * jnp.sqrt(self.variance)
        return jnp.where(self.count >= window // 2, highest, jnp.inf)

    def record(self, value: Float[Array, ""], sigma: float, window: int) -> "RecentValues":
        """Returns the moments with `value` in them; a value that is not finite changes nothing.

        A spike is recorded as the limit: one spike can't hide the next, and a lasting rise is accepted in time.
        """
        share = 1 / jnp.minimum(self.count + 1, window)
        distance = jnp.minimum(value, self.limit(sigma, window)) - self.mean
        recorded = RecentValues(
            self.count + 1, self.mean + share * distance, (1 - share) * (self.variance + share * distance**2)
        )
        return select(jnp.isfinite(value), recorded, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays that a step changes, and the frozen parameters, which it returns unchanged.

    step: batches read so far, skipped ones included; it sets the learning rate and the dropout.
    trainable: float32 masters by path. frozen: by path, in the dtype they were given in.
    rng: key data of the run's dropout, the same at every step.
    skipped, skipped_in_a_row: skipped steps in all, and directly before this one.
    recent_loss, recent_norm: moments of the loss and the gradient norm, which define a spike.
    phase: the latest phase of the mixture so far. spikes_in_a_row: spikes skipped directly before this step.
    ema: float32 moving averages of the trainable parameters by path, if `OptimizerConfig.ema_decay` is set.
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


def new_state(
    parameters: Parameters,
    config: MossAudioConfig,
    optimizer: OptimizerConfig,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> TrainState:
    """Returns the state before the first step, on the devices of `mesh`.

    It takes ownership of `parameters`: arrays that already have the right dtype and sharding become the masters
    themselves, and `train_step` donates them.
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
    """Returns shape, dtype and sharding of every array of a state: the target of a restore.

    frozen_dtypes: by path; float32 for paths that are not given. Moments and averages are sharded like their
    parameters; scalars, and moments of other shapes (Adafactor's rows and columns), are replicated.
    """
    parameters = abstract_parameters(config, jnp.float32, mesh)
    for path, dtype in (frozen_dtypes or {}).items():
        parameters[path] = parameters[path].update(dtype=dtype)
    replicated = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def with_sharding(keys: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parameter = parameters.get(_parameter_path(keys))
        if parameter is None or parameter.shape != leaf.shape:
            return leaf.update(sharding=replicated)
        return leaf.update(sharding=parameter.sharding)

    state = jax.eval_shape(lambda arrays: _first_state(arrays, config.lora, optimizer, seed=0), parameters)
    return jax.tree_util.tree_map_with_path(with_sharding, state)


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
    """Returns the state to resume from with other data: the moments that define a spike restart."""
    watched: Any = {name: getattr(state, name) for name in ("recent_loss", "recent_norm", "phase", "spikes_in_a_row")}
    shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, watched)
    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, watched), out_shardings=shardings)()
    return dataclasses.replace(state, **zeros)


def model_of(graphdef: nnx.GraphDef, parameters: Parameters) -> MossAudio:
    """Returns the model with these parameters, by path."""
    return nnx.merge(graphdef, nnx.State(unflatten(parameters)))


def constrain_to_rules(graphdef: nnx.GraphDef, parameters: Parameters, tree: Any) -> Any:
    """Constrains the arrays of a tree on the current mesh to the shardings of `abstract_state`.

    tree: a state, or any tree whose innermost dicts are by parameter path, such as gradients.
    """
    declared = nnx.to_flat_state(nnx.state(model_of(graphdef, parameters), nnx.Param))
    axes = {".".join(map(str, path)): leaf.get_metadata("logical_axes") for path, leaf in declared}

    def constrained(keys: KeyPath, x: jax.Array) -> jax.Array:
        path = _parameter_path(keys)
        is_like_parameter = path in axes and x.shape == parameters[path].shape
        return constrain(x, *(axes[path] if is_like_parameter else ()))

    return jax.tree_util.tree_map_with_path(constrained, tree)


def _parameter_path(keys: KeyPath) -> str:
    """Path of the parameter that an array of a state belongs to: the innermost dicts of a state are by path."""
    return str(getattr(keys[-1], "key", "")) if keys else ""
