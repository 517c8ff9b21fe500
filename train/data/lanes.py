"""A lane: one row of the batch. Reads examples, packs them into sequences, and keeps the state to resume from.

Lane l of n packs examples l, l + n, l + 2 n ... of the order. The state has the numbers and sizes of the examples in
open bins; a resumed lane decodes them when their bin is emitted.
"""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moss_audio_jax.errors import MossAudioError, StorageError
from train.data.budget import TooLong
from train.data.config import DataConfig
from train.data.mixture import Drawn, ExampleOrder
from train.data.objectives import NothingToAsk
from train.data.packing import Bin, Packer, Row, empty_row, pack_row
from train.data.samples import Sample, SampleMaker

log = logging.getLogger(__name__)

SKIPS_JUDGED_AFTER = 200  # examples per lane: fewer are too few for a rate
KINDS = {  # reason for a skip -> words and options in the message that stops a run
    "unreadable": ("unreadable", "data.max_skip_rate"),
    "unlabelled": ("without labels for the objectives of their group", "data.max_unused_rate"),
    "too_long": ("too long", "data.tokens, data.chunks or data.max_unused_rate"),
}
COUNTS = ("read", *KINDS, "truncated", "done", "audio_seconds")  # totals of a lane since the start of the run


class Interrupted(Exception):
    """Waiting for a batch was interrupted."""


