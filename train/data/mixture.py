"""Which examples come in which order: groups with shares, sources in them by the square root of their size.

MOSS-Audio's pretraining mixes 30% speech recognition, 40% captions and 30% text, and inside each of these its data
sets in proportion to the square root of their sizes. The order is one sequence without end that depends on the
sources and the seed alone; any place of it can be read at once (`ExampleOrder[n]`), so that it can be dealt out to
any number of readers.

A curriculum is a mixture that changes: a group may take part from some example of the order on, or until one.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from moss_audio_jax.errors import MossAudioError
from train.data.manifest import Example
from train.data.objectives import check_shares

SHUFFLE_WINDOW = 4096


@dataclass(frozen=True)
class Source:
    """A data set.

    examples: a Manifest, Shards, or anything with a length and an Example at each index, cheap to pickle.
    objectives: how often each objective is drawn where it applies (see `objectives.render`).
    """

    name: str
    examples: Sequence[Example]
    objectives: Mapping[str, float] | None = None

    def __post_init__(self):
        if not len(self.examples):
            raise MossAudioError(f"source {self.name}: expected examples, found none; leave it out.")
        if self.objectives is not None:
            check_shares(self.objectives)


@dataclass(frozen=True)
class Group:
    """Sources that together make a share of all examples, relative to the shares of the other groups.

    Shares count examples; `TrainingData.metrics` gives the tokens that each group comes to.
    begin, end: the group takes part from this example of the order on, and until that one (None: to the end).
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


def source_weights(groups: Sequence[Group]) -> list[tuple[Group, Source, float]]:
    """How often each source is drawn; the weights sum to 1."""
    total = sum(group.share for group in groups)
    weights = []
    for group in groups:
        roots = [math.sqrt(len(source.examples)) for source in group.sources]
        weights += [
            (group, source, group.share / total * root / sum(roots))
            for source, root in zip(group.sources, roots, strict=True)
        ]
    return weights


@dataclass(frozen=True)
class Drawn:
    """An example at its place in the order; `rng` decides everything about it that is left to chance."""

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
        names = [source.name for group in groups for source in group.sources]
        if not names or len(set(names)) < len(names):
            raise MossAudioError(f"expected sources of different names, found {names}; rename or add some.")
        borders = {group.begin for group in groups} | {group.end for group in groups if group.end is not None}
        self._starts = sorted({0} | borders)
        seeds = np.random.SeedSequence(seed).spawn(len(self._starts))
        self._phases = [
            _Phase([group for group in groups if _takes_part(group, start)], start, phase_seed)
            for start, phase_seed in zip(self._starts, seeds, strict=True)
        ]
        self._seed = seed
        self.groups = [group.name for group in groups]

    def phase(self, number: int) -> int:
        """Which phase of the mixture an example belongs to, counted from 0: a new one begins where groups change."""
        return bisect.bisect_right(self._starts, number) - 1

    def __getitem__(self, number: int) -> Drawn:
        phase = self.phase(number)
        group, source, index = self._phases[phase][number - self._starts[phase]]
        return Drawn(number, group, source, index, self._seed)

    def fingerprint(self) -> dict[str, Any]:
        """JSON of what decides about the examples to come, which a resumed run compares: the seed and the sources."""
        facts = {
            f"source {source.name}" + (f" from example {start}" if start else ""): {
                "examples": len(source.examples),
                "weight": weight,
                "objectives": None if source.objectives is None else dict(source.objectives),
            }
            for start, phase in zip(self._starts, self._phases, strict=True)
            for _, source, weight in phase.weights
        }
        return {"seed": self._seed} | facts


def _takes_part(group: Group, number: int) -> bool:
    return group.begin <= number and (group.end is None or number < group.end)


class _Phase:
    """The order between two changes of the mixture, counted from the first: (group, source, index) for any number.

    Every source is shuffled anew in each of its epochs, and the sources are interleaved at their weights (to 1%) in a
    short pattern that repeats. This pattern is shuffled too, in windows, for readers of every k-th example would
    otherwise see some sources only.
    """

    def __init__(self, groups: Sequence[Group], start: int, seed: np.random.SeedSequence):
        if not groups:
            raise MossAudioError(f"from example {start} on no group takes part; let one begin there, or end later.")
        self.weights = source_weights(groups)
        # Epoch e of a shuffle uses its seed + e: seeds of sources must lie far apart.
        seeds = seed.generate_state(len(self.weights) + 1)
        shuffled = [
            grain.MapDataset.range(len(source.examples)).shuffle(int(source_seed)).repeat().map(_WithSource(number))
            for number, (source_seed, (_, source, _)) in enumerate(zip(seeds[1:], self.weights, strict=True))
        ]
        mixed = grain.MapDataset.mix(shuffled, [weight for _, _, weight in self.weights])
        # Window w uses its seed + w, which must stay below 2**32.
        self._order: Any = grain.experimental.WindowShuffleMapDataset(
            mixed, window_size=SHUFFLE_WINDOW, seed=int(seeds[0]) // 2
        )

    def __getitem__(self, number: int) -> tuple[str, Source, int]:
        source_number, index = self._order[number]
        group, source, _ = self.weights[source_number]
        return group.name, source, index


@dataclass(frozen=True)
class _WithSource:
    number: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.number, index
