"""Freezing, the learning-rate schedule, and the optimizers AdamW, Adafactor and Muon.

Parameters are dicts by path, such as `language_model.layers.mlp.up_proj.kernel`. The path alone decides if a parameter
is frozen, its learning rate and its weight decay. The optimizers get trainable parameters only: a frozen one has no
gradient and no moments, and does not count in the norm of clipping.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from moss_audio_jax.config import LoraConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.patterns import matches, require_matches

Parameters = dict[str, Any]
Schedule = Literal["cosine", "wsd"]
OptimizerName = Literal["adamw", "adafactor", "muon"]

# First name of a path, its part of the model -> the field of OptimizerConfig that scales its learning rate.
RATE_FIELDS = {
    "audio_encoder": "encoder_rate",
    "audio_adapter": "adapter_rate",
    "deepstack_audio_merger_list": "adapter_rate",
    "language_model": "language_model_rate",
    "lm_head": "language_model_rate",
}
# First name of a path -> name of its part in the metrics of gradient norms.
PART_NAMES = {
    "audio_encoder": "encoder",
    "audio_adapter": "adapter",
    "deepstack_audio_merger_list": "deepstack",
    "language_model": "language_model",
    "lm_head": "language_model",
}
# RMS of Muon's updates: AdamW's as measured in "Muon is Scalable for LLM Training" (arXiv 2502.16982).
MUON_RMS = 0.2
# Last names of the paths without weight decay: norm scales and all biases.
UNDECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with decoupled weight decay, a schedule and global-norm clipping.

    name: "adamw". "adafactor" keeps no first moment, and of the second one means of rows and columns, so that it takes
        next to no memory; updates are clipped to an RMS of 1, and not scaled by the parameters' own. "muon" makes the
        momentum of the layers' kernels orthogonal by Newton-Schulz iterations, scaled to AdamW's usual RMS of 0.2, so
        that AdamW's rates and decay serve; embeddings, head, convolutions, adapters of LoRA, norms and biases are
        AdamW's. It keeps one moment of the kernels instead of two, and on a mesh sends more.
    learning_rate: the schedule's peak; a part of the model learns at this times its own rate.
    encoder_rate, adapter_rate, language_model_rate: multipliers; the adapter's serves the DeepStack mergers too.
    freeze: globs over paths, such as `audio_encoder.*` or `*.embed_tokens.embedding`.
    schedule: both rise linearly for `warmup_steps`. "cosine" falls from there to the end. "wsd" (warm-up, stable,
        decay) stays at the peak and falls linearly during the last `decay_steps`: it can be prolonged at any time.
    final_fraction: of the peak, where the schedule ends and stays.
    clip_norm: gradients are scaled down to this norm, taken over all trainable parameters.
    first_moment_dtype: bfloat16 saves 2 bytes a parameter; the second moment is always float32.
    muon_momentum: Muon's, Nesterov's kind; b1 and b2 are AdamW's.
    ema_decay: keeps a moving average of the trainable parameters, float32 and 4 bytes a parameter, which evaluations
        while training use and `RUN/ema` names: after each accepted step, decay * average + (1 - decay) * parameters,
        where the decay is at most (1 + steps) / (10 + steps), so that the first parameters soon fade. 0 keeps none.
    """

    name: OptimizerName = "adamw"

    learning_rate: float = 1e-4
    encoder_rate: float = 1.0
    adapter_rate: float = 1.0
    language_model_rate: float = 1.0
    freeze: tuple[str, ...] = ()
    schedule: Schedule = "cosine"
    total_steps: int = 10_000
    warmup_steps: int = 100
    decay_steps: int = 1_000
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    muon_momentum: float = 0.95
    ema_decay: float = 0.0

    def __post_init__(self):
        if self.name not in get_args(OptimizerName):
            raise MossAudioError(f"name must be one of {', '.join(get_args(OptimizerName))}, not {self.name!r}")
        if self.schedule not in get_args(Schedule):
            raise MossAudioError(f"schedule must be one of {', '.join(get_args(Schedule))}, not {self.schedule!r}")
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise MossAudioError(f"first_moment_dtype must be float32 or bfloat16, not {self.first_moment_dtype!r}")
        falling = self.decay_steps if self.schedule == "wsd" else 1
        if min(self.warmup_steps, falling) < 0 or self.warmup_steps + falling > self.total_steps:
            raise MossAudioError(
                f"warmup_steps {self.warmup_steps} and {falling} steps of decay do not fit into total_steps "
                f"{self.total_steps}: make the schedule longer"
            )
        for name in ("learning_rate", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise MossAudioError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in {*RATE_FIELDS.values(), "weight_decay", "final_fraction"}:
            if not getattr(self, name) >= 0:
                raise MossAudioError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("ema_decay", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise MossAudioError(f"{name} must be 0 or more and below 1, not {getattr(self, name)}")


def split_frozen(
    parameters: Parameters, freeze: Sequence[str], lora: LoraConfig | None = None
) -> tuple[Parameters, Parameters]:
    """Returns the trainable and the frozen parameters.

    Raises MossAudioError for a pattern that matches nothing, and if nothing is left to train.
    """
    require_matches("freeze", freeze, parameters)
    frozen = {path: leaf for path, leaf in parameters.items() if is_frozen(path, freeze, lora)}
    trainable = {path: leaf for path, leaf in parameters.items() if path not in frozen}
    if not trainable:
        raise MossAudioError(f"the freeze patterns {', '.join(freeze)} leave no parameter to train: take one away")
    return trainable, frozen


def is_frozen(path: str, freeze: Sequence[str], lora: LoraConfig | None = None) -> bool:
    """Returns True for a path that matches `freeze`, and with LoRA for every path that the adapter does not train."""
    return matches(path, freeze) or (lora is not None and not lora.trains(path))


def learning_rate(config: OptimizerConfig, step: jax.Array, total_steps: jax.Array | int | None = None) -> jax.Array:
    """Computes the schedule at a step, counted from 0: the first step's rate is peak / warmup_steps, not 0.

    total_steps: an estimate, for a run that ends with its data; None takes the configured number.
    """
    total = config.total_steps if total_steps is None else total_steps
    warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    falling = config.decay_steps if config.schedule == "wsd" else total - config.warmup_steps
    progress = jnp.clip((step - (total - falling)) / jnp.maximum(falling, 1), 0.0, 1.0)
    share_left = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * warmup * (config.final_fraction + (1 - config.final_fraction) * share_left)


def rate_of(config: OptimizerConfig, path: str) -> float:
    """Returns the factor of the learning rate for a parameter's part of the model."""
    return getattr(config, RATE_FIELDS[path.partition(".")[0]])


def decays(path: str) -> bool:
    return path.rpartition(".")[2] not in UNDECAYED


def by_part(parameters: Parameters) -> dict[str, Parameters]:
    """Groups parameters, or values of each, by the name of their part of the model."""
    parts: dict[str, Parameters] = {}
    for path, leaf in parameters.items():
        parts.setdefault(PART_NAMES[path.partition(".")[0]], {})[path] = leaf
    return parts


def gradient_transformation(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optimizer: gradients by path -> updates at a learning rate of 1, which `apply_gradients` scales."""

    def decaying(parameters: Any) -> dict[str, bool]:
        return {path: decays(path) for path in parameters}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        *_SCALES[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=decaying),
    )


def _adam(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.first_moment_dtype)]


def _adafactor(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]


def _muon(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    def labels(parameters: Any) -> dict[str, str]:
        return {path: "muon" if is_hidden_kernel(path, leaf.ndim) else "adam" for path, leaf in parameters.items()}

    def matrices(updates: Any) -> dict[str, Any]:
        # Each layer of a stack is a matrix of its own. AdamW's parameters are masked here, and stay so.
        last_two = optax.contrib.MuonDimensionNumbers(-2, -1)
        return {path: leaf if isinstance(leaf, optax.MaskedNode) else last_two for path, leaf in updates.items()}

    def scaled(update: Any, _: Any) -> Any:
        return update * (MUON_RMS * math.sqrt(max(update.shape[-2:])))  # an orthogonal matrix has RMS 1 / that root

    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.muon_momentum,
            mu_dtype=config.first_moment_dtype,
            weight_dimension_numbers=matrices,
        ),
        optax.stateless_with_tree_map(scaled),
    )
    return [optax.partition({"muon": orthogonal, "adam": optax.chain(*_adam(config))}, labels)]


_SCALES = {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}


def is_hidden_kernel(path: str, ndim: int) -> bool:
    """Returns True for a matrix between hidden layers, or a stack of such matrices: the parameters Muon is for."""
    return path.endswith(".kernel") and ndim in (2, 3) and not path.startswith("lm_head.")


def moving_average(
    config: OptimizerConfig, average: Parameters, parameters: Parameters, count: jax.Array
) -> Parameters:
    """Returns the moving average updated with `parameters`. count: accepted steps before the one that made them."""
    share = 1 - jnp.minimum(config.ema_decay, (1 + count) / (10 + count))
    return {path: leaf + share * (parameters[path] - leaf) for path, leaf in average.items()}


def apply_gradients(
    config: OptimizerConfig,
    parameters: Parameters,
    moments: optax.OptState,
    gradients: Parameters,
    rate: jax.Array,
) -> tuple[Parameters, optax.OptState]:
    """Returns parameters and moments after a step. rate: the schedule's, which each part of the model multiplies."""
    updates: Any
    updates, moments = gradient_transformation(config).update(gradients, moments, parameters)
    moved = {path: leaf - rate * rate_of(config, path) * updates[path] for path, leaf in parameters.items()}
    return moved, moments
