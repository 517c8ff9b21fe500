"""Places of a file's lines, in a file that all processes of a machine map: 8 bytes a line, once for all workers.

An index is found by a hash of the file's content. So a run that starts again, and each further run over the same data,
reads the file once for its hash (about 1 s for 1.5 GB) and checks no line again. Indexes are in `lines/` of the cache
directory; they may be deleted at any time. A small file has its index in memory.
"""

import hashlib
import importlib.metadata
import os
import pathlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, atomic_file, read_lines, scratch_directory
from moss_audio_jax.storage.retries import retried
from moss_audio_jax.storage.user_cache import user_cache
from train.data.worker_processes import worker_pool

Check = Callable[[bytes, str], object]
_VERSION = 1
_IN_MEMORY = 1 << 23  # bytes of a file, about a second of checking
_SPAN = 1 << 25  # bytes that a process checks at a time
_SECONDS_WITHOUT_A_BAR = 2


class LineIndex:
    """Places of the lines of a file that are not blank.

    rows: int64 [1, lines], the byte at which each begins; [2, lines] with their numbers from 1, if some are left out.
    file: the .npy file that holds `rows`, which is then mapped; None: they are in memory.
    """

    def __init__(self, rows: np.ndarray, file: pathlib.Path | None = None):
        self._rows, self._file = rows, file

    def __len__(self) -> int:
        return self._rows.shape[1]

    def begin(self, index: int) -> int:
        """Returns the byte of the file at which a line begins."""
        return int(self._rows[0, index])

    def number(self, index: int) -> int:
        """Returns the number of a line in the file, from 1."""
        return int(self._rows[1, index]) if len(self._rows) > 1 else int(range(1, len(self) + 1)[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_rows": self._rows if self._file is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._file is not None:
            self._rows = np.load(self._file, mmap_mode="r")


def index_lines(path: AnyPath, local: pathlib.Path, check: Check | None = None, *, header: bool = False) -> LineIndex:
    """Returns the index of a file; where there is none, makes it by all processors, with a progress bar.

    path: name of the file in errors. local: the file, or a copy of it on this machine.
    check: raises MossAudioError for an invalid line, given its bytes and its name; picklable. The first such error of
        the file is raised, at each call.
    header: leave out the first line.
    """
    size = local.stat().st_size
    if size <= _IN_MEMORY:
        return LineIndex(_rows_of(path, local, check, [(0, size)], map, header))
    digest = content_hash(local)
    checked = "" if check is None else f"-{importlib.metadata.version('moss-audio-jax')}"
    name = f"{digest}-{_VERSION}{checked}{'-header' * header}.npy"
    file = user_cache() / "lines" / name
    try:
        return LineIndex(np.load(file, mmap_mode="r"), file)
    except (OSError, ValueError, EOFError):  # there is none, or a part of one
        rows = _made_by_processes(path, local, check, header)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, rows)
    except OSError:  # no place for it
        file = scratch_directory() / name
        _write(file, rows)
    return LineIndex(np.load(file, mmap_mode="r"), file)


def content_hash(local: pathlib.Path) -> str:
    """Returns the SHA-256 of a file of this machine."""

    def digest() -> str:
        with open(local, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retried(local, digest)


def _write(file: pathlib.Path, rows: np.ndarray) -> None:
    with atomic_file(file) as partial, open(partial, "wb") as opened:
        np.save(opened, rows)


def _made_by_processes(path: AnyPath, local: pathlib.Path, check: Check | None, header: bool) -> np.ndarray:
    size = local.stat().st_size
    spans = [(begin, min(begin + _SPAN, size)) for begin in range(0, size, _SPAN)]
    workers = min(os.cpu_count() or 1, len(spans)) if check is not None else 1
    if workers == 1:
        return _rows_of(path, local, check, spans, map, header)
    with worker_pool(workers, f"checks lines of {path}") as pool:
        return _rows_of(path, local, check, spans, pool.map, header)


@dataclass(frozen=True)
class _Span:
    """Lines that begin in a part of a file.

    begins: int64 [lines not blank]. numbers: theirs, from 0 at the beginning of the part. lines: with blank ones.
    error: number and bytes of the first invalid line.
    """

    begins: np.ndarray
    numbers: np.ndarray
    lines: int
    error: tuple[int, bytes] | None


def _rows_of(
    path: AnyPath,
    local: pathlib.Path,
    check: Check | None,
    spans: list[tuple[int, int]],
    run: Callable[..., Iterator[_Span]],
    header: bool,
) -> np.ndarray:
    begins, numbers, lines = [], [], 0
    name = pathlib.PurePath(path).name
    with tqdm(
        desc=f"reading {name}",
        total=spans[-1][1],
        unit="B",
        unit_scale=True,
        disable=None,
        delay=_SECONDS_WITHOUT_A_BAR,
    ) as bar:
        for (begin, end), span in zip(spans, run(_Reader(str(path), local, check), spans), strict=True):
            if span.error is not None:
                assert check is not None
                number, line = span.error
                check(line, line_name(path, lines + number + 1))  # raises, with its number
            begins.append(span.begins)
            numbers.append(span.numbers + lines + 1)
            lines += span.lines
            bar.update(end - begin)
    begins, numbers = np.concatenate(begins), np.concatenate(numbers)
    if header and len(numbers) and numbers[0] == 1:
        begins, numbers = begins[1:], numbers[1:]
    if len(numbers) == 0 or numbers[-1] == len(numbers):  # none is left out
        return begins[None]
    return np.stack([begins, numbers])


@dataclass(frozen=True)
class _Reader:
    """Reads the lines of a part of a file. Picklable, for processes."""

    path: str
    local: pathlib.Path
    check: Check | None

    def __call__(self, span: tuple[int, int]) -> _Span:
        first, last = span
        begins, numbers, lines, error = array("q"), array("q"), 0, None
        read = read_lines(self.local, begin=max(0, first - 1))
        # The line that reaches into the part, or ends right before it, is of an earlier part.
        offset = 0 if first == 0 else first - 1 + len(next(read, b""))
        for line in read:
            if offset >= last:
                break
            if line.strip():
                begins.append(offset)
                numbers.append(lines)
                if self.check is not None:
                    try:
                        self.check(line, line_name(self.path, lines + 1))
                    except MossAudioError:
                        error = lines, line
                        break
            offset += len(line)
            lines += 1
        return _Span(np.array(begins, np.int64), np.array(numbers, np.int64), lines, error)


def line_name(path: AnyPath, number: int) -> str:
    """Returns the name of a line in errors."""
    return f"{path} line {number}"
