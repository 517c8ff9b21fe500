"""Ablation of time markers and DeepStack: a small model with and without each, from scratch, on one family of tasks.

All arms get the same steps, data and seeds. With several learning rates each arm takes the one that is best in the last
validation of its first seed. An arm is compared with the arm that has one thing less, seed by seed.

    out/config.json      configuration; the same call, repeated, resumes with what is missing
    out/runs/            directory of every training run, with its measures
    out/ablation.json    scores and learning curves of every run
    out/ablation.md      tables: scores, differences with their confidence intervals, steps until a score
    out/ablation.png     plot of the scores
    out/curves.png       plot of the learning curves
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from moss_audio_jax.pictures import require_matplotlib
from moss_audio_jax.storage.paths import Path, atomic_write
from train.ablation_config import ARMS, AblationConfig
from train.ablation_report import Result, Scores, difference_table, mean_curve, score_table, speed_table
from train.config import RunConfig, ValidationConfig
from train.data.config import DataConfig, SceneConfig
from train.data.mixture_config import MixtureConfig, SceneGroupConfig
from train.evaluation.config import EvaluationConfig
from train.evaluation.evaluate import evaluate
from train.evaluation.measures import Measures
from train.evaluation.plots import plot_learning_curves, plot_ranges
from train.evaluation.questions import Question, scene_questions
from train.loop import train
from train.recipes import RECIPES
from train.running.directory import CONFIG_FILE, SCORES_FILE
from train.running.resume import write_or_check_config

_TEST_SEED = 2**31 + 1  # scenes of training have the seeds 0, 1, 2, ... of their runs; validation adds 2**31
_SCORES = {"timeline": "f1", "start": "share_within", "duration": "share_within"}
_SCORE = "accuracy"  # of the other tasks
RESULT_FILE = "result.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of one arm."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '_').replace(',', '')}-{self.learning_rate:g}-seed_{self.seed}"


def run_config(run: Run, config: AblationConfig) -> RunConfig:
    """Returns the recipe `time_events` with the arm's model and the ablation's scenes."""
    recipe, arm = RECIPES["time_events"], ARMS[run.arm]
    middle_end = config.easy_examples + config.middle_examples
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model,
            preset=arm.preset,
            time_markers=arm.time_markers,
            deepstack=None if arm.deepstack else 0,
        ),
        data=DataConfig(config.batch_size, config.tokens, config.chunks, open_bins=8, label_times=arm.label_times),
        mixture=MixtureConfig(
            easy_scenes=SceneGroupConfig(1.0, config.easy_scenes, end=config.easy_examples),
            middle_scenes=SceneGroupConfig(
                float(config.middle_examples > 0), config.middle_scenes, begin=config.easy_examples, end=middle_end
            ),
            scenes=SceneGroupConfig(1.0, config.scenes, begin=middle_end),
            clips=config.clips,
        ),
        optimizer=dataclasses.replace(
            recipe.optimizer,
            learning_rate=run.learning_rate,
            total_steps=config.steps,
            warmup_steps=min(recipe.optimizer.warmup_steps, config.steps // 2),
            decay_steps=config.steps // 2,
        ),
        step=dataclasses.replace(
            recipe.step,
            loss_chunk=config.tokens,
            audio_label_weight=recipe.step.audio_label_weight if arm.labels else 0.0,
        ),
        validation=ValidationConfig(
            every=max(config.steps // config.validations, 1),
            count=config.validation_questions,
            max_new_tokens=config.answers.max_new_tokens,
            batch_size=config.answers.batch_size,
            show_samples=0,
        ),
        loop=dataclasses.replace(recipe.loop, checkpoint_every=max(config.steps // 4, 1), log_every=100),
        microbatches=1,
        seed=run.seed,
    )


def questions(config: AblationConfig) -> list[Question]:
    """Makes the same number of questions of every task about the scenes of each test; the source is the test's name."""
    return [
        dataclasses.replace(item, source=name)
        for name, scenes in tests(config).items()
        for task in dict.fromkeys(scenes.tasks)
        for item in scene_questions(config.questions, dataclasses.replace(scenes, tasks=(task,)), seed=_TEST_SEED)
    ]


def tests(config: AblationConfig) -> dict[str, SceneConfig]:
    """Returns the scenes of each test by its name, such as `8 to 16 s`."""
    clips = MixtureConfig(clips=config.clips)
    return {
        f"{seconds[0]:g} to {seconds[1]:g} s": clips.with_clips(
            dataclasses.replace(config.test_scenes, seconds=seconds)
        )
        for seconds in config.bins
    }


def scores(measures: Mapping[str, Mapping[str, Measures]]) -> Scores:
    """Returns the share of right answers of each task; for timelines the F1 of events."""
    return {
        source: {task: measured[_SCORES.get(task, _SCORE)] for task, measured in tasks.items()}
        for source, tasks in measures.items()
    }


