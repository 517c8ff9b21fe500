"""Steers answers while they are drawn: minimum length, biased tokens, a guard against loops, a budget of thought.

All options are arrays, a row for each answer, so that other values compile nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NO_BUDGET = np.iinfo(np.int32).max // 2
MAX_BIASED = 64  # tokens that a request may bias

# A loop is a run of a period of up to MAX_PERIOD tokens, REPEATS times or more, and of MIN_LOOP tokens or more.
MAX_PERIOD, REPEATS, MIN_LOOP = 64, 6, 48
IGNORE, STOP, WARM = 0, 1, 2  # what is done about one
WARM_TEMPERATURE = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steering:
    """Options of each row.

    least: tokens before an end token may be drawn.
    biased, bias: ids, padded with -1, and what is added to their logits.
    loops: IGNORE, STOP, or WARM.
    budgets: tokens after which an open thought is ended; NO_BUDGET: none.
    opened: True where the prompt itself has opened the thought.
    thought: ids that open and close a thought. hand_over: ids that end one; both are the same for all rows.
    """

    least: Int[Any, " b"]
    biased: Int[Any, "b n"]
    bias: Float[Any, "b n"]
    loops: Int[Any, " b"]
    budgets: Int[Any, " b"]
    opened: Bool[Any, " b"]
    thought: Int[Any, "2"]
    hand_over: Int[Any, " m"]

    @classmethod
    def none(cls, rows: int, thought: tuple[int, int], hand_over: list[int]) -> "Steering":
        """Makes NumPy arrays that steer nothing."""
        return cls(
            least=np.zeros(rows, np.int32),
            biased=np.full((rows, MAX_BIASED), -1, np.int32),
            bias=np.zeros((rows, MAX_BIASED), np.float32),
            loops=np.zeros(rows, np.int32),
            budgets=np.full(rows, NO_BUDGET, np.int32),
            opened=np.zeros(rows, bool),
            thought=np.array(thought, np.int32),
            hand_over=np.array(hand_over, np.int32),
        )

    def with_bias(self, logits: Float[Array, "b vocab"]) -> Float[Array, "b vocab"]:
        """Adds the bias to the logits."""
        vocab = logits.shape[1]

        def added() -> Float[Array, "b vocab"]:
            ids = jnp.where(self.biased < 0, vocab, self.biased)  # outside: dropped
            return logits.at[jnp.arange(len(ids))[:, None], ids].add(self.bias, mode="drop")

        return jax.lax.cond((self.bias != 0).any(), added, lambda: logits)

    def banned(self, eos_ids: Int[Array, "b n"], counts: Int[Array, " b"]) -> Int[Array, "b n"]:
        """Returns the ids that may not be drawn yet, padded with -1."""
        return jnp.where((counts < self.least)[:, None], eos_ids, -1)

    def forced(
        self, drawn: Int[Array, " b"], tokens: Int[Array, "b new"], counts: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        """Replaces the drawn tokens where a thought has used up its budget: by the next token of the hand-over."""

        def replaced() -> Int[Array, " b"]:
            within = jnp.arange(tokens.shape[1]) < jnp.minimum(counts, self.budgets)[:, None]
            opened = self.opened | ((tokens == self.thought[0]) & within).any(-1)
            closed = ((tokens == self.thought[1]) & within).any(-1)
            place = counts - self.budgets
            due = opened & ~closed & (place >= 0) & (place < len(self.hand_over))
            return jnp.where(due, self.hand_over[jnp.clip(place, 0, len(self.hand_over) - 1)], drawn)

        return jax.lax.cond((counts >= self.budgets).any(), replaced, lambda: drawn)

    def looping(
        self, tokens: Int[Array, "b new"], counts: Int[Array, " b"], since: Int[Array, " b"]
    ) -> Bool[Array, " b"]:
        """Returns True where it matters that `tokens[since:counts]` of a row ends in a loop."""
        found = jax.lax.cond(
            (self.loops != IGNORE).any(), ends_in_a_loop, lambda *x: jnp.zeros(len(counts), bool), tokens, counts, since
        )
        return found & (self.loops != IGNORE)


def ends_in_a_loop(tokens: Int[Array, "b new"], counts: Int[Array, " b"], since: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Returns True where `tokens[since:counts]` of a row ends in a loop."""
    periods = np.arange(1, MAX_PERIOD + 1)
    runs = periods * np.maximum(REPEATS, -(-MIN_LOOP // periods))
    back = np.arange(runs.max())
    places = counts[:, None] - 1 - back
    recent = jnp.take_along_axis(tokens, jnp.clip(places, 0, tokens.shape[1] - 1), axis=1)  # the newest first
    recent = jnp.where(places >= since[:, None], recent, -1 - back)  # equal to no other
    earlier = recent[:, np.minimum(back + periods[:, None], back[-1])]  # [b, period, back]
    same = (recent[:, None] == earlier) | (back >= (runs - periods)[:, None])
    return same.all(-1).any(-1)
