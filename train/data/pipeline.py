"""Batches of a training run, read by worker processes on any number of hosts.

    order = ExampleOrder(groups, seed)     one endless sequence of examples
    lane l: one row of the batch           packs examples l, l + rows, l + 2 rows ... of the order into sequences
    batch s: the next sequence of each lane, or the next few once the batch has grown

A host owns the lanes of its rows and divides them among its workers. A lane does not depend on hosts and workers, so
neither do the batches: with any number of workers, and of hosts that divides the batch, the same sequences are in the
same rows of the global batch. The state of a lane is small: its place in the order, and the numbers and sizes of the
examples in its open bins. It comes with every sequence and is saved in checkpoints. A resumed lane decodes the examples
of an open bin when the bin is emitted, and no other example twice.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

import grain
import numpy as np
from absl import flags

from moss_audio_jax.errors import MossAudioError
from train.data.config import DataConfig
from train.data.lanes import COUNTS, Interrupted, Lane, LaneState
from train.data.mixture import ExampleOrder
from train.data.packing import Row, TrainingBatch, batch_of_rows
from train.data.places import difference, place
from train.data.samples import SampleMaker
from train.data.worker_processes import prepare_worker

STATE_VERSION = 3  # 1 had lanes of several rows, 2 one shuffle only and no sources


class _Rounds(grain.IterDataset):
    """Rounds: the next sequence of each lane, with its report.

    Grain calls `set_slice` in each of n workers, which then has every n-th lane.
    """

    def __init__(self, lanes: Sequence[int], make_lane: Callable[[int, threading.Event], Lane]):
        super().__init__()
        self._lanes, self._make_lane = list(lanes), make_lane

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        self._lanes = self._lanes[sl]

    def __iter__(self) -> grain.DatasetIterator:
        return _RoundIterator(self._lanes, self._make_lane)


class _RoundIterator(grain.DatasetIterator):
    def __init__(self, lanes: Sequence[int], make_lane: Callable[[int, threading.Event], Lane]):
        super().__init__()
        self.stopped = threading.Event()
        self._lanes = [make_lane(lane, self.stopped) for lane in lanes]

    def __next__(self) -> list[tuple[Row, str]]:
        return [next(lane) for lane in self._lanes]

    def get_state(self) -> dict[str, Any]:
        return {}  # it is in the reports

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Required by Grain, never called: `TrainingData.set_state` creates new lanes."""
        raise TypeError("rows have the state of their lanes: call TrainingData.set_state")


