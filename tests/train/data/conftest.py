"""A small corpus on disk: clips of noise with labels, texts, and a tokenizer with a token for each byte."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer
from train.data.manifest import Manifest
from train.data.mixture import ExampleOrder, Group, Source
from train.data.samples import SampleMaker

CLIPS, TEXTS = 24, 10


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips.jsonl: clips of 0.4 to 6 s, the first cut out of a longer file. texts.jsonl: plain texts."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(CLIPS):
        seconds = float(rng.uniform(0.4, 6))
        soundfile.write(directory / f"{number}.wav", rng.normal(0, 0.1, int(seconds * 16000)), 16000)
        events = [{"text": "tone", "start": 0.1, "end": 0.2}, {"text": "noise", "start": 0.25, "end": 0.4}]
        lines.append({"audio": f"{number}.wav", "text": f"number {number}", "caption": "Hiss.", "events": events})
    soundfile.write(directory / "long.wav", rng.normal(0, 0.1, 10 * 22050), 22050)
    lines[0] = {"audio": "long.wav", "start": 2.5, "end": 4.75, "text": "a cut"}
    write_lines(directory / "clips.jsonl", lines)
    write_lines(directory / "texts.jsonl", [{"text": f"text number {number}. " * 4} for number in range(TEXTS)])
    return directory


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_small_tokenizer(directory)
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="session")
def maker(tokenizer: Tokenizer) -> SampleMaker:
    return SampleMaker(tokenizer, MossAudioConfig.preset("tiny"))


@pytest.fixture(scope="session")
def order(corpus: Path) -> ExampleOrder:
    """70% clips, 30% texts."""
    clips = Group("audio", 0.7, (Source("clips", Manifest(corpus / "clips.jsonl")),))
    texts = Group("text", 0.3, (Source("texts", Manifest(corpus / "texts.jsonl")),))
    return ExampleOrder([clips, texts], seed=5)
