"""Shards hold what the manifest named: training from either reads the same batches, bit for bit."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from moss_audio_jax.errors import MossAudioError
from tests.train.data.conftest import CLIPS, write_lines
from train.data.config import DataConfig
from train.data.manifest import Clip, Manifest
from train.data.mixture import ExampleOrder, Group, Source
from train.data.pipeline import TrainingData
from train.data.samples import SampleMaker
from train.data.shard_writing import prepare
from train.data.shards import Shards, damaged


def audio(example) -> bytes:
    assert example.clip is not None and isinstance(example.clip.audio, bytes)
    return example.clip.audio


def test_batches_are_those_of_the_manifest(corpus: Path, tmp_path: Path, maker: SampleMaker):
    prepare(corpus / "clips.jsonl", tmp_path / "shards", 3)
    config = DataConfig(batch_size=2, tokens=400, chunks=4)
    for_both = []
    for examples in (Manifest(corpus / "clips.jsonl"), Shards(tmp_path / "shards")):
        order = ExampleOrder([Group("all", 1, (Source("clips", examples),))], seed=2)
        data = TrainingData(order, maker, config)
        for_both.append([next(data) for _ in range(8)])
    jax.tree.map(np.testing.assert_array_equal, *for_both)


def test_shards_hold_every_field_and_the_bytes_of_whole_files(corpus: Path, tmp_path: Path):
    reports = prepare(corpus / "clips.jsonl", tmp_path, 5)
    assert [report.examples for report in reports] == [5, 5, 5, 5, 4]
    assert len(Shards(tmp_path)) == CLIPS
    for read, listed in zip(Shards(tmp_path), Manifest(corpus / "clips.jsonl"), strict=True):
        for field in ("name", "text", "caption", "words", "segments", "events", "conversation"):
            assert getattr(read, field) == getattr(listed, field)
        assert listed.clip is not None and isinstance(listed.clip.audio, str)
        if listed.clip.start is None:
            assert audio(read) == Path(listed.clip.audio).read_bytes()


def test_conversations_and_texts(corpus: Path, tmp_path: Path):
    messages = [
        {"role": "user", "message_type": "audio", "content": str(corpus / "1.wav")},
        {"role": "user", "message_type": "audio", "content": str(corpus / "2.wav"), "start": 0.1},
        {"role": "user", "message_type": "text", "content": "Same?"},
        {"role": "assistant", "message_type": "text", "content": "Nein, größer."},
    ]
    lines = [{"conversation": messages}, {"conversation": messages[1:], "text": "hm"}, {"text": "plain"}]
    manifest = write_lines(tmp_path / "m.jsonl", lines)
    prepare(manifest, tmp_path / "out", 1)
    two, one, text = Shards(tmp_path / "out")
    first, second, question = two.conversation[0].content
    assert isinstance(first, Clip) and isinstance(second, Clip) and question == "Same?"
    assert first.audio == (corpus / "1.wav").read_bytes() and two.clip is None
    assert two.conversation[1].content == ("Nein, größer.",)
    assert one.clip is one.conversation[0].content[0] and one.text == "hm"
    assert (text.text, text.clip, text.conversation) == ("plain", None, ())


@pytest.mark.parametrize(
    ("file", "options", "stored"),
    [
        ("mono16.wav", {"subtype": "PCM_16"}, "FLAC"),
        ("mono24.flac", {"subtype": "PCM_24"}, "WAV"),
        ("stereo.wav", {"subtype": "PCM_16"}, "WAV"),
        ("clip.mp3", {}, "WAV"),
        ("loud.wav", {"subtype": "FLOAT"}, "WAV"),
    ],
)
def test_cuts_keep_their_samples(tmp_path: Path, file: str, options: dict, stored: str):
    wave = np.random.default_rng(0).normal(0, 0.2, (44100, 2 if file == "stereo.wav" else 1))
    wave[20000] = -1.0 if file != "loud.wav" else 3.0
    soundfile.write(tmp_path / file, wave, 22050, **options)
    line = {"audio": file, "start": 0.50001, "end": 1.25, "text": "hi"}
    prepare(write_lines(tmp_path / "m.jsonl", [line]), tmp_path / "out", 1)
    (read,), (listed,) = Shards(tmp_path / "out"), Manifest(tmp_path / "m.jsonl")
    assert read.clip is not None and listed.clip is not None
    np.testing.assert_array_equal(read.clip.wave(), listed.clip.wave())
    assert audio(read).startswith({"FLAC": b"fLaC", "WAV": b"RIFF"}[stored])


def test_a_repeated_call_writes_what_is_missing_only(corpus: Path, tmp_path: Path):
    reports = prepare(corpus / "clips.jsonl", tmp_path, 3)
    written = {report.path: os.stat(report.path).st_mtime_ns for report in reports}
    gone, damaged, _ = written
    content = gone.read_bytes()
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:5000])  # as no interrupted call leaves it, but a disk might
    with pytest.raises(
        MossAudioError, match=r"shard-00000-of-00003\.arrayrecord: expected a shard of 8 examples, found none"
    ):
        Shards(tmp_path)
    reports = prepare(corpus / "clips.jsonl", tmp_path, 3)
    assert [report.already_there for report in reports] == [False, False, True]
    assert os.stat(reports[2].path).st_mtime_ns == written[reports[2].path]
    assert gone.read_bytes() == content and len(list(Shards(tmp_path))) == CLIPS
    assert not list(tmp_path.glob("*.partial"))


def test_processes_and_machines_write_the_same_files(corpus: Path, tmp_path: Path):
    for machine, workers in ((1, 1), (0, 2)):
        prepare(corpus / "clips.jsonl", tmp_path / "apart", 5, part=(machine, 2), workers=workers)
    prepare(corpus / "clips.jsonl", tmp_path / "together", 5)
    names = sorted(path.name for path in (tmp_path / "together").iterdir())
    assert len(names) == 11 and names == sorted(path.name for path in (tmp_path / "apart").iterdir())
    for name in names:
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()


def test_a_changed_byte_of_a_shard_is_found(corpus: Path, tmp_path: Path):
    prepare(corpus / "clips.jsonl", tmp_path, 3)
    assert not list(damaged(tmp_path))
    shard = tmp_path / "shard-00001-of-00003.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert len(Shards(tmp_path)) == CLIPS  # sizes alone don't show it
    (problem,) = damaged(tmp_path)
    assert problem.startswith(f"{shard}: expected the SHA-256 ")
    shard.with_suffix(".json").write_text('{"examples": 8}')
    with pytest.raises(MossAudioError, match=r"00001-of-00003\.json: expected examples, unreadable, bytes"):
        Shards(tmp_path)
    shard.with_suffix(".json").unlink()  # as an older version left it: then its records are counted
    assert len(Shards(tmp_path)) == CLIPS and not list(damaged(tmp_path))


def test_one_machine_writes_one_shard(corpus: Path, tmp_path: Path):
    for shard in (2, 0, 1):
        (report,) = prepare(corpus / "clips.jsonl", tmp_path / "apart", 3, part=(shard, 3))
        assert f"shard-0000{shard}-of" in report.path.name
    prepare(corpus / "clips.jsonl", tmp_path / "together", 3)
    for path in (tmp_path / "together").iterdir():
        assert path.read_bytes() == (tmp_path / "apart" / path.name).read_bytes()


def test_unreadable_clips_are_counted_and_named(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shutil.copy(corpus / "1.wav", tmp_path)
    lines = [{"audio": name, "text": "hi"} for name in ("1.wav", "absent.wav", "1.wav")]
    manifest = write_lines(tmp_path / "m.jsonl", lines)
    with caplog.at_level(logging.WARNING, "train.data"):
        (report,) = prepare(manifest, tmp_path / "out", 1)
    assert (report.examples, report.unreadable) == (3, 1)
    assert "m.jsonl line 2: absent.wav" in caplog.text
    assert prepare(manifest, tmp_path / "out", 1)[0].unreadable == 1  # a repeated call counts them too
    shards = Shards(tmp_path / "out")
    assert shards[0].text == shards[2].text == "hi"
    with pytest.raises(MossAudioError, match=r"line 2: absent\.wav must be a readable audio file"):
        shards[1]


def test_errors(corpus: Path, tmp_path: Path):
    manifest = corpus / "clips.jsonl"
    for options in ({"shards": 0}, {"shards": 2, "part": (2, 2)}, {"shards": 2, "workers": 0}):
        with pytest.raises(MossAudioError, match="at least 1 shard"):
            prepare(manifest, tmp_path, **options)
    with pytest.raises(MossAudioError, match="an example for each of 25 shards, found 24"):
        prepare(manifest, tmp_path, 25)
    prepare(manifest, tmp_path, 2)
    with pytest.raises(MossAudioError, match=r"shards\.json: expected shards of this manifest, found others \(shards"):
        prepare(manifest, tmp_path, 4)
    with pytest.raises(MossAudioError, match="manifest_sha256 differ"):
        prepare(write_lines(tmp_path / "m.jsonl", [{"text": f"{n}"} for n in range(CLIPS)]), tmp_path, 2)
    with pytest.raises(MossAudioError, match=r"shards\.json can't be read"):
        Shards(corpus)
    (tmp_path / "shards.json").write_text(json.dumps({"examples": True, "shards": 2}))
    with pytest.raises(MossAudioError, match="expected the numbers of examples and shards"):
        Shards(tmp_path)
