"""By what a run's evaluations are compared: the metrics that can say which is best, and the best so far."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moss_audio_jax.errors import MossAudioError

Measures = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number about all that was measured.

    field: its name where a task is measured (`measures.measure`; `Validation` for the loss).
    total: what it was divided by there. Weighted by that, the rates of several tasks make the rate of all of them.
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
    """Every metric that any of the tasks has, over all that have it; None where there is nothing to divide by."""
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
    there = list(available)
    if name not in there:
        raise MossAudioError(
            f"best_metric must be one that the evaluation's data have, which are {', '.join(there)}, not {name!r}"
        )


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation so far, which is the first one of its value.

    value, step: None before there was one; a metric that is not finite, or of nothing, is none.
    since: how many evaluations came after it.
    evaluated: the step of the last evaluation that is counted here.
    """

    metric: str
    value: float | None = None
    step: int | None = None
    since: int = 0
    evaluated: int | None = None

    def after(self, step: int, value: float | None) -> "Best":
        """The best when one more evaluation has found this value."""
        if value is not None and math.isfinite(value) and self._is_beaten_by(value):
            return Best(self.metric, value, step, evaluated=step)
        return dataclasses.replace(self, since=self.since + 1, evaluated=step)

    def _is_beaten_by(self, value: float) -> bool:
        if self.value is None:
            return True
        return value < self.value if METRICS[self.metric].lower_is_better else value > self.value
