"""Data as people have it: tables, lists and archives, read as the examples of a manifest.

    Parquet         a file, a glob, or a directory of one split              `table_files`, needs pyarrow
    Arrow           a file, or a directory that `datasets` saved to disk     `table_files`, needs pyarrow
    JSON lines      rows with `audio_filepath`, as NeMo and Kaldi users have `list_files`
    JSON lines      of Lhotse's cuts                                         `lhotse_files`
    TSV             with a header, such as Common Voice's                    `list_files`
    tar             WebDataset: members that share a name are an example     `tar_files`

What a source is, is read from its first bytes. A row becomes the object that a line of a manifest is, and is checked by
the same code. An invalid row is an error when it is read, not when the source is opened: training skips and counts it.
Rows have random access, and memory holds where they begin, but no object for each of them.
"""

import hashlib
import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import (
    AnyPath,
    Path,
    children,
    exists,
    file_in,
    files_below,
    is_plain_name,
    is_remote,
    local_copy,
    matching,
    open_binary,
    read_lines,
    reason,
    require_local,
    to_path,
)
from moss_audio_jax.storage.retries import retried
from train.data.config import ColumnsConfig
from train.data.manifest import AudioBytes, Example, Manifest, checked_lines, parse_content

LABEL_COLUMNS = ("text", "caption", "words")
# Columns that are read where none is named, the first that exists.
USUAL_COLUMNS = {
    "audio": ("audio", "audio_filepath", "path", "file"),
    "text": ("text", "txt", "sentence", "transcription", "transcript", "normalized_text"),
    "caption": ("caption",),
    "words": ("words",),
}
_HEAD_BYTES = 512  # a header of tar
_MOST_NAMES = 100_000  # that braces may stand for


class Rows(Protocol):
    """Rows of a file, as objects by column.

    columns: names of the columns, of a tar the extensions.
    keep_open: number of such files that stay open at a time.
    """

    path: Path
    columns: Sequence[str]
    keep_open: int

    def __len__(self) -> int: ...

    def select(self, names: Mapping[str, str]) -> None:
        """Chooses the columns to read, by what they are for; raises MossAudioError if one has another type."""

    def row(self, index: int) -> dict[str, Any]:
        """Reads the chosen columns of a row, by their names; also `start` and `end` if the format cuts clips."""
        ...

    def place(self, index: int) -> str:
        """Returns where a row is, as in `row 3`."""
        ...

    def audio_directory(self) -> str:
        """Returns the directory that paths of audio are relative to."""
        ...

    def close(self) -> None:
        """Closes the file; the next `row` opens it again."""


