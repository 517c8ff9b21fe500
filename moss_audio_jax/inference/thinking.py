"""Thoughts: `<think>...</think>` before an answer, told from it while both are generated."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
# Written into the answer when the budget of its thought is used up: the text of Qwen3's technical report, section
# "Thinking Mode Fusion".
STOP_THINKING = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
)
HAND_OVER = f"{STOP_THINKING}\n{CLOSE}.\n\n"

Kind = Literal["reasoning", "text"]
Shown = Literal["show", "hide", "only"]  # both parts of an answer, its text, its thought
DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # on a terminal


class Piece(NamedTuple):
    kind: Kind
    text: str


def thought_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Returns the ids that open and close a thought, or None for a tokenizer without such tokens."""
    ids = [tokenizer.encode(mark) for mark in (OPEN, CLOSE)]
    return (ids[0][0], ids[1][0]) if all(len(each) == 1 for each in ids) else None


def require_thought_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    ids = thought_ids(tokenizer)
    if ids is None:
        raise MossAudioError(
            f"a thinking_budget needs a tokenizer with the tokens {OPEN} and {CLOSE}, which this one has not: leave it "
            "out, or use a Thinking checkpoint"
        )
    return ids


def opens_thought(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Returns True if a prompt ends in `<think>`, so that its answer begins within a thought."""
    end = ids[-len(tokenizer.encode(OPEN)) - 2 :]  # and white space
    return tokenizer.decode(end).rstrip().endswith(OPEN)


class ThoughtSplitter:
    """Splits an answer into its reasoning and its text: the results of `feed`, then `flush`.

    A thought begins at the start of the answer, or in the prompt (`opened`). An answer without one is left as it is.
    Otherwise white space around the two parts is dropped, and so is what a hand-over writes after the thought.
    """

    def __init__(self, opened: bool = False):
        self._state: Literal["start", "thought", "between", "text"] = "thought" if opened else "start"
        self._held = ""  # read, and not told yet
        self._reasoning = ""

    def feed(self, text: str) -> Iterator[Piece]:
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._state, self._held = "thought", begun[len(OPEN) :]
            elif not OPEN.startswith(begun):
                self._state = "text"
        if self._state == "thought":
            thought, closed, rest = self._held.partition(CLOSE)
            end = len(thought.rstrip()) if closed else _told(thought)
            yield from self._reason(thought[:end])
            self._held = rest if closed else self._held[end:]
            self._state = "between" if closed else "thought"
        if self._state == "between":
            if self._reasoning.endswith(STOP_THINKING):
                self._held = self._held.removeprefix(".")
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "between"
        if self._state == "text" and self._held:
            text, self._held = self._held, ""
            yield Piece("text", text)

    def flush(self) -> Iterator[Piece]:
        """Yields the rest at the end of the answer."""
        held, self._held = self._held, ""
        if self._state == "thought":
            yield from self._reason(held.rstrip())
        elif held:
            yield Piece("text", held)

    def _reason(self, thought: str) -> Iterator[Piece]:
        if not self._reasoning:
            thought = thought.lstrip()
        if thought:
            self._reasoning += thought
            yield Piece("reasoning", thought)


def _told(thought: str) -> int:
    """Returns how much of an open thought can be told: not white space at its end, nor the beginning of `</think>`."""
    begun = next((size for size in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:size])), 0)
    return len(thought[: len(thought) - begun].rstrip())


class ThoughtPrinter:
    """Writes out the parts of an answer that are to be seen: what `feed` returns of each piece, then `flush`.

    A thought stands between its marks, also if the prompt has opened it. dim: it is dimmed, for a terminal.
    """

    def __init__(self, shown: Shown, dim: bool):
        self._shown, self._dim, self._open = shown, dim, False

    def feed(self, piece: Piece) -> str:
        if piece.kind == "text":
            return self.flush() + piece.text if self._shown != "only" else ""
        if self._shown != "show":
            return piece.text if self._shown == "only" else ""
        begun, self._open = "" if self._open else f"{DIM if self._dim else ''}{OPEN}\n", True
        return begun + piece.text

    def flush(self) -> str:
        closed, self._open = f"\n{CLOSE}{PLAIN if self._dim else ''}\n\n" if self._open else "", False
        return closed


def print_pieces(pieces: Iterable[Piece], printer: ThoughtPrinter) -> None:
    for piece in pieces:
        print(printer.feed(piece), end="", flush=True)
