"""Shards: a manifest and its audio in a few large files, for storage that is slow with many small ones.

`shard_writing.prepare` writes them, from a manifest or any other source, `Shards` reads them.

    shards.json                       numbers of examples and shards, hash of the manifest
    shard-00000-of-00008.arrayrecord  examples 0, 8, 16 ... of the manifest
    shard-00000-of-00008.json         numbers of its examples and of unreadable ones, its size and hash

Example i of the manifest is record i // shards of shard i % shards, so training reads the same examples in the same
order as from the manifest. A shard is an ArrayRecord file. A record is

    length of the header: 4 bytes, little-endian | header: JSON | audio files of the clips, concatenated

Audio is lossless: the bytes of the file, or for a cut clip its samples as FLAC or float WAV. The record of an example
whose clip can't be decoded holds the reason instead: training skips and counts it, as with a manifest.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, exists, to_path
from moss_audio_jax.storage.retries import is_transient, retried
from train.data.config import ColumnsConfig
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.sources import open_source, or_errors, read_examples

INDEX_FILE = "shards.json"
HEADER_LENGTH_BYTES = 4
_HASHED_AT_ONCE = 1 << 24
_THREADS = 16  # that wait for storage

Item = TypeVar("Item")
Result = TypeVar("Result")


class Shards(Sequence[Example]):
    """Examples of a directory written by `prepare`, with random access. paths: of its shards."""

    def __init__(self, directory: AnyPath):
        self.directory = to_path(directory)
        index = read_json(self.directory / INDEX_FILE)
        if not (_is_count(index.get("examples")) and _is_count(index.get("shards"))):
            raise MossAudioError(
                f"{self.directory / INDEX_FILE}: expected the numbers of examples and shards, found {index}; "
                "run `prepare` again."
            )
        self._examples, self._shards = index["examples"], index["shards"]
        counts = [examples_in(shard, self._shards, self._examples) for shard in range(self._shards)]
        paths = [shard_path(self.directory, shard, self._shards) for shard in range(self._shards)]
        for problem in _in_threads(_problem, zip(paths, counts, strict=True)):
            if problem is not None:
                raise MossAudioError(problem)
        self.paths = paths
        self._starts = np.cumsum([0, *counts])
        self._records = Records(paths)

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Example:
        """Raises MossAudioError if the record is damaged, or says that a clip was unreadable when it was written."""
        if not 0 <= index < self._examples:
            raise IndexError(index)
        shard, position = index % self._shards, index // self._shards
        name = f"{shard_path(self.directory, shard, self._shards)} record {position}"
        try:
            return _decode(self._records.read(int(self._starts[shard]) + position, name), name)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            if isinstance(error, MossAudioError):
                raise
            raise MossAudioError(
                f"{name}: expected an example, found damaged data ({error}); run `prepare` for this shard again."
            ) from error


def open_examples(path: AnyPath, columns: ColumnsConfig | None = None) -> Sequence[Example]:
    """Opens a directory of shards, a manifest or another source, with these columns."""
    return Shards(path) if is_shards(path) else open_source(path, columns)


def examples_or_errors(path: AnyPath, columns: ColumnsConfig | None = None) -> Iterator[Example | MossAudioError]:
    """Yields each example of what `open_examples` opens, in order, or the error of its line, row or record."""
    return or_errors(Shards(path)) if is_shards(path) else read_examples(path, columns)


def is_shards(path: AnyPath) -> bool:
    """Returns True if a path is a directory that `prepare` wrote."""
    return exists(to_path(path) / INDEX_FILE)


class Records:
    """Records of ArrayRecord files. A reader that failed once keeps failing: all files are then reopened."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = [str(path) for path in paths]
        self._source = self._opened()

    def _opened(self) -> grain.sources.ArrayRecordDataSource:
        return retried(self._paths[0], lambda: grain.sources.ArrayRecordDataSource(self._paths))

    def read(self, place: int, name: object) -> bytes:
        def attempt() -> bytes:
            try:
                return self._source[place]
            except RuntimeError as error:
                if is_transient(error):
                    self._source = self._opened()
                raise

        return retried(name, attempt)


@dataclass(frozen=True)
class ShardFacts:
    """Contents of the JSON file beside a shard. unreadable: examples whose record holds the reason instead."""

    examples: int
    unreadable: int
    bytes: int
    sha256: str


