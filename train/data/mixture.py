"""Order of the examples: groups with shares, and in them sources with weights.

MOSS-Audio's pretraining mixes 30% speech recognition, 40% captions and 30% text, and in each of these its data sets in
proportion to the square root of their sizes; a source may have another weight. The order is one endless sequence that
depends on the sources and the seed alone, with random access (`ExampleOrder[n]`): any number of readers can share it.

    window w of SHUFFLE_WINDOW examples: each source in proportion to its weight, shuffled
    c-th example of a source:            example c modulo its size, in the shuffle of epoch c // size

Each example of a source therefore comes exactly once per epoch of that source.

In a curriculum the mixture changes: a group may begin or end at an example of the order. A source may join its group
later. A stretch without a change is a phase. A source that takes part in several phases continues its epochs in the
next. A source that joins changes nothing of the order before.
"""

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np

from moss_audio_jax.errors import MossAudioError
from train.data.manifest import Example
from train.data.objectives import check_shares

SHUFFLE_WINDOW = 4096
_WINDOWS_KEPT = 4  # readers of an order are never far apart
_WEIGHT_BITS = 40  # weights are rounded to integers, so that counts are the same on every machine
_ORDER_VERSION = 3  # increased when the same sources and seed give another order
_FROM_EXAMPLE = re.compile(r"source .* from example (\d+)", re.DOTALL)  # facts of a later phase in a fingerprint
ENDLESS = 2**30  # sources of at least this size are generated and have no epochs


@dataclass(frozen=True)
class Source:
    """A data set.

    examples: a Manifest, Shards, or any sequence of Example that is cheap to pickle.
    objectives: shares of the objectives (see `objectives.render`).
    weight: relative to the other sources of its group. None: the square root of the number of examples.
    begin: the source takes part from this example of the order on, if its group does.
    """

    name: str
    examples: Sequence[Example]
    objectives: Mapping[str, float] | None = None
    weight: float | None = None
    begin: int = 0

    def __post_init__(self):
        if not len(self.examples):
            raise MossAudioError(f"source {self.name}: expected examples, found none; leave it out.")
        if self.objectives is not None:
            check_shares(self.objectives)
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise MossAudioError(f"source {self.name}: expected a weight above 0, found {self.weight}; correct it.")
        if self.begin < 0:
            raise MossAudioError(f"source {self.name}: expected a begin of 0 or more, found {self.begin}; correct it.")

    @property
    def relative_weight(self) -> float:
        return math.sqrt(len(self.examples)) if self.weight is None else self.weight


@dataclass(frozen=True)
class Group:
    """Sources that together make a share of all examples, relative to the shares of other groups.

    Shares are of examples, not tokens.
    begin, end: the group takes part from example `begin` of the order to before `end` (None: without end).
    """

    name: str
    share: float
    sources: tuple[Source, ...]
    begin: int = 0
    end: int | None = None

    def __post_init__(self):
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise MossAudioError(
                f"group {self.name}: expected 0 <= begin < end, found {self.begin} and {self.end}; correct them."
            )
        if not 0 < self.share < math.inf or not self.sources:
            raise MossAudioError(
                f"group {self.name}: expected a share above 0 and at least one source, "
                f"found {self.share} and {len(self.sources)}; correct it or leave it out."
            )
        late = [source for source in self.sources if self.end is not None and source.begin >= self.end]
        if late:
            raise MossAudioError(
                f"group {self.name}: expected its sources to begin before its end, found {late[0].name}, which begins "
                f"at {late[0].begin}, and the end {self.end}; correct one of them."
            )

    def begin_of(self, source: Source) -> int:
        """First example of the order at which a source of this group takes part."""
        return max(self.begin, source.begin)

    def at(self, number: int) -> "Group | None":
        """Returns the group with those of its sources that take part in example `number`; None if none does."""
        part = tuple(source for source in self.sources if self.begin_of(source) <= number)
        return replace(self, sources=part) if part and (self.end is None or number < self.end) else None


def source_weights(groups: Sequence[Group]) -> list[tuple[Group, Source, float]]:
    """Computes the weight of each source in the whole mixture; weights sum to 1."""
    total = sum(group.share for group in groups)
    weights = []
    for group in groups:
        of_group = sum(source.relative_weight for source in group.sources)
        weights += [
            (group, source, group.share / total * source.relative_weight / of_group) for source in group.sources
        ]
    return weights


@dataclass(frozen=True)
class Drawn:
    """An example at its place in the order. `rng` is the source of all randomness about it."""

    number: int
    group: str
    source: Source
    index: int
    seed: int

    @property
    def example(self) -> Example:
        return self.source.examples[self.index]

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number])


