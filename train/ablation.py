"""Do time markers and DeepStack help? The same small model with and without each, from nothing, on sound scenes.

Every arm gets the same steps, the same seeds and the same tuning: its learning rate is the better one, on validation
scenes, of those that seed 0 is trained with. All are then asked about test scenes as long as those of training and
about longer ones, in which times come up that no answer of training held.

    out/config.json      the configuration, which a repeated call must share: it goes on with what is missing
    out/runs/            a directory for every run of training, with its measures
    out/ablation.json    the scores of every run
    out/ablation.md      a table of them
    out/ablation.png     a picture of it
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path, atomic_write
from train.config import CONFIG_FILE, RECIPES, MixtureConfig, RunConfig, SceneGroupConfig
from train.data.scenes import SceneConfig
from train.evaluation.answers import AnswerConfig
from train.evaluation.evaluate import EvaluationConfig, evaluate
from train.evaluation.measures import Measures
from train.evaluation.plots import plot_ranges, require_matplotlib
from train.evaluation.questions import Question, scene_questions
from train.loop import train
from train.running.resume import write_or_check_config

TASKS = ("timeline", "start", "duration", "what_at", "pitch", "loudness")
LATE_START = "late start"  # a task of its own: the start of a sound, past the end of the longest scene of training
VALIDATION, TRAINED, LONGER = "validation", "as in training", "longer"
_TRAINING = SceneConfig(seconds=(2.0, 6.0), events=(1, 3), tasks=TASKS, questions=3)
_BEGINNING = dataclasses.replace(_TRAINING, seconds=(4.0, 4.0), events=(1, 2))
_ANSWERS = AnswerConfig(batch_size=25, max_new_tokens=96)
# Scenes of training have the seeds 0, 1, 2, ... of their runs.
_VALIDATION_SEED, _TEST_SEED = 2**31, 2**31 + 1
_SCORES = {"timeline": "f1", "start": "share_within", "duration": "share_within", LATE_START: "share_within"}
_SCORE = "accuracy"  # of the other tasks
MEASURES_FILE = "measures.json"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model: with seconds between its audio tokens or without, with DeepStack injection or without."""

    time_markers: bool
    deepstack: bool


ARMS = {
    "both": Arm(time_markers=True, deepstack=True),
    "no markers": Arm(time_markers=False, deepstack=True),
    "no DeepStack": Arm(time_markers=True, deepstack=False),
    "neither": Arm(time_markers=False, deepstack=False),
}


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """How each arm is trained, and what it is asked."""

    arms: tuple[str, ...] = tuple(ARMS)
    """Which models to compare: both, no markers, no DeepStack, neither."""
    steps: int = 600
    """Of every run."""
    seeds: int = 3
    """Runs of each arm at its learning rate; they differ in their data and their first parameters."""
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3)
    """Tried by each arm with its first seed."""
    preset: str = "small"
    """Size of the model."""
    scenes: SceneConfig = _TRAINING
    """Of training, and of the test as long as it."""
    easy_scenes: SceneConfig = _BEGINNING
    """What training begins with."""
    easy_examples: int = 6400
    """How many scenes it begins with."""
    longer: float = 2.0
    """The longer scenes of the test are all so many times as long as the longest of training, at most so many times as
    full."""
    questions: int = 100
    """Of each task, about validation scenes and about both lengths of test scenes."""
    answers: AnswerConfig = _ANSWERS
    """How every model is asked."""

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise MossAudioError(f"arms must be some of {', '.join(ARMS)}, found {', '.join(unknown) or 'none'}")
        for name in ("steps", "seeds", "questions"):
            if getattr(self, name) < 1:
                raise MossAudioError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not self.learning_rates:
            raise MossAudioError("learning_rates must name one rate or more, found none")
        if self.longer <= 1:
            raise MossAudioError(f"longer must be above 1, not {self.longer}")

    @property
    def longer_scenes(self) -> SceneConfig:
        seconds = self.scenes.seconds[1] * self.longer
        events = (self.scenes.events[0], round(self.scenes.events[1] * self.longer))
        return dataclasses.replace(self.scenes, seconds=(seconds, seconds), events=events)


@dataclasses.dataclass(frozen=True)
class Run:
    """One model that is trained."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '_')}-{self.learning_rate:g}-seed_{self.seed}"


def run_config(run: Run, config: AblationConfig) -> RunConfig:
    """The recipe `time_events` with the arm's model and the ablation's scenes."""
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
    """Of every task as many, about validation scenes and about both kinds of test scenes; those are the sources."""
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
    """The share of right answers of each task; of timelines the F1 of their events."""
    return {
        source: {task: measured[_SCORES.get(task, _SCORE)] for task, measured in tasks.items()}
        for source, tasks in measures.items()
    }


def mean_score(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)


# The whole


def ablate(config: AblationConfig, out: Path) -> bool:
    """Trains and asks what is not done yet and writes what was found; False if a SIGTERM stopped it before the end.

    Raises MossAudioError for another configuration than the one the directory was begun with.
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
    """Of a run, trained and asked unless it was before; None if training was stopped."""
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
    """Source, task and the scores of each arm, a seed each, in percent; the last task of a source is their mean."""
    first = next(iter(arms.values()))[0]
    for source in (TRAINED, LONGER):
        for task in first[source]:
            yield source, task, {arm: [100 * seed[source][task] for seed in seeds] for arm, seeds in arms.items()}
        yield source, "mean", {arm: [100 * mean_score(seed[source]) for seed in seeds] for arm, seeds in arms.items()}


def table(arms: Mapping[str, Sequence[Scores]], chosen: Mapping[str, Run]) -> str:
    """Markdown: a line a task, in percent the mean over the seeds, and the lowest and highest of them."""
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
    """Title of a source -> task -> arm -> a score each seed."""
    by_source: dict[str, dict[str, dict[str, list[float]]]] = {}
    for source, task, cells in _cells(arms):
        by_source.setdefault(f"scenes {source}" if source == TRAINED else f"{source} scenes", {})[task] = cells
    return by_source
