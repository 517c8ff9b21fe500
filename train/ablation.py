"""Ablation of time markers and DeepStack: a small model with and without each, from scratch, on sound scenes.

All arms get the same steps, seeds and tuning: each takes the learning rate that is best on validation scenes with seed
0. All answer questions about test scenes as long as those of training, and about longer ones, with times that no
training answer has.

    out/config.json      configuration; the same call, repeated, resumes with what is missing
    out/runs/            directory of every training run, with its measures
    out/ablation.json    scores of every run
    out/ablation.md      table of the scores
    out/ablation.png     plot of the scores
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moss_audio_jax.pictures import require_matplotlib
from moss_audio_jax.storage.paths import Path, atomic_write
from train.ablation_config import ARMS, AblationConfig
from train.config import RunConfig
from train.data.mixture_config import MixtureConfig, SceneGroupConfig
from train.evaluation.config import EvaluationConfig
from train.evaluation.evaluate import evaluate
from train.evaluation.measures import Measures
from train.evaluation.plots import plot_ranges
from train.evaluation.questions import Question, scene_questions
from train.loop import train
from train.recipes import RECIPES
from train.running.directory import CONFIG_FILE
from train.running.resume import write_or_check_config

LATE_START = "late start"  # a task of its own: the start of a sound, past the end of the longest scene of training
VALIDATION, TRAINED, LONGER = "validation", "as in training", "longer"
# Scenes of training have the seeds 0, 1, 2, ... of their runs.
_VALIDATION_SEED, _TEST_SEED = 2**31, 2**31 + 1
_SCORES = {"timeline": "f1", "start": "share_within", "duration": "share_within", LATE_START: "share_within"}
_SCORE = "accuracy"  # of the other tasks
MEASURES_FILE = "measures.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of one arm."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '_')}-{self.learning_rate:g}-seed_{self.seed}"


def run_config(run: Run, config: AblationConfig) -> RunConfig:
    """Returns the recipe `time_events` with the arm's model and the ablation's scenes."""
    recipe, arm = RECIPES["time_events"], ARMS[run.arm]
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model,
            preset=config.preset,
            time_markers=arm.time_markers,
            deepstack=None if arm.deepstack else 0,
        ),
        mixture=MixtureConfig(
            easy_scenes=SceneGroupConfig(1.0, config.easy_scenes, end=config.easy_examples),
            scenes=SceneGroupConfig(1.0, config.scenes, begin=config.easy_examples),
        ),
        optimizer=dataclasses.replace(
            recipe.optimizer,
            learning_rate=run.learning_rate,
            total_steps=config.steps,
            warmup_steps=min(recipe.optimizer.warmup_steps, config.steps // 2),
            decay_steps=config.steps // 2,
        ),
        loop=dataclasses.replace(recipe.loop, checkpoint_every=max(config.steps, 100), log_every=100),
        seed=run.seed,
    )


# Questions


def questions(config: AblationConfig) -> list[Question]:
    """Makes the same number of questions of every task, about validation scenes and both kinds of test scenes."""
    places = (
        (VALIDATION, config.scenes, _VALIDATION_SEED),
        (TRAINED, config.scenes, _TEST_SEED),
        (LONGER, config.longer_scenes, _TEST_SEED),
    )
    return [
        dataclasses.replace(item, source=source, task=_task(item, config))
        for source, scenes, seed in places
        for task in config.scenes.tasks
        for item in scene_questions(config.questions, dataclasses.replace(scenes, tasks=(task,)), seed=seed)
    ]


def _task(item: Question, config: AblationConfig) -> str:
    is_late = item.task == "start" and float(item.reference) > config.scenes.seconds[1]
    return LATE_START if is_late else item.task


# Scores

Scores = Mapping[str, Mapping[str, float]]  # source -> task -> 0 to 1


def scores(measures: Mapping[str, Mapping[str, Measures]]) -> Scores:
    """Returns the share of right answers of each task; for timelines the F1 of events."""
    return {
        source: {task: measured[_SCORES.get(task, _SCORE)] for task, measured in tasks.items()}
        for source, tasks in measures.items()
    }


def mean_score(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)


# The whole


def ablate(config: AblationConfig, out: Path) -> bool:
    """Trains and evaluates the runs that are not done and writes the results; returns False if SIGTERM stopped it.

    Raises MossAudioError if the directory was begun with another configuration.
    """
    require_matplotlib()
    items = questions(config)
    write_or_check_config(config, out, begun=(out / CONFIG_FILE).exists())
    began = time.monotonic()
    tuning = {arm: [Run(arm, learning_rate, 0) for learning_rate in config.learning_rates] for arm in config.arms}
    expected = len(config.arms) * (len(config.learning_rates) + config.seeds - 1)
    numbers = itertools.count(1)
    found: dict[Run, Scores] = {}

    def finish(run: Run) -> bool:
        print(f"run {next(numbers)} of {expected}: {run.name}", file=sys.stderr)
        measures = _measures(run, config, items, out / "runs" / run.name)
        if measures is not None:
            found[run] = scores(measures)
        return measures is not None

    if not all(finish(run) for runs in tuning.values() for run in runs):
        return False
    chosen = {arm: max(runs, key=lambda run: mean_score(found[run][VALIDATION])) for arm, runs in tuning.items()}
    others = [dataclasses.replace(run, seed=seed) for seed in range(1, config.seeds) for run in chosen.values()]
    if not all(map(finish, others)):
        return False
    arms = {
        arm: [found[dataclasses.replace(run, seed=seed)] for seed in range(config.seeds)] for arm, run in chosen.items()
    }
    _write(config, out, found, chosen, arms, time.monotonic() - began)
    return True


def _measures(run: Run, config: AblationConfig, items: Sequence[Question], directory: Path) -> dict[str, Any] | None:
    """Measures of a run, which is trained and evaluated unless it was before; None if training was stopped."""
    path = directory / MEASURES_FILE
    if not path.exists():
        if train(run_config(run, config), directory).preempted:
            return None
        results = evaluate(directory, items, EvaluationConfig(answers=config.answers), progress=True).results
        atomic_write(path, json.dumps(results["measures"], indent=2) + "\n")
    return json.loads(path.read_text("utf-8"))


def _write(
    config: AblationConfig,
    out: Path,
    found: Mapping[Run, Scores],
    chosen: Mapping[str, Run],
    arms: Mapping[str, Sequence[Scores]],
    seconds: float,
) -> None:
    results = {
        "config": dataclasses.asdict(config),
        "learning_rates": {arm: run.learning_rate for arm, run in chosen.items()},
        "runs": [dataclasses.asdict(run) | {"scores": run_scores} for run, run_scores in found.items()],
        "seconds_of_last_call": round(seconds),
    }
    atomic_write(out / "ablation.json", json.dumps(results, indent=2) + "\n")
    atomic_write(out / "ablation.md", table(arms, chosen) + "\n")
    plot_ranges(out / "ablation.png", _by_source(arms), unit="right answers, % (of timelines: F1)")


def _cells(arms: Mapping[str, Sequence[Scores]]) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """Yields source, task and the scores of each arm by seed, in percent; the last task of a source is the mean."""
    first = next(iter(arms.values()))[0]
    for source in (TRAINED, LONGER):
        for task in first[source]:
            yield source, task, {arm: [100 * seed[source][task] for seed in seeds] for arm, seeds in arms.items()}
        yield source, "mean", {arm: [100 * mean_score(seed[source]) for seed in seeds] for arm, seeds in arms.items()}


def table(arms: Mapping[str, Sequence[Scores]], chosen: Mapping[str, Run]) -> str:
    """Formats a Markdown table: a line per task, with mean, minimum and maximum over the seeds in percent."""
    rows = [
        ("scenes", "task", *arms),
        ("---",) * (2 + len(arms)),
        *(
            (
                source,
                task,
                *(f"{sum(cell) / len(cell):.1f} ({min(cell):.0f}-{max(cell):.0f})" for cell in cells.values()),
            )
            for source, task, cells in _cells(arms)
        ),
        ("", "learning rate", *(f"{chosen[arm].learning_rate:g}" for arm in arms)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _by_source(arms: Mapping[str, Sequence[Scores]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Groups scores by title of the source, task and arm; one score per seed."""
    by_source: dict[str, dict[str, dict[str, list[float]]]] = {}
    for source, task, cells in _cells(arms):
        by_source.setdefault(f"scenes {source}" if source == TRAINED else f"{source} scenes", {})[task] = cells
    return by_source
