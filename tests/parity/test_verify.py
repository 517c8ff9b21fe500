"""`verify` runs PyTorch and JAX on the same sound, passes equal models and fails what computes something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)

from convert import verify as module  # noqa: E402
from convert.rehearse import rehearse  # noqa: E402
from convert.to_hf import convert_to_hf  # noqa: E402
from convert.to_orbax import convert_to_orbax  # noqa: E402
from convert.verify import (  # noqa: E402
    THRESHOLDS,
    as_json,
    beyond,
    report_table,
    verify,
)
from moss_audio_jax import MossAudioError  # noqa: E402

STAGES = ["encoder", "tap 0", "tap 1", "tap 2", "adapter", "merged 0", "merged 1", "merged 2", "logits"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A released directory and the same as Orbax."""
    directory = tmp_path_factory.mktemp("verify")
    rehearse("tiny", directory / "released", seed=4)
    convert_to_orbax(directory / "released", directory / "orbax")
    return directory / "released", directory / "orbax"


def test_equal_models_agree_at_every_stage(pair):
    report = verify(*pair)
    assert report.passed, report_table(report)
    assert report.models is not None
    assert [stage.stage for stage in report.models.stages] == STAGES
    # Measured: 1.3e-6 at most, KL 1e-12.
    assert all(stage.relative_error < 1e-5 for stage in report.models.stages)
    assert 0 <= report.models.max_kl < 1e-9
    assert (report.models.top_1_agreement, report.models.top_k_overlap) == (1.0, 1.0)
    assert json.loads(json.dumps(as_json(report), allow_nan=False))["models"]["positions"] > 100
    assert "PyTorch and JAX in float32 on a synthetic clip" in report_table(report)


def test_real_tokenizer_and_recording(goldens_dir):
    source = goldens_dir / "tiny-hf"
    report = verify(source, source, audio=goldens_dir.parent / "audio" / "test_en.mp3")
    assert report.passed, report_table(report)
    assert report.models is not None
    assert report.models.positions == 158
    assert max(stage.relative_error for stage in report.models.stages) < 1e-5


def test_without_a_tokenizer(pair, tmp_path):
    sides = [Path(shutil.copytree(side, tmp_path / side.name)) for side in pair]
    for side in sides:
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
            (side / name).unlink()
        (side / "special_tokens_map.json").unlink()
    assert verify(*sides).passed


def test_bfloat16_takes_wider_thresholds(pair):
    report = verify(*pair, dtype="bfloat16")
    assert report.passed, report_table(report)
    assert report.models is not None
    errors = [stage.relative_error for stage in report.models.stages]
    assert 1e-4 < max(errors) < 0.1
    assert beyond(report.models, THRESHOLDS["float32"])


def test_rounded_weights_take_wider_thresholds(data_dir, tmp_path):
    source = Path(shutil.copytree(data_dir / "tiny", tmp_path / "source"))
    (source / "processor_config.json").write_text(
        json.dumps({"audio_token_id": 511, "audio_start_id": 509, "audio_end_id": 510})
    )
    convert_to_orbax(source, tmp_path / "orbax", np.dtype("bfloat16"))
    report = verify(source, tmp_path / "orbax")
    assert report.passed, report_table(report)
    assert report.models is not None
    assert max(stage.relative_error for stage in report.models.stages) > 1e-4


def test_models_that_compute_something_else_fail(pair, tmp_path):
    """The same tensors under a configuration that leaves DeepStack's features to other layers."""
    released, orbax = pair
    changed = Path(shutil.copytree(orbax, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    config["audio_config"]["deepstack_encoder_layer_indexes"] = [2, 1, 4]
    (changed / "config.json").write_text(json.dumps(config))
    report = verify(released, changed)
    assert all(tensor.equal for tensor in report.tensors)
    assert report.differences == ["config.json differs"]
    assert "relative error of tap 0" in "\n".join(report.exceeded)
    assert "relative error of encoder" not in "\n".join(report.exceeded)
    assert not report.passed
    assert "past its threshold: relative error of tap 0" in report_table(report)


def test_a_config_of_transformers_5_keeps_its_rotary_base(pair, tmp_path):
    """It has rope_parameters alone: both sides read it, and what goes back to PyTorch has the older key as well."""
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    theta = config["language_config"].pop("rope_theta")
    config["language_config"] |= {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    (source / "config.json").write_text(json.dumps(config))
    convert_to_orbax(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    exported = json.loads((tmp_path / "back" / "config.json").read_text())["language_config"]
    assert exported["rope_theta"] == exported["rope_parameters"]["rope_theta"] == theta != 10_000
    report = verify(source, tmp_path / "back")
    assert report.passed and report.models is not None, report_table(report)


def test_two_orbax_directories_are_compared_by_tensors_alone(pair, tmp_path):
    report = verify(pair[1], pair[1])
    assert report.passed
    assert report.models is None
    assert "neither is one" in report_table(report)


def test_missing_pytorch_is_said_with_the_install_line(pair, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    report = verify(*pair)
    assert report.passed
    assert "torch and transformers not installed: pip install torch 'transformers==4.57.1'" in report_table(report)


def test_other_transformers_are_said_with_the_install_line(pair, monkeypatch):
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "5.1.0")
    assert "transformers 5.1.0 is installed, 4.57.1 is needed" in report_table(verify(*pair))


def test_too_little_memory_is_refused_beforehand(pair, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 10**9)
    with pytest.raises(MossAudioError, match=r"needs about 3\.0 GB .* 1\.0 GB are available: .*--no-torch"):
        verify(*pair)
    assert verify(*pair, pytorch=False).passed


def test_audio_that_is_none(pair, tmp_path):
    (tmp_path / "clip.wav").write_text("no sound")
    with pytest.raises(MossAudioError, match=r"clip\.wav"):
        verify(*pair, audio=tmp_path / "clip.wav")


def test_released_shards_after_orbax_and_a_limit_of_ones_own(pair, tmp_path):
    convert_to_hf(pair[1], tmp_path / "back", shard_bytes=10**5)
    report = verify(pair[1], tmp_path / "back", limits={"relative_error": 1e-9, "kl": None})
    assert report.models is not None
    assert not report.passed
    assert len(report.exceeded) == len(STAGES)
