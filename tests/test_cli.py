"""The command line: text out, tables, and mistakes in one sentence."""

import subprocess
import sys

import numpy as np
import pytest

from convert.to_orbax import convert_to_orbax
from moss_audio_jax import MossAudioConfig
from moss_audio_jax.model import parameter_specs


def door(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moss_audio_jax", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("layout", ["released", "orbax"])
def test_generate_prints_the_recorded_answer(layout, goldens_dir, tmp_path):
    """The real tokenizer and a real recording, from the released layout directly and converted."""
    recorded = np.load(goldens_dir / "e2e_test_en.npz")
    checkpoint, clip = goldens_dir / "tiny-hf", goldens_dir.parent / "audio" / "test_en.mp3"
    if layout == "orbax":
        convert_to_orbax(checkpoint, tmp_path / "orbax")
        checkpoint = tmp_path / "orbax"
    result = door("generate", str(checkpoint), str(clip), "--prompt", str(recorded["text"]), "--max-new-tokens", "24")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{recorded['decoded']}\n"
    assert "158 tokens read, 24 written" in result.stderr


def test_info_adds_up(data_dir):
    result = door("info", str(data_dir / "tiny"))
    assert result.returncode == 0, result.stderr
    specs = parameter_specs(MossAudioConfig.from_hf(data_dir / "tiny"))
    total = sum(int(np.prod(spec.shape)) for spec in specs.values())
    assert result.stdout.splitlines()[-1].split() == ["all", f"{total:,}", f"{4 * total:,}"]
    for path in specs:
        assert path in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere"), "nowhere"),
        (("generate", "nowhere", "clip.wav"), "nowhere"),
        (("generate", "{tiny}", "clip.wav"), "vocab.json"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, data_dir):
    result = door(*(argument.format(tiny=data_dir / "tiny") for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert not result.stdout
