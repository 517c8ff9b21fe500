"""`moss-audio-train prepare` and `check`, as a person runs them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from moss_audio_jax.small_tokenizer import write_small_tokenizer
from tests.train.training_runs import assert_same_numbers, one_device, until
from train.config import RunConfig
from train.data.config import ColumnsConfig
from train.data.shards import Shards
from train.loop import train


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
        (("--shard", "2/2"), "--shard must be I/N"),
        (("--shards", "2", "--part", "0/3"), "part=0/3"),
    ],
)
def test_mistakes_are_one_sentence(manifest, tmp_path, options, message):
    result = invoke("prepare", manifest, tmp_path / "shards", *options)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "shards").exists()


def test_check_shows_what_is_learned_and_how_long_it_is(manifest, tmp_path):
    audio = [(tmp_path / f"{index}.wav").read_bytes() for index in range(5)]
    table = {"wav": audio, "said": [f"no. {index}" for index in range(5)]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    write_small_tokenizer(tmp_path)
    options = ("--columns.audio", "wav", "--columns.text", "said", "--model.tokenizer", tmp_path)
    result = invoke("check", tmp_path / "x.parquet", *options, "--show", 2, "--plot", tmp_path / "sizes.png")
    assert result.returncode == 0, result.stderr
    first, second = (f"{tmp_path}/x.parquet row {index}: " for index in range(2))
    assert first in result.stdout and second in result.stdout and "⟦no. 1<|im_end|>⟧" in result.stdout
    assert "<|AUDIO×2|>" in result.stdout and result.stdout.count("⟦") == 2
    assert "5 examples make 1 sequences of 4096 tokens and 64 chunks, of which " in result.stdout
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    without = invoke("check", manifest, "--show", 1)
    assert "⟦number 0<|im_end|>⟧" in without.stdout and "tokens are bytes" in without.stderr


def test_a_run_reads_parquet_as_it_reads_a_manifest(corpus: Path, config: RunConfig, tmp_path: Path):
    lines = [json.loads(line) for line in (corpus / "clips.jsonl").read_text().splitlines()]
    table = {"wav": [(corpus / line["audio"]).read_bytes() for line in lines], "said": [line["text"] for line in lines]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=5)
    mixture = config.mixture
    speech = dataclasses.replace(mixture.speech, paths=(str(tmp_path / "x.parquet"),))
    columns = ColumnsConfig(audio="wav", text="said")
    other = dataclasses.replace(config, mixture=dataclasses.replace(mixture, speech=speech), columns=columns)
    for name, each in (("manifest", config), ("parquet", other)):
        train(until(each, 2), tmp_path / name, mesh=one_device())
    assert_same_numbers(tmp_path / "parquet", tmp_path / "manifest", config)
