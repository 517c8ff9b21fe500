"""Report of a run: takes the metrics of its steps and the results of its evaluations, and gives them to the sinks.

The sinks are `progress` (stderr), `record_files`, `tensorboard` and `weights_and_biases`. They write:

    out/metrics.jsonl    one line per step; JSON has no NaN, so values that are not finite are null
    out/scores.jsonl     one line per evaluation
    out/samples.jsonl    one line per sample that an evaluation shows
    out/rollouts.jsonl   of `reinforce`: one line per question whose answers are shown, with their rewards
    out/answers/         one Markdown table per evaluation, named by its step: all questions, references and answers
    out/tensorboard/     metrics, scores and samples for TensorBoard
    out/wandb_run.txt    on request: id of the run in Weights & Biases, which a resumed run continues

Only process 0 prints and writes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, Path, to_path
from moss_audio_jax.storage.retries import is_transient
from train.running.directory import METRICS_FILE
from train.running.distributed import from_first_process
from train.running.progress import Progress
from train.running.record_files import RecordFiles, scores_of
from train.running.sink import RolloutGroup, ShownSample, Sink, Values
from train.running.tensorboard import TensorBoard
from train.running.weights_and_biases import WeightsAndBiases


class RunReport:
    """Records the metrics of every step. They are fetched while the next step runs, so no step waits for them.

    figures: computes the data figures of a step's line from its sums (`figures.DataFigures`).
    start: step that the run resumes from. last_step: None if the run ends with its data.
    peak_flops: bfloat16 FLOP/s of all devices (`chips.peak_flops`); None shows FLOP/s instead of MFU.
    restarts: number of starts after the first. wandb: project in Weights & Biases.
    groups: names of the mixture's groups, in the order of the step's metrics. joining: group that joins later ->
        number of its first example.
    """

    def __init__(
        self,
        out: AnyPath,
        *,
        figures: Callable[[Values], dict[str, float]] = dict,
        start: int,
        last_step: int | None,
        log_every: int,
        max_skipped_in_a_row: int,
        peak_flops: float | None = None,
        restarts: int = 0,
        wandb: str | None = None,
        groups: Sequence[str] = (),
        joining: Mapping[str, int] | None = None,
    ):
        out = to_path(out)
        self._figures = figures
        self._groups = groups
        self._out, self._max_skipped, self._peak_flops = out, max_skipped_in_a_row, peak_flops
        self._restarts = restarts
        self._sinks: list[Sink] = []
        if jax.process_index() == 0:
            with _writing_into(out):
                self._sinks += [WeightsAndBiases(out, wandb)] if wandb else []
                self._sinks += [RecordFiles(out, start), TensorBoard(out, start)]
            self._sinks.append(Progress(start, last_step, log_every, peak_flops, joining or {}))
        self._pending: tuple[int, Mapping[str, jax.Array], Callable[[], Values]] | None = None
        self._last = time.perf_counter()

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.flush()
        finally:
            with _writing_into(self._out):
                for sink in self._sinks:
                    sink.close()

    def say(self, line: str) -> None:
        """Shows a line on stderr."""
        for sink in self._sinks:
            sink.say(line)

    def add(self, step: int, metrics: Mapping[str, jax.Array], sums: Callable[[], Values]) -> None:
        """Takes a step that was started, and writes the previous one.

        metrics: returned by `train_step`. sums: returns the step's sums over all hosts (`distributed.HostSums`).
        """
        self.flush()
        self._pending = step, metrics, sums

    def pass_over(self, sums: Callable[[], Values]) -> None:
        """Counts the data of a batch that is read but not trained on. Its time is not part of a step."""
        with self.paused():  # waits for all steps
            self._figures(sums())

    def flush(self) -> None:
        """Waits for the last added step and writes it; raises MossAudioError if too many in a row were skipped."""
        if self._pending is None:
            return
        step, metrics, sums = self._pending
        self._pending = None
        values = by_name(jax.device_get(metrics), self._groups)
        host = self._figures(sums())
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = host["packed_tokens"] / seconds if seconds else math.inf
        clock = {"time": time.time(), "step_seconds": seconds, "tokens_per_second": rate, "restarts": self._restarts}
        line = {**clock, **values, **host}
        if self._peak_flops is not None and "model_flops" in host:
            line["mfu"] = host["model_flops"] / (seconds * self._peak_flops)
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.write(step, line)
        if values["skipped_in_a_row"] >= self._max_skipped:
            raise MossAudioError(
                f"step {step}: {values['skipped_in_a_row']} steps in a row were skipped (loss {values['loss']}, "
                f"gradient norm {values['grad_norm']}): see {self._out / METRICS_FILE}, and lower the learning rate or "
                "repair the data in a new run"
            )

    def commit(self) -> None:
        """Flushes, and makes all lines durable. Called before a checkpoint, so that it never precedes its lines."""
        self.flush()
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.commit()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the context from the next step's time, for example that of an evaluation."""
        self.flush()
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def add_scores(self, step: int, scores: Values) -> None:
        """Records the scores of an evaluation after this step, by names such as `eval/loss`."""
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.write_scores(step, scores)

    def scores_of(self, step: int) -> Mapping[str, float | None] | None:
        """Returns the scores recorded for this step, perhaps by an earlier start of the run; None if there are none.

        Every process must call it; all get the same.
        """
        return from_first_process(scores_of(self._out, step) if jax.process_index() == 0 else None)

    def add_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """Shows answers of the model after this step."""
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.write_samples(step, samples)

    def add_rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Shows drawn answers of this step with their rewards."""
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.write_rollouts(step, groups)

    def add_answers(self, step: int, answers: Sequence[ShownSample]) -> None:
        """Writes a table of all answers of an evaluation after this step."""
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.write_answers(step, answers)


def by_name(metrics: Mapping[str, np.ndarray], groups: Sequence[str]) -> dict[str, float]:
    """Converts metrics of a step to numbers. Those by group become `loss/<group>` and `learned_tokens/<group>`.

    A group without supervised tokens in the batch has no loss.
    """
    values = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
    if "loss_of_group" in metrics:
        for name, loss, tokens in zip(groups, metrics["loss_of_group"], metrics["tokens_of_group"], strict=True):
            values |= {f"loss/{name}": loss.item()} if tokens else {}
            values[f"learned_tokens/{name}"] = tokens.item()
    return values


@contextmanager
def _writing_into(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_transient(error):
            raise
        raise MossAudioError(
            f"the run's records can't be written into {out} ({error}): free disk space or give access, and run the "
            "same command to resume"
        ) from error
