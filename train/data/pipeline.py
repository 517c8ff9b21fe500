"""The batches of a training run: read, decoded, packed and put together, by worker processes and any number of hosts.

    order = ExampleOrder(groups, seed)          every example's place in one endless sequence
    lane l: one row of the batch                packs the examples l, l + rows, l + 2 rows ... into sequences
    batch s: the next sequence of every lane    or the next few of each, where the batch has grown

Lanes are the unit of work. A host owns those of its rows, and a worker process of it some of those. A lane knows
nothing of hosts and workers, so neither do the batches: any number of hosts that divides the batch, with any number of
workers, reads the same sequences into the same rows of the global batch. The state of a lane is small (its place in the
order, and the numbers and sizes of the examples in its open bins). It travels with every sequence, and checkpoints hold
it. A resumed lane decodes the examples of an open bin when that bin is given out, and no other example twice.
"""

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from moss_audio_jax.errors import MossAudioError, StorageError
from train.data.budget import Budget, TooLong
from train.data.mixture import Drawn, ExampleOrder
from train.data.objectives import NothingToAsk
from train.data.packing import Bin, Packer, Row, Strategy, TrainingBatch, batch_of_rows, empty_row, pack_row, stacked
from train.data.samples import Answers, Sample, SampleMaker, Thoughts

log = logging.getLogger(__name__)

Oversize = Literal["skip", "truncate", "refuse"]
SKIPS_JUDGED_AFTER = 200  # examples of a lane: fewer say little about a rate
KINDS = {  # of skipped examples -> what the message that ends a run calls them, and the options that allow more
    "unreadable": ("unreadable", "data.max_skip_rate"),
    "unlabelled": ("without labels for the objectives of their group", "data.max_unused_rate"),
    "too_long": ("too long", "data.tokens, data.chunks or data.max_unused_rate"),
}
COUNTS = ("read", *KINDS, "truncated", "done", "audio_seconds")  # of a lane, since the start of the run
STATE_VERSION = 2  # 1 had lanes of several rows


class Interrupted(Exception):
    """The wait for a batch was ended."""


@dataclass(frozen=True)
class DataConfig:
    """How examples become batches."""

    batch_size: int
    """Packed sequences in a global batch."""
    tokens: int
    """Tokens of a packed sequence."""
    chunks: int
    """Chunks of audio (4 s) in a packed sequence; `packing.balanced_chunks` computes what goes with the tokens."""
    open_bins: int = 4
    """Sequences that each row of the batch fills at the same time. More of them leave less padding, and read more
    examples ahead: this number of batches. docs/training.md has measured fill rates."""
    strategy: Strategy = "best_fit"
    """Where an example goes: best_fit takes the fullest open sequence that has room, first_fit the oldest."""
    grow: tuple[str, ...] = ()
    """STEP=FACTOR: from the batch after this step on, a batch has FACTOR times as many sequences, in as many more
    microbatches. Several are given in order of their steps."""
    answers: Answers = "all"
    """Learn all answers of a conversation, or the last one."""
    thoughts: Thoughts = "learn"
    """Learn the thoughts that answers begin with, or mask them: they are read and not learned."""
    oversize: Oversize = "skip"
    """An example longer than a sequence is skipped and counted (`too_long`); or truncated and counted (`truncated`):
    it ends with the last learned token that fits, whole clips after that are left out, and it is skipped if nothing to
    learn is left; or refused, which stops the run. Plain text is never too long: it is split."""
    max_skip_rate: float = 0.05
    """Stop the run when more than this share of a row's examples can't be read."""
    max_unused_rate: float = 0.5
    """Stop the run when more than this share of a row's examples is too long, or has no labels for the objectives."""
    max_skips_in_a_row: int = 64
    """Stop the run when none of this many examples in a row of a group, within a row of the batch, can be used."""

    def __post_init__(self):
        if self.batch_size < 1 or self.open_bins < 1 or self.max_skips_in_a_row < 1:
            raise MossAudioError(
                f"expected a batch_size, open_bins and max_skips_in_a_row of 1 or more, "
                f"found {self.batch_size}, {self.open_bins} and {self.max_skips_in_a_row}; correct them."
            )
        rates = (self.max_skip_rate, self.max_unused_rate)
        if self.oversize not in ("skip", "truncate", "refuse") or not all(0 <= rate <= 1 for rate in rates):
            raise MossAudioError(
                f"expected oversize of skip, truncate, refuse, and a max_skip_rate and max_unused_rate of 0 to 1, "
                f"found {self.oversize!r}, {self.max_skip_rate} and {self.max_unused_rate}; correct them."
            )
        _ = self._growth  # is checked

    @property
    def budget(self) -> Budget:
        return Budget(self.tokens, self.chunks)

    @cached_property
    def _growth(self) -> list[tuple[int, int]]:
        """(batches before the change, factor), in order."""
        pairs = [text.partition("=") for text in self.grow]
        if any(not (step.isdecimal() and factor.isdecimal() and int(factor)) for step, _, factor in pairs):
            raise MossAudioError(f"data.grow must be STEP=FACTOR, such as 1000=2, not {' '.join(self.grow)!r}")
        growth = [(int(step), int(factor)) for step, _, factor in pairs]
        if growth != sorted(set(growth)):
            raise MossAudioError(f"data.grow must have its steps in order, not {' '.join(self.grow)}")
        return growth

    def growth(self, batches: int) -> int:
        """How many times `batch_size` sequences the next batch has, after this many batches."""
        return next((factor for begin, factor in reversed(self._growth) if batches >= begin), 1)


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


