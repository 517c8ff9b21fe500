"""Models loaded and saved: damage, types and what is left out are refused by name; what is saved loads again."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_audio_jax import MossAudio, MossAudioConfig, MossAudioError, load_model, load_processor, save_model
from moss_audio_jax.compilation import jit
from moss_audio_jax.model import _compiled_logits
from moss_audio_jax.storage.paths import to_path
from moss_audio_jax.weights import locate
from moss_audio_jax.weights.finite import first_nonfinite
from moss_audio_jax.weights.parameters import build_model, parameters_of
from tests.conftest import question


@pytest.fixture(scope="module")
def model(released: Path) -> MossAudio:
    return load_model(released)


def test_a_saved_model_has_the_tokenizer_of_the_one_that_was_loaded(model: MossAudio, released: Path, tmp_path: Path):
    save_model(model, tmp_path / "saved")
    expected = parameters_of(model)
    for path, leaf in parameters_of(load_model(tmp_path / "saved")).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (released / name).read_bytes()
    assert load_processor(tmp_path / "saved").tokenizer.encode("12") == [16, 17]
    save_model(build_model(MossAudioConfig.preset("tiny"), expected), tmp_path / "named", tokenizer=released)
    assert load_processor(tmp_path / "named").tokenizer.encode("12") == [16, 17]


def test_a_run_that_saves_meanwhile_is_read_at_one_checkpoint(model: MossAudio, tmp_path: Path, monkeypatch):
    """Its newest checkpoint is looked up once: here each look-up finds another one."""
    steps = iter((1, 2))
    save_model(model, tmp_path / "run" / "checkpoints" / "1")
    (tmp_path / "run" / "model").mkdir()
    model.config.save_hf(tmp_path / "run" / "model")
    monkeypatch.setattr(locate, "_newest_checkpoint", lambda run: to_path(run) / "checkpoints" / str(next(steps)))
    load_model(tmp_path / "run")
    assert next(steps) == 2


def test_a_model_that_could_not_be_loaded_is_not_saved(model: MossAudio, tmp_path: Path):
    parameters = parameters_of(model)
    parameters["lm_head.kernel"] = parameters["lm_head.kernel"].astype(jnp.int8)
    with pytest.raises(MossAudioError, match=r"floating-point parameters .*, not lm_head\.kernel int8"):
        save_model(build_model(model.config, parameters), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("dtype", ["int8", np.int32, "fp32", 7])
def test_types_that_nothing_computes_in_are_refused(released: Path, dtype):
    with pytest.raises(MossAudioError, match="dtype must be one of bfloat16, float16, float32, not "):
        load_model(released, dtype=dtype)


def test_a_truncated_chunk_is_named(model: MossAudio, tmp_path: Path):
    save_model(model, tmp_path / "saved")
    chunk = max((tmp_path / "saved" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    os.truncate(chunk, chunk.stat().st_size // 2)
    with pytest.raises(MossAudioError, match=r"params can't be restored, its files are damaged \(.*\.\w+/"):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize(
    ("path", "index", "value", "name"),
    [
        ("language_model.layers.mlp.up_proj.kernel", (2, 0, 0), np.nan, "language_model.layers.2.mlp.up_proj.weight"),
        ("lm_head.kernel", (0, 5), -np.inf, "lm_head.weight"),
        ("language_model.norm.scale", (3,), np.inf, "language_model.norm.weight"),
    ],
)
def test_the_first_tensor_that_is_not_finite(model: MossAudio, path: str, index: tuple, value: float, name: str):
    assert first_nonfinite(model) is None
    parameters = parameters_of(model)
    parameters[path] = parameters[path].at[index].set(value)
    assert first_nonfinite(build_model(model.config, parameters)) == name


def test_bfloat16_weights_are_not_copied_on_the_cpu(released: Path):
    """The layers' float32 copies would be twice the weights' own size."""
    model = load_model(released, dtype="bfloat16")
    inputs = question(model, [120])
    graphdef, state = nnx.split(model)
    stacked = sum(
        leaf.nbytes for path, leaf in parameters_of(model).items() if path.startswith("language_model.layers.")
    )
    assert isinstance(_compiled_logits, jit)
    plain, sparing = (
        jitted.lower(graphdef, state, inputs).compile().memory_analysis().temp_size_in_bytes
        for jitted in (_compiled_logits._plain, _compiled_logits._sparing)
    )
    hoisted = jax.__version_info__ < (0, 12)  # XLA casts all layers before the loop; newer versions need no option
    assert sparing <= plain - (2 * stacked if hoisted else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(_compiled_logits, "_plain")
        logits = model(inputs)
    np.testing.assert_array_equal(logits, _compiled_logits._plain(graphdef, state, inputs))
    jax.jit(lambda: model(inputs)).lower()  # inside of another program it is a plain one