def shard_facts(path: Path) -> ShardFacts | None:
    """Reads the facts of a shard; None if it has none, as one that an older version wrote."""
    file = facts_path(path)
    if not exists(file):
        return None
    content = read_json(file)
    names = [field.name for field in fields(ShardFacts)]
    *counts, sha256 = (content.get(name) for name in names)
    if not (all(_is_count(count) or count == 0 for count in counts) and isinstance(sha256, str)):
        raise MossAudioError(
            f"{file}: expected {', '.join(names)} of a shard, found {content}; remove it and run `prepare` for this "
            "shard again."
        )
    return ShardFacts(**{name: content[name] for name in names})


def facts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def is_complete(path: Path, examples: int) -> bool:
    """Returns True if a shard is there, with the size that it was written with, or else with its records."""
    return _problem((path, examples)) is None


def _problem(shard: tuple[Path, int]) -> str | None:
    """Returns what is wrong with a shard, by the sizes of its files; the shard itself is read if it has no facts."""
    path, examples = shard
    facts, there = shard_facts(path), exists(path)
    if facts is None or not there:
        count = num_records(path) if there else 0
    else:
        size = retried(path, lambda: path.stat().length)
        if facts.examples == examples and size != facts.bytes:
            return f"{path}: expected its {facts.bytes} bytes, found {size}; run `prepare` for it again."
        count = facts.examples
    if count == examples:
        return None
    return f"{path}: expected a shard of {examples} examples, found {count or 'none'}; run `prepare` for it again."


def damaged(directory: AnyPath) -> Iterator[str]:
    """Reads all shards of a directory; yields a sentence for each that is not as it was written.

    Shards without facts, of older versions, are left out.
    """
    index = Shards(directory)
    for problem in _in_threads(_difference, index.paths):
        if problem is not None:
            yield problem


def _difference(path: Path) -> str | None:
    facts = shard_facts(path)
    if facts is None or (found := retried(path, lambda: _content_hash(path))) == facts.sha256:
        return None
    return (
        f"{path}: expected the SHA-256 {facts.sha256} that it was written with, found {found}; remove it and run "
        "`prepare` for it again, or copy it again."
    )


def _content_hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_AT_ONCE):
            found.update(piece)
    return found.hexdigest()


def _in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(work, items)


def examples_in(shard: int, shards: int, examples: int) -> int:
    return len(range(shard, examples, shards))


def shard_path(directory: Path, shard: int, shards: int) -> Path:
    return directory / f"shard-{shard:05d}-of-{shards:05d}.arrayrecord"


def num_records(path: Path) -> int:
    """Number of records of an ArrayRecord file; 0 if it is missing, damaged or of another format."""

    def count() -> int:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        if not reader.ok():
            reader.read([0])  # raises the reason
        records = reader.num_records()
        reader.close()
        return records

    try:
        return retried(path, count)
    except RuntimeError:  # the library's error for all of these
        return 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# Reading


def split_record(record: bytes) -> tuple[dict[str, Any], bytes]:
    """Splits a record into header and audio."""
    end = HEADER_LENGTH_BYTES + int.from_bytes(record[:HEADER_LENGTH_BYTES], "little")
    header = json.loads(record[HEADER_LENGTH_BYTES:end])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, record[end:]


def _decode(record: bytes, name: str) -> Example:
    header, audio = split_record(record)
    if "unreadable" in header:
        raise MossAudioError(header["unreadable"])
    labels: dict[str, Any] = {
        key: tuple(TimedText(**label) for label in header[key]) for key in ("words", "segments", "events")
    }
    clips, begin = [], 0
    for clip in header["clips"]:
        clips.append(Clip(audio[begin : begin + clip["bytes"]], name=clip["name"]))
        begin += clip["bytes"]
    if begin != len(audio):
        raise ValueError(f"{len(audio)} bytes of audio instead of {begin}")
    return Example(
        header["name"],
        tuple(
            Message(
                message["role"],
                tuple(clips[piece["clip"]] if isinstance(piece, dict) else piece for piece in message["content"]),
            )
            for message in header["conversation"]
        ),
        None if header["clip"] is None else clips[header["clip"]],
        header["text"],
        header["caption"],
        **labels,
    )
