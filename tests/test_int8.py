"""Kernels in int8: each weight within half a step, and a forward pass that is that of the rounded weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_audio_jax import LoraConfig, MossAudio, MossAudioConfig, MossAudioError
from moss_audio_jax.int8 import LARGEST, int8_kernels, quantize
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.weights.checkpoint import merge_adapter
from moss_audio_jax.weights.parameters import build_model, parameters_of
from tests.conftest import question

TINY = MossAudioConfig.preset("tiny")
EVERYWHERE = LoraConfig(rank=4, int8=("*_proj", "*.fc?"))


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
    with pytest.raises(MossAudioError, match="kernels are int8, as in training: load its base by load_model"):
        merge_adapter(quantized(EVERYWHERE)[0])


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
