"""What one packed sequence holds, and what becomes of an example that is longer."""

from dataclasses import dataclass

import numpy as np

from moss_audio_jax.errors import MossAudioError


class TooLong(MossAudioError):
    """An example goes beyond its budget."""


@dataclass(frozen=True)
class Budget:
    """Of one packed sequence."""

    tokens: int
    chunks: int

    def __post_init__(self):
        if self.tokens < 2 or self.chunks < 0:
            raise MossAudioError(
                f"expected a budget of at least 2 tokens and 0 chunks a sequence, "
                f"found {self.tokens} and {self.chunks}; correct it."
            )

    def exceeded(self, name: str, found: str) -> TooLong:
        return TooLong(
            f"{name}: expected at most {self.tokens} tokens and {self.chunks} chunks of audio, found {found}; "
            "cut it, or raise the budget."
        )


@dataclass(frozen=True)
class Extent:
    """What decides whether a sample is within a budget.

    learned: bool [tokens], as in Sample. slots: int [tokens], as ModelInputs.audio_slots.
    tokens_per_chunk: audio tokens of a whole chunk.
    """

    learned: np.ndarray
    slots: np.ndarray
    tokens_per_chunk: int

    def chunks(self, num_tokens: int) -> int:
        """Of the clips among the first tokens."""
        return int(self.slots[:num_tokens].max(initial=-1)) // self.tokens_per_chunk + 1

    def within(self, budget: Budget, *, truncate: bool) -> int | None:
        """How many of its first tokens are trained on: all, if they are within the budget.

        If not, and if it may be truncated, those up to the last learned one that is within the budget. As none is
        learned within a clip, a clip stays whole or goes. None if there is nothing to learn within the budget.
        """
        total = len(self.learned)
        if total <= budget.tokens and self.chunks(total) <= budget.chunks:
            return total
        beyond = np.flatnonzero(self.slots >= budget.chunks * self.tokens_per_chunk)
        learned = np.flatnonzero(self.learned[: min(budget.tokens, *beyond[:1].tolist(), total)])
        # Nothing comes before the first token that could predict it.
        return int(learned[-1]) + 1 if truncate and learned.max(initial=0) > 0 else None