class SourceExamples(Sequence[Example]):
    """Examples of files of one kind, in their order. Cheap to pickle."""

    def __init__(self, files: Sequence[Rows], columns: ColumnsConfig):
        self._files = list(files)
        self._names = [_chosen(file, columns) for file in files]
        for file, names in zip(files, self._names, strict=True):
            file.select(names)
        self._starts = np.cumsum([0, *map(len, files)])
        self._opened: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        """Raises MossAudioError that names file, row and column if the row is no example."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        file, names, row = self._files[number], self._names[number], index - int(self._starts[number])
        with self._lock:
            self._open(number)
            cells = file.row(row)
        name = f"{file.path} {file.place(row)}"
        return parse_content(_content(cells, names, name), name, file.audio_directory())

    def digest(self) -> str:
        """Returns a hash of the files' names, sizes, beginnings and ends, and of the columns."""
        found = hashlib.sha256()
        for file, names in zip(self._files, self._names, strict=True):
            with open_binary(file.path) as opened:
                size = opened.seek(0, 2)
                found.update(json.dumps([file.path.name, size, sorted(names.items())]).encode())
                for begin in (0, max(0, size - _DIGESTED_BYTES)):
                    opened.seek(begin)
                    found.update(opened.read(_DIGESTED_BYTES))
        return found.hexdigest()

    def _open(self, number: int) -> None:
        """Notes that a file is read, and closes the ones that were read the longest ago if too many are open."""
        self._opened[number] = None
        self._opened.move_to_end(number)
        while len(self._opened) > self._files[number].keep_open:
            self._files[self._opened.popitem(last=False)[0]].close()

    def __getstate__(self) -> dict[str, Any]:
        for number in self._opened:
            self._files[number].close()
        return {key: value for key, value in vars(self).items() if key != "_lock"} | {"_opened": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


_DIGESTED_BYTES = 1 << 16


def open_source(path: AnyPath, columns: ColumnsConfig | None = None) -> Manifest | SourceExamples:
    """Opens a manifest, or data of another kind.

    columns: names of columns, for all kinds but manifests.
    Raises MossAudioError if the path is none of these, lacks a column, or has several splits.
    """
    columns = columns or ColumnsConfig()
    files = source_files(path)
    kinds = {kind_of(file, columns) for file in files}
    if kinds == {"manifest"} and len(files) == 1:
        return Manifest(files[0])
    if len(kinds) > 1 or kinds == {"manifest"}:
        raise MossAudioError(
            f"{path} must be files of one kind, not {' and '.join(sorted(kinds))}: give each "
            f"{'manifest' if kinds == {'manifest'} else 'kind'} as a path of its own"
        )
    (kind,) = kinds
    return SourceExamples([_opened(file, kind) for file in files], columns)


def read_examples(path: AnyPath, columns: ColumnsConfig | None = None) -> Iterator[Example | MossAudioError]:
    """Yields each example of a source in order, or the error of its line or row. Arguments as of `open_source`."""
    columns = columns or ColumnsConfig()
    files = source_files(path)
    if len(files) == 1 and kind_of(files[0], columns) == "manifest":
        yield from checked_lines(files[0], local_copy(files[0]))
        return
    yield from or_errors(open_source(path, columns))


def or_errors(examples: Sequence[Example]) -> Iterator[Example | MossAudioError]:
    """Yields each example, or its error."""
    for index in range(len(examples)):
        try:
            yield examples[index]
        except MossAudioError as error:
            yield error


def _opened(path: Path, kind: str) -> Rows:
    if kind in ("Parquet", "Arrow"):
        from train.data.table_files import ArrowRows, ParquetRows

        return ParquetRows(path) if kind == "Parquet" else ArrowRows(path)
    from train.data.lhotse_files import CutRows
    from train.data.list_files import JsonRows, TsvRows
    from train.data.tar_files import TarRows

    return {"tar": TarRows, "TSV": TsvRows, "NeMo": JsonRows, "Lhotse": CutRows}[kind](path)


# Files


def source_files(path: AnyPath) -> list[Path]:
    """Lists the files of a source: itself, or those of a directory, a glob, or braces as in `{0000..0099}.tar`."""
    if exists(path):
        return _in_directory(to_path(path)) if to_path(path).is_dir() else [to_path(path)]
    text = str(path)
    if not re.search(r"[*?{\[]", text):
        return [to_path(path)]  # its reader says that it is missing
    found = []
    for name in _expanded(text):
        files = matching(name) if re.search(r"[*?\[]", name) else [to_path(name)]
        found += [file for file in files if not file.is_dir()]
    if not found:
        raise MossAudioError(f"{path} must match a file, not none: check the pattern")
    if missing := next((file for file in found if not exists(file)), None):
        raise MossAudioError(f"{path}: {missing} must exist, as the braces name it: check their numbers")
    return found


def _expanded(text: str) -> Iterator[str]:
    """Yields the names that braces stand for: `{0000..0099}` and `{train,test}`, as WebDataset users write them."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [[part] if number % 2 == 0 else _alternatives(part, text) for number, part in enumerate(parts)]
    if np.prod([float(len(choice)) for choice in choices]) > _MOST_NAMES:
        raise MossAudioError(f"{text} must stand for at most {_MOST_NAMES} files: correct the numbers in braces")
    return map("".join, itertools.product(*choices))


def _alternatives(inside: str, text: str) -> Sequence[str]:
    if numbers := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inside):
        first, last = map(int, numbers.groups())
        if not 0 <= last - first < _MOST_NAMES:
            raise MossAudioError(f"{text} must have numbers that rise to at most {_MOST_NAMES}, not {inside}")
        return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    return inside.split(",")


def _in_directory(directory: Path) -> list[Path]:
    """Lists the files of a directory of one data set and split."""
    if exists(directory / "dataset_dict.json"):
        splits = [child for child in children(directory) if exists(child / "state.json")]
        raise MossAudioError(
            f"{directory} has several splits: give one of them, {' or '.join(map(str, splits)) or 'which is missing'}"
        )
    if exists(directory / "state.json"):
        return _saved_files(directory)
    for ending in (".parquet", ".arrow", ".tar"):
        found = [file for file in files_below(directory) if file.name.endswith(ending)]
        splits = sorted({_split(file) for file in found})
        if len(splits) > 1:
            raise MossAudioError(
                f"{directory} has several splits: give one of them, such as '{splits[0]}' or '{splits[1]}'; "
                f"'{directory}/**/*{ending}' takes them all"
            )
        if found:
            return found
    raise MossAudioError(
        f"{directory} must be shards, or hold *.parquet, *.arrow or *.tar, not only "
        f"{', '.join(child.name for child in children(directory)[:5]) or 'nothing'}: check the path"
    )


def _split(file: Path) -> str:
    """Returns a glob for the files of one split: `train-00000-of-00002.parquet` has others beside it."""
    prefix = re.match(r"(.+?)-\d+-of-\d+", file.name)
    return str(file.parent / (f"{prefix[1]}-*{file.suffix}" if prefix else f"*{file.suffix}"))


def _saved_files(directory: Path) -> list[Path]:
    """Lists the files of `Dataset.save_to_disk`, in their order."""
    from moss_audio_jax.storage.json_files import read_json

    state = read_json(directory / "state.json")
    if state.get("_indices_data_files"):
        raise MossAudioError(f"{directory} must have its rows in order, not by indices: save `flatten_indices()` of it")
    named = state.get("_data_files")
    entries = named if isinstance(named, list) else []
    names = [str(entry.get("filename")) if isinstance(entry, dict) else "" for entry in entries]
    if not names or not all(map(is_plain_name, names)):
        raise MossAudioError(f"{directory / 'state.json'} must name files of its directory, not {named}: save it again")
    return [file_in(directory, name) for name in names]


def kind_of(path: AnyPath, columns: ColumnsConfig) -> str:
    """Returns Parquet, Arrow, tar, TSV, NeMo, Lhotse or manifest, by the first bytes of a file."""
    path = to_path(path)
    if is_remote(path):
        head = b""
        if path.suffix in (".parquet", ".arrow", ".tar", ".tsv"):
            require_local(path, "this kind of data is read from")
    else:
        try:
            with open(path, "rb") as file:
                head = retried(path, lambda: file.read(_HEAD_BYTES))
        except OSError as error:
            raise MossAudioError(
                f"{path}: expected a readable manifest, found '{reason(error)}'; check the path."
            ) from error
    if head.startswith(b"version https://git-lfs"):
        raise MossAudioError(f"{path} must be data, not a Git LFS pointer: fetch the file with `git lfs pull`")
    if head.startswith(b"PAR1"):
        return "Parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "Arrow"
    if head[257:262] == b"ustar":
        return "tar"
    for endings, kind in (((".parquet",), "Parquet"), ((".arrow",), "Arrow"), ((".tar", ".tar.gz", ".tgz"), "tar")):
        if path.name.endswith(endings):
            compressed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
            advice = "decompress it, which gives its rows places" if compressed else "download it again"
            raise MossAudioError(f"{path} must be {kind}, not {head[:8]!r} at its beginning: {advice}")
    if path.name.endswith(".tsv"):
        return "TSV"
    return "manifest" if is_remote(path) else _kind_of_lines(path, columns)


def _kind_of_lines(path: Path, columns: ColumnsConfig) -> str:
    """Returns NeMo or Lhotse if the first object of JSON lines has its audio where these have it, else manifest."""
    line = next((line for line in read_lines(path) if line.strip()), b"")
    try:
        first = json.loads(line)
    except ValueError:  # Manifest says what is wrong
        return "manifest"
    if not isinstance(first, dict) or {"audio", "conversation"} & set(first):
        return "manifest"
    if {"recording", "supervisions"} <= set(first):
        return "Lhotse"
    return "NeMo" if (columns.audio or "audio_filepath") in first else "manifest"


# Columns


def _chosen(file: Rows, columns: ColumnsConfig) -> dict[str, str]:
    """Returns what columns of a file are for -> their names."""
    chosen = {}
    for use, usual in USUAL_COLUMNS.items():
        named = getattr(columns, use)
        if named is not None and named not in file.columns:
            raise MossAudioError(
                f"{file.path} must have the column {named!r} of --columns.{use}, not only {', '.join(file.columns)}: "
                "name one of these"
            )
        name = named or next((name for name in usual if name in file.columns), None)
        if name is not None:
            chosen[use] = name
    if not any(use in chosen for use in LABEL_COLUMNS):
        raise MossAudioError(
            f"{file.path} must have a column of text, not only {', '.join(file.columns)}: name it by --columns.text, "
            "--columns.caption or --columns.words"
        )
    return chosen


def _content(row: dict[str, Any], names: Mapping[str, str], name: str) -> dict[str, Any]:
    """Makes the object of a line of a manifest from a row."""
    content = {key: row[key] for key in ("start", "end") if key in row and key not in names.values()}
    if "audio" in names:
        content["audio"] = _audio(row[names["audio"]], f"{name}, column {names['audio']!r}")
    for use in LABEL_COLUMNS:
        value = row[names[use]] if use in names else None
        if use == "words" and value is not None:
            value = _words(value, f"{name}, column {names[use]!r}")
        if value is not None and value != [] and not (isinstance(value, str) and not value.strip()):
            content[use] = value
    if not any(use in content for use in LABEL_COLUMNS):
        first = next(use for use in LABEL_COLUMNS if use in names)
        _fail(f"{name}, column {names[first]!r}", "text that is not blank", row[names[first]])
    return content


def _audio(value: Any, place: str) -> "str | AudioBytes":
    """Returns a path, or the bytes of a file; `datasets` has a struct of both, of which one may be null."""
    path = None
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        path = value.get("path")
        value = path if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes) and value:
        return AudioBytes(value, path or "audio")
    if isinstance(value, str) and value.strip():
        return value
    _fail(place, "a path, or bytes of an audio file, or a struct of bytes and path", value)


def _words(value: Any, place: str) -> list[Any]:
    """Returns words in the form of a manifest, without those of blank text, which stand for silence in alignments."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            _fail(place, "a list of {word, start, end}", value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())  # a struct of lists
        if len(set(map(len, columns))) != 1:
            _fail(place, "lists of one length", {key: len(value[key]) for key in sorted(value)})  # Arrow sorts or not
        value = [dict(zip(value, word, strict=True)) for word in zip(*columns, strict=True)]
    if not isinstance(value, list):
        _fail(place, "a list of {word, start, end}", value)
    words = [
        {"text" if key == "word" and "text" not in word else key: part for key, part in word.items()}
        if isinstance(word, dict)
        else word
        for word in value
    ]
    return [word for word in words if not (isinstance(word, dict) and str(word.get("text", "?")).strip() == "")]


def _fail(place: str, expected: str, found: Any) -> NoReturn:
    shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:80]}..."
    raise MossAudioError(f"{place}: expected {expected}, found {shown}; correct the row.")
