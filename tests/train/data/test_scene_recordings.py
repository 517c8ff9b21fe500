"""Recordings in scenes: labels from names, tables and folders; exact times; a cache that notices changes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.errors import MossAudioError
from train.__main__ import main
from train.data.config import SceneConfig
from train.data.manifest import Manifest
from train.data.mixture import ExampleOrder
from train.data.mixture_config import MixtureConfig, SceneGroupConfig
from train.data.recordings import open_recordings
from train.data.scenes import event_recordings, make_scene, make_task
from train.evaluation.questions import scene_questions

RATE = 16_000


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three recordings of two voices, of other formats and rates; 0.1 s of silence around each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "clips"
    (directory / "cat").mkdir(parents=True)
    files = (("meow_anna_1.wav", 8000, 0.4), ("bark_bert_1.flac", 22050, 0.6), ("cat/meow_bert_2.ogg", 16000, 0.5))
    for name, rate, seconds in files:
        silence = np.zeros(rate // 10, np.float32)
        soundfile.write(directory / name, np.concatenate([silence, tone(440, seconds, rate), silence]), rate)
    (directory / "notes.txt").write_text("no recording")
    return directory


def config(clips: Path, **options) -> SceneConfig:
    given = {"seconds": (3.0, 4.0), "events": (2, 2), "label_from": "{label}_{voice}_*"}
    return SceneConfig(clips=str(clips), **(given | options))


def test_labels_of_names_folders_and_tables(clips: Path, tmp_path: Path):
    named = open_recordings(str(clips), "{label}_{voice}_*", names=("bark=a dog",))
    assert named.names == ["bark_bert_1.flac", "cat/meow_bert_2.ogg", "meow_anna_1.wav"]
    assert named.labels == ["a dog", "meow", "meow"] and named.voices == ["bert", "bert", "anna"]
    assert open_recordings(str(clips)).labels == ["clips", "cat", "clips"]
    assert open_recordings(str(clips), "{label}/*", only=("cat",)).labels == ["cat"]
    table = tmp_path / "labels.csv"
    table.write_text("filename,category,fold\nbark_bert_1.flac,dog,1\nmeow_anna_1.wav,cat,2\nmeow_bert_2.ogg,cat,2\n")
    assert open_recordings(str(clips), str(table)).labels == ["dog", "cat", "cat"]
    assert open_recordings(str(clips), only=("cat",)).names == ["cat/meow_bert_2.ogg"]
    assert open_recordings(str(clips), without=("*.ogg", "bark*")).names == ["meow_anna_1.wav"]


def test_recordings_are_decoded_once_and_again_when_they_change(clips: Path, monkeypatch: pytest.MonkeyPatch):
    first = open_recordings(str(clips), trim_db=40.0)
    assert first.lengths / RATE == pytest.approx([0.6, 0.5, 0.4], abs=0.03)  # without the silence
    open_recordings.cache_clear()
    monkeypatch.setattr("train.data.recordings.load_audio", lambda path: pytest.fail(f"{path} was decoded again"))
    again = open_recordings(str(clips), trim_db=40.0)
    assert isinstance(again.samples, np.memmap) and again.sha256 == first.sha256
    np.testing.assert_array_equal(again.samples, first.samples)
    monkeypatch.undo()
    open_recordings.cache_clear()
    soundfile.write(clips / "meow_anna_1.wav", tone(440, 0.7), RATE)
    changed = open_recordings(str(clips), trim_db=40.0)
    assert changed.sha256 != first.sha256 and changed.lengths[2] / RATE == pytest.approx(0.7, abs=0.01)


def test_times_are_those_of_the_sound(clips: Path):
    levels = {"background_db": (-90.0, -90.0), "level_db": (-20.0, -8.0)}
    scenes = config(clips, clips_except=("*.ogg",), pause=(0.1, 0.3), speed=(0.8, 1.25), **levels)
    lengths = set()
    for index in range(20):
        scene = make_scene(0, index, scenes)
        first, second = scene.events
        assert 0.1 - 1e-3 <= second.start - first.end <= 0.3 + 1e-3
        outside = np.ones(scene.samples, bool)
        for event in scene.events:
            begin, end = round(event.start * RATE), round(event.end * RATE)
            outside[begin:end] = False
            sound = scene.wave[begin:end]
            assert 20 * np.log10(np.abs(sound).max()) == pytest.approx(event.level_db, abs=0.1)
            assert np.abs(sound[:80]).max() > 0.02 and np.abs(sound[-80:]).max() > 0.02  # no silence at either end
            lengths.add(round(event.end - event.start, 2))
        assert np.abs(scene.wave[outside]).max() < 1e-3
    assert min(lengths) < 0.4 and max(lengths) > 0.6


def test_pauses_below_zero_overlap(clips: Path):
    scenes = [make_scene(0, index, config(clips, pause=(-0.3, -0.1), events=(3, 3))) for index in range(10)]
    for scene in scenes:
        for first, second in zip(scene.events, scene.events[1:], strict=False):
            assert first.start <= second.start < first.end


def test_synthetic_sounds_beside_recordings(clips: Path):
    mixed = config(clips, clip_share=0.5, labels=("tone",), events=(1, 1), tasks=("caption",))
    tasks = [make_task(0, index, mixed) for index in range(40)]
    assert {event.text for task in tasks for event in task.scene.events} == {"tone", "meow", "bark"}
    assert any("A meow," in task.answer or "Meow," in task.answer for task in tasks)


def test_reverberation_comes_after_the_sound(clips: Path):
    dry = config(clips, events=(1, 1), background_db=(-90.0, -90.0))
    wet = replace(dry, reverberation=(0.5, 0.5))
    for index in range(5):
        scene, event = make_scene(0, index, wet), make_scene(0, index, wet).events[0]
        begin, end = round(event.start * RATE), round(event.end * RATE)
        after = scene.wave[end : end + 1600]
        assert np.abs(scene.wave[:begin]).max() < 1e-3
        assert np.sqrt(np.mean(after**2)) > 5 * np.sqrt(np.mean(make_scene(0, index, dry).wave[-1600:] ** 2))


def test_a_recorded_background(clips: Path, tmp_path: Path):
    (tmp_path / "rain").mkdir()
    soundfile.write(tmp_path / "rain" / "a.wav", tone(1000, 1.0), RATE)
    scenes = config(clips, backgrounds=(str(tmp_path / "rain"),), background_db=(-40.0, -40.0), level_db=(-90.0, -90.0))
    wave = make_scene(0, 0, scenes).wave
    assert 20 * np.log10(np.sqrt(np.mean(wave**2))) == pytest.approx(-40, abs=0.3)
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.argmax(spectrum) * RATE / len(wave) == pytest.approx(1000, abs=5)
    assert "over other sound" in make_task(0, 0, replace(scenes, tasks=("caption",))).answer


def test_words_and_voices(clips: Path):
    words = make_task(0, 1, config(clips, tasks=("words",)))
    assert words.answer == "".join(f"[{event.start:.2f}]{event.text}[{event.end:.2f}]" for event in words.scene.events)
    example = words.example()
    assert example.words == words.scene.events and example.text == " ".join(event.text for event in words.scene.events)
    assert make_task(0, 1, config(clips, tasks=("transcript",))).answer == example.text
    answers = []
    for index in range(30):
        task = make_task(1, index, config(clips, tasks=("voice",)))
        first, second = task.scene.events
        assert (task.answer == "yes") == (first.voice == second.voice)
        answers.append(task.answer)
    assert 8 < answers.count("yes") < 22
    items = scene_questions(2, config(clips, tasks=("words",)))
    assert [item.measure for item in items] == ["timed_text"] * 2


def test_among_many_voices_two_are_as_often_the_same_as_not(clips: Path):
    for name in range(10):
        soundfile.write(clips / f"meow_voice{name}_1.wav", tone(200 + 50 * name, 0.4), RATE)
    answers = [make_task(0, index, config(clips, tasks=("voice",))).answer for index in range(60)]
    assert 20 < answers.count("yes") < 40


def test_as_files_by_the_command(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["scenes", str(tmp_path / "out"), "--count", "2", "--scenes.clips", str(clips)]
    options = [
        "--scenes.tasks",
        "words",
        "--scenes.seconds",
        "3",
        "3",
        "--scenes.label-from",
        "{label}_*",
        "--scenes.label-names",
        "bark=woof",
    ]
    monkeypatch.setattr(sys, "argv", ["moss-audio-train", *arguments, *options])
    main()
    examples = Manifest(tmp_path / "out" / "manifest.jsonl")
    assert {word.text for example in examples for word in example.words} <= {"woof", "meow"}
    assert all(example.text == " ".join(word.text for word in example.words) for example in examples)


def test_one_option_for_all_groups_of_a_mixture(clips: Path, tmp_path: Path):
    scenes = config("elsewhere", clips_except=("bark*",))  # pyright: ignore[reportArgumentType]
    mixture = MixtureConfig(
        easy_scenes=SceneGroupConfig(1.0, scenes),
        scenes=SceneGroupConfig(1.0, scenes),
        clips=str(clips),
        clips_except=("*_2.ogg",),
    )
    groups = mixture.groups(0)
    assert len(groups) == 2
    for group in groups:
        example = group.sources[0].examples[0]
        assert {event.text for event in example.events} == {"meow"}
    facts = groups[0].sources[0].examples.facts  # pyright: ignore[reportAttributeAccessIssue]
    assert facts == {"recordings": open_recordings(str(clips), only=("meow*",), trim_db=40.0).sha256}


def test_errors_say_what_to_do(clips: Path, tmp_path: Path):
    for options, message in (
        (
            {"label_from": "{label}-*"},
            "bark_bert_1.flac does not match label_from '{label}-*': correct the pattern, or",
        ),
        ({"label_from": "*_{speaker}"}, "or a pattern with {label} once, and {voice} once or not, not '*_{speaker}'"),
        ({"clips_only": ("*.mp3",)}, "must have audio files, but none of its 3 is left by clips_only and clips_except"),
        ({"label_names": ("moo=cow",)}, "label_names has 'moo', which is no label of"),
    ):
        with pytest.raises(MossAudioError, match=re.escape(message)):
            make_scene(0, 0, config(clips, **options))
    soundfile.write(clips / "long_anna_1.wav", tone(440, 3.0), RATE)
    open_recordings.cache_clear()
    with pytest.raises(MossAudioError, match=r"takes 3\.00 s, and with 0\.2 s at both ends it does not fit"):
        make_scene(0, 0, config(clips, speed=(1.0, 1.01)))
    soundfile.write(clips / "long_anna_1.wav", np.zeros(RATE, np.float32), RATE)
    open_recordings.cache_clear()
    with pytest.raises(MossAudioError, match=r"long_anna_1\.wav is silent: leave it out by clips_except"):
        make_scene(0, 1, config(clips, speed=(1.0, 1.02)))
    with pytest.raises(MossAudioError, match="must be a directory of recordings"):
        make_scene(0, 0, config(tmp_path / "none"))
    with pytest.raises(MossAudioError, match="label_from is about the recordings of clips: give clips too"):
        SceneConfig(label_from="{label}_*")
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n")
    with pytest.raises(MossAudioError, match=r"labels\.csv must have lines with a column file"):
        open_recordings(str(clips), str(table))


def test_a_run_that_resumes_with_other_recordings_is_refused(clips: Path):
    mixture = MixtureConfig(scenes=SceneGroupConfig(1.0, config(clips)))
    before = ExampleOrder(mixture.groups(0), 0).fingerprint()
    assert json.dumps(before)
    soundfile.write(clips / "meow_anna_1.wav", tone(300, 0.4), RATE)
    open_recordings.cache_clear()
    event_recordings.cache_clear()
    assert ExampleOrder(mixture.groups(0), 0).fingerprint() != before
