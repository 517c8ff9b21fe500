"""How a token is drawn from logits: Hugging Face's options, as arrays, so that other values compile nothing.

The tokens to draw from are found without sorting the vocabulary: a threshold on the logits is built bit by bit.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sampling_config import Sampling

_FLOAT32 = np.finfo(np.float32)
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` within a compiled function."""

    temperature: Float[Any, ""]
    top_k: Int[Any, ""]
    top_p: Float[Any, ""]
    repetition_penalty: Float[Any, ""]

    @classmethod
    def of(cls, sampling: Sampling) -> "SamplingArrays":
        """Converts to float32, and to the nearest normal number what is too small or too large for that."""

        def normal(value: float) -> np.float32:
            return np.float32(min(max(value, float(_FLOAT32.tiny)), float(_FLOAT32.max)))

        return cls(
            temperature=normal(sampling.temperature) if sampling.temperature else np.float32(0),
            top_k=np.int32(min(sampling.top_k, np.iinfo(np.int32).max)),
            top_p=normal(sampling.top_p),
            repetition_penalty=normal(sampling.repetition_penalty),
        )

    def __call__(
        self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"], keys: jax.Array
    ) -> Int[Array, " b"]:
        """One token a sequence; `keys` [b] are its random keys. seen: tokens of the prompt and of the answer so far."""
        logits = self._penalised(logits, seen)

        def greedy() -> Int[Array, " b"]:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def drawn() -> Int[Array, " b"]:
            return jax.vmap(jax.random.categorical)(keys, self._filtered(logits)).astype(jnp.int32)

        return jax.lax.cond(self.temperature == 0, greedy, drawn)

    def log_weights(self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        """Logarithms of the weights that tokens are drawn by, temperature above 0: -inf where one can't be drawn."""
        return self._filtered(self._penalised(logits, seen))

    def _penalised(self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        penalty = self.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(seen, jnp.clip(penalised, _FLOAT32.min, _FLOAT32.max), logits)

    def _filtered(self, logits: Float[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        # The largest becomes 0, which no temperature makes infinite.
        logits = (logits - logits.max(-1, keepdims=True)) / self.temperature
        limited = (self.top_k > 0) & (self.top_k < logits.shape[-1])
        logits = jax.lax.cond(limited, lambda: _top_k(logits, self.top_k), lambda: logits)
        return jax.lax.cond(self.top_p < 1, lambda: _top_p(logits, self.top_p), lambda: logits)


def _top_k(logits: Float[Array, "b vocab"], k: Int[Array, ""]) -> Float[Array, "b vocab"]:
    """-inf for all that are less than the k-th largest."""
    order = _ordered(logits)

    def enough(threshold: UInt32[Array, " b"]) -> Bool[Array, " b"]:
        return (order >= threshold[:, None]).sum(-1, dtype=jnp.int32) >= k

    return jnp.where(order >= _largest(enough, len(logits))[:, None], logits, -jnp.inf)


def _top_p(logits: Float[Array, "b vocab"], p: Float[Array, ""]) -> Float[Array, "b vocab"]:
    """-inf for all whose larger ones' probabilities reach p."""
    order, probabilities = _ordered(logits), jax.nn.softmax(logits, axis=-1)

    def reached(threshold: UInt32[Array, " b"]) -> Bool[Array, " b"]:
        return jnp.where(order > threshold[:, None], probabilities, 0).sum(-1) >= p

    return jnp.where(order > _largest(reached, len(logits))[:, None], logits, -jnp.inf)


def _ordered(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Whole numbers above 0, in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _largest(holds: Callable[[UInt32[Array, " b"]], Bool[Array, " b"]], batch: int) -> UInt32[Array, " b"]:
    """The largest number for which `holds` is true, which it is up to there and not beyond; 0 if nowhere."""

    def with_bit(index: jax.Array, found: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
        candidate = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(batch, jnp.uint32))


def row_seeds(batch: int, seed: int, seeds: Sequence[int] | None) -> np.ndarray:
    """Seeds [b, 2] of the rows' random keys, the high and low 32 bits; `seeds`, or else seed + row.

    Raises MossAudioError for what is no whole number of 64 bits, and for another number of seeds than rows.
    """
    if seeds is not None and len(seeds) != batch:
        raise MossAudioError(f"seeds must hold one for each of {batch} prompts, not {len(seeds)}")
    given = [_checked_seed("seed", seed) + row for row in range(batch)]
    if seeds is not None:
        given = [_checked_seed(f"seeds[{row}]", value) for row, value in enumerate(seeds)]
    words = [divmod(value % 2**64, 2**32) for value in given]
    return np.array(words, np.uint32).reshape(batch, 2)


def _checked_seed(name: str, seed: Any) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = None
    if value is None or not MIN_SEED <= value <= MAX_SEED:
        raise MossAudioError(f"{name} must be a whole number from -2^63 to 2^64 - 1, not {seed}: choose one of those")
    return value


def row_keys(seeds: UInt32[Any, "b 2"]) -> jax.Array:
    """The random key of each row."""
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.key(words[1]), words[0]))(jnp.asarray(seeds))
