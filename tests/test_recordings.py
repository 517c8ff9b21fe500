"""Long recordings: every sample is in a window, cuts are in pauses, and nothing is lost or doubled at the seams.

An oracle answers: it finds where the samples that it gets are in the recording, and says what is there, as a model might:
times are rounded and a little wrong, and words that a window's edge cuts through come out as other words.
"""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from moss_audio_jax.audio import SAMPLE_RATE, load_audio
from moss_audio_jax.audio_stream import stream_audio
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.recordings import Transcript, transcribe_recording
from moss_audio_jax.inference.windows import Cutting, Window, cut
from moss_audio_jax.timelines.segment import Segment
from train.data.config import SceneConfig
from train.data.manifest import TimedText
from train.data.scenes import make_scene
from train.evaluation.metrics.events import score_events
from train.evaluation.metrics.text import word_error_rate

CUTTING = Cutting.of(20)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def reply(text: str) -> Future:
    future = Future()
    future.set_result(SimpleNamespace(text=text, finish_reason="stop"))
    return future


class Oracle:
    """Answers a window by `say(labels, window seconds)`: labels are those of its samples, on its clock, and cut by it."""

    def __init__(self, path: Path, labels: Sequence[TimedText], say: Callable[[list[TimedText], float], str]):
        self.whole, self.labels, self.say = load_audio(path), labels, say
        self.windows: list[tuple[float, float]] = []
        self.alone: list[str] = []

    def __call__(self, window: Window) -> Future:
        first = round(window.place.begin * SAMPLE_RATE)
        assert np.array_equal(self.whole[first : first + len(window.wave)], window.wave)
        begin, end = first / SAMPLE_RATE, (first + len(window.wave)) / SAMPLE_RATE
        assert (begin, end) == (window.place.begin, window.place.end)
        assert end - begin <= CUTTING.window
        self.windows.append((begin, end))
        heard = [TimedText(one.text, one.start - begin, one.end - begin) for one in self.labels]
        self.alone.append(self.say([one for one in heard if one.start < end - begin and one.end > 0], end - begin))
        return reply(self.alone[-1])

    @property
    def overlaps(self) -> int:
        return sum(end > begin for (_, end), (begin, _) in itertools.pairwise(self.windows))


