"""Writes sound scenes as files: a manifest, and a WAV file per line."""

import io
import json

import soundfile

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, Path, atomic_file, atomic_write, nothing_left, require_empty, to_path
from train.data.config import SEEDS, SceneConfig
from train.data.manifest import Clip, Message
from train.data.scenes import SceneTask, make_task

MANIFEST = "manifest.jsonl"


def write_scenes(directory: AnyPath, count: int, seed: int, config: SceneConfig) -> Path:
    """Writes scenes 0 to `count` - 1 of a seed as 16-bit WAV files, then the manifest; returns its path."""
    if count < 1 or not 0 <= seed < SEEDS:
        raise MossAudioError(f"count must be 1 or more and seed from 0 to {SEEDS - 1}, found {count} and {seed}")
    directory = to_path(directory)
    require_empty(directory)
    with nothing_left(directory):
        return _write_scenes(directory, count, seed, config)


def _write_scenes(directory: Path, count: int, seed: int, config: SceneConfig) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        task = make_task(seed, index, config)
        name = f"{index:0{len(str(count - 1))}d}.wav"
        file = io.BytesIO()
        soundfile.write(file, task.scene.wave, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        with atomic_file(directory / name) as partial:
            partial.write_bytes(file.getvalue())
        lines.append(json.dumps(_line(task, name), ensure_ascii=False) + "\n")
    atomic_write(directory / MANIFEST, "".join(lines))
    return directory / MANIFEST


def _line(task: SceneTask, name: str) -> dict:
    example = task.example()
    messages = [message for turn in example.conversation for message in _messages(turn, name)]
    labels = {"words": example.words, "events": example.events}
    timed = {
        kind: [{"text": label.text, "start": label.start, "end": label.end} for label in found]
        for kind, found in labels.items()
        if found
    }
    return {"conversation": messages} | ({"text": example.text} if example.text else {}) | timed


def _messages(turn: Message, clip: str) -> list[dict[str, str]]:
    kinds = [("audio", clip) if isinstance(piece, Clip) else ("text", piece) for piece in turn.content]
    return [{"role": turn.role, "message_type": kind, "content": content} for kind, content in kinds]
