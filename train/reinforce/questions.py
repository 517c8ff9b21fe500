"""Questions with known answers, in an endless order that depends on the run's seed alone."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moss_audio_jax.errors import MossAudioError
from train.data.config import SceneConfig
from train.evaluation.questions import (
    SCENE_MEASURES,
    Question,
    benchmark_questions,
    manifest_questions,
    scene_question,
)
from train.reinforce.config import ReinforceConfig
from train.reinforce.rewards import BY_MEASURE


class SceneQuestions(Sequence[Question]):
    """Questions about sound scenes, made when they are read."""

    def __init__(self, count: int, config: SceneConfig, seed: int):
        self._count, self._config, self._seed = count, config, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Question:
        return scene_question(index, self._config, self._seed)


class QuestionOrder:
    """Place of an endless order -> question. Each epoch asks every question once, in an order of its own."""

    def __init__(self, config: ReinforceConfig):
        self._seed = config.seed
        asked, self.unjudged = _listed(config)
        scenes = SceneQuestions(config.questions.scenes, config.questions.scene, config.seed)
        self._parts: list[Sequence[Question]] = [asked, scenes]
        self.count = len(asked) + len(scenes)
        # Measure -> a question that is judged by it.
        self.measures = {question.measure: question.name for question in asked}
        if scenes:
            self.measures |= {
                SCENE_MEASURES[task]: f"the task {task} of scenes" for task in config.questions.scene.tasks
            }
        if not self.count:
            raise MossAudioError(
                f"there is nothing to ask ({self.unjudged} questions without a measure): give --data with known "
                "answers, --questions.scenes N or --questions.benchmark NAME=FILE"
            )

    def __getitem__(self, place: int) -> Question:
        epoch, at = divmod(place, self.count)
        index = int(self._permutation(epoch)[at])
        first = len(self._parts[0])
        return self._parts[0][index] if index < first else self._parts[1][index - first]

    def _permutation(self, epoch: int) -> np.ndarray:
        return _permutation(self._seed, epoch, self.count)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _listed(config: ReinforceConfig) -> tuple[list[Question], int]:
    """Returns the questions of data and question files that have a measure, and the number of those that have none."""
    chosen, found = config.questions, []
    for path in chosen.data:
        found += manifest_questions(
            path,
            chosen.objectives,
            seed=config.seed,
            answers=config.data.answers,
            default_prompt=config.data.default_prompt,
            columns=config.columns,
        )
    for benchmark in chosen.benchmark:
        name, equals, path = benchmark.partition("=")
        if not equals:
            raise MossAudioError(f"--questions.benchmark must be NAME=FILE, such as mmau=test.json, not {benchmark!r}")
        found += benchmark_questions(name, path, chosen.audio_dir)
    judged = [question for question in found if question.measure in BY_MEASURE]
    return judged, len(found) - len(judged)