def learning_curve(directory: Path) -> dict[int, float]:
    """Reads the validations of a run: step -> mean score of the tasks."""
    lines = [json.loads(line) for line in (directory / SCORES_FILE).read_text("utf-8").splitlines()]
    curve = {}
    for line in lines:
        names = {task: f"eval/scenes/{task}/{_SCORES.get(task, _SCORE)}" for task in _tasks_of(line)}
        found = [line[name] for name in names.values() if name in line]
        curve[int(line["step"])] = sum(found) / len(found)
    return curve


def _tasks_of(line: Mapping[str, Any]) -> set[str]:
    return {name.split("/")[2] for name in line if name.startswith("eval/scenes/") and name.endswith("/items")}


# The whole


def ablate(config: AblationConfig, out: Path) -> bool:
    """Trains and evaluates the runs that are not done and writes the results; returns False if SIGTERM stopped it.

    Raises MossAudioError if the directory was begun with another configuration.
    """
    require_matplotlib()
    items = questions(config)
    write_or_check_config(config, out, begun=(out / CONFIG_FILE).exists())
    rates = config.learning_rates
    tuning = {arm: [Run(arm, rate, 0) for rate in rates] for arm in config.arms}
    expected = len(config.arms) * (len(rates) + config.seeds - 1)
    progress = _Progress(expected)
    found: dict[Run, Result] = {}

    def finish(run: Run) -> bool:
        with progress.run(run.name, done=(out / "runs" / run.name / RESULT_FILE).exists()):
            result = _result(run, config, items, out / "runs" / run.name)
        if result is not None:
            found[run] = result
            write_results(config, out, found)
        return result is not None

    if not all(finish(run) for runs in zip(*tuning.values(), strict=True) for run in runs):
        return False
    chosen = {arm: max(runs, key=lambda run: found[run].last) for arm, runs in tuning.items()}
    others = [dataclasses.replace(run, seed=seed) for seed in range(1, config.seeds) for run in chosen.values()]
    return all(map(finish, others))


class _Progress:
    """Says which run begins, and estimates what remains from those of this call."""

    def __init__(self, runs: int):
        self._runs, self._number, self._seconds = runs, itertools.count(1), []

    @contextmanager
    def run(self, name: str, *, done: bool) -> Iterator[None]:
        """Says that a run begins, and measures its time unless it was done before."""
        number, said = next(self._number), " is done" if done else ""
        if self._seconds and not done:
            minutes = sum(self._seconds) / len(self._seconds) * (self._runs - number + 1) / 60
            said = f", about {minutes:.0f} min left"
        print(f"run {number} of {self._runs}: {name}{said}", file=sys.stderr, flush=True)
        began = time.monotonic()
        yield
        if not done:
            self._seconds.append(time.monotonic() - began)


def _result(run: Run, config: AblationConfig, items: Sequence[Question], directory: Path) -> Result | None:
    """Returns the result of a run, which is trained and evaluated unless it was before; None if it was stopped."""
    path = directory / RESULT_FILE
    if not path.exists():
        if train(run_config(run, config), directory).preempted:
            return None
        evaluation = evaluate(directory, items, EvaluationConfig(answers=config.answers), progress=True)
        measures = evaluation.results["measures"]
        content = {"scores": scores(measures), "curve": learning_curve(directory), "measures": measures}
        atomic_write(path, json.dumps(content, indent=2) + "\n")
    content = json.loads(path.read_text("utf-8"))
    return Result(content["scores"], {int(step): score for step, score in content["curve"].items()})


def write_results(config: AblationConfig, out: Path, found: Mapping[Run, Result]) -> None:
    """Writes tables and plots of the runs that are done, those at the learning rate that an arm has taken."""
    best: dict[str, Run] = {}
    for run, result in found.items():
        if run.seed == 0 and (run.arm not in best or result.last > found[best[run.arm]].last):
            best[run.arm] = run
    arms = {
        arm: {run.seed: found[run] for run in found if run.arm == arm and run.learning_rate == taken.learning_rate}
        for arm, taken in best.items()
    }
    results = {
        "config": dataclasses.asdict(config),
        "learning_rates": {arm: run.learning_rate for arm, run in best.items()},
        "runs": [dataclasses.asdict(run) | dataclasses.asdict(result) for run, result in found.items()],
    }
    atomic_write(out / "ablation.json", json.dumps(results, indent=2) + "\n")
    pairs = [(whole, arm) for arm in arms if (whole := ARMS[arm].without) in arms and whole is not None]
    tables = (score_table(arms), difference_table(arms, pairs), speed_table(arms))
    atomic_write(out / "ablation.md", "\n\n".join(filter(None, tables)) + "\n")
    by_source = {
        source: {
            task: {arm: [100 * result.scores[source][task] for result in runs.values()] for arm, runs in arms.items()}
            for task in tasks
        }
        for source, tasks in next(iter(found.values())).scores.items()
    }
    plot_ranges(out / "ablation.png", by_source, unit="right answers, % (of timelines: F1)")
    plot_learning_curves(out / "curves.png", {arm: mean_curve(runs.values()) for arm, runs in arms.items()})
