"""Shards: a manifest and its audio in a few large files, for storage that is slow with many small ones.

`prepare` writes them, from a manifest or any other source, `Shards` reads them. Example i of the manifest is record
i // shards of shard i % shards, so training reads the same examples in the same order as from the manifest. A shard is
an ArrayRecord file. A record is

    length of the header: 4 bytes, little-endian | header: JSON | audio files of the clips, concatenated

Audio is lossless: the bytes of the file, or for a cut clip its samples as FLAC or float WAV. The record of an example
whose clip can't be decoded holds the reason instead: training skips and counts it, as with a manifest.
"""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grain
import numpy as np
import soundfile
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moss_audio_jax.audio import load_audio
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, atomic_file, atomic_write, exists, read_bytes, to_path
from moss_audio_jax.storage.retries import is_transient, retried
from train.data.config import ColumnsConfig
from train.data.manifest import Clip, Example, Manifest, Message, TimedText
from train.data.sources import SourceExamples, open_source, or_errors, read_examples

log = logging.getLogger(__name__)

INDEX_FILE = "shards.json"
_INT16_SCALE = 32768
_HEADER_LENGTH_BYTES = 4
_WRITTEN_AT_ONCE = 64  # shards that one pass over a table or an archive writes


@dataclass(frozen=True)
class ShardReport:
    """Result of writing a shard. unreadable: examples whose record holds the reason instead."""

    path: Path
    examples: int
    unreadable: int
    already_there: bool


