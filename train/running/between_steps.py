"""What a run does between its steps: checkpoints, evaluations, and its end."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import jax
from jax.experimental import multihost_utils

from moss_audio_jax.commands.interruption import stops_on_ctrl_c
from moss_audio_jax.config import MossAudioConfig
from train.config import RunConfig
from train.running.beginning import saved_part
from train.running.best import Best
from train.running.checkpoints import Checkpoints
from train.running.distributed import first_process_decides
from train.running.report import RunReport
from train.running.validation import Validation
from train.running.watchdog import Watchdog
from train.state import TrainState

AGREE_EVERY = 10  # steps between decisions of process 0 by its clock

Scores = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a run.

    step: its last step, which has a checkpoint.
    preempted: ended before the last step by SIGTERM or Ctrl-C.
    best: its best evaluation, if it has a `best_metric`. stopped_early: ended because `patience` evaluations did not
        improve on it.
    """

    step: int
    preempted: bool
    best: Best | None = None
    stopped_early: bool = False


class Termination:
    """Returns True after a step if the run must stop: after SIGTERM, which announces a preemption, or Ctrl-C.

    With several processes JAX handles SIGTERM: all stop after the same step, whichever got the signal.
    """

    def __init__(self):
        self._requested = threading.Event()
        self._stack = ExitStack()
        self._saves_on_ctrl_c = False

    def __enter__(self) -> "Termination":
        if jax.process_count() == 1:
            before = signal.signal(signal.SIGTERM, lambda *_: self._requested.set())
            self._stack.callback(signal.signal, signal.SIGTERM, before)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested.is_set()

    def is_requested(self) -> bool:
        """Returns True if the run may stop while it waits for data. Several processes stop only after a step."""
        return self._requested.is_set()

    def save_on_ctrl_c(self) -> None:
        """Makes Ctrl-C act like SIGTERM. Before the first step there is nothing to save, and it ends the run."""
        if not self._saves_on_ctrl_c:
            self._saves_on_ctrl_c = True
            self._stack.enter_context(stops_on_ctrl_c(lambda: os.kill(os.getpid(), signal.SIGTERM)))


@dataclasses.dataclass
class BetweenSteps:
    """Base of the loops of runs, which call `begin`, then `after` each step while it `goes_on`, then `end`.

    data_state: returns the position in the data of all processes after the last step.
    """

    config: RunConfig
    model: MossAudioConfig
    data_state: Callable[[], dict[str, Any]]
    checkpoints: Checkpoints
    report: RunReport
    validation: Validation
    stop: Termination
    watchdog: Watchdog

    def begin(self, state: TrainState, start: int) -> None:
        """Prepares for the step after `start`; completes the evaluation of that step."""
        self.step = self.saved = start
        self.best, self.clock = _best_so_far(self.config, self.checkpoints), _Clock(self.config.loop.checkpoint_minutes)
        self.at_end = False
        self._evaluate_again(state)

    def goes_on(self) -> bool:
        """Returns True if another step follows. Several processes call it together."""
        return (
            self.step != self.config.last_step
            and not _is_exhausted(self.best, self.config)
            and not self.stop(self.step)
        )

    def after(self, state: TrainState) -> None:
        """Saves and evaluates, if that is due after this step."""
        # A checkpoint comes before the evaluation of its step.
        evaluates = self.validation.is_due(self.step)
        if self._saves(evaluates):
            self.save(state)
        if evaluates:
            self._evaluate(state)

    def _saves(self, evaluates: bool) -> bool:
        """Returns True if a checkpoint is due after this step. evaluates: an evaluation follows this step."""
        # The first evaluation may run out of memory, so the training until then is saved first.
        before_evaluation = evaluates and (self.best is not None or not self.validation.has_asked)
        is_last = self.step == self.config.last_step
        by_step = self.step % self.config.loop.checkpoint_every == 0
        return by_step or is_last or before_evaluation or self.clock.is_due(self.step)

    def save(self, state: TrainState) -> None:
        with self.watchdog.long(f"the checkpoint of step {self.step}"):
            self.report.commit()
            self.checkpoints.save(self.step, saved_part(state, self.model), self.data_state(), self.best)
        self.saved = self.step
        self.clock.restart()

    def _evaluate_again(self, state: TrainState) -> None:
        """Completes the evaluation of the step that the run resumes from: makes it if missing, counts it in `best`."""
        if self.best is not None and self.best.evaluated is not None:
            self.checkpoints.publish(self.best)  # as of this step: best.json may be of a later step
        if self.validation.is_due(self.step) and (self.best is None or self.best.evaluated != self.step):
            self._evaluate(state, self.report.scores_of(self.step))

    def _evaluate(self, state: TrainState, recorded: Scores | None = None) -> None:
        """Evaluates and records the scores, or takes the `recorded` ones; then updates the best evaluation."""
        with self.watchdog.long(f"the evaluation after step {self.step}"):
            scores = recorded or self._scores(state)
        if self.best is not None:
            self.best = self.best.after(self.step, scores.get(f"eval/{self.best.metric}"))
            self.checkpoints.publish(self.best)

    def _scores(self, state: TrainState) -> Scores:
        """Evaluates and records the results. Scores come last: they tell a resumed run that the rest is complete."""
        with self.report.paused():
            scores, answers = self.validation.ask(self.step, (state.ema or state.trainable) | state.frozen)
            self.report.add_samples(self.step, answers[: self.config.validation.show_samples])
            self.report.add_answers(self.step, answers)
            self.report.add_scores(self.step, scores)
        self.report.commit()
        return scores

    def end(self, state: TrainState) -> Outcome:
        """Saves the last step if it is not saved, and evaluates at the end of the data."""
        self.watchdog.reached("the end", long=True)
        self.report.commit()
        if self.step > self.saved:
            self.save(state)
        if self.at_end and self.validation.is_on and self.report.scores_of(self.step) is None:
            self._evaluate(state)
        is_over = self.at_end or self.step == self.config.last_step
        early = not is_over and _is_exhausted(self.best, self.config)
        return Outcome(self.step, preempted=not is_over and not early, best=self.best, stopped_early=early)


class _Clock:
    """Clock for checkpoints every N minutes. None: never."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Returns True if the time is over. All processes get the answer of process 0's clock."""
        seconds = self._seconds
        if seconds is None or (jax.process_count() > 1 and step % AGREE_EVERY):
            return False
        return first_process_decides(f"checkpoint/{step}", lambda: time.monotonic() - self._last >= seconds)


def _best_so_far(config: RunConfig, checkpoints: Checkpoints) -> Best | None:
    """Returns the best evaluation before the restored step; None without a `best_metric`."""
    metric, known = config.loop.best_metric, checkpoints.best
    if metric is None:
        return None
    return known if known is not None and known.metric == metric else Best(metric)


def _is_exhausted(best: Best | None, config: RunConfig) -> bool:
    """Returns True if the last `patience` evaluations did not improve on the best one."""
    return best is not None and config.loop.patience is not None and best.since >= config.loop.patience
