"""`moss-audio-train prepare` and `check`, as a person runs them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from train.data.shards import Shards


def invoke(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for index in range(5):
        soundfile.write(tmp_path / f"{index}.wav", np.full(1600, index / 10), 16000)
        lines.append(json.dumps({"audio": f"{index}.wav", "text": f"number {index}"}))
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_shards_written_one_by_one_hold_everything(manifest, tmp_path):
    assert "5 examples" in invoke("check", manifest).stdout
    for number in range(2):
        result = invoke("prepare", manifest, tmp_path / "shards", "--shard", f"{number}/2")
        assert result.returncode == 0, result.stderr
    assert len(Shards(tmp_path / "shards")) == 5
    again = invoke("prepare", manifest, tmp_path / "shards", "--shards", 2)
    assert again.returncode == 0 and again.stdout.count("already there") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--shards N"),
        (("--shard", "two"), "'two'"),
        (("--shard", "1/2", "--shards", "3"), "different"),
        (("--shard", "2/2"), "shard=2"),
    ],
)
def test_mistakes_are_one_sentence(manifest, tmp_path, options, message):
    result = invoke("prepare", manifest, tmp_path / "shards", *options)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "shards").exists()
