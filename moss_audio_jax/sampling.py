"""Draws tokens from logits with Hugging Face's options, which are arrays: other values compile nothing.

Top-k and top-p don't sort the vocabulary: they find a threshold on the logits bit by bit.
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
    """`Sampling` of each row as arguments of a compiled function; one row's serve any number."""

    temperature: Float[Any, " b"]
    top_k: Int[Any, " b"]
    top_p: Float[Any, " b"]
    repetition_penalty: Float[Any, " b"]

    @classmethod
    def of(cls, *rows: Sampling) -> "SamplingArrays":
        """Converts to float32, and to the nearest normal number what is too small or too large for that."""

        def normal(name: str) -> np.ndarray:
            values = np.array([getattr(row, name) for row in rows], np.float64)
            return np.clip(values, _FLOAT32.tiny, _FLOAT32.max).astype(np.float32)

        greedy = [not row.temperature for row in rows]
        largest = np.iinfo(np.int32).max
        return cls(
            temperature=np.where(greedy, np.float32(0), normal("temperature")),
            top_k=np.array([min(int(row.top_k), largest) for row in rows], np.int32),
            top_p=normal("top_p"),
            repetition_penalty=normal("repetition_penalty"),
        )

    def __call__(
        self,
        logits: Float[Array, "b vocab"],
        seen: Bool[Array, "b vocab"],
        keys: jax.Array,
        banned: Int[Array, "b n"] | None = None,
    ) -> Int[Array, " b"]:
        """Draws one token for each sequence. Arguments as of `draw`."""
        return self.draw(logits, seen, keys, banned)[0]

    def draw(
        self,
        logits: Float[Array, "b vocab"],
        seen: Bool[Array, "b vocab"],
        keys: jax.Array,
        banned: Int[Array, "b n"] | None = None,
    ) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
        """Draws one token for each sequence; returns them with the logprobs that they were drawn with (0 if greedy).

        seen: tokens of the prompt and answer so far. keys: random keys [b]. banned: ids not to draw, padded with -1.
        """
        logits = self._penalised(logits, seen)
        if banned is not None:
            logits = jax.lax.cond((banned >= 0).any(), _without, lambda logits, _: logits, logits, banned)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def drawn() -> tuple[Int[Array, " b"], Float[Array, " b"]]:
            weights = self._filtered(logits)
            tokens = jax.vmap(jax.random.categorical)(keys, weights).astype(jnp.int32)
            found = jnp.take_along_axis(weights, tokens[:, None], axis=1)[:, 0] - jax.nn.logsumexp(weights, axis=-1)
            greedy = self.temperature == 0
            return jnp.where(greedy, likeliest, tokens), jnp.where(greedy, 0, found)

        certain = jnp.zeros(len(likeliest), logits.dtype)
        return jax.lax.cond((self.temperature > 0).any(), drawn, lambda: (likeliest, certain))

    def log_weights(self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        """Returns the log weights that tokens are drawn by at temperature > 0: -inf for those that can't be drawn."""
        return self._filtered(self._penalised(logits, seen))

    def _penalised(self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        penalty = self.repetition_penalty[:, None]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(seen, jnp.clip(penalised, _FLOAT32.min, _FLOAT32.max), logits)

    def _filtered(self, logits: Float[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        # The largest becomes 0, which stays finite at any temperature.
        temperature = jnp.where(self.temperature > 0, self.temperature, 1)[:, None]
        logits = (logits - logits.max(-1, keepdims=True)) / temperature
        # A row that draws from all tokens keeps them, whatever the others' options are.
        limited = (self.top_k > 0) & (self.top_k < logits.shape[-1])
        top_k = jnp.where(limited, self.top_k, logits.shape[-1])
        logits = jax.lax.cond(limited.any(), lambda: _top_k(logits, top_k), lambda: logits)
        nucleus = self.top_p < 1

        def within_top_p() -> Float[Array, "b vocab"]:
            return jnp.where(nucleus[:, None], _top_p(logits, self.top_p), logits)

        return jax.lax.cond(nucleus.any(), within_top_p, lambda: logits)


def _without(logits: Float[Array, "b vocab"], banned: Int[Array, "b n"]) -> Float[Array, "b vocab"]:
    """Sets the logits of ids to -inf."""
    ids = jnp.where(banned < 0, logits.shape[1], banned)  # outside: dropped
    return logits.at[jnp.arange(len(ids))[:, None], ids].set(-jnp.inf, mode="drop")


def _top_k(logits: Float[Array, "b vocab"], k: Int[Array, " b"]) -> Float[Array, "b vocab"]:
    """Sets logits below the k-th largest to -inf."""
    order = _ordered(logits)

    def enough(threshold: UInt32[Array, " b"]) -> Bool[Array, " b"]:
        return (order >= threshold[:, None]).sum(-1, dtype=jnp.int32) >= k

    return jnp.where(order >= _largest(enough, len(logits))[:, None], logits, -jnp.inf)


def _top_p(logits: Float[Array, "b vocab"], p: Float[Array, " b"]) -> Float[Array, "b vocab"]:
    """Sets a logit to -inf if the probabilities of all larger ones reach p."""
    order, probabilities = _ordered(logits), jax.nn.softmax(logits, axis=-1)

    def reached(threshold: UInt32[Array, " b"]) -> Bool[Array, " b"]:
        return jnp.where(order > threshold[:, None], probabilities, 0).sum(-1) >= p

    return jnp.where(order > _largest(reached, len(logits))[:, None], logits, -jnp.inf)


def _ordered(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Maps floats to positive integers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _largest(holds: Callable[[UInt32[Array, " b"]], Bool[Array, " b"]], batch: int) -> UInt32[Array, " b"]:
    """Returns the largest number for which `holds` is true, or 0; `holds` is true up to a number and false above."""

    def with_bit(index: jax.Array, found: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
        candidate = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(batch, jnp.uint32))


def row_seeds(batch: int, seed: int, seeds: Sequence[int] | None) -> np.ndarray:
    """Returns the rows' seeds as high and low 32 bits [b, 2]: `seeds`, or else seed + row.

    Raises MossAudioError for a seed that is no whole number of 64 bits, and for a wrong number of seeds.
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
    """Returns the random key of each row."""
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.key(words[1]), words[0]))(jnp.asarray(seeds))
