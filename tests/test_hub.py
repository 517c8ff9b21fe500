"""Checkpoints by their names on the Hugging Face hub, which a stand-in on loopback plays."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub

from moss_audio_jax import MossAudioError, load_processor
from moss_audio_jax.weights import locate as locating
from moss_audio_jax.weights.info import contents
from moss_audio_jax.weights.locate import SINGLE_FILE, locate

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "Someone/tiny"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The only hub that this process, and those it starts, can reach; with an empty cache in `tmp_path`/home."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    locating.forget_names()
    with FakeHub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # Read from the environment when huggingface_hub was imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def published(hub: FakeHub, released: Path, tmp_path: Path) -> str:
    """A repository as people publish them, with code and pickles; returns its commit."""
    directory = Path(shutil.copytree(released, tmp_path / "published"))
    for name in ("modeling.py", "pytorch_model.bin", "chat_template.py", "README.md", "original/model.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("raise SystemExit")
    return hub.publish(NAME, directory)


def test_a_model_is_fetched_once_and_without_what_it_does_not_need(hub: FakeHub, published: str, released: Path):
    assert load_processor(NAME).tokenizer.encode("12") == [16, 17]
    assert SINGLE_FILE not in hub.downloaded
    assert contents(NAME).dtypes == contents(released).dtypes
    there = {file.name for file in released.iterdir()}
    assert hub.downloaded == there
    hub.asked.clear()
    found = locate(NAME)
    assert str(found.hub) == f"{NAME}@{published}" and found.path.name == published
    assert hub.asked == []
