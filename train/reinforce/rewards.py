"""Rewards: plain functions from a question and an answer to a number. The sum of them, weighted, is an answer's reward.

    rewards = Rewards(("correct=1", "format=0.2", "my_rewards.py:short=0.1"), seconds=60)
    scores = rewards(questions, answers)        # {"correct": [...], "format": [...], "my_rewards.py:short": [...]}

A user's function takes (question, answer), a `Question` and an `Answered`; with `function.batched = True` it takes a
list of each and returns as many numbers. Its file is imported because the user named it, and only then.
"""

import importlib.util
import math
import pathlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.errors import MossAudioError
from train.evaluation.measures import ONSET_TOLERANCE, SECONDS_TOLERANCE
from train.evaluation.metrics.choices import score_choices
from train.evaluation.metrics.events import score_events
from train.evaluation.metrics.text import final_answer, word_error_rate
from train.evaluation.metrics.timelines import parse_timeline, score_timestamps, without_times
from train.evaluation.metrics.values import read_seconds, score_matches
from train.evaluation.questions import Question
from train.reinforce.config import RolloutConfig

FALL_SECONDS = 5 * SECONDS_TOLERANCE  # error at which the reward of a time has fallen to 0
AAS_SECONDS = 1.0  # mean shift of timestamps at which their reward has fallen to 0


class Answered(NamedTuple):
    """A drawn answer. text: with its thought. tokens: their number. finished: False if cut off at the most tokens."""

    text: str
    tokens: int
    finished: bool


Reward = Callable[[Question, Answered], float]


class RewardError(MossAudioError):
    """A reward that can't be computed. The run ends, and is saved first."""


# Rewards of correctness, by the measure of the question: what `evaluate` measures, of one answer


def choice(question: Question, answer: Answered) -> float:
    """1 if the answer names the right option."""
    return float(score_choices([answer.text], [question.choices], [question.reference]).correct)


def equal(question: Question, answer: Answered) -> float:
    """1 if the final answer equals the reference, after normalization."""
    return float(score_matches([final_answer(answer.text)], [final_answer(question.reference)]).correct)


def seconds(question: Question, answer: Answered) -> float:
    """1 within 0.2 s of the true time, and from there on linearly down to 0 at 1 s; 0 without one number."""
    found = read_seconds(answer.text)
    if found is None:
        return 0.0
    error = abs(found - float(final_answer(question.reference)))
    return float(np.clip((FALL_SECONDS - error) / (FALL_SECONDS - SECONDS_TOLERANCE), 0, 1))


def events(question: Question, answer: Answered) -> float:
    """F1 of the events of a timeline, with onsets within 0.2 s; of no events at all, `equal`."""
    score = score_events([parse_timeline(answer.text).items], [question.labels], ONSET_TOLERANCE)
    return equal(question, answer) if score.total.f1 is None else score.total.f1


def words(question: Question, answer: Answered) -> float:
    """1 - WER, and not below 0."""
    timed = question.measure == "timed_text"
    said, truth = final_answer(answer.text), final_answer(question.reference)
    said, truth = (without_times(text) if timed else text for text in (said, truth))
    rate = word_error_rate([said], [truth]).rate
    return float(not said.strip()) if rate is None else max(0.0, 1 - rate)


def times(question: Question, answer: Answered) -> float:
    """Share of matched timestamps, times 1 - their mean shift in seconds, and not below 0."""
    score = score_timestamps([parse_timeline(answer.text).items], [question.labels])
    if score.aas_ms is None:
        return 0.0
    share = score.matched_slots / (score.matched_slots + score.missing_slots + score.surplus_slots)
    return share * max(0.0, 1 - score.aas_ms / 1000 / AAS_SECONDS)


def timed_text(question: Question, answer: Answered) -> float:
    """The mean of `words` and `times`."""
    return (words(question, answer) + times(question, answer)) / 2


BY_MEASURE: dict[str, Reward] = {
    "choice": choice,
    "label": equal,
    "reply": equal,
    "seconds": seconds,
    "events": events,
    "text": words,
    "timed_text": timed_text,
}


# Measures of the questions that a reward can judge, where these are not all.
JUDGED: dict[str, tuple[str, ...]] = {
    "choice": ("choice",),
    "seconds": ("seconds",),
    "events": ("events",),
    "words": ("text", "timed_text"),
    "timed_text": ("timed_text",),
    "times": ("timed_text", "events"),
}


def correct(question: Question, answer: Answered) -> float:
    """The reward of the question's measure: choice, equal, seconds, events, words or timed_text."""
    return BY_MEASURE[question.measure](question, answer)


# Other rewards

_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)


def format_(_: Question, answer: Answered) -> float:
    """1 for `<think>`, a thought, `</think>`, each mark once, and an answer after them."""
    found = _THOUGHT.fullmatch(answer.text)
    once = all(answer.text.count(mark) == 1 for mark in ("<think>", "</think>"))
    return float(bool(found and once and found["thought"].strip() and found["answer"].strip()))


