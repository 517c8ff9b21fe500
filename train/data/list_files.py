"""Rows of lists that name audio files: NeMo's JSON lines, and TSV with a header, such as Common Voice's."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path, join, read_lines
from moss_audio_jax.storage.retries import retried
from train.data.line_index import index_lines
from train.data.manifest import parse_json

_COMMON_VOICE = {"client_id", "path", "sentence"}  # of its header; the audio is in clips/
_COMMON_VOICE_CLIPS = "clips"
_JSON_CHECKED = 100  # lines that give the names of the columns


class _Lines:
    """Lines of a file of this machine that are not blank. Memory holds their places (`line_index`)."""

    keep_open = 1 << 30  # none stays open

    def __init__(self, path: Path, *, header: bool):
        self.path = path
        self.columns: Sequence[str] = ()
        self._lines = index_lines(path, pathlib.Path(path), header=header)
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._lines)

    def select(self, names: Mapping[str, str]) -> None:
        self._names = list(names.values())

    def place(self, index: int) -> str:
        return f"line {self._lines.number(index)}"

    def audio_directory(self) -> str:
        return str(self.path.parent)

    def close(self) -> None:
        pass

    def _line(self, index: int) -> bytes:
        def read() -> bytes:
            with open(self.path, "rb") as file:
                file.seek(self._lines.begin(index))
                return file.readline()

        return retried(self.path, read)


class JsonLines(_Lines):
    """Rows of JSON lines."""

    def __init__(self, path: Path):
        super().__init__(path, header=False)

    def content(self, index: int) -> dict[str, Any]:
        """Returns the object of a row."""
        name = f"{self.path} {self.place(index)}"
        content = parse_json(self._line(index), name)
        if not isinstance(content, dict):
            raise MossAudioError(f"{name}: expected a JSON object, found {str(content)[:80]!r}; correct the line.")
        return content


class JsonRows(JsonLines):
    """Rows of NeMo's JSON lines. A row with an `offset` is a cut of its file, `duration` seconds long."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.columns = list(dict.fromkeys(key for row in self._first_rows() for key in row))

    def row(self, index: int) -> dict[str, Any]:
        content, name = self.content(index), f"{self.path} {self.place(index)}"
        row = {name: content.get(name) for name in self._names}
        if (offset := content.get("offset")) is None:
            return row
        duration = content.get("duration")
        for key, value in (("offset", offset), ("duration", duration)):
            if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                raise MossAudioError(f"{name}, column {key!r}: expected seconds, found {value!r}; correct the row.")
        return row | {"start": offset} | ({} if duration is None else {"end": offset + duration})

    def _first_rows(self) -> Iterator[dict[str, Any]]:
        for index in range(min(_JSON_CHECKED, len(self))):
            try:
                yield self.content(index)
            except MossAudioError:  # of this row, when it is read
                continue


class TsvRows(_Lines):
    """Rows of a TSV file. Quotes are text, as in Common Voice's files, whose audio is in clips/ beside them."""

    def __init__(self, path: Path):
        super().__init__(path, header=True)
        self.columns = header_of(path)
        if repeated := {name for name in self.columns if self.columns.count(name) > 1}:
            raise MossAudioError(f"{path} must have each column once, not {repeated.pop()!r} twice: rename one")
        self._clips = set(self.columns) >= _COMMON_VOICE

    def select(self, names: Mapping[str, str]) -> None:
        super().select(names)
        self._clips = self._clips and names.get("audio") == "path"

    def audio_directory(self) -> str:
        return join(super().audio_directory(), _COMMON_VOICE_CLIPS) if self._clips else super().audio_directory()

    def row(self, index: int) -> dict[str, Any]:
        name = f"{self.path} {self.place(index)}"
        cells = _cells(self._line(index), name)
        if len(cells) != len(self.columns):
            raise MossAudioError(
                f"{name}: expected {len(self.columns)} cells between tabs, as in the header, found {len(cells)}; "
                "correct the row."
            )
        row = dict(zip(self.columns, cells, strict=True))
        return {name: row[name] for name in self._names}


def header_of(path: Path) -> list[str]:
    """Reads the names of the columns of a TSV file."""
    return _cells(next(read_lines(path), b"").removeprefix(b"\xef\xbb\xbf"), f"{path} line 1")


def _cells(line: bytes, name: str) -> list[str]:
    try:
        return line.decode().rstrip("\r\n").split("\t")
    except UnicodeError as error:
        raise MossAudioError(f"{name}: expected text in UTF-8, found none ({error}); save it as UTF-8.") from error