class _Lane:
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
        return self._maker.fitting_all(drawn.example, drawn.rng, drawn.source.objectives, budget, truncate=truncate)

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


class _Rounds(grain.IterDataset):
    """The next sequence of each of some lanes, again and again: their rows by name [lanes, ...], and their reports.

    A worker process takes every n-th of the lanes (`set_slice`, which Grain calls in it).
    """

    def __init__(self, lanes: Sequence[int], make_lane: Callable[[int, threading.Event], _Lane]):
        super().__init__()
        self._lanes, self._make_lane = list(lanes), make_lane

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        self._lanes = self._lanes[sl]

    def __iter__(self) -> grain.DatasetIterator:
        return _RoundIterator(self._lanes, self._make_lane)


class _RoundIterator(grain.DatasetIterator):
    def __init__(self, lanes: Sequence[int], make_lane: Callable[[int, threading.Event], _Lane]):
        super().__init__()
        self.stopped = threading.Event()
        self._lanes = [make_lane(lane, self.stopped) for lane in lanes]

    def __next__(self) -> tuple[Row, list[str]]:
        rows, reports = zip(*map(next, self._lanes), strict=True)
        return stacked(rows), list(reports)

    def get_state(self) -> dict[str, Any]:
        return {}  # the reports have it

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Grain asks for this method; a state is restored by making new lanes of it."""
        raise NotImplementedError


def _prepare_worker(*_: int) -> None:
    """Makes a worker process end with its parent, however that ends, and leaves signals to the parent.

    A terminal or a machine that shuts down sends them to all processes; the run then still needs its batches to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(message)s")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end with parent", daemon=True).start()


