"""Answers of one value: a time or duration in seconds, or a label."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from train.evaluation.metrics.text import final_answer, normalize_text
from train.evaluation.metrics.timelines import ROUNDING_SECONDS


@dataclass(frozen=True)
class SecondsScore:
    """Errors of answers that are a time or a duration.

    mean_error: seconds, over readable answers. within: answers within the tolerance.
    unreadable: answers without a number, or with several numbers.
    """

    mean_error: float | None
    within: int
    unreadable: int
    total: int

    @property
    def share_within(self) -> float | None:
        """Share of answers within the tolerance; unreadable ones are outside."""
        return self.within / self.total if self.total else None


def score_seconds(predictions: Iterable[str], references: Iterable[float], tolerance: float = 0.2) -> SecondsScore:
    """Computes the mean absolute error of a test set. tolerance: seconds, inclusive."""
    read = [(read_seconds(text), truth) for text, truth in zip(predictions, references, strict=True)]
    errors = np.array([abs(seconds - truth) for seconds, truth in read if seconds is not None])
    return SecondsScore(
        mean_error=float(errors.mean()) if len(errors) else None,
        within=int((errors <= tolerance + ROUNDING_SECONDS).sum()),
        unreadable=len(read) - len(errors),
        total=len(read),
    )


_NUMBER = re.compile(r"(?<![\w.])[0-9]{1,7}(?:\.[0-9]{1,9})?(?![0-9]|\.[0-9])")


def read_seconds(text: str) -> float | None:
    """Returns the one number in an answer, in digits: `2.7`, `At [2.7] s.`, `2.7s`.

    None without a number, or with different numbers, such as a range or minutes (`1:05`).
    """
    numbers = {float(number) for number in _NUMBER.findall(final_answer(text))}
    return numbers.pop() if len(numbers) == 1 else None


@dataclass(frozen=True)
class MatchScore:
    """Numbers of correct and of all answers."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.total if self.total else None


def score_matches(predictions: Iterable[str], references: Iterable[str]) -> MatchScore:
    """Counts answers that equal their reference after `normalize_text`."""
    equal = [normalize_text(p) == normalize_text(r) for p, r in zip(predictions, references, strict=True)]
    return MatchScore(sum(equal), len(equal))