@dataclass
class LaneState:
    """State of a lane; JSON in reports and checkpoints.

    next, piece: next sample to read: piece `piece` of example number `next`.
    open: `Piece.sizes` of each piece in each open bin.
    rows: packed sequences so far. done: examples in them or skipped. audio_seconds: of audio in them.
    read: examples read so far. unreadable, unlabelled, too_long: skipped ones among them. truncated: shortened ones.
    in_a_row: consecutive skipped examples, by group.
    """

    next: int
    piece: int = 0
    open: list[list[list[int]]] = field(default_factory=list)
    rows: int = 0
    done: int = 0
    audio_seconds: float = 0.0
    read: int = 0
    unreadable: int = 0
    unlabelled: int = 0
    too_long: int = 0
    truncated: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A piece of an example in a bin: the whole example, or a part of a long plain text.

    number: of the example in the order. group: its index in the mixture. is_last: 1 for the last piece, else 0.
    sample: None in a bin restored from a state; `Lane._row` decodes it.
    """

    number: int
    group: int
    piece: int
    is_last: int
    num_tokens: int
    num_chunks: int
    sample: Sample | None = None

    def sizes(self) -> list[int]:
        return [self.number, self.group, self.piece, self.is_last, self.num_tokens, self.num_chunks]


class Lane:
    """Endless iterator of (packed sequence, JSON of `_report`) over every `batch_size`-th example.

    end: number of examples of the order. After them, the open bins are emitted, then empty rows.
    """

    def __init__(
        self,
        order: ExampleOrder,
        maker: SampleMaker,
        config: DataConfig,
        state: Mapping[str, Any],
        end: int | None,
        stopped: threading.Event,
    ):
        self._order, self._maker, self._config, self._end, self._stopped = order, maker, config, end, stopped
        self._state = LaneState(**state)
        self._packer: Packer[Piece] = Packer(config.budget, config.open_bins, config.strategy)
        self._pieces: tuple[int, int, list[Sample]] | None = None  # number, group, samples of the example read last
        for bin in self._state.open:
            self._packer.open_bin([Piece(*sizes) for sizes in bin])  # pyright: ignore[reportArgumentType]

    def __next__(self) -> tuple[Row, str]:
        # Add pieces until one fits in no open bin: the packer then closes a bin, which becomes this sequence.
        closed = None
        while closed is None and not self._is_at_end():
            if self._stopped.is_set():
                raise Interrupted
            # Open the bins one per sequence: the first batches do not wait for the whole read-ahead.
            self._packer.open_bins = min(self._config.open_bins, 1 + self._state.rows)
            closed = self._add_next()
        if closed is None and self._packer.bins:  # the examples have ended
            closed = self._packer.bins.pop(0)
        return self._row(closed)

    def _is_at_end(self) -> bool:
        return self._end is not None and self._state.next >= self._end

    def _add_next(self) -> Bin[Piece] | None:
        """Packs the next piece; returns the bin that this closes, if any."""
        number, piece = self._state.next, self._state.piece
        group, pieces = self._read(number)
        is_last = piece + 1 >= len(pieces)
        closed = None
        if pieces:
            sample = pieces[piece]
            closed = self._packer.add(
                Piece(number, group, piece, int(is_last), sample.num_tokens, sample.num_chunks, sample)
            )
        else:
            self._state.done += 1
        self._state.next, self._state.piece = (number + self._config.batch_size, 0) if is_last else (number, piece + 1)
        return closed

    def _read(self, number: int) -> tuple[int, list[Sample]]:
        """Returns the group index and the pieces of an example: usually one, none if the example is skipped."""
        if self._pieces is not None and self._pieces[0] == number:
            return self._pieces[1:]
        drawn = self._order[number]
        skipped: tuple[str, MossAudioError] | None = None
        pieces: list[Sample] = []
        try:
            pieces = self._samples(drawn)
        except StorageError:  # not the fault of the example
            raise
        except TooLong as error:
            if self._config.oversize == "refuse":
                raise
            skipped = "too_long", error
        except NothingToAsk as error:
            skipped = "unlabelled", error
        except MossAudioError as error:
            skipped = "unreadable", error
        if self._state.piece == 0:  # else a resumed run reads the rest of an example that is counted already
            self._count(drawn.group, pieces, skipped)
        elif skipped is not None:  # its first pieces are already in sequences
            raise skipped[1]
        self._pieces = number, self._order.groups.index(drawn.group), pieces
        return self._pieces[1:]

    def _count(self, group: str, pieces: Sequence[Sample], skipped: tuple[str, MossAudioError] | None) -> None:
        """Counts an example; logs a skipped one before the check that may stop the run."""
        state = self._state
        state.read += 1
        state.truncated += any(sample.truncated for sample in pieces)
        state.in_a_row[group] = 0 if skipped is None else state.in_a_row.get(group, 0) + 1
        if skipped is not None:
            kind, problem = skipped
            log.warning("skipped (%s): %s", kind.replace("_", " "), problem)
            setattr(state, kind, getattr(state, kind) + 1)
            self._check_skips(kind, group)

    def _samples(self, drawn: Drawn) -> list[Sample]:
        """Returns the pieces of an example. Raises TooLong or another MossAudioError if it is unusable."""
        budget, truncate = self._config.budget, self._config.oversize == "truncate"
        return self._maker.fitting(drawn.example, drawn.rng, drawn.source.objectives, budget, truncate=truncate)

    def _check_skips(self, kind: str, group: str) -> None:
        state, config = self._state, self._config
        named, options = KINDS[kind]
        rate = config.max_skip_rate if kind == "unreadable" else config.max_unused_rate
        skipped = getattr(state, kind)
        if skipped > rate * max(state.read, SKIPS_JUDGED_AFTER):
            raise MossAudioError(
                f"expected at most {rate:.1%} of the examples to be {named}, found {skipped} of {state.read}; the log "
                f"names them: repair the data, or raise {options}."
            )
        if state.in_a_row[group] >= config.max_skips_in_a_row:
            raise MossAudioError(
                f"none of {state.in_a_row[group]} examples in a row of group {group} could be used, the last ones were "
                f"{named}; the log names them: repair the data, leave the group out, or raise {options}."
            )

    def _row(self, closed: Bin[Piece] | None) -> tuple[Row, str]:
        """Returns the packed sequence of a closed bin, or an empty one, and its report with the state after it."""
        config, maker = self._config, self._maker
        self._state.open = [[piece.sizes() for piece in bin.items] for bin in self._packer.bins]
        if closed is None:
            return empty_row(config.budget, *maker.chunk_shape), json.dumps(self._report([], []))
        # Pieces of a restored bin are decoded now.
        samples = [piece.sample or self._samples(self._order[piece.number])[piece.piece] for piece in closed.items]
        groups = [piece.group for piece in closed.items]
        self._state.rows += 1
        self._state.done += sum(piece.is_last for piece in closed.items)
        self._state.audio_seconds += sum(sample.audio_seconds for sample in samples)
        phase = max(self._order.phase(piece.number) for piece in closed.items)
        row = pack_row(samples, config.budget, groups, phase)
        return row, json.dumps(self._report(samples, groups))

    def _report(self, samples: Sequence[Sample], groups: Sequence[int]) -> dict[str, Any]:
        """State of the lane after this sequence, and figures of the sequence that add up over rows and hosts."""
        group_tokens = dict.fromkeys(self._order.groups, 0)
        for sample, group in zip(samples, groups, strict=True):
            group_tokens[self._order.groups[group]] += sample.num_tokens
        return {
            "state": vars(self._state),
            "sums": {
                "packed_tokens": sum(sample.num_tokens for sample in samples),
                "packed_chunks": sum(sample.num_chunks for sample in samples),
                "examples": len(samples),
                "attention_pairs": sum(sample.num_tokens**2 for sample in samples),
                **{f"tokens/{group}": tokens for group, tokens in group_tokens.items()},
            },
        }
