"""The recipe `spoken_digits` on the recordings themselves, in small: what it reads, and that it learns from it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.train.training_runs import lines
from train.data.mixture_config import MixtureConfig
from train.data.scenes import event_recordings
from train.loop import train
from train.recipes import DIGITS, RECIPES


@pytest.fixture
def recordings(digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(digits_dir)


def test_strings_are_of_the_recordings_that_train(recordings: str):
    mixture = dataclasses.replace(RECIPES["spoken_digits"].mixture, clips=recordings)
    (_, easy), (_, strings) = ((group.name, group.sources[0].examples) for group in mixture.groups(0))
    opened = event_recordings(strings.config)
    assert len(opened) == 2700 - 2 and set(opened.labels) == set(DIGITS) and len(set(opened.voices)) == 6
    assert all(DIGITS[int(name[0])] == label for name, label in zip(opened.names, opened.labels, strict=True))
    assert not any(name.endswith(tuple(f"_{index}.wav" for index in range(5))) for name in opened.names)
    without = dataclasses.replace(mixture, clips_except=("*_theo_*",)).with_clips(strings.config)
    assert set(event_recordings(without).voices) == set(opened.voices) - {"theo"}
    counts = set()
    for examples in (easy, strings):
        for index in range(30):
            example = examples[index]
            wave, outside = example.clip.wave(), np.ones(len(example.clip.wave()), bool)
            counts.add(len(example.words))
            for word in example.words:
                begin, end = round(word.start * 16000), round(word.end * 16000)
                outside[begin:end] = False
                assert np.abs(wave[begin:end]).max() > 0.1
            assert np.abs(wave[outside]).max() < 0.1 and example.text == " ".join(word.text for word in example.words)
    assert counts >= {1, 2, 3, 8}


def test_a_model_learns_from_them(recordings: str, tmp_path: Path):
    recipe = RECIPES["spoken_digits"]
    easy = recipe.mixture.easy_scenes
    config = dataclasses.replace(
        recipe,
        mixture=MixtureConfig(easy_scenes=easy, clips=recordings),
        data=dataclasses.replace(recipe.data, batch_size=8, open_bins=2),
        optimizer=dataclasses.replace(recipe.optimizer, total_steps=40, warmup_steps=5, decay_steps=10),
        microbatches=1,
    )
    train(config, tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert len(losses) == 40 and losses[0] > 5.5 and np.mean(losses[-5:]) < 2
