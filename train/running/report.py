"""Records of a run for people, on stderr and in its directory:

    out/metrics.jsonl    one line per step; JSON has no NaN, so values that are not finite are null
    out/scores.jsonl     one line per evaluation
    out/samples.jsonl    one line per sample that an evaluation shows
    out/answers/         one Markdown table per evaluation, named by its step: all questions, references and answers
    out/tensorboard/     metrics, scores and samples for TensorBoard
    out/wandb_run.txt    on request: id of the run in Weights & Biases, which a resumed run continues
    out/profile/         on request: trace of a few steps, for TensorBoard or XProf
    out/profile_now      requests a trace during the run

Only process 0 prints and writes. If a run was killed, the steps after its last checkpoint run again: their lines are
removed, and TensorBoard is told to drop them.
"""

import datetime
import html
import io
import json
import math
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import register_writer_factory
from tensorboardX.summary import text as text_summary

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import (
    AnyPath,
    GrowingFile,
    Path,
    atomic_file,
    atomic_write,
    exists,
    local_directory,
    read_bytes,
    read_text,
    to_path,
)
from moss_audio_jax.storage.retries import is_transient, retried
from train.planning.flops import CONVENTION
from train.running.directory import (
    ANSWERS,
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    TENSORBOARD,
    WANDB_FILE,
)
from train.running.distributed import from_first_process

ESTIMATED_AFTER = 5  # steps until the time that is left is estimated

Values = Mapping[str, float]


class ShownSample(NamedTuple):
    """Answer of the model with its question and reference. figure: a PNG file of it."""

    name: str
    question: str
    reference: str
    prediction: str
    figure: Path | None = None


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
        self._sinks: list[_Sink] = []
        if jax.process_index() == 0:
            with _writing_into(out):
                self._sinks += [_WeightsAndBiases(out, wandb)] if wandb else []
                self._sinks += [_Lines(out, start), _TensorBoard(out, start)]
            self._sinks.append(_Progress(start, last_step, log_every, peak_flops, joining or {}))
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
        return from_first_process(_scores_of(self._out, step) if jax.process_index() == 0 else None)

    def add_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """Shows answers of the model after this step."""
        with _writing_into(self._out):
            for sink in self._sinks:
                sink.write_samples(step, samples)

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


class _Sink:
    """Destination of a run's records, which are written at once. By default a method ignores its arguments."""

    def say(self, line: str) -> None: ...

    def write(self, step: int, line: Values) -> None: ...

    def write_scores(self, step: int, scores: Values) -> None: ...

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None: ...

    def write_answers(self, step: int, answers: Sequence[ShownSample]) -> None: ...

    def commit(self) -> None: ...

    def close(self) -> None: ...


class _Lines(_Sink):
    """JSON lines of metrics, scores and samples, and the tables of answers."""

    def __init__(self, out: Path, start: int):
        self._out = out
        # An evaluation writes its scores last. Without them it runs again, so its samples are removed.
        of_samples = start if _scores_of(out, start) else start - 1
        last = {METRICS_FILE: start, SCORES_FILE: start, SAMPLES_FILE: of_samples}
        self._files = {name: _open_after(out / name, step) for name, step in last.items()}

    def _write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            self._files[name].write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._files[name].flush()

    def write(self, step: int, line: Values) -> None:
        self._write(METRICS_FILE, [{"step": step} | _finite(line)])

    def write_scores(self, step: int, scores: Values) -> None:
        self._write(SCORES_FILE, [{"step": step} | _finite(scores)])

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        lines = []
        for sample in samples:
            figure = sample.figure and os.path.relpath(sample.figure, self._out)
            lines.append({"step": step} | sample._asdict() | {"figure": figure})
        self._write(SAMPLES_FILE, lines)

    def write_answers(self, step: int, answers: Sequence[ShownSample]) -> None:
        path = self._out / ANSWERS / f"{step}.md"
        retried(path, lambda: path.parent.mkdir(exist_ok=True))
        atomic_write(path, _markdown_table(_COLUMNS, map(_row, answers)))

    def commit(self) -> None:
        for file in self._files.values():
            file.commit()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


_COLUMNS = ("name", "question", "reference", "prediction")  # columns of a table of answers