class TrainingData(grain.DatasetIterator[TrainingBatch]):
    """This host's rows of every global batch, without end or until every source was read `epochs` times.

    Host h of `hosts` has rows h * batch_size / hosts to (h + 1) * batch_size / hosts - 1. `get_state` and `set_state`
    resume a run exactly, also with other numbers of hosts and workers (`merge_states`). Unusable examples are logged.
    `sums` has figures of the last batch, to be added over hosts. Call `close` at the end to stop the workers.
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
        """Args:
        workers: processes that decode and pack; 0 works in this process.
        rounds_ahead: sequences per row that a worker prepares in advance.
        epochs: end after this many epochs of every source. None: never.
        exists: with several hosts and `epochs`: returns whether any host has batch number `batch`, given whether this
          host has it (`distributed.any_host_has`). A host that has run out gives empty rows until all have.
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
        """Returns to the beginning of the order. The number of batches so far is kept."""
        self.close()
        self._states = {lane: vars(LaneState(next=lane)) for lane in self._lanes}
        self._is_at_end = False
        self.sums: dict[str, float] = {}

    def __next__(self) -> TrainingBatch:
        if self._is_at_end:
            raise StopIteration
        before = _total(self._states.values())
        # 1. Read `factor` sequences of every lane (1, or more once the batch has grown) into [lanes, factor, ...].
        factor = self._config.growth(self._batches)
        arrays: Row = {}
        reports = [report for number in range(factor) for report in self._round(arrays, number, factor)]
        sums = {name: sum(report["sums"][name] for report in reports) for name in reports[0]["sums"]}
        # 2. Stop together: with `epochs`, hosts run out at different batches.
        if self._end is not None and not self._exists(self._batches + 1, sums["examples"] > 0):
            self._is_at_end = True
            raise StopIteration
        self._batches += 1
        # 3. Counts of this batch are the differences of the lanes' totals.
        after = _total(self._states.values())
        self.sums = sums | {"rows": len(reports)} | {name: after[name] - before[name] for name in COUNTS}
        # 4. [lanes, factor, ...] -> [lanes * factor, ...], lane by lane: the order of rows does not depend on hosts.
        arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
        if self._end is not None:
            arrays["progress"] = np.repeat([self._progress(lane) for lane in self._lanes], factor)
        return batch_of_rows(arrays)

    def _round(self, arrays: Row, number: int, rounds: int) -> list[dict[str, Any]]:
        """Writes the next sequence of every lane to arrays[name][:, number]; returns the reports by lane.

        arrays: [lanes, rounds, ...] by name, allocated in the first round. Rows are copied here only.
        """
        if self._rounds is None:
            self._rounds = self._start()
        reports: dict[int, dict[str, Any]] = {}
        parts = max(self._workers, 1)
        for part in range(parts):
            # Grain alternates between workers; worker w has lanes w, w + parts, w + 2 parts ...
            lanes = range(part, len(self._lanes), parts)
            for lane, (row, report) in zip(lanes, next(self._rounds), strict=True):
                for name, values in row.items():
                    if name not in arrays:
                        arrays[name] = np.empty((len(self._lanes), rounds, *values.shape), values.dtype)
                    arrays[name][lane, number] = values
                reports[lane] = json.loads(report)
                self._states[self._lanes[lane]] = reports[lane]["state"]
        return [reports[lane] for lane in sorted(reports)]

    def _start(self) -> Any:
        order, maker, config, states, end = self._order, self._maker, self._config, dict(self._states), self._end

        def make_lane(lane: int, stopped: threading.Event) -> Lane:
            return Lane(order, maker, config, states[lane], end, stopped)

        rounds = _Rounds(self._lanes, make_lane)
        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which this program does not parse
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._rounds_ahead)
        return iter(rounds.mp_prefetch(options, worker_init_fn=prepare_worker))

    def _progress(self, lane: int) -> np.float32:
        """Share of a lane's examples that are in batches or were skipped."""
        assert self._end is not None
        total = len(range(lane, self._end, self._config.batch_size))
        return np.float32(min(self._states[lane]["done"] / total, 1.0) if total else 1.0)

    def get_state(self) -> dict[str, Any]:
        """Returns JSON: what the batches depend on, their number so far, and the states of this host's lanes.

        groups: names of the groups whose indices are in open bins. sources: see `ExampleOrder`.
        """
        return {
            "version": STATE_VERSION,
            "batches": self._batches,
            "depends_on": self._order.fingerprint() | self._content_options(),
            "groups": self._order.groups,
            "sources": self._order.sources,
            "lanes": {str(lane): state for lane, state in self._states.items()},
        }

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> bool:
        """Resumes after the batch at which `get_state` returned this state, here or merged from several hosts.

        The data may differ from those of the state where no row has read yet: sources and groups may join there.
        allow_other_data: with other data or options than those of the state, start at the beginning of these data.
        Returns True if the data are those of the state. Raises MossAudioError if they differ and that is not allowed,
        or if lanes are missing.
        """
        self.restart()
        self._batches = state["batches"]
        if (problem := self._difference(state)) is not None:
            if allow_other_data and not self._joins(state):
                return False
            raise MossAudioError(problem)
        missing = [lane for lane in self._lanes if str(lane) not in state["lanes"]]
        if missing:
            raise MossAudioError(
                f"the data's state: expected rows {self._lanes[0]} to {self._lanes[-1]}, found no row {missing[0]}; "
                "merge the states of all hosts (`merge_states`)."
            )
        self._states = {lane: self._with_present_groups(state, state["lanes"][str(lane)]) for lane in self._lanes}
        return True

    def _joins(self, state: Mapping[str, Any]) -> bool:
        """Returns True if a source joins after the state's place, which means nothing once the data start again."""
        last = self._order.last_join
        return last > 0 and state.get("version") == STATE_VERSION and last >= place(state)

    def _with_present_groups(self, state: Mapping[str, Any], lane: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the state of a lane with the indices that groups have now."""
        before, now = state["groups"], self._order.groups
        if before == now:
            return dict(lane)
        bins = [[[number, now.index(before[group]), *rest] for number, group, *rest in bin] for bin in lane["open"]]
        return {**lane, "open": bins}

    def _difference(self, state: Mapping[str, Any]) -> str | None:
        """Error message for the first difference between a state's data and these; None if they are the same."""
        if state.get("version") != STATE_VERSION:
            return (
                "the data's state is one of an older version, whose order of examples is not made any more: begin a "
                "new run with the parameters of this one, by --init or --branch"
            )
        found = difference(self._order, self._content_options(), state)
        if found is None:
            return None
        key, then, now = found
        return (
            f"the data's state: expected {key}={then!r} as in the run it is from, found {now!r}; restore the data and "
            "its options, or start a new run."
        )

    def _content_options(self) -> dict[str, Any]:
        options = asdict(self._config) | self._maker.content_options()
        if options["label_times"]:  # states from before this option lack it
            del options["label_times"]
        for name in ("max_skip_rate", "max_unused_rate", "max_skips_in_a_row", "grow"):
            del options[name]  # do not change the sequences
        if not options["default_prompt"]:  # older runs have no such option
            del options["default_prompt"]
        return options

    def interrupt(self) -> None:
        """Ends a wait for the next batch in another thread. Call only `close` or `set_state` after it."""
        if isinstance(rounds := self._rounds, _RoundIterator):
            rounds.stopped.set()

    def close(self) -> None:
        """Stops the workers; the next batch starts new ones."""
        if self._rounds is not None:
            self._rounds.close()
            self._rounds = None


def _total(states: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Sums the counts of lanes."""
    lanes = list(states)
    return {name: sum(state[name] for state in lanes) for name in COUNTS}


def total_counts(state: Mapping[str, Any]) -> dict[str, float]:
    """Sums `COUNTS` over the lanes of a state."""
    return _total(state["lanes"].values())


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all hosts into one, from which any number of hosts can resume."""
    merged = dict(states[0])
    for state in states[1:]:
        if (state["batches"], state["depends_on"]) != (merged["batches"], merged["depends_on"]):
            raise MossAudioError(
                f"the data's states: expected those of one step of one run, found batches {merged['batches']} and "
                f"{state['batches']}; take all from the same checkpoint."
            )
        merged["lanes"] = merged["lanes"] | state["lanes"]
    return merged


WAIT_SECONDS = 0.2  # between two checks of `stopped`


class Prefetched(grain.DatasetIterator[Any]):
    """Batches of `data`, transferred by `put` (usually to devices) in a thread while the previous step runs.

    `get_state` and `sums` belong to the batch taken last, not to batches prepared ahead.
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
        except StopIteration:  # a future can't hold StopIteration
            return None
        return batch, self._data.get_state(), self._data.sums

    def __next__(self) -> Any:
        return self.take(lambda: False)

    def take(self, stopped: Callable[[], bool]) -> Any:
        """Returns the next batch. Raises Interrupted if `stopped()` while waiting, StopIteration at the end."""
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
        self._thread.submit(lambda: None).result()  # waits for the running one, if any

    def close(self) -> None:
        """Stops the thread and the workers; no more batches can be taken."""
        if not self._closed:
            self._closed = True
            self._drain()
            self._thread.shutdown()
            self._data.close()