class ExampleOrder:
    """The endless order of examples: `order[n]` for any n >= 0."""

    def __init__(self, groups: Sequence[Group], seed: int):
        if not 0 <= seed < 2**32:
            raise MossAudioError(f"expected a seed of 0 to 2**32 - 1, found {seed}; choose another.")
        self._sources = [source for group in groups for source in group.sources]
        names = [source.name for source in self._sources]
        if not names or len(set(names)) < len(names):
            raise MossAudioError(f"expected sources of different names, found {names}; rename or add some.")
        self.groups = [group.name for group in groups]
        begins = {group.name: [group.begin_of(source) for source in group.sources] for group in groups}
        self.begins = {name: min(of_group) for name, of_group in begins.items()}  # example of the order
        ends = {group.end for group in groups if group.end is not None}
        self._starts = sorted({0}.union(ends, *begins.values()))
        self._seed = seed
        # A source that joins gets its seed after those that are there: seeds are a prefix of any longer list of seeds.
        by_seed = sorted(self._sources, key=lambda source: source.begin)
        number_of_seed = {source.name: number for number, source in enumerate(by_seed)}
        # JSON by source: its group, and the number of the seed of its shuffle.
        self.sources = {
            source.name: [group.name, number_of_seed[source.name]] for group in groups for source in group.sources
        }
        self.last_join = max(source.begin for source in self._sources)  # 0: all are there from the beginning
        # Epoch e of a shuffle uses seed + e, so the seeds of sources must be far apart.
        seeds = [np.random.SeedSequence(key).generate_state(len(names)).tolist() for key in (seed, [seed, 1])]
        self._shuffled: dict[str, Any] = {
            source.name: _shuffled(len(source.examples), *of_source)
            for source, *of_source in zip(by_seed, *seeds, strict=True)
        }
        self._phases: list[_Phase] = []
        read = dict.fromkeys(names, 0)
        for number, start in enumerate(self._starts):
            part = [group.at(start) for group in groups]
            self._phases.append(_Phase([group for group in part if group is not None], start, (seed, number), read))
            if number + 1 < len(self._starts):
                read = read | self._phases[-1].read(self._starts[number + 1] - start)

    def __getitem__(self, number: int) -> Drawn:
        phase = self._phases[self.phase(number)]
        group, source, count = phase[number - phase.start]
        return Drawn(number, group.name, source, int(self._shuffled[source.name][count]), self._seed)

    def phase(self, number: int) -> int:
        """Index of the phase of an example."""
        return bisect.bisect_right(self._starts, number) - 1

    def sources_before(self, number: int) -> list[str]:
        """Names of the sources that take part in an example before `number`."""
        weights = [weight for phase in self._phases if phase.start < number for weight in phase.weights]
        return list(dict.fromkeys(source.name for _, source, _ in weights))

    def epochs(self, number: int) -> dict[str, float]:
        """Epochs of each source after `number` examples, by name. Leaves out endless ones, and those not begun."""
        counts = self._read(number)
        return {
            source.name: counts[source.name] / len(source.examples)
            for source in self._sources
            if len(source.examples) < ENDLESS and source.name in counts
        }

    def examples_of(self, epochs: int) -> int:
        """Number of examples after which every source was read at least `epochs` times.

        Raises MossAudioError if a source is endless or leaves the mixture.
        """
        last = {source.name for _, source, _ in self._phases[-1].weights}
        unfit = [source.name for source in self._sources if len(source.examples) >= ENDLESS or source.name not in last]
        if unfit:
            raise MossAudioError(
                f"epochs can't be counted over {unfit[0]}, which has no end or takes part only for a time: "
                "give a number of steps instead of epochs"
            )
        wanted = {source.name: epochs * len(source.examples) for source in self._sources}

        def is_enough(number: int) -> bool:
            read = self._read(number)
            return all(read.get(name, 0) >= count for name, count in wanted.items())

        return _first(is_enough)

    def end_of_epoch(self, group: str, number: int) -> int:
        """Number of examples after which the largest source of a group has completed its epoch at example `number`.

        The sources are those that take part then: of all groups, if none of `group` does. Raises MossAudioError if they
        have no epochs, or if the source leaves the mixture before.
        """
        here = [(of.name, source) for of, source, _ in self._phases[self.phase(number)].weights]
        finite = [(name, source) for name, source in here if len(source.examples) < ENDLESS]
        sources = [source for name, source in finite if name == group] or [source for _, source in finite]
        if not sources:
            raise MossAudioError(f"the data at example {number} have no epochs: give the example itself")
        largest = max(sources, key=lambda source: len(source.examples))
        size = len(largest.examples)
        wanted = size * max(-(-self._read(number).get(largest.name, 0) // size), 1)

        def is_complete(number: int) -> bool:
            return self._read(number).get(largest.name, 0) >= wanted

        stays = any(source is largest for _, source, _ in self._phases[-1].weights)
        if not stays and not is_complete(self._starts[-1]):
            raise MossAudioError(
                f"{largest.name} leaves the mixture before it completes its epoch: give the example itself"
            )
        return _first(is_complete)

    def _read(self, number: int) -> dict[str, int]:
        """Examples of each source among the first `number`; without sources whose phase has not begun."""
        read: dict[str, int] = {}
        for phase, end in zip(self._phases, [*self._starts[1:], number], strict=True):
            if phase.start <= number:
                read |= phase.read(min(number, end) - phase.start)  # includes the counts of earlier phases
        return read

    def fingerprint(self, before: float = math.inf) -> dict[str, Any]:
        """Returns JSON that determines the order (seed and sources), which a resumed run compares.

        before: only what determines the examples before this one; `facts_before` selects the same of a fingerprint.
        """
        facts = {
            f"source {source.name}" + (f" from example {phase.start}" if phase.start else ""): {
                "examples": len(source.examples),
                "weight": weight,
                "objectives": None if source.objectives is None else dict(source.objectives),
                **getattr(source.examples, "facts", {}),
            }
            for phase in self._phases
            if phase.start < before or not phase.start
            for _, source, weight in phase.weights
        }
        return {"seed": self._seed, "order": _ORDER_VERSION} | facts


def facts_before(fingerprint: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the facts of a fingerprint that determine the examples before `number`, and everything else in it."""
    starts = {key: _FROM_EXAMPLE.fullmatch(key) for key in fingerprint}
    return {key: fingerprint[key] for key, start in starts.items() if start is None or int(start[1]) < number}


def _shuffled(size: int, first: int, second: int) -> grain.MapDataset[int]:
    """Returns the indices of a data set, shuffled anew in each epoch, without end. first, second: seeds.

    Grain's shuffle computes one place at a time, in no memory. Applied once, it leaves neighbours together: in a
    million examples their indices have a correlation of 0.4.
    """
    return grain.MapDataset.range(size).shuffle(first).shuffle(second).repeat()


def _first(is_enough: Callable[[int], bool]) -> int:
    """Smallest number of examples that is enough. Every larger one must be enough too."""
    bound = 1
    while not is_enough(bound):
        bound *= 2
    return bisect.bisect_left(range(bound + 1), True, key=is_enough)


class _Phase:
    """Order between two changes of the mixture: (group, source, count) by position within the phase.

    count: number of earlier examples of that source in the whole order.
    """

    def __init__(self, groups: Sequence[Group], start: int, seed: Sequence[int], read: Mapping[str, int]):
        """read: examples of each source before this phase."""
        if not groups:
            raise MossAudioError(f"from example {start} on no group takes part; let one begin there, or end later.")
        self.start, self._seed = start, tuple(seed)
        self.weights = source_weights(groups)
        self._before = [read[source.name] for _, source, _ in self.weights]
        sums = np.cumsum([weight for *_, weight in self.weights])
        # Python integers: products with large numbers are exact.
        self._borders = [0, *(round(border * 2**_WEIGHT_BITS) for border in (sums / sums[-1]).tolist())]
        self._windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_windows": {}}

    def __getitem__(self, number: int) -> tuple[Group, Source, int]:
        window, place = divmod(number, SHUFFLE_WINDOW)
        pattern, counts = self._window(window)
        group, source, _ = self.weights[pattern[place]]
        return group, source, int(counts[place])

    def read(self, number: int) -> dict[str, int]:
        """Examples of each source before example `number` of this phase, in the whole order."""
        window, place = divmod(number, SHUFFLE_WINDOW)
        here = np.bincount(self._window(window)[0][:place], minlength=len(self.weights)) if place else 0
        counts = (np.array(self._counts(window)) + here).tolist()
        return {source.name: count for (_, source, _), count in zip(self.weights, counts, strict=True)}

    def _counts(self, windows: int) -> list[int]:
        """Examples of each source before window `windows`: each rounded, their sum exact."""
        half = 2 ** (_WEIGHT_BITS - 1)
        ends = [(border * windows * SHUFFLE_WINDOW + half) >> _WEIGHT_BITS for border in self._borders]
        return [before + end - begin for before, begin, end in zip(self._before, ends[:-1], ends[1:], strict=True)]

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a window: index of its source, and the number of earlier examples of it. Both [window]."""
        found = self._windows.get(window)
        if found is None:
            first, last = np.array(self._counts(window)), np.array(self._counts(window + 1))
            sources = np.repeat(np.arange(len(first)), last - first)
            # Shuffle the sources, then count each source's occurrences in shuffled order.
            pattern = np.random.default_rng([*self._seed, window]).permutation(sources)
            counts = np.empty(SHUFFLE_WINDOW, np.int64)
            within = np.arange(SHUFFLE_WINDOW) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
            counts[np.argsort(pattern, kind="stable")] = within + first[sources]
            while len(self._windows) >= _WINDOWS_KEPT:
                self._windows.pop(min(self._windows), None)  # another thread may have removed it
            found = self._windows[window] = pattern, counts
        return found
