"""Scenes as files: what training and evaluation read of them is what was made."""

import errno
import sys
from pathlib import Path

import numpy as np
import pytest

from moss_audio_jax.errors import MossAudioError
from train.__main__ import main
from train.data.config import SceneConfig
from train.data.manifest import Manifest
from train.data.scene_files import write_scenes
from train.data.scenes import make_task

CONFIG = SceneConfig(
    seconds=(2.0, 3.0), events=(1, 2), labels=("siren", "tone"), tasks=("timeline", "start"), questions=2
)


def test_a_manifest_holds_the_scenes(tmp_path: Path):
    path = write_scenes(tmp_path / "scenes", 11, 5, CONFIG)
    examples = Manifest(path)
    assert len(examples) == 11
    assert {file.name for file in path.parent.iterdir()} == {"manifest.jsonl", *(f"{i:02d}.wav" for i in range(11))}
    for index, example in enumerate(examples):
        task = make_task(5, index, CONFIG)
        expected = task.example()
        assert [turn.role for turn in example.conversation] == [turn.role for turn in expected.conversation]
        texts, wanted = (
            [piece for turn in each.conversation for piece in turn.content if isinstance(piece, str)]
            for each in (example, expected)
        )
        assert texts == wanted
        assert [(event.text, event.start, event.end) for event in example.events] == [
            (event.text, event.start, event.end) for event in task.scene.events
        ]
        assert example.clip is not None
        np.testing.assert_allclose(example.clip.wave(), task.scene.wave, atol=2.0**-15)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "scenes"
    arguments = ["scenes", str(out), "--count", "2", "--seed", "3", "--scenes.seconds", "2", "2"]
    monkeypatch.setattr(sys, "argv", ["moss-audio-train", *arguments, "--scenes.labels", "siren"])
    main()
    assert f"wrote {out / 'manifest.jsonl'}, 2 conversations" in capsys.readouterr().out
    assert {event.text for example in Manifest(out / "manifest.jsonl") for event in example.events} == {"siren"}


def test_nothing_is_overwritten_and_values_are_checked(tmp_path: Path):
    write_scenes(tmp_path / "scenes", 1, 0, CONFIG)
    with pytest.raises(MossAudioError, match="is not an empty directory"):
        write_scenes(tmp_path / "scenes", 1, 0, CONFIG)
    with pytest.raises(MossAudioError, match="count must be 1 or more and seed from 0 to 4294967295, found 0 and 0"):
        write_scenes(tmp_path / "none", 0, 0, CONFIG)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(path: Path, content: bytes) -> int:
        if "2.wav" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, content)

    whole = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match="No space left") as error:
        write_scenes(tmp_path / "new" / "scenes", 4, 0, CONFIG)
    assert error.value.filename == str(tmp_path / "new" / "scenes" / "2.wav")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["99999999999999999999", "4294967296", "-1"])
def test_seeds_that_no_run_can_have_are_refused(
    seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commands = (
        ("scenes", str(tmp_path / "new"), "--count", "1"),
        ("evaluate", "nowhere", "--scenes", "1"),
        ("run", "--recipe", "time_events", "--out", str(tmp_path / "new")),
    )
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["moss-audio-train", *command, "--seed", seed])
        with pytest.raises(SystemExit) as end:
            main()
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert f" {seed}" in error and any(most in error for most in ("4294967295", "2**32 - 1"))
    assert not list(tmp_path.iterdir())
