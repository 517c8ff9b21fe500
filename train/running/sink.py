"""Base class of the destinations of a run's records, and the answers of an evaluation that go there."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moss_audio_jax.storage.paths import Path

Values = Mapping[str, float]
ANSWER_COLUMNS = ("name", "question", "reference", "prediction")  # of a table of answers


class ShownSample(NamedTuple):
    """Answer of the model with its question and reference. figure: a PNG file of it."""

    name: str
    question: str
    reference: str
    prediction: str
    figure: Path | None = None


class RolloutGroup(NamedTuple):
    """Drawn answers to a question of `reinforce`, and their rewards. rewards: by name, one for each answer."""

    name: str
    question: str
    reference: str
    answers: Sequence[str]
    tokens: Sequence[int]
    reward: Sequence[float]
    rewards: Mapping[str, Sequence[float]]


def answer_row(answer: ShownSample) -> list[str]:
    """Returns the cells of an answer, by ANSWER_COLUMNS."""
    return [getattr(answer, column) for column in ANSWER_COLUMNS]


class Sink:
    """Destination of a run's records. Each call writes at once. By default a method ignores its arguments."""

    def say(self, line: str) -> None: ...

    def write(self, step: int, line: Values) -> None: ...

    def write_scores(self, step: int, scores: Values) -> None: ...

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None: ...

    def write_answers(self, step: int, answers: Sequence[ShownSample]) -> None: ...

    def write_rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...

    def commit(self) -> None: ...

    def close(self) -> None: ...
