"""Long recordings: every sample is in a window, cuts are in pauses, and nothing is lost or doubled at the seams.

An oracle answers: it checks where the samples that it gets are in the recording, and says what is there, as a model
might: times are rounded and a little wrong, and words that a window's edge cuts through come out as other words.
"""

import itertools
import re
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from moss_audio_jax.audio import SAMPLE_RATE, load_audio
from moss_audio_jax.audio_stream import stream_audio
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.recordings import transcribe_recording
from moss_audio_jax.inference.seams import join_pieces, join_segments, join_texts
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
    """Answers a window by `say(labels, seconds of the window)`. The labels are on its clock, and may stick out."""

    def __init__(self, path: Path, labels: Sequence[TimedText], say: Callable[[list[TimedText], float], str]):
        self.whole, self.labels, self.say = load_audio(path), labels, say
        self.windows: list[tuple[float, float]] = []
        self.alone: list[str] = []

    def __call__(self, window: Window) -> Future:
        first = round(window.place.begin * SAMPLE_RATE)
        assert np.array_equal(self.whole[first : first + len(window.wave)], window.wave)
        begin, end = first / SAMPLE_RATE, (first + len(window.wave)) / SAMPLE_RATE
        assert (begin, end) == (window.place.begin, window.place.end)
        assert len(window.wave) <= CUTTING.window * SAMPLE_RATE
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
    dense["background_db"] = (-20.0, -20.0)
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
        start, end = np.clip(np.array([label.start, label.end]) + rng.uniform(-0.08, 0.08, 2), 0, seconds)
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
    rate_alone = word_error_rate(*alone(oracle, words)).rate
    assert rate is not None and rate_alone is not None
    assert rate <= min(0.01, rate_alone + 0.01)
    assert found.timed == (timestamps != "none")
    if found.timed:
        begins = [segment.begin for segment in found.timeline.segments]
        assert begins == sorted(begins) and not found.timeline.problems and not found.timeline.unread


# Windows


def test_every_sample_is_in_a_window_and_cuts_are_in_pauses():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(95 * SAMPLE_RATE).astype(np.float32) * 0.1
    pauses = [(17.0, 17.6), (33.4, 34.0), (51.0, 51.5)]  # the next would be in the last third of a window from 51.25 on
    for begin, end in pauses:
        wave[int(begin * SAMPLE_RATE) : int(end * SAMPLE_RATE)] *= 0.01
    pieces = np.split(wave, np.sort(rng.integers(0, len(wave), 40)))
    windows = list(cut(pieces, CUTTING))
    for index, window in enumerate(windows):
        first = round(window.place.begin * SAMPLE_RATE)
        assert np.array_equal(window.wave, wave[first : first + len(window.wave)])
        assert window.place.last == (index == len(windows) - 1)
    for one, other, (begin, end) in zip(windows, windows[1:], pauses, strict=False):
        assert begin + 0.15 <= one.place.end == other.place.begin <= end - 0.1 and other.place.overlap == 0
    for one, other in itertools.pairwise(windows[3:]):
        assert one.place.end - one.place.begin == pytest.approx(20)
        assert other.place.overlap == pytest.approx(one.place.end - other.place.begin) == pytest.approx(4)
    assert windows[-1].place.end == 95


def test_a_loud_bang_makes_speech_no_pause():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(30 * SAMPLE_RATE).astype(np.float32) * 0.01
    wave[SAMPLE_RATE : SAMPLE_RATE + 2000] = 1.0
    assert next(cut([wave], CUTTING)).place.end == 20


def test_a_recording_of_one_window_is_not_cut():
    wave = np.zeros(20 * SAMPLE_RATE, np.float32)
    assert [window.place.last for window in cut([wave, wave[:0]], CUTTING)] == [True]
    first, second = cut([wave, wave[:1]], CUTTING)
    assert first.place.end == second.place.begin and len(second.wave) > 0.2 * SAMPLE_RATE
    assert list(cut([], CUTTING)) == []


