"""Layers that the encoder and the language model share, and stacks of equal layers.

Every parameter is declared once, by `parameter`: shape, logical axes and initializer. Initialization, sharding,
conversion and restoring derive from that declaration. Modules compute in the dtype of their weights; norms and softmax
always compute in float32.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from moss_audio_jax.attention import dropout
from moss_audio_jax.config import LoraConfig
from moss_audio_jax.sharding import on_cpu
from moss_audio_jax.splash import RESIDUALS
from moss_audio_jax.tree import dotted

Initializer = Callable[..., jax.Array]
Carry = TypeVar("Carry")
Module = TypeVar("Module", bound=nnx.Module)

MASTER = "_master"  # ends the name under which a module has a parameter's master
LAYER_INPUT = "layer_input"  # the checkpoint name of the input of a stack's layer

_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    # Activations of a layer that are stored for the backward pass, beside the layer's input.
    "none": None,  # all: fastest, and most memory
    "dots": _policies.dots_with_no_batch_dims_saveable,  # outputs of the weight matmuls
    "attention": _policies.save_only_these_names(RESIDUALS),  # residuals of splash attention; without it, none
    "full": _policies.nothing_saveable,  # none: one more forward pass
    # None, and the input is stored in host memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    layers: int | None = None,
) -> nnx.Param:
    """Declares a parameter; with `layers`, that many are stacked on a new first axis."""
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=axes)


def weighted(module: nnx.Module, name: str, function: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Computes function(x, weight) with the module's parameter of that name.

    If the module has the weight's float32 master too (`with_masters`), the master gets the gradient, in float32, so
    that it is also summed over devices in float32. The value and the gradient with respect to x do not change.
    """
    weight, master = getattr(module, name)[...], getattr(module, name + MASTER, None)
    return function(x, weight) if master is None else _with_float32_gradient(function, x, weight, master[...])


def copied(module: Module) -> Module:
    """Returns a copy that shares the arrays: variables added to it do not reach the original."""
    return nnx.merge(*nnx.split(module))


def with_masters(model: Module, masters: Mapping[str, jax.Array]) -> Module:
    """Returns the model with the float32 masters, by path, of parameters that it holds in the compute dtype."""
    model = copied(model)
    modules = {dotted(path): module for path, module in nnx.iter_modules(model)}
    for path, master in masters.items():
        module, _, name = path.rpartition(".")
        setattr(modules[module], name + MASTER, nnx.Variable(master))
    return model


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_float32_gradient(function, x, weight, master):
    return function(x, weight)


def _forward(function, x, weight, master):
    return function(x, weight), (x, weight)


def _backward(function, residuals, gradient):
    x, weight = residuals
    by_x, x32 = None, x
    if jnp.issubdtype(x.dtype, jnp.floating):
        (by_x,) = jax.vjp(lambda x: function(x, weight), x)[1](gradient)
        x32 = x.astype(jnp.float32)
    exact, by_weight = jax.vjp(lambda weight: function(x32, weight), weight.astype(jnp.float32))
    return by_x, None, by_weight(gradient.astype(exact.dtype))[0]


_with_float32_gradient.defvjp(_forward, _backward)


class Linear(nnx.Module):
    """y = x W + b, with the kernel stored [in, out]; plus scale (x A) B if `lora.add_adapters` declared A and B.

    by_output: the kernel is stored [out, in] (`by_output`).
    kernel_scale: a scale per output, if the kernel is int8 (`int8`).
    lora_keys: a key per layer of a stack, if the adapter's dropout is on (`lora.with_adapter_dropout`).
    """

    by_output = False
    kernel_scale: nnx.Param
    lora: LoraConfig
    lora_a: nnx.Param
    lora_b: nnx.Param
    lora_keys: nnx.Variable

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        use_bias: bool = False,
        std: float = 0.02,
        layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(std)
        self.kernel = parameter(rngs, (in_features, out_features), axes, normal, layers)
        if use_bias:
            self.bias = parameter(rngs, (out_features,), axes[1:], nnx.initializers.zeros, layers)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        matmul = _matmul_by_output if self.by_output else _matmul
        if hasattr(self, "kernel_scale"):
            y = matmul(x, self.kernel[...].astype(x.dtype)) * self.kernel_scale[...]
        else:
            y = weighted(self, "kernel", matmul, x)
        if hasattr(self, "lora_a"):
            key = self.lora_keys[...] if hasattr(self, "lora_keys") else None
            low = weighted(self, "lora_a", jnp.matmul, dropout(x, self.lora.dropout, key))
            y = y + weighted(self, "lora_b", jnp.matmul, low) * self.lora.scale
        return weighted(self, "bias", jnp.add, y) if hasattr(self, "bias") else y


