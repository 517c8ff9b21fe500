"""The README.md of a model that is to be published, as huggingface_hub reads it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moss_audio_jax.weights.locate import PARAMS
from train.config import ModelSource, OptimizerConfig, RunConfig
from train.data.config import DataConfig

COMMIT = "0123456789" * 4
RELEASED = "OpenMOSS-Team/MOSS-Audio-4B-Instruct"


@pytest.fixture
def run(orbax: Path, tmp_path: Path) -> Path:
    """A training run as its files are, with a checkpoint of steps 2 and 4."""
    out = tmp_path / "run"
    for step in ("2", "4"):
        shutil.copytree(orbax / PARAMS, out / "checkpoints" / step / PARAMS)
    shutil.copytree(orbax, out / "model", ignore=shutil.ignore_patterns(PARAMS))
    config = RunConfig(
        data=DataConfig(batch_size=3, tokens=160, chunks=2),
        optimizer=OptimizerConfig(learning_rate=0.00025, total_steps=200, freeze=("audio_encoder.*",)),
        model=ModelSource(checkpoint=f"{RELEASED}@{COMMIT}"),
        recipe="finetune",
    )
    write(out, config, speech="/home/me/secret/birds|1.jsonl")
    (out / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "tokens": 1000}}\n' for step in range(1, 5)))
    scores = [{"step": step, "eval/loss": 1 / step, "eval/speech/wer": None} for step in (2, 4)]
    (out / "scores.jsonl").write_text("\n".join(map(json.dumps, scores)) + '\n{"step": 6, "eval/lo')
    return out


def write(out: Path, config: RunConfig, speech: str) -> None:
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    content["mixture"]["speech"]["paths"] = [speech]
    content |= {"starts": 1, "versions": {"jax": "0.10.2"}, "history": []}
    (out / "config.json").write_text(json.dumps(content))


def card(directory: Path) -> tuple[dict[str, Any], str]:
    """Returns the metadata, as the hub's own library reads it, and the text."""
    library = pytest.importorskip("huggingface_hub")
    read = library.ModelCard.load(directory / "README.md")
    assert read.data.to_dict() == library.metadata_load(directory / "README.md")
    return read.data.to_dict(), read.text


def test_a_card_has_the_facts_of_its_run(run: Path, invoke, tmp_path: Path):
    code, _, errors = invoke("to-hf", run, tmp_path / "out", "--model-card")
    assert code == 0 and "README.md" not in errors
    metadata, text = card(tmp_path / "out")
    assert metadata == {
        "base_model": RELEASED,
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "library_name": "moss-audio-jax",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["moss-audio", "audio", "speech", "music"],
    }
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert rows["recipe"] == "finetune" and rows["steps"] == "4" and rows["tokens with labels"] == "4,000"
    assert rows["data"] == "speech (`birds1.jsonl`)" and "secret" not in text
    assert rows["batch"] == "3 sequences of up to 160 tokens" and rows["learning rate"] == "0.00025"
    assert rows["frozen"] == "`audio_encoder.*`" and rows["versions"] == "jax 0.10.2" and rows["eval/loss"] == "0.25"
    assert f"at commit `{COMMIT}`" in text and "moss-audio generate OWNER/out clip.wav" in text


def test_a_card_of_an_earlier_checkpoint(run: Path, invoke, tmp_path: Path):
    assert invoke("to-hf", run / "checkpoints" / "2", tmp_path / "out", "--model-card")[0] == 0
    _, text = card(tmp_path / "out")
    assert "| steps | 2 |" in text and "| tokens with labels | 2,000 |" in text and "after step 2:" in text
    assert "| eval/loss | 0.5 |" in text


def test_what_is_not_known_is_left_out_and_said(run: Path, orbax: Path, invoke, tmp_path: Path):
    content = json.loads((run / "config.json").read_text())
    # The name of a directory of this machine, which has the form of a name of the hub.
    (run / "config.json").write_text(json.dumps(content | {"model": {"checkpoint": "runs/stage1"}}))
    for number, source in enumerate((run, orbax)):
        code, _, errors = invoke("to-hf", source, tmp_path / f"out{number}", "--model-card")
        assert code == 0 and "[README.md names no base model and no licence: add what you know" in errors
        metadata, text = card(tmp_path / f"out{number}")
        assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}
        assert ("## Training" in text) == (source == run)
    (run / "config.json").write_text(json.dumps(content | {"model": {"checkpoint": f"/models/{RELEASED}/"}}))
    assert invoke("to-hf", run, tmp_path / "out", "--model-card")[0] == 0
    assert card(tmp_path / "out")[0]["base_model"] == RELEASED


def test_no_readme_is_overwritten(run: Path, invoke, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    code, _, errors = invoke("to-hf", run, tmp_path / "out", "--model-card")
    assert code == 2 and "is not an empty directory" in errors
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert invoke("to-hf", run, tmp_path / "plain")[0] == 0
    assert not (tmp_path / "plain" / "README.md").exists()
