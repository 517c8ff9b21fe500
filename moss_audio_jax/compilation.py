"""`jax.jit` for programs that scan over a model's stacked layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import in_a_trace

# The CPU computes bfloat16 in float32, and this pass would cast the weights of all layers before the loop: a copy of
# twice their size. Without it each layer is cast when it is read.
_FOR_BFLOAT16 = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class jit:
    """`jax.jit(function, **options)` without a float32 copy of all bfloat16 weights on the CPU.

    Inside another jit, and through `trace` and `lower`, it is the same as `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        functools.update_wrapper(self, function)
        self._plain: Any = jax.jit(function, **options)
        self._sparing: Any = jax.jit(function, compiler_options=_FOR_BFLOAT16, **options)
        self.trace, self.lower = self._plain.trace, self._plain.lower

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        leaves = jax.tree.leaves((arguments, keywords))
        sparing = (
            jax.default_backend() == "cpu"
            and any(getattr(leaf, "dtype", None) == jnp.bfloat16 for leaf in leaves)
            and not in_a_trace()  # an inner jit can't have compiler options
        )
        return (self._sparing if sparing else self._plain)(*arguments, **keywords)
