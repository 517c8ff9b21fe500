"""One row of the batch: its examples, read in turn and packed into sequences, with all that a resumed run needs.

Lane l of a batch of n rows packs the examples l, l + n, l + 2 n ... of the order. The first sequences are given out
while its bins are still being opened. The state holds the numbers and sizes of the examples in the open bins: a resumed
lane decodes them when their bin is given out.
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

SKIPS_JUDGED_AFTER = 200  # examples of a lane: fewer say little about a rate
KINDS = {  # of skipped examples -> what the message that ends a run calls them, and the options that allow more
    "unreadable": ("unreadable", "data.max_skip_rate"),
    "unlabelled": ("without labels for the objectives of their group", "data.max_unused_rate"),
    "too_long": ("too long", "data.tokens, data.chunks or data.max_unused_rate"),
}
COUNTS = ("read", *KINDS, "truncated", "done", "audio_seconds")  # of a lane, since the start of the run


class Interrupted(Exception):
    """The wait for a batch was ended."""


@dataclass
class LaneState:
    """Where a lane is: JSON when it travels.

    next, piece: the sample to read next is piece `piece` of example number `next`.
    open: of each open bin, the fields of its items (`_Item`) but the sample.
    rows: packed sequences so far. done: examples in them, and skipped ones. audio_seconds: of audio in them.
    read: examples so far. unreadable, unlabelled, too_long: those of them that were skipped. truncated: those that lost
    their end. in_a_row: by group, how many were skipped since one that was not.
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
class _Item:
    """A piece of an example in a bin. sample: None where the rest alone is known, from a state.

    number: of the example. group: its index in the mixture. is_last: whether it is the example's last piece, 0 or 1.
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
    """Packed sequences out of every `batch_size`-th example, as pairs (row, JSON of `_report`), without end.

    After the last example that `end` allows, the open bins are given out, and then empty rows.
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
        self._packer: Packer[_Item] = Packer(config.budget, config.open_bins, config.strategy)
        self._pieces: tuple[int, int, list[Sample]] | None = None  # number, group, samples of what was read last
        for bin in self._state.open:
            self._packer.open_bin([_Item(*sizes) for sizes in bin])  # pyright: ignore[reportArgumentType]

    def __next__(self) -> tuple[Row, str]:
        closed = None
        while closed is None and not self._is_at_end():
            if self._stopped.is_set():
                raise Interrupted
            # The first sequences are given out before all bins are open: so a run does not wait for a whole read-ahead.
            self._packer.open_bins = min(self._config.open_bins, 1 + self._state.rows)
            closed = self._add_next()
        if closed is None and self._packer.bins:
            closed = self._packer.bins.pop(0)
        return self._row(closed)

    def _is_at_end(self) -> bool:
        return self._end is not None and self._state.next >= self._end

    def _add_next(self) -> Bin[_Item] | None:
        """Packs the next piece of an example; returns the bin that this closes."""
        number, piece = self._state.next, self._state.piece
        group, pieces = self._read(number)
        is_last = piece + 1 >= len(pieces)
        closed = None
        if pieces:
            sample = pieces[piece]
            item = _Item(number, group, piece, int(is_last), sample.num_tokens, sample.num_chunks, sample)
            closed = self._packer.add(item)
        else:
            self._state.done += 1
        self._state.next, self._state.piece = (number + self._config.batch_size, 0) if is_last else (number, piece + 1)
        return closed

    def _read(self, number: int) -> tuple[int, list[Sample]]:
        """The group of the example of that number, and its pieces, mostly one; none if it can't be used."""
        if self._pieces is not None and self._pieces[0] == number:
            return self._pieces[1:]
        drawn = self._order[number]
        skipped: tuple[str, MossAudioError] | None = None
        pieces: list[Sample] = []
        try:
            pieces = self._samples(drawn)
        except StorageError:  # no fault of the example
            raise
        except TooLong as error:
            if self._config.oversize == "refuse":
                raise
            skipped = "too_long", error
        except NothingToAsk as error:
            skipped = "unlabelled", error
        except MossAudioError as error:
            skipped = "unreadable", error
        if self._state.piece == 0:
            self._count(drawn.group, pieces, skipped)
        elif skipped is not None:  # its first pieces are in sequences already
            raise skipped[1]
        self._pieces = number, self._order.groups.index(drawn.group), pieces
        return self._pieces[1:]

    def _count(self, group: str, pieces: Sequence[Sample], skipped: tuple[str, MossAudioError] | None) -> None:
        """Counts an example that was read, and names one that is skipped at once: a run may end by it."""
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
        """Raises TooLong, or another MossAudioError, that names the example if it can't be used."""
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

    def _row(self, closed: Bin[_Item] | None) -> tuple[Row, str]:
        config, maker = self._config, self._maker
        self._state.open = [[item.sizes() for item in bin.items] for bin in self._packer.bins]
        if closed is None:
            return empty_row(config.budget, *maker.chunk_shape), json.dumps(self._report([], []))
        samples = [item.sample or self._samples(self._order[item.number])[item.piece] for item in closed.items]
        groups = [item.group for item in closed.items]
        self._state.rows += 1
        self._state.done += sum(item.is_last for item in closed.items)
        self._state.audio_seconds += sum(sample.audio_seconds for sample in samples)
        phase = max(self._order.phase(item.number) for item in closed.items)
        row = pack_row(samples, config.budget, groups, phase)
        return row, json.dumps(self._report(samples, groups))

    def _report(self, samples: Sequence[Sample], groups: Sequence[int]) -> dict[str, Any]:
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
