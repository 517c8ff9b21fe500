"""Freezing, the learning-rate schedule, and the optimizers AdamW, Adafactor and Muon.

Parameters are dicts by path, such as `language_model.layers.mlp.up_proj.kernel`. The path alone decides if a parameter
is frozen, its learning rate and its weight decay. The optimizers get trainable parameters only: a frozen one has no
gradient and no moments, and does not count in the norm of clipping.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_audio_jax.config import LoraConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.patterns import matches, require_matches
from train.config import OptimizerConfig

Parameters = dict[str, Any]

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


def select(condition: jax.Array | bool, if_true: Any, if_false: Any) -> Any:
    """Returns one of two equal trees of arrays, by a condition that is known on the devices only."""
    return jax.tree.map(functools.partial(jnp.where, condition), if_true, if_false)


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


def _adam(config: OptimizerConfig) -> Sequence[optax.GradientTransformation]:
    """Adam as `optax.scale_by_adam`, but its update is computed from the moments that stay after the step.

    So each moment is written over itself. From moments that might be discarded, XLA's CPU backend takes twice the time,
    and copies them all.
    """
    initial = optax.scale_by_adam(mu_dtype=config.first_moment_dtype).init

    def update(updates, state, params=None, *, accepted: jax.Array | bool = True) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        # In float32, also if the first one is stored in bfloat16.
        mu = select(accepted, optax.tree.update_moment(updates, state.mu, config.b1, 1), state.mu)
        nu = select(accepted, optax.tree.update_moment_per_elem_norm(updates, state.nu, config.b2, 2), state.nu)
        scaled = jax.tree.map(
            lambda mu, nu: mu / (jnp.sqrt(nu) + config.eps),
            optax.tree.bias_correction(mu, config.b1, count),
            optax.tree.bias_correction(nu, config.b2, count),
        )
        stored = optax.tree.cast(mu, config.first_moment_dtype)
        return scaled, optax.ScaleByAdamState(select(accepted, count, state.count), stored, nu)

    return [optax.GradientTransformationExtraArgs(initial, update)]


def _skippable(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the old state after a step that is not accepted."""

    def update(updates, state, params=None, *, accepted: jax.Array | bool = True) -> tuple[Any, Any]:
        updates, moved = inner.update(updates, state, params)
        return updates, select(accepted, moved, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _adafactor(config: OptimizerConfig) -> Sequence[optax.GradientTransformation]:
    return [_skippable(optax.scale_by_factored_rms()), optax.clip_by_block_rms(1.0)]


def _muon(config: OptimizerConfig) -> Sequence[optax.GradientTransformation]:
    def labels(parameters: Any) -> dict[str, str]:
        return {path: "muon" if is_hidden_kernel(path, leaf.ndim) else "adam" for path, leaf in parameters.items()}

    def matrices(updates: Any) -> dict[str, Any]:
        # Each layer of a stack is a matrix of its own. AdamW's parameters are masked here, and stay so.
        last_two = optax.contrib.MuonDimensionNumbers(-2, -1)
        return {path: leaf if isinstance(leaf, optax.MaskedNode) else last_two for path, leaf in updates.items()}

    def scaled(update: Any, _: Any) -> Any:
        return update * (MUON_RMS * math.sqrt(max(update.shape[-2:])))  # an orthogonal matrix has RMS 1 / that root

    muon = optax.contrib.scale_by_muon(
        beta=config.muon_momentum,
        mu_dtype=config.first_moment_dtype,
        weight_dimension_numbers=matrices,
    )
    orthogonal = optax.chain(_skippable(muon), optax.stateless_with_tree_map(scaled))
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
    accepted: jax.Array | bool = True,
) -> tuple[Parameters, optax.OptState]:
    """Returns parameters and moments after a step; both are unchanged, bit for bit, unless it is accepted.

    rate: the schedule's, which each part of the model multiplies.
    """
    updates: Any
    optimizer = optax.with_extra_args_support(gradient_transformation(config))
    updates, moments = optimizer.update(gradients, moments, parameters, accepted=accepted)
    moved = {path: leaf - rate * rate_of(config, path) * updates[path] for path, leaf in parameters.items()}
    return select(accepted, moved, parameters), moments
