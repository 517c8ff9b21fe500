"""Budget of a packed sequence: tokens and audio chunks; truncation and splitting of longer examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moss_audio_jax.errors import MossAudioError


class TooLong(MossAudioError):
    """An example exceeds the budget."""


@dataclass(frozen=True)
class Budget:
    """Maximum tokens and audio chunks of a packed sequence."""

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
    """Size of a sample, to compare with a budget.

    loss_mask: bool [tokens], as in Sample. slots: int [tokens], as ModelInputs.audio_slots.
    tokens_per_chunk: audio tokens of a whole chunk.
    """

    loss_mask: np.ndarray
    slots: np.ndarray
    tokens_per_chunk: int

    def chunks(self, num_tokens: int) -> int:
        """Chunks of the clips among the first `num_tokens` tokens."""
        return int(self.slots[:num_tokens].max(initial=-1)) // self.tokens_per_chunk + 1

    def within(self, budget: Budget, *, truncate: bool) -> int | None:
        """Returns the number of leading tokens to keep: all of them if they fit the budget.

        If not, and with `truncate`, up to the last supervised token that fits. No token of a clip is supervised, so
        clips are kept whole or dropped. None if no supervised token fits.
        """
        total = len(self.loss_mask)
        if total <= budget.tokens and self.chunks(total) <= budget.chunks:
            return total
        beyond = np.flatnonzero(self.slots >= budget.chunks * self.tokens_per_chunk)
        learned = np.flatnonzero(self.loss_mask[: min(budget.tokens, *beyond[:1].tolist(), total)])
        # The first token has no predecessor to predict it.
        return int(learned[-1]) + 1 if truncate and learned.max(initial=0) > 0 else None


def split_text(ids: Sequence[int], limit: int, spell: Callable[[Sequence[int]], bytes]) -> list[slice]:
    """Splits the ids of a text into pieces of at most `limit` (2 or more) ids.

    A piece starts with the last id of the previous piece, which predicts the next id. It ends in the last quarter of
    `limit`, at the last end of a line, else of a sentence, else of a word, else of a character.

    spell: returns the bytes of ids.
    """
    pieces, begin = [], 0
    while len(ids) - begin > limit:
        ends = range(begin + max(2, limit - limit // 4), begin + limit + 1)
        # Four ids cover the last character, even if each is one byte.
        end = max(ends, key=lambda end: (_border(spell(ids[max(end - 4, 0) : end]), spell(ids[end : end + 1])), end))
        pieces.append(slice(begin, end))
        begin = end - 1
    return [*pieces, slice(begin, len(ids))]


_SENTENCE_ENDS = tuple(mark.encode() for mark in ".!?…")  # before a blank
_WIDE_SENTENCE_ENDS = tuple(mark.encode() for mark in "。！？")


def _border(before: bytes, after: bytes) -> int:
    """Scores the place between two texts for a cut; 0 is inside a character."""
    if after and 0x80 <= after[0] < 0xC0:  # UTF-8's continuation bytes
        return 0
    if before.endswith(b"\n"):
        return 4
    between_words = before[-1:].isspace() or after[:1].isspace()
    if before.endswith(_WIDE_SENTENCE_ENDS) or (between_words and before.rstrip().endswith(_SENTENCE_ENDS)):
        return 3
    return 2 if between_words else 1