def _matmul(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    # For the kernel's gradient, XLA's CPU backend transposes an x of three axes, but not one of two.
    if not on_cpu():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _matmul_by_output(x: Float[Array, "... in"], kernel: Float[Array, "out in"]) -> Float[Array, "... out"]:
    return jnp.einsum("ri,oi->ro", x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[0])


def by_output(module: Module) -> Module:
    """Returns a copy of one layer whose kernels are stored [out, in].

    XLA's CPU backend multiplies a few rows faster by such a kernel: 16 rows of 1024 in 1.3 instead of 1.9 ms.
    """
    module = copied(module)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Linear):
            part.kernel = nnx.Param(part.kernel[...].T)
            part.by_output = True
    return module


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis."""

    def __init__(self, features: int, eps: float, *, layers: int | None = None, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = parameter(rngs, (features,), (None,), nnx.initializers.ones, layers)
        self.bias = parameter(rngs, (features,), (None,), nnx.initializers.zeros, layers)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        return weighted(self, "bias", jnp.add, weighted(self, "scale", jnp.multiply, normed)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""

    def __init__(self, features: int, eps: float, *, layers: int | None = None, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = parameter(rngs, (features,), (None,), nnx.initializers.ones, layers)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return weighted(self, "scale", jnp.multiply, normed).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the exact GELU. On a CPU by erf, as PyTorch: there XLA's erfc takes three times as long."""
    return _gelu_of_erf(x) if on_cpu() else jax.nn.gelu(x, approximate=False)


@jax.checkpoint
def _gelu_of_erf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return (0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)): the MLP of the language model, the audio adapter and the DeepStack mergers."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        std: float = 0.02,
        layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        common = {"std": std, "layers": layers, "rngs": rngs}
        self.gate_proj = Linear(in_features, hidden_features, ("embed", "mlp"), **common)
        self.up_proj = Linear(in_features, hidden_features, ("embed", "mlp"), **common)
        self.down_proj = Linear(hidden_features, out_features, ("mlp", "embed"), **common)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def gradients_before(x: jax.Array, module: Module) -> tuple[jax.Array, Module]:
    """Returns both unchanged; the module's gradients are computed before the backward pass goes on from `x`.

    A TPU's compiler may compute them later, to overlap their sums over devices with more work, and then holds what they
    are computed from for longer.
    """
    graphdef, state = nnx.split(module)
    weights, structure = jax.tree.flatten(state)
    x, weights = _together(x, weights)
    return x, nnx.merge(graphdef, jax.tree.unflatten(structure, weights))


@jax.custom_vjp
def _together(x: jax.Array, weights: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    return x, weights


def _together_forward(x, weights):
    # Of each weight () if it gets a gradient, else None: that of a frozen one is not to be computed.
    learning = [() if weight.perturbed else None for weight in weights]
    return (x.value, [weight.value for weight in weights]), learning


def _together_backward(learning, gradients):
    by_x, by_weights = gradients
    pairs = zip(by_weights, learning, strict=True)
    # What is no array is a symbolic zero.
    kept = [by if learns is not None and isinstance(by, jax.Array) else None for by, learns in pairs]
    return jax.lax.optimization_barrier((by_x, kept))


_together.defvjp(_together_forward, _together_backward, symbolic_zeros=True)


def row_major(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keeps the compiler from another order of `x`'s axes in memory, which it might carry over to whole weights."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def take_layers(stack: nnx.Module, first: int, last: int) -> Any:
    """Returns layers first..last-1 of a stack, as a stack."""
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[first:last], state))


def map_layers(stack: nnx.Module, x: Float[Array, "layers ..."], *, remat: str = "none") -> Float[Array, "layers ..."]:
    """Applies each layer of a stack to its own entry of `x`. remat: a key of REMAT_POLICIES."""
    graphdef, state = nnx.split(stack)
    apply = rematerialized(lambda layer, x: nnx.merge(graphdef, layer)(x), remat)
    return jax.lax.map(lambda pair: apply(*pair), (state, x))


def layer_at(stack: nnx.Module, index: jax.Array) -> Any:
    """Returns one layer of a stack; in a loop, only this layer is read and nothing else of the stack is copied."""
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), state))


def unstacked(stack: nnx.Module) -> list[Any]:
    """Returns the layers of a stack, each with arrays of its own."""
    graphdef, state = nnx.split(stack)
    count = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(operator.itemgetter(index), state)) for index in range(count)]


def scan_layers(
    body: Callable[[Any, Carry, Any], Carry],
    stack: nnx.Module,
    carry: Carry,
    xs: Any = None,
    *,
    remat: str = "none",
) -> Carry:
    """Computes carry = body(layer, carry, x) for every layer of a stack; leaves of `xs` have an entry per layer.

    remat: a key of REMAT_POLICIES.
    """
    graphdef, state = nnx.split(stack)

    def step(carry, inputs):
        layer, x = inputs
        carry = jax.tree.map(lambda x: checkpoint_name(x, LAYER_INPUT), carry)
        return body(nnx.merge(graphdef, layer), carry, x), None

    policy = REMAT_POLICIES[remat]
    if policy is None and on_cpu():
        policy = _policies.dots_saveable  # a CPU computes all but a matmul again sooner than it reads it from memory
    if policy is not None:
        # prevent_cse is for code outside loops; inside a scan it only costs.
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(step, carry, (state, xs))[0]


def rematerialized(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Returns the function as the backward pass of `remat` computes it, a key of REMAT_POLICIES."""
    policy = REMAT_POLICIES[remat]
    return function if policy is None else jax.checkpoint(function, policy=policy)
