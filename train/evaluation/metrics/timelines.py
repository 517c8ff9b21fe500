"""Timelines, such as `[0.00]hello[0.31][0.35]there[0.80]`: parsing, and the error of their timestamps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moss_audio_jax.timelines.reading import SECONDS_STAMP, read_stamps
from train.data.manifest import TimedText
from train.evaluation.metrics.text import align, final_answer, split_words

ROUNDING_SECONDS = 1e-6  # 2.7 - 2.5 is more than 0.2 in floating point


class ParsedTimeline(NamedTuple):
    """Parsed items, and the number of texts and times that belong to none."""

    items: tuple[TimedText, ...]
    malformed: int


def parse_timeline(text: str) -> ParsedTimeline:
    """Parses `[0.00]hello there[2.01][2.01]the weather[4.32]` or `[2.7]tone[3.5]` in a model's final answer.

    A text directly between two times is an item; one time may end an item and begin the next. A text without a time
    on both sides, and a time without an item, count as malformed. Times may run backwards. Only times in seconds count:
    the questions ask for them.
    """
    segments, unread = read_stamps(final_answer(text), SECONDS_STAMP)
    items = tuple(
        TimedText(segment.text, segment.begin, segment.end) for segment in segments if segment.end is not None
    )
    points = len(segments) - len(items)  # a time and a text each
    return ParsedTimeline(items, len(unread) + 2 * points)


def without_times(text: str) -> str:
    """Replaces every time, such as `[2.01]`, by a space."""
    return SECONDS_STAMP.sub(" ", text)


@dataclass(frozen=True)
class TimestampScore:
    """Accumulated average shift (AAS) over matched slots. An item has two slots: start and end."""

    aas_ms: float | None
    matched_slots: int
    missing_slots: int  # in the reference only
    surplus_slots: int  # in the prediction only


def score_timestamps(
    predictions: Iterable[Sequence[TimedText]], references: Iterable[Sequence[TimedText]]
) -> TimestampScore:
    """Computes AAS: the mean |predicted - reference| over matched timestamp slots, as MOSS-Audio reports it.

    Words of all items are aligned with `align`; ties are broken by the nearest times. A start slot belongs to the first
    word of its item, an end slot to the last. A slot is matched if both sides start (or end) an item at an aligned
    word; substituted words count as aligned. Merged or split items therefore give missing or surplus slots, not errors
    between unrelated times.
    """
    shift = 0.0
    matched = predicted_slots = reference_slots = 0
    for prediction, reference in zip(predictions, references, strict=True):
        predicted_slots += 2 * len(prediction)
        reference_slots += 2 * len(reference)
        predicted, expected = _word_times(prediction), _word_times(reference)
        for i, j in align(predicted.words, expected.words, _gaps(predicted, expected)):
            for times, true_times in ((predicted.starts, expected.starts), (predicted.ends, expected.ends)):
                if i in times and j in true_times:
                    matched += 1
                    shift += abs(times[i] - true_times[j])
    return TimestampScore(
        aas_ms=1000 * shift / matched if matched else None,
        matched_slots=matched,
        missing_slots=reference_slots - matched,
        surplus_slots=predicted_slots - matched,
    )


class _WordTimes(NamedTuple):
    words: list[str]
    starts: dict[int, float]  # by index of the first word of an item
    ends: dict[int, float]  # by index of the last word


def _word_times(items: Sequence[TimedText]) -> _WordTimes:
    result = _WordTimes([], {}, {})
    for item in items:
        result.starts[len(result.words)] = item.start
        result.words.extend(split_words(item.text) or [""])  # punctuation alone still has its slots
        result.ends[len(result.words) - 1] = item.end
    return result


def _gaps(predicted: _WordTimes, expected: _WordTimes) -> Callable[[int], np.ndarray]:
    """Function of a predicted word: seconds to each reference word, [reference words], over the slots both have."""
    sides = [  # start and end: predicted times by word, reference times [reference words] with NaN for no slot
        (times, np.array([true_times.get(j, np.nan) for j in range(len(expected.words))]))
        for times, true_times in ((predicted.starts, expected.starts), (predicted.ends, expected.ends))
    ]

    def gaps(i: int) -> np.ndarray:
        apart = [np.abs(times.get(i, np.nan) - true_times) for times, true_times in sides]
        return np.nan_to_num(apart).sum(0)

    return gaps
