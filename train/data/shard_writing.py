"""Writes shards: in parallel over processes and machines, and only those that are not there yet."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import soundfile
from array_record.python.array_record_module import ArrayRecordWriter

from moss_audio_jax.audio import load_audio
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, atomic_file, atomic_write, exists, read_bytes, to_path
from train.data.config import ColumnsConfig
from train.data.line_index import content_hash
from train.data.manifest import Clip, Example, Manifest
from train.data.shards import (
    HEADER_LENGTH_BYTES,
    INDEX_FILE,
    Records,
    ShardFacts,
    examples_in,
    facts_path,
    is_complete,
    shard_facts,
    shard_path,
    split_record,
)
from train.data.sources import SourceExamples, open_source
from train.data.worker_processes import worker_pool

log = logging.getLogger(__name__)

_INT16_SCALE = 32768
_WRITTEN_AT_ONCE = 64  # shards that one pass over a table or an archive writes


@dataclass(frozen=True)
class ShardReport:
    """Result of writing a shard. unreadable: examples whose record holds the reason instead."""

    path: Path
    examples: int
    unreadable: int
    already_there: bool


def prepare(
    manifest: AnyPath,
    out: AnyPath,
    shards: int,
    *,
    part: tuple[int, int] = (0, 1),
    columns: ColumnsConfig | None = None,
    workers: int = 1,
    completed: Callable[[ShardReport], None] = lambda report: None,
) -> list[ShardReport]:
    """Writes a manifest and its audio to directory `out` as `shards` files; returns their reports.

    The manifest may be any source of `open_source`, with these columns. A table or an archive is read in order, and
    once for each 64 shards, or by each process.

    part: (i, n) writes shards i, i + n, i + 2 n ... only: so n machines share the work, with one directory. Writes are
    atomic and finished shards are kept, so an interrupted call can be repeated. Unreadable clips are logged.
    workers: number of processes.
    completed: is called with each report as its shard is complete.
    Raises MossAudioError for an invalid manifest or option, or if `out` has shards of other data.
    """
    first, parts = part
    if shards < 1 or not 0 <= first < parts <= shards or workers < 1:
        raise MossAudioError(
            f"expected at least 1 shard and 1 process, and one of 0 to n - 1 of at most as many parts, found "
            f"shards={shards}, processes={workers}, part={first}/{parts}; correct them."
        )
    examples, out = open_source(manifest, columns), to_path(out)
    if len(examples) < shards:
        raise MossAudioError(
            f"{manifest}: expected an example for each of {shards} shards, found {len(examples)}; ask for less."
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_index(out, {"examples": len(examples), "shards": shards, "manifest_sha256": examples.digest()})
    wanted = list(range(first, shards, parts))
    at_once = 1 if isinstance(examples, Manifest) else min(_WRITTEN_AT_ONCE, -(-len(wanted) // workers))
    passes = [wanted[begin : begin + at_once] for begin in range(0, len(wanted), at_once)]
    reports = []
    for report in _reports(_Writer(examples, out, shards), passes, min(workers, len(passes))):
        completed(report)
        reports.append(report)
    return reports


def _reports(writer: "_Writer", passes: Sequence[Sequence[int]], workers: int) -> Iterator[ShardReport]:
    if workers == 1:
        for some in passes:
            yield from writer(some)
        return
    with worker_pool(workers, f"writes shards of {writer.out}") as pool:
        for done in as_completed([pool.submit(writer, some) for some in passes]):
            yield from done.result()


def _write_index(out: Path, index: dict[str, Any]) -> None:
    path = out / INDEX_FILE
    if exists(path) and (there := read_json(path)) != index:
        different = [key for key in index if there.get(key) != index[key]]
        raise MossAudioError(
            f"{path}: expected shards of this manifest, found others ({', '.join(different)} differ); "
            "choose another directory or remove it."
        )
    atomic_write(path, json.dumps(index, indent=2))


@dataclass(frozen=True)
class _Writer:
    """Writes shards of some examples. Picklable, for processes."""

    examples: Manifest | SourceExamples
    out: Path
    shards: int

    def __call__(self, wanted: Sequence[int]) -> list[ShardReport]:
        """Writes the shards of these numbers that are not there yet, in one pass over their examples."""
        paths = {shard: shard_path(self.out, shard, self.shards) for shard in wanted}
        counts = {shard: examples_in(shard, self.shards, len(self.examples)) for shard in wanted}
        there = {shard for shard in wanted if is_complete(paths[shard], counts[shard])}
        unreadable = {shard: _unreadable_in(paths[shard], counts[shard]) for shard in there}
        missing = [shard for shard in wanted if shard not in there]
        with ExitStack() as stack:
            files = {shard: stack.enter_context(_shard_file(paths[shard])) for shard in missing}
            for begin in range(0, len(self.examples) if missing else 0, self.shards):
                for shard in missing:
                    if begin + shard < len(self.examples):
                        files[shard].add(*_record_of(self.examples, begin + shard))
        unreadable |= {shard: file.unreadable for shard, file in files.items()}
        return [ShardReport(paths[shard], counts[shard], unreadable[shard], shard in there) for shard in wanted]


class _ShardFile:
    """A shard that is being written."""

    def __init__(self, file: AnyPath):
        # Groups of one for random access. The audio is compressed already.
        self._writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        self.examples = self.unreadable = 0

    def add(self, record: bytes, is_readable: bool) -> None:
        self._writer.write(record)
        self.examples += 1
        self.unreadable += not is_readable

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _shard_file(path: Path) -> Iterator[_ShardFile]:
    """Yields a shard to write. Its facts come first: a shard that is there has them."""
    with atomic_file(path) as file:
        with closing(_ShardFile(file)) as shard:
            yield shard
        facts = ShardFacts(shard.examples, shard.unreadable, file.stat().st_size, content_hash(file))
        atomic_write(facts_path(path), json.dumps(asdict(facts), indent=2) + "\n")


def _unreadable_in(path: Path, examples: int) -> int:
    """Returns the number of unreadable examples of a shard; reads them all if it has no facts."""
    if (facts := shard_facts(path)) is not None:
        return facts.unreadable
    records = Records([path])
    return sum("unreadable" in split_record(records.read(place, path))[0] for place in range(examples))


def _record_of(examples: Manifest | SourceExamples, index: int) -> tuple[bytes, bool]:
    """Returns the record of an example, and False if it holds the reason why the example can't be read."""
    name = str(index)
    try:
        example = examples[index]
        name = example.name
        return encode(example), True
    except StorageError:  # not the fault of the clip
        raise
    except MossAudioError as error:
        log.warning("unreadable: %s", error)
        return _record({"name": name, "unreadable": str(error)}, []), False


def encode(example: Example) -> bytes:
    """Returns the record of an example, with its audio."""
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
    return b"".join([len(encoded).to_bytes(HEADER_LENGTH_BYTES, "little"), encoded, *audio])