def overlong(config: RolloutConfig) -> Reward:
    """Makes DAPO's soft punishment: 0, falling to -1 in the last tokens before the most that an answer may have."""
    begin = config.max_new_tokens - config.overlong

    def of(_: Question, answer: Answered) -> float:
        return -1.0 if not answer.finished else float(np.clip((begin - answer.tokens) / config.overlong, -1, 0))

    return of


NAMED: dict[str, Reward] = {"correct": correct, **{reward.__name__: reward for reward in BY_MEASURE.values()}}
NAMED |= {"times": times, "format": format_}
OVERLONG = "overlong"
KNOWN = (*NAMED, OVERLONG)


class Rewards:
    """Rewards by name, and their weights. seconds: that one of them may take for the answers of a call."""

    def __init__(self, specified: Sequence[str], config: RolloutConfig, seconds: float):
        if not specified:
            raise MossAudioError(f"--rewards must name one at least, such as correct=1, out of {', '.join(KNOWN)}")
        self.weights: dict[str, float] = {}
        self._functions: dict[str, Callable[..., Any]] = {}
        self._seconds = seconds
        for text in specified:
            name, weight = _weighted(text)
            if name in self.weights:
                raise MossAudioError(f"--rewards name {name} twice: give it once, with one weight")
            self.weights[name] = weight
            self._functions[name] = overlong(config) if name == OVERLONG else NAMED.get(name) or imported(name)

    def require_judges(self, measures: Mapping[str, str]) -> None:
        """Raises MossAudioError if a reward can't judge one of the measures. measures: measure -> a question of it."""
        for name in self.weights:
            for measure, question in measures.items():
                if measure not in JUDGED.get(name, (measure,)):
                    raise MossAudioError(
                        f"--rewards {name} judges questions by {' or '.join(JUDGED[name])}, and {question} is judged "
                        f"by {measure}: give correct, which takes the measure of each question, or choose the "
                        "questions by --questions.objectives or --questions.scenes.tasks"
                    )

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answered]) -> dict[str, list[float]]:
        """Returns each reward of each answer, without weights.

        Raises RewardError, which names the reward and the question, for an exception in it, for a result that is no
        finite number, and after `seconds`.
        """
        return {
            name: _within(name, function, questions, answers, self._seconds)
            for name, function in self._functions.items()
        }

    def total(self, scores: dict[str, list[float]]) -> np.ndarray:
        """Sums the rewards of each answer, weighted; float64."""
        return np.sum([self.weights[name] * np.array(found) for name, found in scores.items()], axis=0)


def _weighted(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    try:
        found = (name, float(weight)) if equals else (text, 1.0)
    except ValueError:
        found = ("", math.nan)
    if not (found[0] and math.isfinite(found[1])):
        raise MossAudioError(f"--rewards must be NAME or NAME=WEIGHT, such as correct=1, not {text!r}")
    return found


def imported(name: str) -> Callable[..., Any]:
    """Imports the function of `FILE.py:FUNCTION`; raises MossAudioError if there is none."""
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise MossAudioError(f"--rewards must be some of {', '.join(KNOWN)}, or FILE.py:FUNCTION, not {name!r}")
    file = pathlib.Path(path)
    if not file.is_file():
        raise MossAudioError(f"--rewards {name}: there is no file {path}: correct the path")
    specification = importlib.util.spec_from_file_location(f"rewards_of_{file.stem}", file)
    assert specification is not None and specification.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise MossAudioError(f"--rewards {name}: {path} can't be imported ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise MossAudioError(f"--rewards {name}: {path} has no function {function}: name one that it defines")
    return found


def _within(
    name: str, function: Callable[..., Any], questions: Sequence[Question], answers: Sequence[Answered], seconds: float
) -> list[float]:
    """Computes a reward of all answers in a thread, which is left behind if it takes too long."""
    place, found, failed = [0], [], []

    def work() -> None:
        try:
            if getattr(function, "batched", False):
                found.extend(function(list(questions), list(answers)))
            else:
                for place[0], pair in enumerate(zip(questions, answers, strict=True)):
                    found.append(function(*pair))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    at = place[0]
    of = f"the reward {name} of {questions[at].name!r}, answer {answers[at].text[:80]!r},"
    if thread.is_alive():
        raise RewardError(
            f"{of} is not there after {seconds:g} s for {len(answers)} answers: make it faster, or raise "
            "--reward-seconds"
        )
    if failed:
        error = failed[0]
        raise RewardError(
            f"{of} raised {type(error).__name__}: {error}: repair it, and run the same command"
        ) from error
    if len(found) != len(answers):
        raise RewardError(
            f"the reward {name} must return a number for each of {len(answers)} answers, not {len(found)}"
        )
    for index, value in enumerate(found):
        if not _is_finite(value):
            raise RewardError(
                f"the reward {name} of {questions[index].name!r}, answer {answers[index].text[:80]!r}, must be a "
                f"finite number, not {value!r}: repair it, and run the same command"
            )
    return [float(value) for value in found]


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
