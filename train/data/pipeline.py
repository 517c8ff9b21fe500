"""The batches of a training run: read, decoded, packed and put together, by worker processes and any number of hosts.

    order = ExampleOrder(groups, seed)                       every example's place in one endless sequence
    lane l: packs the examples l, l + lanes, l + 2 lanes ... into sequences, one after the other
    step s: the next batch_size / lanes sequences of every lane

Lanes are the unit of work: a host owns some of them, a worker process of it some of those. Since a lane knows nothing
of hosts and workers, neither do the batches: one host or eight, with or without workers, read the same sequences into
the same rows of the global batch. What a lane has to remember is small (where it stands in the order, and the numbers
of the examples in its open bins), travels with every sequence it gives, and is the state that checkpoints hold.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import grain
from absl import flags

from moss_audio_jax.errors import MossAudioError, StorageError
from train.data.budget import Budget, TooLong
from train.data.mixture import ExampleOrder
from train.data.packing import Bin, Packer, Row, Strategy, TrainingBatch, pack_row, stack_rows
from train.data.samples import Answers, Sample, SampleMaker, Thoughts

log = logging.getLogger(__name__)

Oversize = Literal["skip", "truncate", "refuse"]
SKIPS_JUDGED_AFTER = 200  # examples of a lane: fewer say little about a rate


@dataclass(frozen=True)
class DataConfig:
    """How examples become batches.

    batch_size: packed sequences in a global batch.
    tokens, chunks: budget of one sequence (`packing.balanced_chunks` says which go together).
    lanes: independent streams of examples; they divide batch_size, and hosts and workers divide them. Changing their
        number changes the batches. None takes the largest divisor of batch_size up to 8.
    open_bins, strategy: see `Packer`. Each lane keeps that many sequences in memory, of 0.1 MB a chunk.
    answers: of a conversation all are learned, or the last one. thoughts: those that answers begin with are learned, or
        only read. `samples` says more on both.
    oversize: an example beyond the budget is skipped and counted (`too_long`); or truncated and counted (`truncated`),
        to end with the last learned token that fits, whole clips after that left out, and skipped if there is none; or
        stops the run.
    max_skip_rate: the run stops when more than this share of a lane's examples couldn't be read.
    """

    batch_size: int
    tokens: int
    chunks: int
    lanes: int | None = None
    open_bins: int = 16
    strategy: Strategy = "best_fit"
    answers: Answers = "all"
    thoughts: Thoughts = "learn"
    oversize: Oversize = "skip"
    max_skip_rate: float = 0.05

    def __post_init__(self):
        if self.batch_size < 1 or self.num_lanes < 1 or self.batch_size % self.num_lanes:
            raise MossAudioError(
                f"expected lanes that divide the batch of {self.batch_size} sequences, found {self.lanes}; change one."
            )
        if self.oversize not in ("skip", "truncate", "refuse") or not 0 <= self.max_skip_rate <= 1:
            raise MossAudioError(
                f"expected oversize of skip, truncate, refuse and a max_skip_rate of 0 to 1, "
                f"found {self.oversize!r} and {self.max_skip_rate}; correct them."
            )

    @property
    def num_lanes(self) -> int:
        divisors = [lanes for lanes in range(1, 9) if self.batch_size % lanes == 0]
        return divisors[-1] if self.lanes is None else self.lanes

    @property
    def budget(self) -> Budget:
        return Budget(self.tokens, self.chunks)


@dataclass
class LaneState:
    """Where a lane stands: JSON when it travels.

    next: number of the example to read next. open: the numbers of the examples in each open bin.
    read: examples so far. unreadable, too_long: those of them that were skipped. truncated: those that lost their end.
    """

    next: int
    open: list[list[int]] = field(default_factory=list)
    read: int = 0
    unreadable: int = 0
    too_long: int = 0
    truncated: int = 0


@dataclass(frozen=True)
class _Numbered:
    """A sample and its number in the order."""

    number: int
    group: str
    sample: Sample

    @property
    def num_tokens(self) -> int:
        return self.sample.num_tokens

    @property
    def num_chunks(self) -> int:
        return self.sample.num_chunks


class _Lane(grain.IterDataset):
    """Packed sequences out of every `lanes`-th example, without end: (row, JSON of `_report`)."""

    def __init__(self, order: ExampleOrder, maker: SampleMaker, config: DataConfig, state: LaneState):
        super().__init__()
        self._parts = order, maker, config, state

    def __iter__(self) -> grain.DatasetIterator:
        return _LaneIterator(*self._parts)


class _LaneIterator(grain.DatasetIterator):
    def __init__(self, order: ExampleOrder, maker: SampleMaker, config: DataConfig, state: LaneState):
        super().__init__()
        self._order, self._maker, self._config = order, maker, config
        self.set_state(vars(state))

    def __next__(self) -> tuple[Row, str]:
        skips: list[str] = []
        closed = None
        while closed is None:
            number, self._state.next = self._state.next, self._state.next + self._config.num_lanes
            sample = self._read(number, skips)
            closed = sample and self._packer.add(sample)
        row = pack_row([item.sample for item in closed.items], self._config.budget)
        return row, json.dumps(self._report(closed, skips))

    def _read(self, number: int, skips: list[str]) -> _Numbered | None:
        """The sample of that number; None, with the reason in `skips`, if it can't be used."""
        self._state.read += 1
        try:
            numbered = self._sample(number)
        except StorageError:  # no fault of the example
            raise
        except TooLong as error:
            if self._config.oversize == "refuse":
                raise
            self._state.too_long += 1
            skips.append(str(error))
            return None
        except MossAudioError as error:
            self._state.unreadable += 1
            skips.append(str(error))
            self._check_skips()
            return None
        self._state.truncated += numbered.sample.truncated
        return numbered

    def _sample(self, number: int) -> _Numbered:
        """Raises TooLong, or another MossAudioError, that names the example if it can't be used."""
        drawn, config = self._order[number], self._config
        sample = self._maker.fitting(
            drawn.example,
            drawn.rng,
            drawn.source.objectives,
            config.budget,
            truncate=config.oversize == "truncate",
        )
        return _Numbered(number, drawn.group, sample)

    def _check_skips(self) -> None:
        state, limit = self._state, self._config.max_skip_rate
        if state.unreadable > limit * max(state.read, SKIPS_JUDGED_AFTER):
            raise MossAudioError(
                f"expected at most {limit:.1%} of the examples to be unreadable, found {state.unreadable} of "
                f"{state.read}; see the log for their names and repair the data, or raise max_skip_rate."
            )

    def _report(self, closed: Bin[_Numbered], skips: list[str]) -> dict[str, Any]:
        group_tokens: dict[str, int] = {}
        for item in closed.items:
            group_tokens[item.group] = group_tokens.get(item.group, 0) + item.num_tokens
        return {
            "state": self.get_state(),
            "skips": skips,
            "tokens": self._config.tokens - closed.free_tokens,
            "chunks": self._config.chunks - closed.free_chunks,
            "examples": len(closed.items),
            "attention_pairs": sum(item.num_tokens**2 for item in closed.items),
            "audio_seconds": sum(item.sample.audio_seconds for item in closed.items),
            "group_tokens": group_tokens,
        }

    def get_state(self) -> dict[str, Any]:
        return vars(self._state) | {"open": [[item.number for item in bin.items] for bin in self._packer.bins]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Reads the samples of the open bins again; one that can't be read any more is an error, not a skip."""
        self._state = LaneState(**state)
        self._packer: Packer[_Numbered] = Packer(self._config.budget, self._config.open_bins, self._config.strategy)
        for numbers in self._state.open:
            self._packer.open_bin([self._sample(number) for number in numbers])


class TrainingData(grain.DatasetIterator[TrainingBatch]):
    """This host's rows of every global batch, without end.

    With `hosts` hosts, host h gives the rows from h * batch_size / hosts on. `get_state` and `set_state` continue a
    run exactly, with any number of hosts and workers: see `merge_states`. Unreadable and oversized examples are named
    in the log as their batch is taken. `metrics` holds figures of the last batch. Call `close` in the end: it stops
    the workers.
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
        rows_ahead: int = 2,
    ):
        """workers: processes that decode and pack; 0 does so in this one. rows_ahead: how many rows each prepares."""
        super().__init__()
        self._rows: grain.DatasetIterator[tuple[Row, str]] | None = None
        lanes = config.num_lanes
        if not 0 <= host < hosts or lanes % hosts or (workers and lanes // hosts % workers):
            raise MossAudioError(
                f"expected hosts that divide the {lanes} lanes and workers that divide a host's share of them, found "
                f"host {host} of {hosts} with {workers} workers; change `lanes` for a new run or the workers for this."
            )
        self._order, self._maker, self._config = order, maker, config
        self._lanes = range(host * lanes // hosts, (host + 1) * lanes // hosts)
        self._workers, self._rows_ahead = workers, rows_ahead
        self._states = {lane: vars(LaneState(next=lane)) for lane in self._lanes}
        self._batches = 0
        self.metrics: dict[str, float] = {}

    def __next__(self) -> TrainingBatch:
        rows = self._rows = self._rows or iter(self._row_dataset())
        rounds = self._config.batch_size // self._config.num_lanes
        taken = [next(rows) for _ in range(rounds * len(self._lanes))]  # lane by lane, then the next round
        reports = [json.loads(report) for _, report in taken]
        for lane, report in zip(self._lanes, reports[-len(self._lanes) :], strict=True):
            self._states[lane] = report["state"]
        self._batches += 1
        self.metrics = self._metrics(reports)
        for skip in (skip for report in reports for skip in report["skips"]):
            log.warning("skipped %s", skip)
        by_lane = [row for lane in range(len(self._lanes)) for row, _ in taken[lane :: len(self._lanes)]]
        return stack_rows(by_lane)

    def _row_dataset(self) -> grain.IterDataset:
        lanes = [_Lane(self._order, self._maker, self._config, LaneState(**self._states[lane])) for lane in self._lanes]
        rows = grain.experimental.InterleaveIterDataset(lanes, cycle_length=len(lanes))
        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers ask for absl's flags, which this program doesn't use
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._rows_ahead)
        return rows.mp_prefetch(options)

    def _metrics(self, reports: Sequence[dict]) -> dict[str, float]:
        """Fill rates, sums over the batch, tokens by group, and the run's counts of this host's lanes so far."""
        summed = ("tokens", "chunks", "examples", "attention_pairs", "audio_seconds")
        sums = {key: sum(report[key] for report in reports) for key in summed}
        metrics = {
            "token_fill": sums["tokens"] / (len(reports) * self._config.tokens),
            "chunk_fill": sums["chunks"] / max(len(reports) * self._config.chunks, 1),
            "segment_length": sums["attention_pairs"] / sums["tokens"],  # the mean over tokens
            "examples": sums["examples"],
            "audio_seconds": sums["audio_seconds"],
        }
        for report in reports:
            for group, tokens in report["group_tokens"].items():
                metrics[f"tokens/{group}"] = metrics.get(f"tokens/{group}", 0) + tokens
        for count in ("read", "unreadable", "too_long", "truncated"):
            metrics[count] = sum(state[count] for state in self._states.values())
        return metrics

    def get_state(self) -> dict[str, Any]:
        """JSON: what the batches depend on, how many there were, and the states of this host's lanes."""
        return {
            "batches": self._batches,
            "depends_on": self._order.fingerprint() | self._content_options(),
            "lanes": {str(lane): state for lane, state in self._states.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after the batch at which `get_state` gave this state, here or on hosts whose states were merged.

        Raises MossAudioError if the data or its configuration are not those of the state, or lanes are missing.
        """
        now, then = self._order.fingerprint() | self._content_options(), state["depends_on"]
        for key in sorted(now | then):
            if now.get(key) != then.get(key):
                raise MossAudioError(
                    f"the data's state: expected {key}={then.get(key)!r} as in the run it is from, "
                    f"found {now.get(key)!r}; restore the data and its options, or start a new run."
                )
        missing = [lane for lane in self._lanes if str(lane) not in state["lanes"]]
        if missing:
            raise MossAudioError(
                f"the data's state: expected lanes {self._lanes[0]} to {self._lanes[-1]}, found no lane {missing[0]}; "
                "merge the states of all hosts (`merge_states`)."
            )
        self.close()
        self._states = {lane: state["lanes"][str(lane)] for lane in self._lanes}
        self._batches = state["batches"]

    def _content_options(self) -> dict[str, Any]:
        options = asdict(self._config) | {"lanes": self._config.num_lanes, "time_markers": self._maker.time_markers}
        del options["max_skip_rate"]  # changes no batch
        return options

    def close(self) -> None:
        """Stops the workers; the next batch would start new ones."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a whole run out of those of its hosts, from which any number of hosts can go on."""
    merged = dict(states[0])
    for state in states[1:]:
        if (state["batches"], state["depends_on"]) != (merged["batches"], merged["depends_on"]):
            raise MossAudioError(
                f"the data's states: expected those of one step of one run, found batches {merged['batches']} and "
                f"{state['batches']}; take all from the same checkpoint."
            )
        merged["lanes"] = merged["lanes"] | state["lanes"]
    return merged


class Prefetched(grain.DatasetIterator[Any]):
    """Batches of `data`, put in place (`put`, mostly onto devices) in a thread while the step before still runs.

    `get_state` and `metrics` are those of the batch taken last, not of those prepared ahead.
    """

    def __init__(self, data: TrainingData, put: Callable[[TrainingBatch], Any], ahead: int = 2):
        super().__init__()
        self._data, self._put, self._ahead = data, put, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._restart()

    def _restart(self) -> None:
        self._coming: deque[Future] = deque()
        self._state, self.metrics = self._data.get_state(), self._data.metrics

    def _prepare(self) -> tuple[Any, dict, dict]:
        batch = self._put(next(self._data))
        return batch, self._data.get_state(), self._data.metrics

    def __next__(self) -> Any:
        while len(self._coming) <= self._ahead:
            self._coming.append(self._thread.submit(self._prepare))
        batch, self._state, self.metrics = self._coming.popleft().result()
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._drain()
        self._data.set_state(state)
        self._restart()

    def _drain(self) -> None:
        for future in self._coming:
            future.cancel()
        self._thread.submit(lambda: None).result()  # the one that was running, if any, has ended

    def close(self) -> None:
        """Stops the thread and the workers, for good."""
        if not self._closed:
            self._closed = True
            self._drain()
            self._thread.shutdown()
            self._data.close()
