"""`verify` finds whatever changed, and nothing where nothing did."""

import json
import math
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.check_checksums import regions
from convert.compare_models import ModelComparison, StageError, distribution_errors, stage_error, synthetic_clip
from convert.compare_tensors import largest_errors, same_bits
from convert.to_hf import convert_to_hf
from convert.to_orbax import convert_to_orbax
from convert.verify import THRESHOLDS, as_json, beyond, report_table, verify
from moss_audio_jax.weights.checksums import CHECKSUMS_FILE
from moss_audio_jax.weights.locate import SINGLE_FILE
from moss_audio_jax.weights.safetensors_reader import ReleasedCheckpoint
from tests.conftest import change_one_bit

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
CHANGED = "language_model.layers.2.mlp.up_proj.weight"


def flip_byte(directory: Path, name: str, low: bool = True) -> Path:
    """Flips the lowest bit of one element of a tensor in a single-file checkpoint."""
    tensor = ReleasedCheckpoint(directory).tensors[name]
    path = directory / tensor.file
    data = bytearray(path.read_bytes())
    data[tensor.offset + 5 * tensor.dtype.itemsize] ^= 1
    path.write_bytes(data)
    return directory


def test_equal_checkpoints_in_every_combination(invoke, released, orbax, tmp_path):
    convert_to_hf(orbax, tmp_path / "back", shard_bytes=10**5)
    for pair in ((released, orbax), (orbax, released), (released, tmp_path / "back"), (orbax, orbax)):
        code, out, _ = invoke("verify", *pair, "--no-torch")
        assert code == 0
        assert "159 tensors equal bit by bit (bfloat16)" in out
        assert out.splitlines()[-1] == "PASSED"


@pytest.mark.parametrize("order", [1, -1])
def test_one_flipped_bit_is_found(invoke, released, orbax, tmp_path, order):
    changed = flip_byte(Path(shutil.copytree(released, tmp_path / "changed")), CHANGED)
    code, out, _ = invoke("verify", *[changed, orbax][::order], "--no-torch", "--json", "-")
    assert code == 1
    report = json.loads(out)
    assert report["passed"] is False
    differing = [tensor for tensor in report["tensors"] if not tensor["equal"]]
    assert [tensor["name"] for tensor in differing] == [CHANGED]
    assert 0 < differing[0]["max_abs_error"] < 0.01
    assert 0 < differing[0]["max_relative_error"] <= 2**-7
    code, out, _ = invoke("verify", changed, orbax, "--no-torch")
    assert code == 1
    assert CHANGED in out
    assert out.splitlines()[-1] == "FAILED"


def test_a_tensor_that_is_not_finite_is_named(invoke, released, tmp_path):
    broken = Path(shutil.copytree(released, tmp_path / "broken"))
    tensors = load_file(broken / SINGLE_FILE)
    tensors[CHANGED][3, 4] = np.nan
    save_file(tensors, broken / SINGLE_FILE, {"format": "pt"})
    code, out, _ = invoke("verify", broken, broken, "--no-torch")
    assert code == 0 and f"{CHANGED} holds NaN or infinity" in out
    assert "NaN" not in invoke("verify", released, released, "--no-torch")[1]