def _row(answer: ShownSample) -> list[str]:
    return [getattr(answer, column) for column in _COLUMNS]


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes one row per line. Cells are shown literally: Markdown and HTML in them are escaped."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    def cell(text: str) -> str:
        return "<br>".join(_MARKUP.sub(r"\\\g<0>", html.escape(part, quote=False)) for part in text.splitlines())

    return line(columns) + line("---" for _ in columns) + "".join(line(map(cell, row)) for row in rows)


_MARKUP = re.compile(r"[\\|`*_~]")


def _finite(values: Values) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _open_after(path: Path, step: int) -> GrowingFile:
    """Opens a file of JSON lines for appending. First removes lines of later steps and an incomplete last line."""
    if exists(path):
        whole = io.BytesIO(read_bytes(path))
        with atomic_file(path) as partial, partial.open("wb") as kept:
            kept.writelines(_lines_until(whole, step, path))
    return GrowingFile(path)


def _scores_of(out: Path, step: int) -> dict[str, float | None] | None:
    """Reads the scores of a step; None if there are none."""
    path = out / SCORES_FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        lines = list(_lines_until(file, step, path))
    last = json.loads(lines[-1]) if lines else {}
    return last if last.get("step") == step else None


def _lines_until(file: Iterable[bytes], step: int, path: Path) -> Iterator[bytes]:
    """Yields the complete lines up to this step; raises MossAudioError for a line that is not a record of a step."""
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):  # the last one, incomplete after a kill
            return
        try:
            later = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError) as error:
            found = line[:80].decode(errors="replace").rstrip()
            raise MossAudioError(
                f"{path}, line {number}: expected a JSON object with a step, found {found!r}: "
                "move the file away or remove the line"
            ) from error
        if later:
            return
        yield line


class _EventFiles:
    """Opens event files on gs://. The writer's own class would upload the whole file at every step."""

    open = staticmethod(GrowingFile)


register_writer_factory("gs", _EventFiles())


class _TensorBoard(_Sink):
    """TensorBoard event file, written in this thread: tensorboardX's writer thread would hang if the disk is full."""

    def __init__(self, out: Path, start: int):
        directory = out / TENSORBOARD
        retried(directory, lambda: directory.mkdir(parents=True, exist_ok=True))
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{start}")
        # Makes TensorBoard drop events from this step on in older event files of the directory.
        self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def write(self, step: int, line: Values) -> None:
        self.write_scores(step, {_tag(name): value for name, value in line.items()})

    def write_scores(self, step: int, scores: Values) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in scores.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))
        self._writer.flush()

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        for sample in samples:
            tag = f"samples/{sample.name}"
            fields = (("Question", sample.question), ("Expected", sample.reference), ("Answer", sample.prediction))
            text = "\n\n".join(f"**{title}**\n\n{_as_code(field)}" for title, field in fields)
            self._write(Event(step=step, summary=text_summary(tag, text)))
            if sample.figure is not None:
                value = Summary.Value(tag=tag, image=_png(sample.figure))
                self._write(Event(step=step, summary=Summary(value=[value])))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tag(name: str) -> str:
    """Adds a prefix to names without one: TensorBoard groups by the part before the first slash."""
    return name if "/" in name else f"train/{name}"