@pytest.mark.parametrize(("format", "rate"), [("FLAC", 48000), ("WAV", 44100), ("OGG", 8000), ("MP3", 22050)])
def test_a_stream_has_the_samples_of_the_whole_file(tmp_path, format, rate):
    path = tmp_path / "sound"
    sound = np.random.default_rng(1).uniform(-0.5, 0.5, (rate * 25 + 7, 2))
    soundfile.write(path, sound, rate, format=format)
    pieces = list(stream_audio(path))
    assert len(pieces) > 2
    np.testing.assert_array_equal(np.concatenate(pieces), load_audio(path))
    with path.open("ab") as file:
        file.write(path.read_bytes() if format != "WAV" else b"")  # joined files, and an ordinary one
    np.testing.assert_array_equal(np.concatenate(list(stream_audio(path))), load_audio(path))


def test_a_stream_of_files_of_different_rates_has_their_samples(tmp_path):
    parts = [np.random.default_rng(rate).uniform(-0.5, 0.5, rate * 3) for rate in (8000, 44100, 44100)]
    path = tmp_path / "joined"
    with path.open("wb") as file:
        for part in parts:
            soundfile.write(file, part, len(part) // 3, format="FLAC")
    np.testing.assert_array_equal(np.concatenate(list(stream_audio(path))), load_audio(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (None, "No such file"),
    ],
)
def test_what_is_no_sound_is_named(tmp_path, content, message):
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MossAudioError, match=rf"bad\.wav .*{message}"):
        list(stream_audio(path))


def test_an_odd_window_is_refused():
    for wrong in ({"window": 2}, {"window": float("nan")}, {"search": 200}, {"overlap": 0}):
        with pytest.raises(MossAudioError, match="must"):
            Cutting(**wrong)


# Bounds

THREE_HOURS = """
import resource, struct, sys
from concurrent.futures import Future
from types import SimpleNamespace
import numpy as np, scipy.signal
from moss_audio_jax.inference.recordings import transcribe_recording

waiting = most = 0

class Waiting(Future):
    def __init__(self, window):
        global waiting, most
        super().__init__()
        self.wave = window.wave  # as a request holds it
        loud = np.flatnonzero(np.abs(window.wave) > 0.1) / 16000
        text = f"[{loud[0]:.2f}]burst[{loud[-1]:.2f}]" if len(loud) else ""
        self.set_result(SimpleNamespace(text=text, finish_reason="stop"))
        waiting += 1
        most = max(most, waiting)

    def __del__(self):
        global waiting
        waiting -= 1

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = transcribe_recording(sys.argv[1], Waiting, in_flight=4)
growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(growth, most, len(found.windows), found.seconds)
print(*(f"{segment.begin:.2f}" for segment in found.timeline.segments))
"""


def test_three_hours_stand_in_bounded_memory(tmp_path):
    """48 kHz stereo: 4.1 GB as floats, 691 MB at 16 kHz in mono. A burst of 2 s every 10 minutes, silence between."""
    path, seconds = tmp_path / "long.wav", 3 * 3600
    size = seconds * 48000 * 4
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 2, 48000, 192000, 4, 16, b"data", size
    )
    burst = (np.random.default_rng(0).uniform(-0.5, 0.5, (96000, 2)) * 32767).astype("<i2").tobytes()
    times = [second + 1.5 for second in range(300, seconds, 600)]
    with path.open("wb") as file:  # sparse: silence takes no room on the disk
        file.write(head)
        for time in times:
            file.seek(len(head) + int(time * 48000) * 4)
            file.write(burst)
        file.truncate(len(head) + size)
    end = subprocess.run([sys.executable, "-c", THREE_HOURS, path], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    figures, begins = end.stdout.splitlines()
    growth, most, windows, length = map(float, figures.split())
    assert growth < 6 * 19.2 + 64, "two windows of samples, four that wait, and what the libraries take"
    assert most <= 4 and windows >= 36 and length == seconds
    np.testing.assert_allclose([float(begin) for begin in begins.split()], times, rtol=0, atol=0.011)


def test_an_error_of_a_window_is_raised_and_a_slow_answer_is_waited_for(tmp_path):
    path = written(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 30 * SAMPLE_RATE))

    def fails(window: Window) -> Future:
        future: Future = Future()
        if window.place.begin > 0:
            future.set_exception(MossAudioError("not finite"))
        else:
            threading.Timer(0.5, future.set_result, [SimpleNamespace(text="hello", finish_reason="stop")]).start()
        return future

    with pytest.raises(MossAudioError, match="not finite"):
        transcribe_recording(path, fails, cutting=CUTTING)


# Seams


