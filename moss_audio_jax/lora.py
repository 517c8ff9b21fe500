"""LoRA: pairs of low-rank matrices beside the kernels of linear layers, declared like every other parameter.

Initialization, sharding, freezing, checkpoints and export derive from the declaration, also for stacked layers. The
kernels do not change: only `merge_adapter` computes W + scale A B.

(The library qwix makes its adapters at the first call of a layer. Here that call is inside a scan, on a temporary layer
made of slices of a stack. qwix fails on it, and would need more code around it than is here.)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moss_audio_jax.config import LoraConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.layers import Linear, Module, copied
from moss_audio_jax.patterns import matches, require_matches
from moss_audio_jax.tree import dotted


def add_adapters(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Declares A and B at every linear layer that the configuration names; A is drawn as `peft` does, B is zero.

    Raises MossAudioError for a pattern that matches nothing, and for a layer that is to be trained whole and also
    adapted or in int8.
    """
    linears = linear_layers(model)
    parameters = [dotted(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    require_matches("lora.targets", config.targets, linears, what="linear layer that can have an adapter")
    require_matches("lora.full", config.full, parameters)
    targets = {path: layer for path, layer in linears.items() if matches(path, config.targets)}
    for option, patterns in (("lora.targets", config.targets), ("lora.int8", config.int8)):
        doubled = [path for path in linears if matches(path, patterns) and matches(f"{path}.kernel", config.full)]
        if doubled:
            raise MossAudioError(f"{', '.join(doubled)}: named by {option} and lora.full both; take it out of one")
    for layer in targets.values():
        *stack, inputs, outputs = layer.kernel.shape
        axes = ("layers",) * len(stack)
        # Uniform within 1 / sqrt(in).
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack))))
        first = init(rngs.params(), (*stack, inputs, config.rank), jnp.float32)
        layer.lora_a = nnx.Param(first, logical_axes=(*axes, "adapter", None))
        second = jnp.zeros((*stack, config.rank, outputs), jnp.float32)
        layer.lora_b = nnx.Param(second, logical_axes=(*axes, None, "adapter"))
        layer.lora = config


def linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """Returns path -> linear layer, without the head, whose kernel the loss reads directly."""
    modules = {dotted(path): module for path, module in nnx.iter_modules(model)}
    return {path: module for path, module in modules.items() if isinstance(module, Linear) and path != "lm_head"}


def with_adapter_dropout(model: Module, key: jax.Array) -> Module:
    """Returns the model with the adapters' dropout on: each adapter, and each layer of a stack, has its own key."""
    model = copied(model)
    adapted = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, Linear) and hasattr(layer, "lora_a")]
    for number, layer in enumerate(adapted):
        stack = layer.lora_a.shape[:-2]
        layer.lora_keys = nnx.Variable(jax.random.split(jax.random.fold_in(key, number), stack))
    return model