class TrainingData(grain.DatasetIterator[TrainingBatch]):
    """This host's rows of every global batch, without end, or until every source was read `epochs` times.

    With `hosts` hosts, host h gives the rows from h * batch_size / hosts on. `get_state` and `set_state` continue a
    run exactly, with any number of hosts and workers: see `merge_states`. An example that can't be used is named in the
    log at once. `sums` holds figures of the last batch, each of which adds up over hosts. Call `close` in the end: it
    stops the workers.
    """

    def __init__(
        self,
        order: ExampleOrder,
        maker: SampleMaker,
        config: DataConfig,
        *,
        host: int = 0,
        hosts: int = 1,
        workers: int = 0,
        rounds_ahead: int = 2,
        epochs: int | None = None,
        exists: Callable[[int, bool], bool] = lambda batch, here: here,
    ):
        """workers: processes that decode and pack; 0 does so in this one. rounds_ahead: how many sequences of each of
            its rows a worker prepares.
        exists: with several hosts and `epochs`, says whether any host has a batch of this number, given whether this
            one has (`distributed.any_host_has`). A host without any more then gives empty rows.
        """
        super().__init__()
        self._rounds: Any = None
        rows = config.batch_size
        if not 0 <= host < hosts or rows % hosts or workers < 0:
            raise MossAudioError(
                f"expected hosts that divide the batch of {rows} sequences and 0 workers or more, found host {host} of "
                f"{hosts} with {workers} workers; change data.batch_size or the number of hosts."
            )
        self._order, self._maker, self._config, self._exists = order, maker, config, exists
        self._lanes = range(host * rows // hosts, (host + 1) * rows // hosts)
        self._workers, self._rounds_ahead = min(workers, len(self._lanes)), rounds_ahead
        self._end = None if epochs is None else order.examples_of(epochs)
        self._batches = 0
        self.restart()

    def restart(self) -> None:
        """Starts at the beginning of the order. The number of batches so far stays."""
        self.close()
        self._states = {lane: vars(LaneState(next=lane)) for lane in self._lanes}
        self._is_at_end = False
        self.sums: dict[str, float] = {}

    def __next__(self) -> TrainingBatch:
        if self._is_at_end:
            raise StopIteration
        before = _total(self._states.values())
        rounds = [self._round() for _ in range(self._config.growth(self._batches))]
        reports = [report for _, reports in rounds for report in reports]
        sums = {name: sum(report["sums"][name] for report in reports) for name in reports[0]["sums"]}
        if self._end is not None and not self._exists(self._batches + 1, sums["examples"] > 0):
            self._is_at_end = True
            raise StopIteration
        self._batches += 1
        after = _total(self._states.values())
        self.sums = sums | {"rows": len(reports)} | {name: after[name] - before[name] for name in COUNTS}
        # Lane by lane, so that the rows of a host's lanes stay together whatever the number of hosts.
        arrays = {name: np.stack([rows[name] for rows, _ in rounds], 1) for name in rounds[0][0]}
        arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
        if self._end is not None:
            arrays["progress"] = np.repeat([self._progress(lane) for lane in self._lanes], len(rounds))
        return batch_of_rows(arrays)

    def _round(self) -> tuple[Row, list[dict[str, Any]]]:
        """The next sequence of every lane: arrays [lanes, ...] and reports, both in the order of the lanes."""
        if self._rounds is None:
            self._rounds = self._start()
        parts = [next(self._rounds) for _ in range(max(self._workers, 1))]
        # Worker w has every n-th lane from w on.
        lanes = [lane for worker in range(len(parts)) for lane in self._lanes[worker :: len(parts)]]
        places = np.argsort(lanes)
        rows = {name: np.concatenate([rows[name] for rows, _ in parts])[places] for name in parts[0][0]}
        reports = [json.loads(report) for _, reports in parts for report in reports]
        reports = [reports[place] for place in places]
        for lane, report in zip(self._lanes, reports, strict=True):
            self._states[lane] = report["state"]
        return rows, reports

    def _start(self) -> Any:
        order, maker, config, states, end = self._order, self._maker, self._config, dict(self._states), self._end

        def make_lane(lane: int, stopped: threading.Event) -> _Lane:
            return _Lane(order, maker, config, states[lane], end, stopped)

        rounds = _Rounds(self._lanes, make_lane)
        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers ask for absl's flags, which this program doesn't use
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._rounds_ahead)
        return iter(rounds.mp_prefetch(options, worker_init_fn=_prepare_worker))

    def _progress(self, lane: int) -> np.float32:
        """The share of a lane's examples that are in batches so far, or were skipped."""
        assert self._end is not None
        total = len(range(lane, self._end, self._config.batch_size))
        return np.float32(min(self._states[lane]["done"] / total, 1.0) if total else 1.0)

    def get_state(self) -> dict[str, Any]:
        """JSON: what the batches depend on, how many there were, and the states of this host's lanes."""
        return {
            "version": STATE_VERSION,
            "batches": self._batches,
            "depends_on": self._order.fingerprint() | self._content_options(),
            "lanes": {str(lane): state for lane, state in self._states.items()},
        }

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> bool:
        """Continues after the batch at which `get_state` gave this state, here or on hosts whose states were merged.

        allow_other_data: if the data or its options are not those of the state, start at the beginning of theirs.
        Returns whether the data are those of the state. Raises MossAudioError if they are not and that isn't allowed,
        or lanes are missing.
        """
        self.restart()
        self._batches = state["batches"]
        if (difference := self._difference(state)) is not None:
            if allow_other_data:
                return False
            raise MossAudioError(difference)
        missing = [lane for lane in self._lanes if str(lane) not in state["lanes"]]
        if missing:
            raise MossAudioError(
                f"the data's state: expected rows {self._lanes[0]} to {self._lanes[-1]}, found no row {missing[0]}; "
                "merge the states of all hosts (`merge_states`)."
            )
        self._states = {lane: state["lanes"][str(lane)] for lane in self._lanes}
        return True

    def _difference(self, state: Mapping[str, Any]) -> str | None:
        """What a state's data differ in, as an error says it."""
        if state.get("version") != STATE_VERSION:
            return (
                "the data's state is one of an older version, whose order of examples is not made any more: begin a "
                "new run with the parameters of this one, by --init or --branch"
            )
        now, then = self._order.fingerprint() | self._content_options(), state["depends_on"]
        for key in sorted(now | then):
            if now.get(key) != then.get(key):
                return (
                    f"the data's state: expected {key}={then.get(key)!r} as in the run it is from, "
                    f"found {now.get(key)!r}; restore the data and its options, or start a new run."
                )
        return None

    def _content_options(self) -> dict[str, Any]:
        options = asdict(self._config) | self._maker.content_options()
        for name in ("max_skip_rate", "max_unused_rate", "max_skips_in_a_row", "grow"):
            del options[name]  # changes no sequence
        return options

    def interrupt(self) -> None:
        """Ends a wait for the next batch in another thread, after which only `close` and `set_state` make sense."""
        if isinstance(rounds := self._rounds, _RoundIterator):
            rounds.stopped.set()

    def close(self) -> None:
        """Stops the workers; the next batch would start new ones."""
        if self._rounds is not None:
            self._rounds.close()
            self._rounds = None


