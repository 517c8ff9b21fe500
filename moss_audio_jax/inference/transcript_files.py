"""Transcripts as files: their formats, and the records by which a restarted command knows what is done.

A transcript is written whole, then its record. A recording is done if its record says that the same file was
transcribed with the same options, and all its outputs are there.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.recording_files import RecordingFile
from moss_audio_jax.inference.recordings import Transcript
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, absolute, atomic_write, exists, to_path
from moss_audio_jax.storage.retries import retried

RECORDS = ".moss-audio"  # a directory of the outputs


def _txt(transcript: Transcript, about: Mapping[str, Any]) -> str:
    return transcript.timeline.to_txt() if transcript.timed else transcript.text + "\n"


def _json(transcript: Transcript, about: Mapping[str, Any]) -> str:
    windows = [
        {
            "begin": round(window.place.begin, 6),
            "end": round(window.place.end, 6),
            "text": window.text,
            "finish_reason": window.finish_reason,
        }
        for window in transcript.windows
    ]
    content = {**about, "text": transcript.text, **transcript.timeline.to_json(), "windows": windows}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _jsonl(transcript: Transcript, about: Mapping[str, Any]) -> str:
    segments = transcript.timeline.to_json()["segments"]
    return "".join(json.dumps(segment, ensure_ascii=False) + "\n" for segment in segments)


FORMATS: dict[str, Callable[[Transcript, Mapping[str, Any]], str]] = {
    "txt": _txt,
    "json": _json,
    "jsonl": _jsonl,
    "csv": lambda transcript, about: transcript.timeline.to_csv(),
    "srt": lambda transcript, about: transcript.timeline.to_srt(),
    "vtt": lambda transcript, about: transcript.timeline.to_vtt(),
    "tsv": lambda transcript, about: transcript.timeline.to_audacity(),
}


def parse_formats(text: str) -> tuple[str, ...]:
    """Reads the names of formats, separated by commas; raises MossAudioError for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise MossAudioError(f"--format must be some of {','.join(FORMATS)}, not {(unknown or [text])[0]!r}")
    return names


@dataclass(frozen=True)
class Outputs:
    """The directory of transcripts. options: of the answers; a transcript with others is made again."""

    directory: AnyPath
    formats: tuple[str, ...]
    options: Mapping[str, Any]

    def done(self, recording: RecordingFile) -> bool:
        """Returns True if the outputs of a recording are there, made of the same file with the same options.

        Raises MossAudioError if the outputs of that name are those of another recording.
        """
        record = self._record(recording)
        if not exists(record) or not exists(recording.path):
            return False
        found = read_json(record)
        if found.get("file") != _source(recording):
            raise MossAudioError(
                f"{recording.path}: {recording.name}.* in {self.directory} are the outputs of {found.get('file')}: "
                "give another --out"
            )
        same = found == {**self._about(recording), "seconds": found.get("seconds")}
        return same and all(exists(path) for path in self._files(recording).values())

    def write(self, recording: RecordingFile, transcript: Transcript) -> None:
        """Writes all formats of a transcript, each whole, and then its record."""
        about = {**self._about(recording), "seconds": round(transcript.seconds, 6)}
        record = self._record(recording)
        for path in (*self._files(recording).values(), record):
            retried(path, lambda path=path: path.parent.mkdir(parents=True, exist_ok=True))
        retried(record, lambda: record.unlink(missing_ok=True))  # an older one is of outputs that are replaced now
        for name, path in self._files(recording).items():
            atomic_write(path, FORMATS[name](transcript, {"file": about["file"], "options": about["options"]}))
        atomic_write(record, json.dumps(about, ensure_ascii=False, indent=2) + "\n")

    def _files(self, recording: RecordingFile) -> dict[str, Any]:
        return {name: to_path(self.directory) / f"{recording.name}.{name}" for name in self.formats}

    def _record(self, recording: RecordingFile) -> Any:
        return to_path(self.directory) / RECORDS / f"{recording.name}.json"

    def _about(self, recording: RecordingFile) -> dict[str, Any]:
        status = retried(recording.path, recording.path.stat)
        return {
            "file": _source(recording),
            "bytes": status.length,
            "modified": status.mtime,
            "options": dict(self.options),
        }


def _source(recording: RecordingFile) -> str:
    return str(absolute(recording.path))
