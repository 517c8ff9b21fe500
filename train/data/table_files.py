"""Rows of Parquet and Arrow files, read by pyarrow alone: nothing is unpickled, unknown extension types are storage."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sound.files import warn_once
from moss_audio_jax.storage.paths import Path
from moss_audio_jax.storage.retries import retried

_ROWS_AT_ONCE = 8  # of a row group, in memory
_READ_AT_ONCE = 1 << 20  # bytes of a column
_LARGE_GROUP = 1 << 25  # bytes
_WANTED = {"audio": "paths, bytes, or a struct of bytes and path", "words": "lists of {word, start, end}"}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MossAudioError(
            "Parquet and Arrow need pyarrow, which is not installed: pip install 'moss-audio-jax[data]'"
        ) from error
    return pyarrow


class _Table:
    """What Parquet and Arrow have in common."""

    keep_open = 1

    def __init__(self, path: Path, schema: Any, lengths: Sequence[int]):
        """lengths: numbers of rows of the row groups, or record batches."""
        self.path = path
        self.columns: Sequence[str] = list(schema.names)
        self._types = {name: schema.field(name).type for name in dict.fromkeys(schema.names)}
        self._starts = np.cumsum([0, *lengths])
        self._names: list[str] = []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def select(self, names: Mapping[str, str]) -> None:
        types = _pyarrow().types
        for use, name in names.items():
            kind = self._types[name]
            kind = kind.value_type if types.is_dictionary(kind) else kind
            text = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
            binary = types.is_binary(kind) or types.is_large_binary(kind)
            nested = types.is_list(kind) or types.is_large_list(kind) or types.is_struct(kind)
            if self.columns.count(name) > 1:
                raise MossAudioError(f"{self.path} must have the column {name!r} once, not twice: rename one")
            fits = text or (use == "audio" and (binary or types.is_struct(kind))) or (use == "words" and nested)
            if not fits:
                raise MossAudioError(
                    f"{self.path}, column {name!r}: expected {_WANTED.get(use, 'text')} for --columns.{use}, found "
                    f"{kind}; name another column."
                )
        self._names = list(dict.fromkeys(names.values()))

    def place(self, index: int) -> str:
        return f"row {index}"

    def audio_directory(self) -> str:
        return str(self.path.parent)

    def _found(self, index: int) -> tuple[int, int]:
        """Returns the row group of a row, and its number there."""
        group = int(np.searchsorted(self._starts, index, "right")) - 1
        return group, index - int(self._starts[group])

    def _cells(self, batch: Any, row: int) -> dict[str, Any]:
        return {name: batch.column(name)[row].as_py() for name in self._names}


class ParquetRows(_Table):
    """Rows of a Parquet file.

    A few rows are in memory at a time. Rows in order are each read once; any other row reads its row group up to it.
    """

    def __init__(self, path: Path):
        with _errors(path, "Parquet"):
            metadata = retried(path, lambda: _pyarrow().parquet.read_metadata(str(path)))
            schema = metadata.schema.to_arrow_schema()
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        super().__init__(path, schema, [group.num_rows for group in groups])
        self._largest = max((group.total_byte_size for group in groups), default=0)
        self._file: Any = None
        self._batch: Any = None
        self._batches: Any = None
        self.close()

    def row(self, index: int) -> dict[str, Any]:
        group, row = self._found(index)
        with _errors(self.path, "Parquet"):
            if self._group != group or row < self._first:
                self._seek(group, index)
            while row >= self._first + (len(self._batch) if self._batch is not None else 0):
                self._first += len(self._batch) if self._batch is not None else 0
                self._batch = next(self._batches)
            return self._cells(self._batch, row - self._first)

    def _seek(self, group: int, index: int) -> None:
        in_order = index in (0, self._next)
        if not in_order and self._largest > _LARGE_GROUP:
            warn_once(
                f"{self.path}: a row is read with its row group, of up to {self._largest >> 20} MiB; to read only the "
                "row, `moss-audio-train prepare` it first"
            )
        self.close()
        self._file = _pyarrow().parquet.ParquetFile(str(self.path), pre_buffer=False, buffer_size=_READ_AT_ONCE)
        self._batches = self._file.iter_batches(
            _ROWS_AT_ONCE, row_groups=[group], columns=self._names, use_threads=False
        )
        self._group, self._next = group, int(self._starts[group + 1])

    def close(self) -> None:
        """Closes the file and forgets the place in it."""
        if self._file is not None:
            self._file.close()
        self._file = self._batch = self._batches = None
        self._group, self._first, self._next = -1, 0, 0


class ArrowRows(_Table):
    """Rows of an Arrow file, mapped into memory: of the format that `datasets` writes (a stream), or of Feather 2."""

    keep_open = 64

    def __init__(self, path: Path):
        self.path = path
        self._batches: list[Any] | None = None
        with _errors(path, "Arrow"):
            schema, batches = retried(path, self._opened)
        super().__init__(path, schema, [len(batch) for batch in batches])

    def row(self, index: int) -> dict[str, Any]:
        batch, row = self._found(index)
        with _errors(self.path, "Arrow"):
            if self._batches is None:
                self._batches = self._opened()[1]
            return self._cells(self._batches[batch], row)

    def close(self) -> None:
        self._batches = None

    def _opened(self) -> tuple[Any, list[Any]]:
        """Returns the schema and the record batches, whose bytes stay in the file."""
        arrow = _pyarrow()
        mapped = arrow.memory_map(str(self.path))
        if mapped.read(6) == b"ARROW1":
            reader = arrow.ipc.open_file(mapped)
            return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
        mapped.seek(0)
        reader = arrow.ipc.open_stream(mapped)
        return reader.schema, list(reader)


@contextmanager
def _errors(path: Path, kind: str) -> Iterator[None]:
    arrow = _pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError, StopIteration) as error:
        sentence = " ".join(str(error).split()).rstrip(".") or "it ends too early"
        raise MossAudioError(f"{path}: expected {kind}, found damaged data ({sentence}); download it again.") from error
