"""Measures of answers against references: WER and CER, timestamps (AAS), event F1, seconds, equality.

Multiple choice is in `choices`.

Every measure is taken over a whole test set: counts are summed first and divided once, so a long clip weighs more than
a short one. A rate whose denominator is zero is None. Answers are what a model wrote: what can't be read is counted,
never raised and never left out of the denominator.

NumPy only: a row of the edit-distance table is a few vector operations, so 10,000 characters against 10,000 take
a fraction of a second.
"""

import re
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from train.data.manifest import TimedText

# Text

_APOSTROPHE = re.compile(r"(?<=\w)['\u2019\u02bc](?=\w)")
_UNSPACED = re.compile(  # a script written without spaces: Han, kana, bopomofo
    "([\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


class _Punctuation(dict[int, str]):
    """For `str.translate`: punctuation, symbols, controls to a space; invisible format characters to nothing."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        self[code] = "" if category == "Cf" else " " if category[0] in "PSZC" else chr(code)
        return self[code]


_PUNCTUATION = _Punctuation()


def normalize_text(text: str) -> str:
    """The form in which WER, CER and event labels are compared.

    NFKC; lower case (Unicode case folding); an apostrophe inside a word is removed (don't = dont); all other
    punctuation and symbols become spaces (well-known = well known); runs of white space become one space. Numbers
    and abbreviations stay as written.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_APOSTROPHE.sub("", folded).translate(_PUNCTUATION).split())


def split_words(text: str) -> list[str]:
    """Normalised words; a Han, kana or bopomofo character is a word of its own ("mixed error rate")."""
    return _UNSPACED.sub(r" \1 ", normalize_text(text)).split()


def split_characters(text: str) -> list[str]:
    """Normalised characters without white space, the unit of CER."""
    return list(normalize_text(text).replace(" ", ""))


@dataclass(frozen=True)
class ErrorRate:
    """Substitutions, deletions and insertions over the length of all references, in words or characters."""

    edits: int
    length: int

    @property
    def rate(self) -> float | None:
        return self.edits / self.length if self.length else None


def word_error_rate(predictions: Iterable[str], references: Iterable[str]) -> ErrorRate:
    """WER of a test set, over `split_words`."""
    return _error_rate(map(split_words, predictions), map(split_words, references))


def character_error_rate(predictions: Iterable[str], references: Iterable[str]) -> ErrorRate:
    """CER of a test set, over `split_characters`."""
    return _error_rate(map(split_characters, predictions), map(split_characters, references))


def _error_rate(predictions: Iterable[Sequence[str]], references: Iterable[Sequence[str]]) -> ErrorRate:
    edits = length = 0
    for prediction, reference in zip(predictions, references, strict=True):
        edits += edit_distance(prediction, reference)
        length += len(reference)
    return ErrorRate(edits, length)


# Edit distance

Tokens = Sequence[str]


def edit_distance(left: Tokens, right: Tokens) -> int:
    """Levenshtein distance of two sequences of tokens."""
    shorter, longer = sorted((left, right), key=len)
    last_row = deque(_edit_rows(shorter, longer), maxlen=1)[0]
    return int(last_row[-1])


def align(left: Tokens, right: Tokens, gaps: Callable[[int], np.ndarray] | None = None) -> list[tuple[int, int]]:
    """Pairs of indices that a shortest edit leaves alone or substitutes, in order.

    gaps: of an index on the left, how far (0 or more) each token on the right is from it; among equally short edits
        the one whose pairs are nearest is taken. Among those, and without gaps, the one that pairs tokens as late as
        possible.
    """
    if gaps is not None:
        most = max((gaps(i).max(initial=0.0) for i in range(len(left))), default=0.0)
        scale = 0.5 / (1.0 + most * min(len(left), len(right)))  # all gaps of an edit together weigh less than one
        distances = [scale * gaps(i) for i in range(len(left))]
    else:
        distances = [np.zeros(len(right), np.int32)] * len(left)
    table = np.stack(list(_edit_rows(left, right, distances)))
    i, j = len(left), len(right)
    pairs = []
    while i and j:
        paired = table[i - 1, j - 1] + (left[i - 1] != right[j - 1]) + distances[i - 1][j - 1]
        if paired <= min(table[i - 1, j], table[i, j - 1]) + 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif table[i - 1, j] <= table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _edit_rows(left: Tokens, right: Tokens, distances: Sequence[np.ndarray] | None = None) -> Iterator[np.ndarray]:
    """Rows i = 0..len(left) of the table of distances D[i, j] between left[:i] and right[:j].

    distances: what pairing a token on the left costs beside the edit, by tokens on the right.
    An insertion chain D[i, j] = min over k <= j of (best[k] + j - k) is a running minimum of best[k] - k.
    """
    ids: dict[str, int] = {}
    left_ids, right_ids = (np.array([ids.setdefault(t, len(ids)) for t in side], np.int32) for side in (left, right))
    columns = np.arange(len(right) + 1, dtype=np.int32)
    row = columns
    yield row
    for i, token in enumerate(left_ids, start=1):
        paired = row[:-1] + (right_ids != token)
        if distances is not None:
            paired = paired + distances[i - 1]
        best = np.concatenate([np.full(1, i, paired.dtype), np.minimum(row[1:] + 1, paired)])
        row = np.minimum.accumulate(best - columns) + columns
        yield row


# Timestamps


class ParsedTimeline(NamedTuple):
    """What could be read, and how many texts or times stand where the format has none."""

    items: tuple[TimedText, ...]
    malformed: int


_TIME = re.compile(r"\[\s*([0-9]{1,7}(?:\.[0-9]{0,9})?)\s*\]")


def parse_timeline(text: str) -> ParsedTimeline:
    """Reads `[0.00]hello there[2.01][2.01]the weather[4.32]` or `[2.7]tone[3.5]`, whatever is around it.

    A text directly between two times is an item; one time may end an item and begin the next. A text without a time
    before or after it, and a time that belongs to no item, count as malformed. Times are taken as written, even
    if they run backwards. Reasoning before `</think>` is dropped first.
    """
    texts, times = [], []
    for index, part in enumerate(_TIME.split(final_answer(text))):
        if index % 2:
            times.append(float(part))
        else:
            texts.append(part.strip())
    items = []
    stray_texts, used_times = 0, set()
    for index, content in enumerate(texts):  # text `index` stands between the times `index - 1` and `index`
        if not content:
            continue
        if 0 < index < len(texts) - 1:
            items.append(TimedText(content, times[index - 1], times[index]))
            used_times |= {index - 1, index}
        else:
            stray_texts += 1
    return ParsedTimeline(tuple(items), stray_texts + len(times) - len(used_times))


def without_times(text: str) -> str:
    """The text of a timeline, malformed or not: every `[2.01]` becomes a space."""
    return _TIME.sub(" ", text)


@dataclass(frozen=True)
class TimestampScore:
    """Accumulated average shift over matched slots; an item has two slots, its start and its end."""

    aas_ms: float | None
    matched_slots: int
    missing_slots: int  # in the reference only
    surplus_slots: int  # in the prediction only


def score_timestamps(
    predictions: Iterable[Sequence[TimedText]], references: Iterable[Sequence[TimedText]]
) -> TimestampScore:
    """AAS of a test set: the mean |predicted - reference| over timestamp slots, as MOSS-Audio reports it.

    The words of all items are aligned by `align`, among equal edits by the one whose times are nearest. A slot belongs
    to its item's first or last word, so it is matched where both sides begin (or end) an item at an aligned word,
    substituted words included. Items that were merged or split thus cost missing or surplus slots, and no error is
    taken between unrelated times.
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
    starts: dict[int, float]  # by index of an item's first word
    ends: dict[int, float]  # by index of its last


def _word_times(items: Sequence[TimedText]) -> _WordTimes:
    result = _WordTimes([], {}, {})
    for item in items:
        result.starts[len(result.words)] = item.start
        result.words.extend(split_words(item.text) or [""])  # punctuation alone still has its slots
        result.ends[len(result.words) - 1] = item.end
    return result


def _gaps(predicted: _WordTimes, expected: _WordTimes) -> Callable[[int], np.ndarray]:
    """Seconds between the slots that a predicted word shares with each of the reference."""
    sides = [
        (times, np.array([true_times.get(j, np.nan) for j in range(len(expected.words))]))
        for times, true_times in ((predicted.starts, expected.starts), (predicted.ends, expected.ends))
    ]

    def gaps(i: int) -> np.ndarray:
        apart = [np.abs(times.get(i, np.nan) - true_times) for times, true_times in sides]
        return np.nan_to_num(apart).sum(0)

    return gaps


# Events

_ROUNDING = 1e-6  # seconds: 2.7 - 2.5 is more than 0.2 in floating point


@dataclass(frozen=True)
class EventCounts:
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
    total: EventCounts  # over all classes: its F1 is the micro average
    by_class: Mapping[str, EventCounts]
    onset_ms: float | None  # mean absolute error over matched events
    offset_ms: float | None


def score_events(
    predictions: Iterable[Sequence[TimedText]],
    references: Iterable[Sequence[TimedText]],
    onset_tolerance: float = 0.2,
) -> EventScore:
    """Event-based F1 of a test set: an event is right if its label equals and its onset lies within the tolerance.

    As many events as possible are matched, one to one. Labels are compared after `normalize_text`.

    onset_tolerance: in seconds, inclusive.
    """
    by_class: defaultdict[str, EventCounts] = defaultdict(EventCounts)
    onset_errors, offset_errors = [], []
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, expected = _sorted_by_label(prediction), _sorted_by_label(reference)
        for label in predicted.keys() | expected.keys():
            pairs = _match_onsets(predicted[label], expected[label], onset_tolerance + _ROUNDING)
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
    """The most pairs within the tolerance. Both sides in order of onset, so that taking the earliest is optimal."""
    pairs = []
    i = j = 0
    while i < len(predicted) and j < len(expected):
        lag = predicted[i].start - expected[j].start
        if abs(lag) <= tolerance:
            pairs.append((predicted[i], expected[j]))
        i += lag <= tolerance
        j += lag >= -tolerance
    return pairs


# Answers

_CLOSED_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def final_answer(text: str) -> str:
    """What follows the reasoning: after the last `</think>`, empty if the reasoning never ended; then the content
    of the last `<answer>` element, if there is one."""
    _, closed, after = text.rpartition("</think>")
    answer = after if closed or "<think>" not in text else ""
    tagged = _CLOSED_TAG.findall(answer)
    return tagged[-1] if tagged else answer


# Seconds and labels


@dataclass(frozen=True)
class SecondsScore:
    """Errors of answers that are a time or a duration.

    mean_error: seconds, over the answers that could be read. within: how many answers lie within the tolerance.
    unreadable: answers without a number or with several.
    """

    mean_error: float | None
    within: int
    unreadable: int
    total: int

    @property
    def share_within(self) -> float | None:
        """Counts unreadable answers as wrong."""
        return self.within / self.total if self.total else None


def score_seconds(predictions: Iterable[str], references: Iterable[float], tolerance: float = 0.2) -> SecondsScore:
    """Mean absolute error of a test set. tolerance: in seconds, inclusive."""
    read = [(read_seconds(text), truth) for text, truth in zip(predictions, references, strict=True)]
    errors = np.array([abs(seconds - truth) for seconds, truth in read if seconds is not None])
    return SecondsScore(
        mean_error=float(errors.mean()) if len(errors) else None,
        within=int((errors <= tolerance + _ROUNDING).sum()),
        unreadable=len(read) - len(errors),
        total=len(read),
    )


_NUMBER = re.compile(r"(?<![\w.])[0-9]{1,7}(?:\.[0-9]{1,9})?(?![0-9]|\.[0-9])")


def read_seconds(text: str) -> float | None:
    """The one number that an answer holds, in digits: `2.7`, `At [2.7] s.`, `2.7s`; None if it holds none, or several
    that differ, so also for a range and for minutes (`1:05`)."""
    numbers = {float(number) for number in _NUMBER.findall(final_answer(text))}
    return numbers.pop() if len(numbers) == 1 else None


@dataclass(frozen=True)
class MatchScore:
    correct: int
    total: int

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.total if self.total else None


def score_matches(predictions: Iterable[str], references: Iterable[str]) -> MatchScore:
    """How many answers equal their reference after `normalize_text`."""
    equal = [normalize_text(p) == normalize_text(r) for p, r in zip(predictions, references, strict=True)]
    return MatchScore(sum(equal), len(equal))
