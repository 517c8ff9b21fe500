"""`jax.jit` for programs that read a model's weights in loops over its layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import in_a_trace

# On the CPU bfloat16 is computed in float32, and this pass would convert all layers' weights before the loop: a copy of
# twice their size. Without it each layer is converted as it is read.
_FOR_BFLOAT16 = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class jit:
    """`jax.jit(function, **options)`, which on the CPU holds no float32 copy of bfloat16 weights.

    Inside of another jit, and compiled ahead by `trace` or `lower`, it is jax.jit's own program.
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
            and not in_a_trace()  # where compiler options are refused
        )
        return (self._sparing if sparing else self._plain)(*arguments, **keywords)

    def _cache_size(self) -> int:
        return self._plain._cache_size() + self._sparing._cache_size()