def _as_code(text: str) -> str:
    """Returns Markdown that shows a text literally."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


def _png(path: Path) -> Summary.Image:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise MossAudioError(f"{path} can't be read ({error}): give the PNG file of a figure") from error
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 26:
        raise MossAudioError(f"{path} must be a PNG image, not another file: give the PNG file of a figure")
    # The IHDR chunk: width, height, bits per channel, colour type (0 grey, 4 grey and alpha, 2 RGB, 6 RGBA).
    width, height, _, kind = struct.unpack(">IIBB", content[16:26])
    channels = {0: 1, 4: 2, 6: 4}.get(kind, 3)
    return Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)


class _WeightsAndBiases(_Sink):
    """Run in Weights & Biases. It ignores steps that it already has; repeated steps have the same numbers."""

    def __init__(self, out: Path, project: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MossAudioError(
                f"the project {project!r} asks for Weights & Biases, which is not installed: "
                "pip install 'moss-audio-jax[wandb]', or leave --wandb out"
            ) from error
        id_file = out / WANDB_FILE
        known = read_text(id_file).strip() if exists(id_file) else None
        config = read_json(out / CONFIG_FILE)
        self._run = wandb.init(project=project, id=known, resume="allow", dir=str(local_directory(out)), config=config)
        atomic_write(id_file, self._run.id + "\n")
        self._table = wandb.Table

    def write(self, step: int, line: Values) -> None:
        self._run.log(dict(line), step=step)

    def write_scores(self, step: int, scores: Values) -> None:
        self._run.log(dict(scores), step=step)

    def write_answers(self, step: int, answers: Sequence[ShownSample]) -> None:
        table = self._table(columns=list(_COLUMNS), data=list(map(_row, answers)))
        self._run.log({"eval/answers": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Progress(_Sink):
    """Lines on stderr. Rates are over the steps since the previous line, without the first step, which compiles."""

    def __init__(
        self,
        start: int,
        last_step: int | None,
        log_every: int,
        peak_flops: float | None,
        joining: Mapping[str, int],
    ):
        self._first, self._last_step, self._log_every = start + 1, last_step, log_every
        self._peak_flops = peak_flops
        self._unprinted: list[Values] = []
        self._joining = dict(joining)
        # No separate estimate if the first lines, which have one, come soon.
        self._estimated = last_step is None or log_every <= 2 * ESTIMATED_AFTER
        if peak_flops is None:
            self._print(f"FLOP/s: {CONVENTION}; the peak of these devices is unknown")
        else:
            self._print(f"MFU: {CONVENTION}, over the bf16 peak of {peak_flops / 1e12:,.0f} TFLOP/s")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        self._print(line)

    def write(self, step: int, line: Values) -> None:
        if step != self._first:
            self._unprinted.append(line)
        for group in [name for name in self._joining if line.get(f"tokens/{name}")]:
            self._print(
                f"step {step}: group {group} joins, from example {self._joining.pop(group):,} on: if its examples are "
                "harder, the loss rises for a while"
            )
        if not self._estimated and len(self._unprinted) == ESTIMATED_AFTER:
            self._estimated = True
            seconds = sum(line["step_seconds"] for line in self._unprinted) / len(self._unprinted)
            self._print(f"{seconds:.3g} s per step: about {self._left(step, seconds)} left")
        if step % self._log_every == 0 or step == self._last_step:
            figures = self._rates(step) if self._unprinted else [f"{line['step_seconds']:.1f} s with compilation"]
            place = f"step {step}" if self._last_step is None else f"step {step}/{self._last_step}"
            epoch = [f"epoch {line['epoch']:.2f}"] if "epoch" in line else []
            epoch += [f"{line['audio_hours']:.2f} h of audio"] if line.get("audio_hours") else []
            loss, skipped = f"loss {line['loss']:.4f}", f"skipped {line['skipped_total']}"
            self._print("  ".join([place, *epoch, loss, skipped, *figures]))
            self._unprinted = []

    def _rates(self, step: int) -> list[str]:
        """Returns rates over the unprinted steps: tokens/s, MFU or FLOP/s, data wait, and the time that is left."""
        seconds, wait, tokens, flops = (
            sum(line.get(name, 0.0) for line in self._unprinted)
            for name in ("step_seconds", "data_wait", "packed_tokens", "model_flops")
        )
        rates = [f"{tokens / seconds:,.0f} tokens/s"]
        if flops and self._peak_flops is None:
            rates.append(f"{flops / seconds / 1e9:,.1f} GFLOP/s")
        elif flops and self._peak_flops is not None:
            rates.append(f"MFU {flops / seconds / self._peak_flops:.1%}")
        rates.append(f"data wait {wait / seconds:.0%}")
        if self._last_step is not None:
            rates.append(f"{self._left(step, seconds / len(self._unprinted))} left")
        return rates

    def _left(self, step: int, seconds: float) -> datetime.timedelta:
        """Returns the time that the steps after this one take at `seconds` each."""
        assert self._last_step is not None
        return datetime.timedelta(seconds=round((self._last_step - step) * seconds))

    def write_scores(self, step: int, scores: Values) -> None:
        # Only overall scores: dozens of each task and class are in the file.
        overall = [f"{name} {value:.4g}" for name, value in scores.items() if name.count("/") == 1]
        self._print("  ".join([f"step {step}", *overall]))

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        for sample in samples:
            self._print(f"step {step}, {sample.name}: {_short(sample.question)}")
            self._print(f"  expected  {_short(sample.reference)}")
            self._print(f"  answer    {_short(sample.prediction)}")


def _short(text: str, width: int = 100) -> str:
    """Shortens a text to one line of at most `width` characters, without control characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."
