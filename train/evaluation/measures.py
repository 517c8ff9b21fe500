"""Judges answers: a measure for each task, from the scores of `metrics`.

    measure(questions, answers)     # {"test.jsonl": {"transcribe": {"items": 50, "wer": 0.08, ...}}, ...}

docs/evaluation.md defines every field.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from train.evaluation.metrics.choices import score_choices
from train.evaluation.metrics.events import EventCounts, score_events
from train.evaluation.metrics.text import character_error_rate, final_answer, word_error_rate
from train.evaluation.metrics.timelines import parse_timeline, score_timestamps, without_times
from train.evaluation.metrics.values import score_matches, score_seconds
from train.evaluation.questions import Question

ONSET_TOLERANCE = 0.2  # seconds, onset tolerance of event F1
SECONDS_TOLERANCE = 0.2  # seconds, tolerance of answers that are a time

Measures = dict[str, Any]


def measure(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, Measures]]:
    """Returns source -> task -> measures and the counts they are computed from, ready for JSON."""
    grouped: defaultdict[tuple[str, str], list[tuple[Question, str]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        grouped[question.source, question.task].append((question, answer))
    measures: dict[str, dict[str, Measures]] = {}
    for (source, task), pairs in grouped.items():
        judge = MEASURES[pairs[0][0].measure]
        measured = judge([question for question, _ in pairs], [answer for _, answer in pairs])
        measures.setdefault(source, {})[task] = {"items": len(pairs), **measured}
    return measures


def _measure_text(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    return _error_rates(map(final_answer, answers), [final_answer(question.reference) for question in questions])


def _error_rates(texts: Iterable[str], references: Sequence[str]) -> Measures:
    predictions = list(texts)
    words, characters = (rate(predictions, references) for rate in (word_error_rate, character_error_rate))
    return {
        "wer": words.rate,
        "word_edits": words.edits,
        "words": words.length,
        "cer": characters.rate,
        "character_edits": characters.edits,
        "characters": characters.length,
    }


def _measure_timed_text(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    texts = (without_times(final_answer(answer)) for answer in answers)
    references = [final_answer(" ".join(label.text for label in question.labels)) for question in questions]
    return _timestamps(questions, answers) | _error_rates(texts, references)


def _timestamps(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    timelines = [parse_timeline(answer) for answer in answers]
    score = score_timestamps([timeline.items for timeline in timelines], [question.labels for question in questions])
    return asdict(score) | {"malformed": sum(timeline.malformed for timeline in timelines)}


def _measure_events(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    predictions = [parse_timeline(answer).items for answer in answers]
    score = score_events(predictions, [question.labels for question in questions], ONSET_TOLERANCE)
    return {
        **_event_counts(score.total),
        "onset_ms": score.onset_ms,
        "offset_ms": score.offset_ms,
        **_timestamps(questions, answers),
        "by_class": {label: _event_counts(counts) for label, counts in score.by_class.items()},
    }


def _event_counts(counts: EventCounts) -> Measures:
    rates = {name: getattr(counts, name) for name in ("f1", "precision", "recall")}
    return rates | {f"{name}_events": count for name, count in asdict(counts).items()}


def _measure_seconds(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    score = score_seconds(
        answers, [float(final_answer(question.reference)) for question in questions], SECONDS_TOLERANCE
    )
    return {
        "mean_error_s": score.mean_error,
        "share_within": score.share_within,
        "within": score.within,
        "unreadable": score.unreadable,
    }


def _measure_label(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    score = score_matches(map(final_answer, answers), [final_answer(question.reference) for question in questions])
    return {"accuracy": score.accuracy, "correct": score.correct}


def _measure_reply(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    return _measure_label(questions, answers) | _measure_text(questions, answers)


def _measure_choice(questions: Sequence[Question], answers: Sequence[str]) -> Measures:
    by_group: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, question in enumerate(questions):
        for kind, group in question.groups.items():
            by_group[kind][group].append(index)

    def accuracy(indices: Sequence[int]) -> Measures:
        score = score_choices(
            [answers[index] for index in indices],
            [questions[index].choices for index in indices],
            [questions[index].reference for index in indices],
        )
        counts = asdict(score)
        return {"items": counts.pop("total"), "accuracy": score.accuracy, **counts}

    groups = {
        kind: {group: accuracy(indices) for group, indices in sorted(members.items())}
        for kind, members in by_group.items()
    }
    return accuracy(range(len(questions))) | {"by_group": groups}


MEASURES: dict[str, Callable[[Sequence[Question], Sequence[str]], Measures]] = {
    "text": _measure_text,
    "timed_text": _measure_timed_text,
    "events": _measure_events,
    "seconds": _measure_seconds,
    "label": _measure_label,
    "reply": _measure_reply,
    "choice": _measure_choice,
    "unjudged": lambda questions, answers: {},
}

_SHOWN = {  # field -> its text in the table, in this order
    "accuracy": "accuracy {:.1%}",
    "f1": "F1 {:.1%}",
    "onset_ms": "onset {:.0f} ms",
    "offset_ms": "offset {:.0f} ms",
    "mean_error_s": "error {:.2f} s",
    "share_within": f"within {SECONDS_TOLERANCE} s {{:.1%}}",
    "aas_ms": "AAS {:.0f} ms",
    "matched_slots": "slots {} matched",
    "missing_slots": "{} missing",
    "surplus_slots": "{} surplus",
    "wer": "WER {:.1%}",
    "cer": "CER {:.1%}",
    "malformed": "malformed {}",
    "unreadable": "unreadable {}",
    "unanswered": "unanswered {}",
    "ambiguous": "ambiguous {}",
}


def measures_table(measures: Mapping[str, Mapping[str, Measures]]) -> str:
    """Text table with one line per task. Rates without data are left out."""
    rows = [("source", "task", "items", "")]
    for source, tasks in measures.items():
        for task, measured in tasks.items():
            cells = [shown.format(measured[name]) for name, shown in _SHOWN.items() if measured.get(name) is not None]
            rows.append((source, task, str(measured["items"]), ", ".join(cells) or "not judged: read the predictions"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{source:<{widths[0]}}  {task:<{widths[1]}}  {count:>{widths[2]}}  {cells}".rstrip()
        for source, task, count, cells in rows
    )
