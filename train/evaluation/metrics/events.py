"""Sound events: event-based F1, and errors of onsets and offsets."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from train.data.manifest import TimedText
from train.evaluation.metrics.text import normalize_text
from train.evaluation.metrics.timelines import ROUNDING_SECONDS


@dataclass(frozen=True)
class EventCounts:
    """Numbers of matched, predicted and reference events."""

    matched: int = 0
    predicted: int = 0
    reference: int = 0

    @property
    def precision(self) -> float | None:
        return self.matched / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        return self.matched / self.reference if self.reference else None

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN)."""
        total = self.predicted + self.reference
        return 2 * self.matched / total if total else None

    def __add__(self, other: "EventCounts") -> "EventCounts":
        return EventCounts(
            self.matched + other.matched, self.predicted + other.predicted, self.reference + other.reference
        )


@dataclass(frozen=True)
class EventScore:
    """Counts over all classes and by class, and mean errors of matched events."""

    total: EventCounts  # its F1 is the micro average
    by_class: Mapping[str, EventCounts]
    onset_ms: float | None  # mean absolute error over matched events
    offset_ms: float | None


def score_events(
    predictions: Iterable[Sequence[TimedText]],
    references: Iterable[Sequence[TimedText]],
    onset_tolerance: float = 0.2,
) -> EventScore:
    """Computes event-based F1 of a test set.

    A predicted event matches a reference event with the same label, after `normalize_text`, whose onset is within
    `onset_tolerance` seconds (inclusive). The largest possible number of events is matched one to one.
    """
    by_class: defaultdict[str, EventCounts] = defaultdict(EventCounts)
    onset_errors, offset_errors = [], []
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, expected = _sorted_by_label(prediction), _sorted_by_label(reference)
        for label in predicted.keys() | expected.keys():
            pairs = _match_onsets(predicted[label], expected[label], onset_tolerance + ROUNDING_SECONDS)
            by_class[label] += EventCounts(len(pairs), len(predicted[label]), len(expected[label]))
            onset_errors += [abs(event.start - truth.start) for event, truth in pairs]
            offset_errors += [abs(event.end - truth.end) for event, truth in pairs]
    return EventScore(
        total=sum(by_class.values(), EventCounts()),
        by_class=dict(sorted(by_class.items())),
        onset_ms=1000 * float(np.mean(onset_errors)) if onset_errors else None,
        offset_ms=1000 * float(np.mean(offset_errors)) if offset_errors else None,
    )


def _sorted_by_label(events: Sequence[TimedText]) -> defaultdict[str, list[TimedText]]:
    groups: defaultdict[str, list[TimedText]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.start):
        groups[normalize_text(event.text)].append(event)
    return groups


def _match_onsets(
    predicted: Sequence[TimedText], expected: Sequence[TimedText], tolerance: float
) -> list[tuple[TimedText, TimedText]]:
    """Returns the most pairs within the tolerance. Both inputs are sorted by onset, so the greedy match is optimal."""
    pairs = []
    i = j = 0
    while i < len(predicted) and j < len(expected):
        lag = predicted[i].start - expected[j].start
        if abs(lag) <= tolerance:
            pairs.append((predicted[i], expected[j]))
        i += lag <= tolerance
        j += lag >= -tolerance
    return pairs
