"""Kernels in int8: each weight within half a step, and a forward pass that is that of the rounded weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.rehearse import rehearse
from convert.to_orbax import convert_to_orbax
from moss_audio_jax import LoraConfig, MossAudio, MossAudioConfig, MossAudioError, generate
from moss_audio_jax.int8 import LARGEST, int8_kernels, quantize
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.weights.checkpoint import load_model, merge_adapter, save_model
from moss_audio_jax.weights.parameters import build_model, parameters_of
from tests.conftest import question

TINY = MossAudioConfig.preset("tiny")
EVERYWHERE = LoraConfig(rank=4, int8=("*_proj", "*.fc?"))


DECODER = ("language_model.layers.*_proj",)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "released"
    rehearse("tiny", directory)
    return directory


def with_lora(lora: LoraConfig) -> MossAudioConfig:
    return dataclasses.replace(TINY, lora=lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_is_rounded_to_the_nearest_step(dtype: str):
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, rng.uniform(0.01, 2, 40), (3, 50, 40))
    kernel[1, :, 7] = 0
    kernel = jnp.asarray(kernel, dtype)
    steps, scale = quantize(kernel)
    assert (steps.dtype, scale.dtype, scale.shape) == (jnp.int8, kernel.dtype, (3, 40))
    exact, size = np.asarray(kernel, np.float64), np.asarray(scale, np.float64)[:, None]
    # The largest weight may lie up to half a unit in the last place of the scale beyond the last step.
    beyond = LARGEST * size * (2.0**-8 if dtype == "bfloat16" else 2.0**-23)
    assert (np.abs(np.asarray(steps, np.float64) * size - exact) <= np.maximum(size / 2 + 1e-9, beyond)).all()
    assert (np.abs(steps).max(-2) >= LARGEST - 1).sum() == 3 * 40 - 1  # every step is used, but where all is zero
    assert not steps[1, :, 7].any()


def quantized(lora: LoraConfig, dtype: str = "float32") -> tuple[MossAudio, MossAudio]:
    """A model with int8 kernels, and that of the same weights as floats."""
    drawn = parameters_of(MossAudio(with_lora(lora), rngs=nnx.Rngs(0)))
    parameters = {path: leaf.astype(dtype) for path, leaf in drawn.items()}
    kernels = int8_kernels(parameters)
    rounded = {path: leaf for path, leaf in parameters.items() if path not in kernels.values()}
    for kernel, scale in kernels.items():
        parameters[kernel], parameters[scale] = quantize(parameters[kernel])
        rounded[kernel] = parameters[kernel] * parameters[scale][..., None, :]
    return build_model(with_lora(lora), parameters), build_model(with_lora(dataclasses.replace(lora, int8=())), rounded)


def test_an_adapter_is_not_merged_into_int8():
    with pytest.raises(MossAudioError, match="has int8 kernels, to which nothing can be added: load its base without"):
        merge_adapter(quantized(EVERYWHERE)[0])


@pytest.mark.parametrize("layout", ["released", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_loaded_in_int8(layout: str, dtype: str, released: Path, tmp_path: Path):
    """Kernels are rounded as `quantize` does, the rest is as stored, and an adapter fits it."""
    path = released
    if layout == "orbax":
        convert_to_orbax(released, path := tmp_path / "orbax")
    plain, model = load_model(path, dtype=dtype), load_model(path, dtype=dtype, int8=DECODER)
    stored, found = parameters_of(plain), parameters_of(model)
    kernels = int8_kernels(found)
    assert len(kernels) == 7 and model.config == dataclasses.replace(plain.config, int8=DECODER)
    for kernel, scale in kernels.items():
        for leaf, expected in zip((found.pop(kernel), found.pop(scale)), quantize(stored.pop(kernel)), strict=True):
            assert leaf.dtype == expected.dtype
            np.testing.assert_array_equal(leaf, expected)
    assert found.keys() == stored.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, stored[name])


def test_int8_generates_as_the_rounded_weights(released: Path):
    model = load_model(released, int8=DECODER)
    parameters = parameters_of(model)
    for kernel, scale in int8_kernels(parameters).items():
        parameters[kernel] = parameters[kernel] * parameters.pop(scale)[..., None, :]
    rounded = build_model(dataclasses.replace(model.config, int8=()), parameters)
    inputs = question(model, [237, 400])
    answers = [generate(one, inputs, max_new_tokens=12, eos_ids=()) for one in (model, rounded)]
    np.testing.assert_array_equal(*answers)


def test_int8_is_not_saved_and_its_patterns_are_checked(released: Path, tmp_path: Path):
    with pytest.raises(MossAudioError, match="int8 pattern 'lm_head' matches no linear layer"):
        load_model(released, int8=["lm_head"])
    with pytest.raises(MossAudioError, match="floating-point parameters of its configuration alone, not"):
        save_model(load_model(released, int8=DECODER), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_forward_pass_is_that_of_the_rounded_weights():
    model, rounded = quantized(EVERYWHERE)
    kernels = {path: leaf for path, leaf in parameters_of(model).items() if leaf.dtype == jnp.int8}
    assert {path.rpartition(".")[0] for path in kernels} == {
        path.rpartition(".")[0]
        for path in parameter_specs(TINY)
        if path.endswith(("_proj.kernel", "fc1.kernel", "fc2.kernel"))
    }
    inputs = question(model, [237, 400])
    found, expected = np.asarray(model(inputs)), np.asarray(rounded(inputs))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    plain = build_model(TINY, parameters_of(MossAudio(TINY, rngs=nnx.Rngs(0))))
    assert 1e-3 < np.abs(np.asarray(plain(inputs)) - expected).max() / np.abs(expected).max() < 0.2


def test_gradients_pass_through_int8_as_through_the_rounded_weights():
    def gradient(model: MossAudio) -> dict[str, jax.Array]:
        parameters = parameters_of(model)
        adapter = {path: leaf for path, leaf in parameters.items() if ".lora_" in path}
        inputs = question(model, [237])

        def loss(adapter: dict[str, jax.Array]) -> jax.Array:
            adapted = build_model(model.config, parameters | adapter)
            return jnp.square(adapted.logits(adapted.hidden_states(inputs).last)).mean()

        return jax.jit(jax.grad(loss))(adapter)

    found, expected = (gradient(model) for model in quantized(EVERYWHERE))
    moved = [path for path in expected if np.abs(expected[path]).max() > 0]
    assert len(moved) == 7  # the first gradient of A is zero, since B is
    for path in moved:
        assert np.abs(found[path] - expected[path]).max() < 1e-4 * np.abs(expected[path]).max(), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"int8": ("lm_head",)}, "lora.int8 pattern 'lm_head' matches no linear layer whose kernel can be int8"),
        ({"int8": ("audio_adapter.*",), "full": ("audio_adapter.*",)}, "named by lora.int8 and lora.full both"),
    ],
)
def test_patterns_are_checked(changes: dict, message: str):
    with pytest.raises(MossAudioError, match=message):
        parameter_specs(with_lora(LoraConfig(**changes)))
