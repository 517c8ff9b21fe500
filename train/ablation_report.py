"""Tables of the ablation: scores, paired differences with their confidence intervals, steps until a score."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import scipy.stats

Scores = Mapping[str, Mapping[str, float]]  # test -> task -> 0 to 1
CONFIDENCE = 0.95
LEVELS = (0.5, 0.8)  # scores whose steps are counted


@dataclasses.dataclass(frozen=True)
class Result:
    """Test scores of a run, and its learning curve: step -> mean score of the tasks in validation."""

    scores: Scores
    curve: Mapping[int, float]

    @property
    def last(self) -> float:
        """Score of the last validation."""
        return self.curve[max(self.curve)]

    @property
    def while_training(self) -> float:
        """Mean score of the validations: the faster a run learns, the higher it is."""
        return float(np.mean(list(self.curve.values())))

    def steps_until(self, score: float) -> int | None:
        """Returns the step of the first validation with at least this score; None if there is none."""
        return next((step for step in sorted(self.curve) if self.curve[step] >= score), None)


Arms = Mapping[str, Mapping[int, Result]]  # arm -> seed -> result
Row = Sequence[str]


def score_table(arms: Arms) -> str:
    """Formats a line per measure: mean, minimum and maximum over the seeds, in percent."""
    rows: list[Row] = [("test", "task", *arms)]
    for names, measure in _measures(arms):
        shown = []
        for runs in arms.values():
            values = [100 * measure(run) for run in runs.values()]
            shown.append(f"{np.mean(values):.1f} ({min(values):.0f}-{max(values):.0f})")
        rows.append((*names, *shown))
    return _markdown(rows)


def difference_table(arms: Arms, pairs: Sequence[tuple[str, str]]) -> str:
    """Formats the differences of pairs of arms, first less second, over the seeds that both have; "" if there are none.

    In points of percent, with a confidence interval of Student's t: what would hold for other seeds.
    """
    pairs = [pair for pair in pairs if len(_common(arms, *pair)) > 1]
    if not pairs:
        return ""
    titles = (f"{first} less {second}, {len(_common(arms, first, second))} seeds" for first, second in pairs)
    rows: list[Row] = [("test", "task", *titles)]
    for names, measure in _measures(arms):
        shown = []
        for first, second in pairs:
            differences = [
                100 * (measure(arms[first][seed]) - measure(arms[second][seed]))
                for seed in _common(arms, first, second)
            ]
            shown.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*mean_interval(differences)))
        rows.append((*names, *shown))
    return _markdown(rows)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of two or more values, and the bounds of its confidence interval by Student's t."""
    mean, count = float(np.mean(values)), len(values)
    reach = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return mean, mean - float(reach), mean + float(reach)


def speed_table(arms: Arms) -> str:
    """Formats a line per arm: the steps until each of LEVELS in validation, mean over the runs that reach it."""
    titles = [f"steps until {level:.0%}" for level in LEVELS]
    rows: list[Row] = [("arm", *titles, "last validation, %")]
    for arm, runs in arms.items():
        cells = []
        for level in LEVELS:
            reached = [steps for run in runs.values() if (steps := run.steps_until(level)) is not None]
            mean = f"{np.mean(reached):.0f}" if reached else "-"
            cells.append(f"{mean} ({len(reached)} of {len(runs)} runs)")
        rows.append((arm, *cells, f"{100 * np.mean([run.last for run in runs.values()]):.1f}"))
    return _markdown(rows)


def mean_curve(runs: Collection[Result]) -> dict[int, tuple[float, float, float]]:
    """Returns step -> lowest, mean and highest score of the runs."""
    steps = sorted(set[int].intersection(*(set(run.curve) for run in runs)))
    values = {step: [run.curve[step] for run in runs] for step in steps}
    return {step: (min(found), float(np.mean(found)), max(found)) for step, found in values.items()}


def _measures(arms: Arms) -> list[tuple[tuple[str, str], Callable[[Result], float]]]:
    """Returns test and task of every score, and how to read it; the mean of the validations is last."""
    first = next(iter(next(iter(arms.values())).values()))
    cells = [(source, task) for source, tasks in first.scores.items() for task in tasks]
    return [
        *((cell, lambda run, cell=cell: run.scores[cell[0]][cell[1]]) for cell in cells),
        (("while training", "all"), lambda run: run.while_training),
    ]


def _common(arms: Arms, first: str, second: str) -> list[int]:
    return sorted(set(arms[first]) & set(arms[second]))


def _markdown(rows: Iterable[Row]) -> str:
    title, *lines = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (title, ("---",) * len(title), *lines))