def seg(begin: float, end: float | None, text: str) -> Segment:
    return Segment(begin, end, text)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # An event that both cut through; one that only the first has; one that only the second has.
        (
            [seg(90, 100, "hum"), seg(96, 97, "click")],
            [seg(95, 104, "hum"), seg(98, 99, "tone")],
            [seg(90, 104, "hum"), seg(96, 97, "click"), seg(98, 99, "tone")],
        ),
        # A word that the first window's end cuts through, and one that the second's beginning does.
        (
            [seg(94.8, 95.3, "Seven"), seg(97, 97.4, "one"), seg(99.8, 100, "fi")],
            [seg(95, 95.3, "ven"), seg(97.1, 97.4, "one"), seg(99.8, 100.2, "five")],
            [seg(94.8, 95.3, "Seven"), seg(97, 97.4, "one"), seg(99.8, 100.2, "five")],
        ),
        # A sentence that each has in part.
        (
            [seg(90, 94, "It rains."), seg(94.5, 100, "The cat sat on the ma")],
            [seg(95, 103, "cat sat on the mat all day."), seg(103, 104, "Why?")],
            [seg(90, 94, "It rains."), seg(94.5, 103, "The cat sat on the mat all day."), seg(103, 104, "Why?")],
        ),
        # Without spaces.
        (
            [seg(94.5, 100, "今天天气很")],
            [seg(95.5, 103, "天天气很好。")],
            [seg(94.5, 103, "今天天气很好。")],
        ),
        # The same word again and again.
        (
            [seg(t, t + 0.4, "no") for t in (94, 95.5, 96.5, 97.5, 98.5, 99.5)],
            [seg(t + 0.05, t + 0.45, "No.") for t in (95.5, 96.5, 97.5, 98.5, 99.5, 100.5)],
            [seg(t, t + 0.45, "no") for t in (95.5, 96.5, 97.5, 98.5, 99.5)],
        ),
        # Points in time.
        (
            [seg(97, None, "siren")],
            [seg(97.1, None, "siren"), seg(99, None, "bell")],
            [seg(97, None, "siren"), seg(99, None, "bell")],
        ),
    ],
    ids=["events", "cut words", "sentences", "chinese", "repeated", "points"],
)
def test_what_both_windows_say_is_kept_once(before, after, expected):
    joined = join_segments(before, after, 95.0, 100.0)
    if expected[0].text == "no":
        joined = joined[1:-1]
    assert [one.text for one in joined] == [one.text for one in expected]
    for one, other in zip(joined, expected, strict=True):
        assert one.begin == pytest.approx(other.begin, abs=0.06) and one.end == pytest.approx(other.end, abs=0.06)


def test_texts_in_which_the_windows_disagree_lose_nothing():
    before, after = [seg(80, 100, "alpha beta gamma")], [seg(95, 120, "one two three")]
    assert join_segments(before, after, 95.0, 100.0) == before + after
    assert join_texts("alpha beta", "one two", 5.0) == ("alpha beta", "one two")
    assert join_texts("a b c d e", "d e f", 0.0) == ("a b c d e", "d e f")


def test_texts_without_times_are_joined_at_a_word_of_both():
    for before, after, expected in [
        ("we went to the sea, and the", "To the sea and then home.", "we went to the sea, and then home."),
        ("今天天气很好我们", "天气很好我们去公园", "今天天气很好我们去公园"),
        ("the end", "the end", "the end"),
        ("", "so it begins", "so it begins"),
    ]:
        assert join_pieces(*join_texts(before, after, 5.0)) == expected


def test_a_sound_that_goes_on_across_a_quiet_cut_is_one():
    found = join_segments([seg(0, 3, "hum"), seg(5, 10, "hum")], [seg(10, 12, "hum"), seg(13, 14, "hum")], 10.0, 10.0)
    assert found == [seg(0, 3, "hum"), seg(5, 12, "hum"), seg(13, 14, "hum")]


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 8), st.sampled_from(["a", "b", "a b c", "d e"])), max_size=12))
def test_segments_outside_of_the_overlap_are_never_touched(drawn):
    segments = [seg(begin, begin + length, text) for begin, length, text in drawn]
    before = [one for one in segments if one.span[1] < 29]
    after = [one for one in segments if one.span[0] > 36]
    joined = join_segments(before, after, 30.0, 35.0)
    assert Counter(joined) == Counter(before + after)