def _total(states: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The counts of some lanes together."""
    lanes = list(states)
    return {name: sum(state[name] for state in lanes) for name in COUNTS}


def total_counts(state: Mapping[str, Any]) -> dict[str, float]:
    """`COUNTS` of all lanes of a state together."""
    return _total(state["lanes"].values())


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a whole run out of those of its hosts, from which any number of hosts can continue."""
    merged = dict(states[0])
    for state in states[1:]:
        if (state["batches"], state["depends_on"]) != (merged["batches"], merged["depends_on"]):
            raise MossAudioError(
                f"the data's states: expected those of one step of one run, found batches {merged['batches']} and "
                f"{state['batches']}; take all from the same checkpoint."
            )
        merged["lanes"] = merged["lanes"] | state["lanes"]
    return merged


WAIT_SECONDS = 0.2  # between two looks at whether to stop waiting


class Prefetched(grain.DatasetIterator[Any]):
    """Batches of `data`, put in place (`put`, mostly onto devices) in a thread while the step before still runs.

    `get_state` and `sums` are those of the batch taken last, not of those prepared ahead.
    """

    def __init__(self, data: TrainingData, put: Callable[[TrainingBatch], Any], ahead: int = 2):
        super().__init__()
        self._data, self._put, self._ahead = data, put, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._restart()

    def _restart(self) -> None:
        self._coming: deque[Future] = deque()
        self._state, self.sums = self._data.get_state(), self._data.sums

    def _prepare(self) -> tuple[Any, dict, dict] | None:
        try:
            batch = self._put(next(self._data))
        except StopIteration:  # which a future can't hold
            return None
        return batch, self._data.get_state(), self._data.sums

    def __next__(self) -> Any:
        return self.take(lambda: False)

    def take(self, stopped: Callable[[], bool]) -> Any:
        """The next batch. Raises Interrupted when it is not there and `stopped` says so, StopIteration at the end."""
        while len(self._coming) <= self._ahead:
            self._coming.append(self._thread.submit(self._prepare))
        while not wait([self._coming[0]], WAIT_SECONDS).done:
            if stopped():
                raise Interrupted
        taken = self._coming.popleft().result()
        if taken is None:
            raise StopIteration
        batch, self._state, self.sums = taken
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> bool:
        self._drain()
        same = self._data.set_state(state, allow_other_data=allow_other_data)
        self._restart()
        return same

    def _drain(self) -> None:
        for future in self._coming:
            future.cancel()
        self._data.interrupt()
        self._thread.submit(lambda: None).result()  # the one that was running, if any, has ended

    def close(self) -> None:
        """Stops the thread and the workers, for good."""
        if not self._closed:
            self._closed = True
            self._drain()
            self._thread.shutdown()
            self._data.close()
