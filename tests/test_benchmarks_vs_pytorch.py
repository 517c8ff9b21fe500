"""The benchmarks against PyTorch at toy size: every row is measured, and none if the two sides differ."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

INSTALL = "needs PyTorch, on Python 3.11: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)

from benchmarks import fine_tuning, input_pipeline, vs_pytorch  # noqa: E402
from benchmarks.side_by_side import Comparison  # noqa: E402
from convert.pytorch_reference import load_reference  # noqa: E402
from convert.rehearse import write_random_checkpoint  # noqa: E402
from moss_audio_jax import MossAudioConfig, MossAudioError, load_model  # noqa: E402
from tests.conftest import SMALL_MODEL, random_mel  # noqa: E402
from train.data import DataConfig  # noqa: E402
from train.data.budget import Budget  # noqa: E402

DATA = DataConfig(batch_size=2, tokens=200, chunks=3, open_bins=2)
CORPUS = {"clips": 4, "longest": 3.0, "batches": 1, "runs": 1}


@pytest.fixture(autouse=True)
def toy_size():
    """At this size XLA takes longer to optimize than to run, and PyTorch's threads only wait for each other."""
    threads, unoptimized = torch.get_num_threads(), jax.config.read("jax_disable_most_optimizations")
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", unoptimized)
    torch.set_num_threads(threads)


def assert_measured(row: Comparison) -> None:
    assert all(0 < value < math.inf for value in (row.ours_seconds, row.pytorch_seconds, row.ratio)), row
    assert row.ratio == pytest.approx(row.pytorch_seconds / row.ours_seconds)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_random_checkpoint(SMALL_MODEL, tmp_path / "model")
    return tmp_path / "model"


def test_the_measured_model_can_be_loaded(tmp_path: Path):
    vs_pytorch.CONFIG.save_hf(tmp_path)
    assert MossAudioConfig.from_hf(tmp_path).language_config == vs_pytorch.CONFIG.language_config


def test_matmuls_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vs_pytorch, "MATMULS", ((3, 4, 5), (1, 8, 2)))
    rows = list(vs_pytorch.matmul_rows(repeats=2))
    assert [row.name for row in rows] == ["matmul 3 x 4 x 5", "matmul 1 x 8 x 2"]
    for row in rows:
        assert_measured(row)


@pytest.mark.slow
def test_every_row_of_the_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vs_pytorch, "NEW_TOKENS", 3)
    rows = list(vs_pytorch.rows(checkpoint, repeats=2, short=1, long=2))
    for row in rows:
        assert_measured(row)
    names = [row.name.split(",")[0].split(" of ")[0].split(" on ")[0] for row in rows]
    assert names == ["mel", "encoder", "encoder", "prefill", "decode", "forward and backward", "training step"]


def test_a_training_step_that_is_another_is_not_measured(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """Their first losses are equal; the second ones tell that PyTorch learned faster."""
    adamw = vs_pytorch._torch_adamw

    def faster(reference):
        optimizer = adamw(reference)
        for group in optimizer.param_groups:
            group["lr"] *= 100
        return optimizer

    monkeypatch.setattr(vs_pytorch, "_torch_adamw", faster)
    model, reference = load_model(checkpoint, dtype=jnp.float32), load_reference(checkpoint)
    mel = random_mel(80)
    ids, inputs = vs_pytorch.question(mel, SMALL_MODEL)
    with pytest.raises(MossAudioError, match="training step: expected PyTorch's loss"):
        vs_pytorch._training_row(model, inputs, torch.tensor([ids]), torch.from_numpy(mel), reference, repeats=1)


def test_an_epoch_of_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fine_tuning, "LONGEST", 3.0)
    monkeypatch.setattr(fine_tuning, "BUDGET", Budget(tokens=160, chunks=3))
    checkpoint = tmp_path / "small"
    write_random_checkpoint(fine_tuning.CONFIG, checkpoint)
    clips = [sample for sample, _ in fine_tuning.samples(5, fine_tuning.CONFIG)]
    useful = sum(sample.num_tokens for sample in clips)
    batches = fine_tuning.packed(clips)
    assert sum(int((batch.inputs.segment_ids > 0).sum()) for batch in batches) >= useful
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == useful - len(clips)
    rows = list(fine_tuning.rows(checkpoint, 1, clips=5, padded=200))
    for row in rows:
        assert_measured(row)
    start = f"fine-tuning on 5 clips, {useful:,} tokens; PyTorch"
    assert [row.name for row in rows] == [f"{start} one at a time", f"{start} padded to 200"]
    monkeypatch.setattr(fine_tuning, "OPTIMIZER", replace(fine_tuning.OPTIMIZER, learning_rate=1e-2))
    with pytest.raises(MossAudioError, match="fine-tuning epoch: expected PyTorch's loss"):
        list(fine_tuning.rows(checkpoint, 1, clips=5, padded=200))


def test_every_row_of_the_input_pipeline(tmp_path: Path):
    measured = list(input_pipeline.rows(tmp_path, input_pipeline.FORMATS, DATA, **CORPUS))
    assert [one.row.name.split()[0] for one in measured] == ["wav", "wav", "flac", "mp3"]
    for one in measured:
        assert_measured(one.row)
        assert 1.0 <= one.clip_seconds <= 3.1
        assert "cores feed 8 TPU v5e chips" in input_pipeline.cores_to_feed(one)


def test_the_rows_of_the_input_pipeline_beside_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_pipeline, "DATA", DATA)
    monkeypatch.setattr(vs_pytorch, "INPUTS", {name: CORPUS[name] for name in ("clips", "longest", "batches")})
    rows = list(vs_pytorch.input_rows(tmp_path, repeats=1))
    for row in rows:
        assert_measured(row)
    hour = "input pipeline, an hour of wav 16 kHz, mono"
    assert [row.name for row in rows] == [hour, f"{hour}, torch.stft"]


@pytest.mark.parametrize("differing", ["ids", "mel"])
def test_an_input_that_differs_is_not_measured(differing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reader = input_pipeline.PyTorchReader
    if differing == "ids":
        ids = reader._ids
        monkeypatch.setattr(reader, "_ids", lambda self, text: [*ids(self, text), 0])
    else:
        mel = reader.mel
        monkeypatch.setattr(reader, "mel", lambda self, wave: mel(self, wave) + 0.1)
    with pytest.raises(MossAudioError, match=f"line .: expected the same on both sides, found other {differing}"):
        list(input_pipeline.rows(tmp_path, input_pipeline.FORMATS[:1], DATA, **CORPUS))
