"""Adapters through the commands: PEFT's files to Orbax and back, merged into their model, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moss_audio_jax import LoraConfig, MossAudioConfig, load_adapter, load_model, merge_adapter
from moss_audio_jax.commands.cli import TRY_AGAIN
from moss_audio_jax.weights.locate import ADAPTER_CONFIG, ADAPTER_FILE
from moss_audio_jax.weights.names import PEFT_PREFIX, adapter_leaves
from moss_audio_jax.weights.peft import write_adapter_config
from tests.conftest import released_tensors

LORA = LoraConfig(rank=2, alpha=3.0, targets=("language_model.layers.*_proj", "audio_encoder.stem_proj"))
LORA = dataclasses.replace(LORA, full=("deepstack_audio_merger_list.*",))


@pytest.fixture(scope="module")
def adapter(released: Path, tmp_path_factory) -> Path:
    """As PEFT lays it out, for `released`: bfloat16, but for the parts trained whole."""
    directory = tmp_path_factory.mktemp("adapter") / "peft"
    directory.mkdir()
    config = dataclasses.replace(MossAudioConfig.from_hf(released), lora=LORA)
    write_adapter_config(directory, config, str(released))
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in adapter_leaves(config).items():
        dtype = ml_dtypes.bfloat16 if "lora_" in path else np.float32
        tensors |= {name: rng.normal(0, 0.2, leaf.tensor_shape).astype(dtype) for name in leaf.names}
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    return directory


@pytest.fixture
def imported(adapter: Path, invoke, tmp_path: Path) -> Path:
    code, _, errors = invoke("from-peft", adapter, tmp_path / "orbax")
    assert code == 0, errors
    return tmp_path / "orbax"


def test_there_and_back_gives_the_same_bytes(adapter: Path, imported: Path, invoke, tmp_path: Path):
    code, printed, errors = invoke("to-peft", imported, tmp_path / "back")
    assert code == 0, errors
    assert printed.startswith(f"wrote {tmp_path / 'back'}")
    assert {file.name for file in (tmp_path / "back").iterdir()} == {ADAPTER_CONFIG, ADAPTER_FILE}
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes(), name


def test_another_type_is_rounded_to(imported: Path, invoke, tmp_path: Path, adapter: Path):
    assert invoke("to-peft", imported, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    before, after = load_file(adapter / ADAPTER_FILE), load_file(tmp_path / "half" / ADAPTER_FILE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("layout", ["peft", "orbax"])
def test_to_hf_merges(layout: str, adapter: Path, released: Path, request, invoke, tmp_path: Path):
    """Each row of W + scale B A rounded once; what has no adapter is untouched; and our model computes the same."""
    source = adapter if layout == "peft" else request.getfixturevalue("imported")
    code, _, errors = invoke("to-hf", source, tmp_path / "merged")
    assert code == 0, errors
    base, merged = load_file(released / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(adapter / ADAPTER_FILE)
    assert base.keys() == merged.keys()
    changed = 0
    for name, tensor in merged.items():
        layer = PEFT_PREFIX + name.removesuffix(".weight")
        assert tensor.dtype == base[name].dtype == ml_dtypes.bfloat16
        if PEFT_PREFIX + name in tensors:
            expected = tensors[PEFT_PREFIX + name].astype(ml_dtypes.bfloat16)
        elif f"{layer}.lora_A.weight" in tensors:
            a, b = (tensors[f"{layer}.lora_{which}.weight"].astype(np.float64) for which in "AB")
            expected = (base[name].astype(np.float64) + 1.5 * b @ a).astype(ml_dtypes.bfloat16)
        else:
            expected = base[name]
        # float32 sums round to the other neighbour where the exact one lies on the edge: never twice in a thousand.
        differ = np.count_nonzero(tensor != expected)
        assert differ <= tensor.size / 1000, name
        changed += not np.array_equal(tensor, base[name])
    assert changed == len([name for name in tensors if "lora_B" not in name])
    ours = merge_adapter(load_adapter(load_model(released, dtype="bfloat16"), source))
    for name, tensor in released_tensors(ours.config, nnx.state(ours, nnx.Param)).items():
        assert np.count_nonzero(tensor != merged[name]) <= tensor.size / 1000, name
    assert (tmp_path / "merged" / "config.json").read_bytes() == (released / "config.json").read_bytes()


def test_a_wider_type_is_rounded_to_once(adapter: Path, released: Path, invoke, tmp_path: Path):
    assert invoke("to-hf", adapter, tmp_path / "merged", "--dtype", "float32")[0] == 0
    base, merged = load_file(released / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(adapter / ADAPTER_FILE)
    name = "language_model.layers.1.mlp.up_proj"
    a, b = (tensors[f"{PEFT_PREFIX}{name}.lora_{which}.weight"].astype(np.float64) for which in "AB")
    expected = base[f"{name}.weight"].astype(np.float64) + 1.5 * b @ a
    np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert {str(tensor.dtype) for tensor in merged.values()} == {"float32"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"


def test_inspect_shows_an_adapter(imported: Path, invoke):
    code, printed, errors = invoke("inspect", imported, "--json", "-")
    assert code == 0, errors
    paths = {parameter["path"] for parameter in json.loads(printed)["parameters"]}
    assert "language_model.layers.mlp.up_proj.lora_a" in paths and "lm_head.kernel" not in paths


def unnamed(adapter: Path, directory: Path) -> Path:
    """The adapter, with a model's name on a hub instead of its directory."""
    shutil.copytree(adapter, directory)
    content = json.loads((directory / ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": "Open/Model"}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("command", ["from-peft", "to-hf"])
def test_a_base_can_be_named(command: str, adapter: Path, released: Path, invoke, tmp_path: Path):
    source = unnamed(adapter, tmp_path / "unnamed")
    code, _, errors = invoke(command, source, tmp_path / "out")
    assert code == TRY_AGAIN and "Open/Model, which is no directory here (" in errors
    assert invoke(command, source, tmp_path / "out", "--base", released)[0] == 0


def test_mistakes_are_refused(adapter: Path, imported: Path, released: Path, orbax: Path, invoke, tmp_path: Path):
    other = MossAudioConfig.preset("small")
    (tmp_path / "small").mkdir()
    other.save_hf(tmp_path / "small")
    cases = {
        ("to-peft", released): "holds no adapter in Orbax",
        ("to-peft", orbax): "holds no adapter in Orbax",
        ("from-peft", released): "is no adapter of PEFT's",
        ("from-peft", imported): "is no adapter of PEFT's",
        ("to-hf", orbax, "--base", released): "leave --base out",
        ("to-hf", adapter, "--base", imported): "holds an adapter, not a model",
        ("to-orbax", adapter): "holds a LoRA adapter and no model: give its model, and the adapter as --adapter",
        ("from-peft", tmp_path / "small"): "holds no adapter_config.json",
        ("from-peft", adapter.with_name("pfet")): f"did you mean {adapter}?",
    }
    for (command, source, *options), message in cases.items():
        code, _, errors = invoke(command, source, tmp_path / "out", *options)
        assert code == 2 and message in errors, (command, errors)
        assert not (tmp_path / "out").exists()
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    (damaged / ADAPTER_FILE).write_bytes((adapter / ADAPTER_FILE).read_bytes()[:-10])
    code, _, errors = invoke("from-peft", damaged, tmp_path / "out")
    assert code == 2 and "damaged" in errors
