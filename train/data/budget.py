"""What one packed sequence holds, and what becomes of an example that is longer."""

from collections.abc import Callable, Sequence
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

    loss_mask: bool [tokens], as in Sample. slots: int [tokens], as ModelInputs.audio_slots.
    tokens_per_chunk: audio tokens of a whole chunk.
    """

    loss_mask: np.ndarray
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
        total = len(self.loss_mask)
        if total <= budget.tokens and self.chunks(total) <= budget.chunks:
            return total
        beyond = np.flatnonzero(self.slots >= budget.chunks * self.tokens_per_chunk)
        learned = np.flatnonzero(self.loss_mask[: min(budget.tokens, *beyond[:1].tolist(), total)])
        # Nothing comes before the first token that could predict it.
        return int(learned[-1]) + 1 if truncate and learned.max(initial=0) > 0 else None


def split_text(ids: Sequence[int], limit: int, spell: Callable[[Sequence[int]], bytes]) -> list[slice]:
    """Pieces of at most `limit` ids (2 or more) that together hold all ids of a text, in order.

    A piece begins with the last id of the one before, which predicts its first id. It ends in the last quarter of its
    length, where there is a line's end, else a sentence's, else a word's, else a character's: the last of the best.

    spell: the bytes of some ids.
    """
    pieces, begin = [], 0
    while len(ids) - begin > limit:
        ends = range(begin + max(2, limit - limit // 4), begin + limit + 1)
        # Four ids spell the last character, even where each is a byte.
        end = max(ends, key=lambda end: (_border(spell(ids[max(end - 4, 0) : end]), spell(ids[end : end + 1])), end))
        pieces.append(slice(begin, end))
        begin = end - 1
    return [*pieces, slice(begin, len(ids))]


_SENTENCE_ENDS = tuple(mark.encode() for mark in ".!?…")  # before a blank
_WIDE_SENTENCE_ENDS = tuple(mark.encode() for mark in "。！？")


def _border(before: bytes, after: bytes) -> int:
    """How good a place between two texts is to cut at; 0 is within a character."""
    if after and 0x80 <= after[0] < 0xC0:  # UTF-8's continuation bytes
        return 0
    if before.endswith(b"\n"):
        return 4
    between_words = before[-1:].isspace() or after[:1].isspace()
    if before.endswith(_WIDE_SENTENCE_ENDS) or (between_words and before.rstrip().endswith(_SENTENCE_ENDS)):
        return 3
    return 2 if between_words else 1
