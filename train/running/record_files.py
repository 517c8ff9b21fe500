"""JSON lines of a run's metrics, scores and samples, and its tables of answers.

If a run was killed, the steps after its last checkpoint run again: their lines are removed.
"""

import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import GrowingFile, Path, atomic_file, atomic_write, exists, read_bytes
from moss_audio_jax.storage.retries import retried
from train.running.directory import ANSWERS, METRICS_FILE, ROLLOUTS_FILE, SAMPLES_FILE, SCORES_FILE
from train.running.sink import ANSWER_COLUMNS, RolloutGroup, ShownSample, Sink, Values, answer_row


class RecordFiles(Sink):
    """JSON lines of metrics, scores and samples, and the tables of answers."""

    def __init__(self, out: Path, start: int):
        self._out = out
        # An evaluation writes its scores last. Without them it runs again, so its samples are removed.
        of_samples = start if scores_of(out, start) else start - 1
        last = {METRICS_FILE: start, SCORES_FILE: start, SAMPLES_FILE: of_samples}
        last |= {ROLLOUTS_FILE: start} if exists(out / ROLLOUTS_FILE) else {}
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
        atomic_write(path, _markdown_table(ANSWER_COLUMNS, map(answer_row, answers)))

    def write_rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        if ROLLOUTS_FILE not in self._files:  # `run` has none
            self._files[ROLLOUTS_FILE] = GrowingFile(self._out / ROLLOUTS_FILE)
        self._write(ROLLOUTS_FILE, [{"step": step} | group._asdict() for group in groups])

    def commit(self) -> None:
        for file in self._files.values():
            file.commit()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


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


def scores_of(out: Path, step: int) -> dict[str, float | None] | None:
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