def test_damaged_byte_in_an_orbax_file_is_found(invoke, released, orbax, tmp_path):
    """Orbax has no checksums: most flipped bytes restore without a word. Ours find them, with no other checkpoint."""
    found = []
    for share in (0.2, 0.5, 0.8):
        changed = Path(shutil.copytree(orbax, tmp_path / f"changed {share}"))
        largest = max((changed / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[int(len(data) * share)] ^= 0x10
        largest.write_bytes(data)
        code, _, err = invoke("verify", released, changed, "--no-torch")
        assert code in (1, 2)
        assert "Traceback" not in err
        found.append(code)
        alone, out, _ = invoke("verify", changed)
        assert alone == 1 and out.splitlines()[-1] == "FAILED" and f"{changed}" in out
        assert re.search(r"  damaged: params: [\w.]+ is (bfloat16\[|not readable)", out)
    assert 1 in found
    code, out, _ = invoke("verify", orbax)
    assert code == 0 and out == f"{orbax}\n{orbax}: 45 arrays have the checksums they were written with\nPASSED\n"
    code, _, err = invoke("verify", released)
    assert code == 2 and f"{released} has no checksums" in err


def test_one_changed_bit_is_found_without_and_with_another_checkpoint(invoke, released, orbax, tmp_path):
    changed = Path(shutil.copytree(orbax, tmp_path / "changed"))
    change_one_bit(changed / "params", "language_model.norm.scale")
    for others in ((), (changed,), (released, "--no-torch")):
        code, out, _ = invoke("verify", changed, *others, "--json", "-")
        report = json.loads(out)
        assert (code, report["passed"]) == (1, False)
        assert [checked["sound"] for checked in report["checksums"]] == [44] * (2 if others == (changed,) else 1)
        (damaged,) = report["checksums"][0]["damaged"]
        assert damaged.startswith("params: language_model.norm.scale is bfloat16[48] ")
    file = changed / CHECKSUMS_FILE
    record = json.loads(file.read_text())
    record["items"]["params"]["gone"] = "float32[1] 0123456789abcdef"
    file.write_text(json.dumps(record))
    assert "damaged: params: gone is missing" in invoke("verify", changed)[1]


def test_regions_cover_an_array_in_whole_chunks():
    found = list(regions((70, 3000, 5000), (1, 1500, 5000), 4))
    assert len(found) == 70 and found[0] == (slice(0, 1), slice(0, 3000), slice(0, 5000))
    found = list(regions((5, 10), (2, 4), 1 << 23))  # of 8 elements
    assert found[:2] == [(slice(0, 2), slice(0, 4)), (slice(0, 2), slice(4, 8))] and len(found) == 9
    assert list(regions((), (), 4)) == [()] and not list(regions((0, 3), (1, 3), 4))


def test_every_conversion_of_types_is_checked(released, tmp_path):
    convert_to_orbax(released, tmp_path / "wide", FLOAT32)
    report = verify(released, tmp_path / "wide", pytorch=False)
    assert report.passed
    assert {(t.source_dtype, t.target_dtype, t.max_abs_error) for t in report.tensors} == {("bfloat16", "float32", 0.0)}
    assert verify(tmp_path / "wide", released, pytorch=False).passed


def test_rounding_is_measured_and_expected_exactly(data_dir, tmp_path):
    source = Path(shutil.copytree(data_dir / "tiny", tmp_path / "source"))
    convert_to_orbax(source, tmp_path / "orbax", BFLOAT16)
    convert_to_hf(tmp_path / "orbax", tmp_path / "narrow")
    report = verify(source, tmp_path / "narrow", pytorch=False)
    assert report.passed
    assert 2**-10 < max(tensor.max_relative_error for tensor in report.tensors) <= 2**-8
    assert "converted from float32 to bfloat16 exactly as expected" in report_table(report)
    # What was rounded is not what a conversion of the rounded one would give.
    assert not verify(tmp_path / "narrow", source, pytorch=False).passed
    flip_byte(tmp_path / "narrow", CHANGED)
    assert not verify(source, tmp_path / "narrow", pytorch=False).passed


def test_low_bits_of_a_widened_tensor_are_found(released, tmp_path):
    """They vanish when rounded back, so the target is compared in its own type."""
    convert_to_orbax(released, tmp_path / "orbax", FLOAT32)
    convert_to_hf(tmp_path / "orbax", tmp_path / "wide")
    flip_byte(tmp_path / "wide", CHANGED)
    report = verify(released, tmp_path / "wide", pytorch=False)
    assert [tensor.name for tensor in report.tensors if not tensor.equal] == [CHANGED]


@pytest.mark.parametrize(
    ("file", "edit", "expected"),
    [
        ("config.json", lambda text: text.replace("1000000", "10000"), "config.json differs"),
        (
            "vocab.json",
            lambda text: text.replace('"A": 32', '"A": 33').replace('"B": 33', '"B": 32'),
            "vocab.json diff",
        ),
        ("merges.txt", lambda text: text + "a b\n", "merges.txt differs"),
        ("merges.txt", None, "merges.txt is in"),
    ],
)
def test_configuration_and_tokenizer_count(released, orbax, tmp_path, file, edit, expected):
    changed = Path(shutil.copytree(released, tmp_path / "changed"))
    if edit is None:
        (changed / file).unlink()
    else:
        text = (changed / file).read_text()
        assert edit(text) != text
        (changed / file).write_text(edit(text))
    report = verify(changed, orbax, pytorch=False)
    assert not report.passed
    assert len(report.differences) == 1
    assert expected in report.differences[0]
    assert all(tensor.equal for tensor in report.tensors)


def test_how_a_configuration_is_written_does_not_count(released, orbax, tmp_path):
    changed = Path(shutil.copytree(released, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert verify(changed, orbax, pytorch=False).passed


def test_different_models_are_told_apart(released, data_dir, tmp_path):
    """A tied head and a wider adapter: tensors on one side only, and tensors of another shape."""
    other = Path(shutil.copytree(released, tmp_path / "other"))
    tensors = load_file(other / SINGLE_FILE)
    del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        if "audio_adapter" in name or "deepstack" in name:
            axis = 1 if "down_proj" in name else 0
            tensors[name] = np.concatenate([tensor, tensor], axis)
    save_file(tensors, other / SINGLE_FILE)
    config = json.loads((other / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "adapter_hidden_size": 80}
    (other / "config.json").write_text(json.dumps(config))
    report = verify(released, other)
    assert not report.passed
    text = "\n".join(report.differences)
    assert f"lm_head.weight is in {released} only" in text
    assert "audio_adapter.up_proj.weight has shape (40, 32) in" in text
    assert "config.json differs" in text
    assert report.note
    assert report.models is None
    assert verify(other, released, pytorch=False).differences[-1].endswith(f"is in {released} only")


def test_bits_count_not_values():
    zeros = np.array([0.0, -0.0], np.float32)
    assert same_bits(zeros, zeros.copy())
    assert not same_bits(zeros, np.zeros(2, np.float32))
    nan = np.array([np.nan], np.float32)
    assert same_bits(nan, nan.copy())
    assert same_bits(np.array([1.00390625], np.float32), np.array([1.0], BFLOAT16))  # a tie, to even


def test_largest_errors():
    expected = np.array([1.0, -4.0, 0.0, np.nan, 8.0], np.float32)
    found = np.array([1.5, -3.0, 0.25, np.nan, 8.0], np.float32)
    assert largest_errors(expected, found) == (1.0, 0.5)
    assert largest_errors(expected, np.full(5, np.inf, np.float32))[0] == math.inf


def comparison(**changes) -> ModelComparison:
    values = {"max_kl": 0.0, "mean_kl": 0.0, "top_1_agreement": 1.0, "top_k_overlap": 1.0} | changes
    stages = [StageError("logits", 0.0, values.pop("error", 0.0))]
    return ModelComparison("clip", 10, "float32", stages, **values)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"error": 1.0}, "relative error of logits"),
        ({"error": math.nan}, "relative error of logits"),
        ({"max_kl": 1.0}, "KL"),
        ({"max_kl": math.nan}, "KL"),
        ({"top_1_agreement": 0.5}, "top-1"),
        ({"top_k_overlap": 0.5}, "top-5"),
    ],
)
def test_thresholds(changes, expected):
    exceeded = beyond(comparison(**changes), THRESHOLDS["float32"])
    assert [line.startswith(expected) for line in exceeded] == ([] if expected is None else [True])


def test_distribution_errors():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    assert distribution_errors(logits, logits + 7)["max_kl"] == pytest.approx(0, abs=1e-12)
    other = np.log(np.array([[0.25, 0.5, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    errors = distribution_errors(logits, other)
    assert errors["max_kl"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert errors["mean_kl"] == pytest.approx(errors["max_kl"] / 2)
    assert errors["top_1_agreement"] == 0.5
    assert errors["top_k_overlap"] == 1.0
    wide, shifted = np.arange(40.0)[None], np.roll(np.arange(40.0), 2)[None]
    assert distribution_errors(wide, shifted)["top_k_overlap"] == 0.6


def test_stage_error():
    error = stage_error("tap 0", np.array([[1.0, -4.0]]), np.array([[1.5, -4.0]]))
    assert error == StageError("tap 0", 0.5, 0.125)
    assert math.isnan(stage_error("tap 0", np.ones((1, 1)), np.full((1, 1), np.nan)).relative_error)


def test_json_has_no_infinity(released, tmp_path):
    changed = Path(shutil.copytree(released, tmp_path / "changed"))
    tensors = load_file(changed / SINGLE_FILE)
    tensors[CHANGED][0, 0] = np.inf
    save_file(tensors, changed / SINGLE_FILE)
    report = as_json(verify(released, changed, pytorch=False))
    text = json.dumps(report, allow_nan=False)
    assert next(tensor for tensor in json.loads(text)["tensors"] if not tensor["equal"])["max_abs_error"] == "inf"


def test_synthetic_clip_is_a_sound_of_some_seconds():
    clip = synthetic_clip()
    assert (clip.dtype, clip.shape) == (np.float32, (148_800,))
    assert 0.1 < np.abs(clip).max() < 1
    np.testing.assert_array_equal(clip, synthetic_clip())