def prepare(
    manifest: AnyPath, out: AnyPath, shards: int, only: int | None = None, columns: ColumnsConfig | None = None
) -> list[ShardReport]:
    """Writes a manifest and its audio to directory `out` as `shards` files, or only file number `only`.

    The manifest may be any source of `open_source`, with these columns. A table or an archive is read in order, and
    once for each 64 shards.

    Several machines can write different shards to one directory. Writes are atomic and finished shards are kept, so an
    interrupted call can be repeated. Unreadable clips are logged. Raises MossAudioError for an invalid manifest or
    option, or if `out` has shards of other data.
    """
    if shards < 1 or (only is not None and not 0 <= only < shards):
        raise MossAudioError(
            f"expected at least 1 shard and one of 0 to shards - 1, found shards={shards}, shard={only}; correct them."
        )
    examples, out = open_source(manifest, columns), to_path(out)
    if len(examples) < shards:
        raise MossAudioError(
            f"{manifest}: expected an example for each of {shards} shards, found {len(examples)}; ask for less."
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_index(out, {"examples": len(examples), "shards": shards, "manifest_sha256": examples.digest()})
    wanted = list(range(shards) if only is None else [only])
    at_once = 1 if isinstance(examples, Manifest) else _WRITTEN_AT_ONCE
    passes = [wanted[begin : begin + at_once] for begin in range(0, len(wanted), at_once)]
    return [report for some in passes for report in _write_shards(examples, out, some, shards)]


class Shards(Sequence[Example]):
    """Examples of a directory written by `prepare`, with random access."""

    def __init__(self, directory: AnyPath):
        self.directory = to_path(directory)
        index = read_json(self.directory / INDEX_FILE)
        if not (_is_count(index.get("examples")) and _is_count(index.get("shards"))):
            raise MossAudioError(
                f"{self.directory / INDEX_FILE}: expected the numbers of examples and shards, found {index}; "
                "run `prepare` again."
            )
        self._examples, self._shards = index["examples"], index["shards"]
        counts = [_examples_in(shard, self._shards, self._examples) for shard in range(self._shards)]
        paths = [_shard_path(self.directory, shard, self._shards) for shard in range(self._shards)]
        for path, count in zip(paths, counts, strict=True):
            if _num_records(path) != count:
                raise MossAudioError(
                    f"{path}: expected a shard of {count} examples, found {_num_records(path) or 'none'}; "
                    "run `prepare` for it again."
                )
        self._starts = np.cumsum([0, *counts])
        self._records = _Records(paths)

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Example:
        """Raises MossAudioError if the record is damaged, or says that a clip was unreadable when it was written."""
        if not 0 <= index < self._examples:
            raise IndexError(index)
        shard, position = index % self._shards, index // self._shards
        name = f"{_shard_path(self.directory, shard, self._shards)} record {position}"
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


class _Records:
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


def _examples_in(shard: int, shards: int, examples: int) -> int:
    return len(range(shard, examples, shards))


def _shard_path(directory: Path, shard: int, shards: int) -> Path:
    return directory / f"shard-{shard:05d}-of-{shards:05d}.arrayrecord"


def _num_records(path: Path) -> int:
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


# Writing


def _write_index(out: Path, index: dict[str, Any]) -> None:
    path = out / INDEX_FILE
    if exists(path) and (there := read_json(path)) != index:
        different = [key for key in index if there.get(key) != index[key]]
        raise MossAudioError(
            f"{path}: expected shards of this manifest, found others ({', '.join(different)} differ); "
            "choose another directory or remove it."
        )
    atomic_write(path, json.dumps(index, indent=2))


def _write_shards(
    examples: Manifest | SourceExamples, out: Path, wanted: Sequence[int], shards: int
) -> list[ShardReport]:
    """Writes the shards that are not there yet, in one pass over their examples."""
    paths = {shard: _shard_path(out, shard, shards) for shard in wanted}
    counts = {shard: _examples_in(shard, shards, len(examples)) for shard in wanted}
    there = [shard for shard in wanted if _num_records(paths[shard]) == counts[shard]]
    unreadable = {shard: _count_unreadable(paths[shard], counts[shard]) if shard in there else 0 for shard in wanted}
    with ExitStack() as stack:
        writers = {shard: stack.enter_context(_writer(paths[shard])) for shard in wanted if shard not in there}
        for index in range(len(examples)) if writers else ():
            if (shard := index % shards) in writers:
                record, is_readable = _record_of(examples, index)
                unreadable[shard] += not is_readable
                writers[shard].write(record)
    return [ShardReport(paths[shard], counts[shard], unreadable[shard], shard in there) for shard in wanted]


@contextmanager
def _writer(path: Path) -> Iterator[ArrayRecordWriter]:
    with atomic_file(path) as file:
        # Groups of one for random access. The audio is compressed already.
        writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        try:
            yield writer
        finally:
            writer.close()


def _record_of(examples: Manifest | SourceExamples, index: int) -> tuple[bytes, bool]:
    """Returns the record of an example, and False if it holds the reason why the example can't be read."""
    name = str(index)
    try:
        example = examples[index]
        name = example.name
        return _encode(example), True
    except StorageError:  # not the fault of the clip
        raise
    except MossAudioError as error:
        log.warning("unreadable: %s", error)
        return _record({"name": name, "unreadable": str(error)}, []), False


def _count_unreadable(path: Path, examples: int) -> int:
    records = _Records([path])
    return sum("unreadable" in _split(records.read(place, path))[0] for place in range(examples))


def _encode(example: Example) -> bytes:
    clips: list[Clip] = []

    def number(clip: Clip) -> int:
        if not any(clip is known for known in clips):
            clips.append(clip)
        return next(i for i, known in enumerate(clips) if known is clip)

    header = {
        "name": example.name,
        "conversation": [
            {
                "role": message.role,
                "content": [{"clip": number(piece)} if isinstance(piece, Clip) else piece for piece in message.content],
            }
            for message in example.conversation
        ],
        "clip": None if example.clip is None else number(example.clip),
        "text": example.text,
        "caption": example.caption,
        **{key: [asdict(label) for label in getattr(example, key)] for key in ("words", "segments", "events")},
    }
    audio = [_audio_bytes(clip) for clip in clips]
    header["clips"] = [{"name": clip.name, "bytes": len(data)} for clip, data in zip(clips, audio, strict=True)]
    return _record(header, audio)


def _audio_bytes(clip: Clip) -> bytes:
    """Returns an audio file with exactly the clip's wave. Raises MossAudioError if the clip can't be decoded."""
    assert not isinstance(clip.audio, np.ndarray)  # a source holds paths or bytes
    clip.wave()  # checks that it can be decoded
    content = clip.audio if isinstance(clip.audio, bytes) else read_bytes(clip.audio)
    if clip.start is None and clip.end is None:
        return content
    rate = soundfile.info(io.BytesIO(content)).samplerate
    wave = load_audio(content, sample_rate=rate, start=clip.start, end=clip.end, name=clip.name)
    file = io.BytesIO()
    scaled = wave * _INT16_SCALE
    integers = np.clip(scaled, -_INT16_SCALE, _INT16_SCALE - 1).astype(np.int16)
    if np.array_equal(scaled, integers):  # 16-bit audio
        soundfile.write(file, integers, rate, format="FLAC", subtype="PCM_16")
    else:
        soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _record(header: dict[str, Any], audio: Sequence[bytes]) -> bytes:
    encoded = json.dumps(header, ensure_ascii=False).encode()
    return b"".join([len(encoded).to_bytes(_HEADER_LENGTH_BYTES, "little"), encoded, *audio])


# Reading


def _split(record: bytes) -> tuple[dict[str, Any], bytes]:
    """Splits a record into header and audio."""
    end = _HEADER_LENGTH_BYTES + int.from_bytes(record[:_HEADER_LENGTH_BYTES], "little")
    header = json.loads(record[_HEADER_LENGTH_BYTES:end])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, record[end:]


def _decode(record: bytes, name: str) -> Example:
    header, audio = _split(record)
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