def written(path: Path, wave: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


# Scenes


def scenes(count: int, overlap: bool) -> tuple[np.ndarray, list[TimedText]]:
    """Scenes one behind the other. overlap: sounds all the time and over each other, so that no place is quiet."""
    dense = {"events": (9, 12), "gap": 0.0, "overlap": True, "event_seconds": (1.0, 4.0), "level_db": (-12.0, -9.0)}
    config = SceneConfig(**(dense if overlap else {"events": (3, 5), "level_db": (-18.0, -6.0)}))
    waves, events, begin = [], [], 0.0
    for index in range(count):
        scene = make_scene(11, index, config)
        waves.append(scene.wave)
        events += [TimedText(event.text, event.start + begin, event.end + begin) for event in scene.events]
        begin += scene.seconds
    return np.concatenate(waves), events


def say_events(labels: list[TimedText], seconds: float) -> str:
    rng = np.random.default_rng(len(labels) * 1000 + round(seconds * 100))
    parts = []
    for label in labels:
        start, end = max(label.start, 0.0), min(label.end, seconds)
        if end - start >= 0.1:
            jitter = rng.uniform(-0.03, 0.03, 2)
            parts.append(f"[{max(start + jitter[0], 0):.2f}]{label.text}[{min(end + jitter[1], seconds):.2f}]")
    return "".join(parts)


def timed(segments: Sequence[Segment]) -> list[TimedText]:
    return [TimedText(one.text, one.begin, one.end) for one in segments if one.end is not None]


@pytest.mark.parametrize("overlap", [False, True], ids=["pauses", "no pauses"])
def test_events_of_scenes_are_neither_lost_nor_doubled(tmp_path, overlap):
    wave, events = scenes(25, overlap)
    path = written(tmp_path / "scenes.flac", wave)
    oracle = Oracle(path, events, say_events)
    found = transcribe_recording(path, oracle, cutting=CUTTING, in_flight=3)
    assert len(oracle.windows) >= 200 / CUTTING.window
    assert (oracle.overlaps > 5) if overlap else (oracle.overlaps == 0)
    score = score_events([timed(found.timeline.segments)], [events]).total
    assert score.f1 is not None and score.f1 >= 0.99, score


# Spoken digits


@pytest.fixture(scope="session")
def digits_dir() -> Path:
    """Recordings of spoken digits: $MOSS_AUDIO_DIGITS or else ../shared/audio/free-spoken-digit-dataset."""
    shared = Path(__file__).parents[2] / "shared" / "audio" / "free-spoken-digit-dataset"
    directory = Path(os.environ.get("MOSS_AUDIO_DIGITS", shared)) / "recordings"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent: set MOSS_AUDIO_DIGITS to a clone of free-spoken-digit-dataset")
    return directory


def spoken(directory: Path, count: int, seed: int, noise: float) -> tuple[np.ndarray, list[TimedText]]:
    """Spoken digits at 8 kHz with pauses of 0.05 to 0.7 s. noise: its root mean square, all the time."""
    rng = np.random.default_rng(seed)
    files = sorted(directory.glob("*.wav"))
    waves, words, begin = [], [], 0
    for index in rng.integers(0, len(files), count):
        wave, rate = soundfile.read(files[index], dtype="float32")
        assert rate == 8000
        wave *= 0.5 / max(np.abs(wave).max(), 1e-3)
        words.append(TimedText(DIGITS[int(files[index].name[0])], begin / rate, (begin + len(wave)) / rate))
        pause = np.zeros(int(rng.uniform(0.05, 0.7) * rate), np.float32)
        waves += [wave, pause]
        begin += len(wave) + len(pause)
    whole = np.concatenate(waves)
    return whole + noise * rng.standard_normal(len(whole), np.float32), words


def heard(word: TimedText, seconds: float) -> str:
    """What a window of `seconds` has of a word: all, another word where its edge cuts through, or nothing."""
    inside = (min(word.end, seconds) - max(word.start, 0.0)) / (word.end - word.start)
    if inside > 0.9:
        return word.text
    return ("ah" if word.start < 0 else "oh") + word.text[0] if inside > 0.3 else ""


def say_words(labels: list[TimedText], seconds: float) -> str:
    rng = np.random.default_rng(len(labels) * 1000 + round(seconds * 100))
    parts = []
    for label in labels:
        start, end = np.clip([label.start, label.end] + rng.uniform(-0.08, 0.08, 2), 0, seconds)
        if text := heard(label, seconds):
            parts.append(f"[{start:.2f}]{text}[{max(start, end):.2f}]")
    return "".join(parts)


def say_sentences(labels: list[TimedText], seconds: float) -> str:
    """Sentences end after a six or a nine, or with the window."""
    sentences: list[list[TimedText]] = [[]]
    for label in labels:
        if heard(label, seconds):
            sentences[-1].append(label)
            if label.text in ("six", "nine"):
                sentences.append([])
    return "".join(
        f"[{max(words[0].start, 0):.2f}]{' '.join(heard(word, seconds) for word in words)}."
        f"[{min(words[-1].end, seconds):.2f}]"
        for words in sentences
        if words
    )


def say_text(labels: list[TimedText], seconds: float) -> str:
    return " ".join(filter(None, (heard(label, seconds) for label in labels)))


SAYINGS = {"words": say_words, "sentences": say_sentences, "none": say_text}


def alone(oracle: Oracle, words: Sequence[TimedText]) -> tuple[list[str], list[str]]:
    """What is said of each window by itself, and what is true of it."""
    truths = []
    for begin, end in oracle.windows:
        inside = [TimedText(one.text, one.start - begin, one.end - begin) for one in words]
        truths.append(" ".join(one.text for one in inside if one.start >= 0 and one.end <= end - begin))
    return [re.sub(r"\[[\d.]+\]", " ", text) for text in oracle.alone], truths


@pytest.mark.parametrize("timestamps", SAYINGS)
@pytest.mark.parametrize("noise", [0.002, 0.12], ids=["pauses", "no pauses"])
def test_spoken_digits_are_neither_lost_nor_doubled(tmp_path, digits_dir, timestamps, noise):
    wave, words = spoken(digits_dir, 300, seed=5, noise=noise)
    path = written(tmp_path / "digits.wav", wave, 8000)
    oracle = Oracle(path, words, SAYINGS[timestamps])
    found = transcribe_recording(path, oracle, cutting=CUTTING)
    assert len(oracle.windows) > 10
    assert oracle.overlaps == (0 if noise < 0.01 else len(oracle.windows) - 1)
    rate = word_error_rate([found.text], [" ".join(word.text for word in words)]).rate
    assert rate is not None
    print(timestamps, noise, oracle.overlaps, len(oracle.windows), rate, word_error_rate(*alone(oracle, words)).rate)
    assert found.timed == (timestamps != "none")
