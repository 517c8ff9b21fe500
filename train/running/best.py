"""Metrics that compare the evaluations of a run, and the best evaluation so far."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moss_audio_jax.errors import MossAudioError

Measures = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric that can be averaged over tasks.

    field: its name in the measures of a task (`measures.measure`; `Validation` for the loss).
    total: its denominator in these measures, which is the task's weight in the average.
    """

    field: str
    lower_is_better: bool
    total: Callable[[Measures], float]


METRICS = {
    "loss": Metric("loss", True, lambda found: found["tokens"]),
    "token_accuracy": Metric("token_accuracy", False, lambda found: found["tokens"]),
    "wer": Metric("wer", True, lambda found: found["words"]),
    "cer": Metric("cer", True, lambda found: found["characters"]),
    "aas": Metric("aas_ms", True, lambda found: found["matched_slots"]),
    "f1": Metric("f1", False, lambda found: found["predicted_events"] + found["reference_events"]),
    "accuracy": Metric("accuracy", False, lambda found: found["items"]),
    "mean_error_s": Metric("mean_error_s", True, lambda found: found["items"] - found["unreadable"]),
    "share_within": Metric("share_within", False, lambda found: found["items"]),
}


def overall(measured: Iterable[Measures]) -> dict[str, float | None]:
    """Averages each metric over the tasks that have it, weighted by `Metric.total`; None if the weights sum to 0."""
    tasks = list(measured)
    found: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        having = [task for task in tasks if metric.field in task]
        rated = [task for task in having if task[metric.field] is not None]
        total = sum(map(metric.total, rated))
        if having:
            weighted = sum(task[metric.field] * metric.total(task) for task in rated)
            found[name] = weighted / total if total else None
    return found


def require_metric(name: str, available: Iterable[str]) -> None:
    """Raises MossAudioError if the metric is not available."""
    there = list(available)
    if name not in there:
        raise MossAudioError(
            f"--best-metric must be a metric of the evaluation's data, one of {', '.join(there)}, not {name!r}"
        )


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation so far. Of equal evaluations the first is the best.

    value, step: None until an evaluation has a finite value of the metric.
    since: number of evaluations after the best one.
    evaluated: step of the last evaluation that was counted.
    """

    metric: str
    value: float | None = None
    step: int | None = None
    since: int = 0
    evaluated: int | None = None

    def after(self, step: int, value: float | None) -> "Best":
        """Returns the best after one more evaluation, at `step`, with this value of the metric."""
        if value is not None and math.isfinite(value) and self._is_beaten_by(value):
            return Best(self.metric, value, step, evaluated=step)
        return dataclasses.replace(self, since=self.since + 1, evaluated=step)

    def _is_beaten_by(self, value: float) -> bool:
        if self.value is None:
            return True
        return value < self.value if METRICS[self.metric].lower_is_better else value > self.value
