"""Fixtures of training runs. What they hold is read only; `copy` is a run of the test's own."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.train.training_runs import STEPS, one_device, write_corpus
from train.config import LoopConfig, ModelSource, OptimizerConfig, RunConfig, StepConfig
from train.data import DataConfig
from train.data.mixture_config import MixtureConfig
from train.loop import Outcome, train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips.jsonl, texts.jsonl, and in model/ a checkpoint with its tokenizer."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), clips=12, texts=8)


@pytest.fixture(scope="session")
def config(corpus: Path) -> RunConfig:
    """A part of everything: speech and text, accumulation, frozen parameters, dropout, bfloat16."""
    mixture = MixtureConfig()
    return RunConfig(
        data=DataConfig(batch_size=2, tokens=160, chunks=2, open_bins=2),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=2, total_steps=20, freeze=("audio_encoder.stem_proj.*",)
        ),
        loop=LoopConfig(steps=STEPS, checkpoint_every=2, keep_last=2, log_every=1),
        model=ModelSource(checkpoint=str(corpus / "model")),
        mixture=dataclasses.replace(
            mixture,
            speech=dataclasses.replace(mixture.speech, paths=(str(corpus / "clips.jsonl"),)),
            text=dataclasses.replace(mixture.text, paths=(str(corpus / "texts.jsonl"),)),
        ),
        step=StepConfig(remat="none", loss_chunk=160),
        microbatches=2,
    )


@pytest.fixture(scope="session")
def straight(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("straight")
    assert train(config, out, mesh=one_device()) == Outcome(STEPS, preempted=False)
    return out


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    return shutil.copytree(straight, tmp_path / "copy")
