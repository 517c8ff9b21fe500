"""The PyTorch reference gives what MOSS-Audio's own code gave, stage by stage, and loads released files."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

from convert.pytorch_reference import ReferenceModel, load_reference, token_count  # noqa: E402
from moss_audio_jax.weights.names import IGNORED_TENSORS  # noqa: E402

from .reference import loss, random_reference, save_released  # noqa: E402

CASES = ["t1", "t8", "t237", "t400", "t403", "t801_markers", "t2998_markers", "two_clips"]
# Largest difference over largest magnitude. Measured with AVX-512, AVX2 and SSE kernels, on 1 and 2 threads:
# outputs 0 to 1.4e-6, gradients up to 4.5e-6 (they are long sums, whose order is up to the machine).
OUTPUT_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 1e-5


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference, magnitude = np.abs(actual - expected).max(), np.abs(expected).max()
    return float(difference / magnitude) if magnitude else float(difference)


def above(tolerance: float, errors: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.fixture
def tiny(data_dir: Path) -> ReferenceModel:
    return load_reference(data_dir / "tiny")


@pytest.fixture
def tiny_config(data_dir: Path) -> dict[str, Any]:
    return json.loads((data_dir / "tiny" / "config.json").read_text("utf-8"))


def load_case(data_dir: Path, name: str) -> tuple[dict[str, np.ndarray], tuple[Any, list[Any], int]]:
    """The recorded arrays and the arguments (input_ids, mels, audio token id) that led to them."""
    with np.load(data_dir / "tiny" / f"case_{name}.npz") as file:
        case = dict(file)
    mels = [
        torch.from_numpy(mel[:, :frames])
        for mel, frames in zip(case["audio_data"], case["audio_data_seqlens"], strict=True)
    ]
    return case, (torch.from_numpy(case["input_ids"]), mels, 511)


@pytest.mark.parametrize("name", CASES)
def test_every_stage_equals_the_recording(tiny: ReferenceModel, data_dir: Path, name: str):
    case, arguments = load_case(data_dir, name)
    with torch.no_grad():
        stages = tiny(*arguments)
    assert stages.audio is not None
    results = {
        "encoder_last_hidden_state": stages.audio.encoder_last_hidden_state[None],
        **{f"deepstack_{k}": tap[None] for k, tap in enumerate(stages.audio.deepstack)},
        "adapter_output": stages.audio.adapter_output[None],
        **{f"deepstack_merged_{k}": merged[None] for k, merged in enumerate(stages.audio.deepstack_merged)},
        "logits": stages.logits,
        "loss": loss(stages.logits, torch.from_numpy(case["labels"])),
    }
    assert {key for key in case if key.startswith("deepstack")} < results.keys()
    errors = {stage: relative_error(result, case[stage]) for stage, result in results.items()}
    assert not above(OUTPUT_TOLERANCE, errors)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_recording(tiny: ReferenceModel, data_dir: Path, name: str):
    case, arguments = load_case(data_dir, name)
    loss(tiny(*arguments).logits, torch.from_numpy(case["labels"])).backward()
    gradients = {f"grad:{name}": parameter.grad for name, parameter in tiny.named_parameters()}
    errors = {key: relative_error(gradients[key], case[key]) for key in case if key.startswith("grad:")}
    assert len(errors) == 13
    assert not above(GRADIENT_TOLERANCE, errors)


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_equal_the_recording(tiny: ReferenceModel, data_dir: Path, name: str):
    case, arguments = load_case(data_dir, name)
    expected = case["greedy_token_ids"].tolist()
    assert tiny.generate_greedy(*arguments, max_new_tokens=len(expected)) == expected


def test_speech_with_the_full_vocabulary_equals_the_recording(goldens_dir: Path):
    """Ten seconds of speech through bfloat16 weights in shards, computed in float32."""
    model = load_reference(goldens_dir / "tiny-hf")
    recorded = np.load(goldens_dir / "e2e_test_en.npz")
    mel = torch.from_numpy(recorded["mel_bf16_as_f32"][0])
    arguments = torch.from_numpy(recorded["input_ids"]), [mel], 151654
    with torch.no_grad():
        logits = model(*arguments).logits[0]
    largest = logits.topk(32)
    np.testing.assert_array_equal(largest.indices, recorded["logits_top32_ids"])
    errors = {
        "largest logits": relative_error(largest.values, recorded["logits_top32_values"]),
        "logsumexp": relative_error(logits.logsumexp(-1), recorded["logits_logsumexp"]),
        "last position": relative_error(logits[-1], recorded["last_logits"]),
    }
    assert not above(OUTPUT_TOLERANCE, errors)
    assert model.generate_greedy(*arguments, max_new_tokens=24) == recorded["greedy_token_ids"].tolist()


def unusual(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny config with what released ones lack: unsorted, capped taps; a projection; small chunks."""
    config = copy.deepcopy(config)
    config["audio_config"] |= {"output_dim": 24, "layer_norm_eps": 0.1, "n_window": 20}
    config["audio_config"]["deepstack_encoder_layer_indexes"] = [4, 0, 2]
    config["deepstack_num_inject_layers"] = 2
    return config


def random_prompt(frames: list[int], seed: int = 0) -> tuple[Any, list[Any], int]:
    """Clips of these many mel frames, text before and after each: (input_ids, mels, audio token id)."""
    generator = torch.Generator().manual_seed(seed)
    mels = [0.5 * torch.randn(128, count, generator=generator) for count in frames]
    ids = torch.randint(0, 500, (3,), generator=generator).tolist()
    for count in frames:
        ids += [511] * token_count(count) + torch.randint(0, 500, (4,), generator=generator).tolist()
    return torch.tensor([ids]), mels, 511


def test_taps_are_layer_outputs_projected_but_not_normed_in_the_listed_order(
    tiny_config: dict[str, Any],
):
    model = random_reference(unusual(tiny_config), seed=0)
    encoder, layer_outputs = model.audio_encoder, []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: layer_outputs.append(output[0]))
    _, mels, _ = random_prompt([30])
    with torch.no_grad():
        audio = model.encode_audio(mels)
        normed = torch.nn.functional.layer_norm(
            layer_outputs[-1][0], (32,), encoder.layer_norm.weight, encoder.layer_norm.bias, eps=0.1
        )
        expected = [encoder.out_proj(layer_outputs[index][0]) for index in (4, 0, 2)]
    torch.testing.assert_close(audio.encoder_last_hidden_state, encoder.out_proj(normed))
    assert len(audio.deepstack_merged) == 2
    for tap, projected in zip(audio.deepstack, expected, strict=True):
        torch.testing.assert_close(tap, projected)


def test_every_random_weight_shows_in_the_loss(tiny_config: dict[str, Any]):
    model = random_reference(unusual(tiny_config), seed=1)
    input_ids, mels, audio_token_id = random_prompt([30, 40, 97])
    logits = model(input_ids, mels, audio_token_id).logits
    loss(logits, input_ids.masked_fill(input_ids == audio_token_id, -100)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, grad in gradients.items() if grad is None or not grad.abs().max() > 1e-5]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_saved_files_give_the_same_model(tiny_config: dict, tmp_path: Path, shards: int, tied: bool):
    model = random_reference({**unusual(tiny_config), "tie_word_embeddings": tied}, seed=2)
    save_released(model, tmp_path, shards)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    names = [name for file in files for name in load_file(file)]
    assert ("lm_head.weight" in names) is not tied
    assert len(names) == len(set(names)) == len(dict(model.named_parameters()))

    prompt = random_prompt([30, 97])
    with torch.no_grad():
        assert torch.equal(load_reference(tmp_path)(*prompt).logits, model(*prompt).logits)


def test_loading_is_strict_but_for_the_stored_sinusoids(tiny_config: dict[str, Any], tmp_path: Path):
    save_released(random_reference(tiny_config, seed=3), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: torch.zeros(16) for name in IGNORED_TENSORS}, file)
    load_reference(tmp_path)

    save_file(tensors | {"audio_encoder.unheard_of": torch.zeros(1)}, file)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*audio_encoder\.unheard_of"):
        load_reference(tmp_path)
    del tensors["audio_adapter.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=r"Missing key.*audio_adapter\.up_proj\.weight"):
        load_reference(tmp_path)


@pytest.mark.parametrize("n_window", [20, 200, None])
def test_a_chunk_hears_the_rest_of_its_clip_only_where_clips_stay_whole(
    tiny_config: dict[str, Any], n_window: int | None
):
    tiny_config["audio_config"]["n_window"] = n_window
    encoder = random_reference(tiny_config, seed=4).audio_encoder
    _, (mel,), _ = random_prompt([450])
    changed = mel.clone()
    changed[:, 420:] += 1
    with torch.no_grad():
        before, after = encoder(mel)[0], encoder(changed)[0]
    assert before.shape == (57, 32)
    assert torch.equal(before[:50], after[:50]) is (n_window is not None)
    assert not torch.allclose(before[50:], after[50:], atol=1e-2)


def test_a_clip_within_one_chunk_is_encoded_whole(tiny_config: dict[str, Any]):
    chunked = random_reference(tiny_config, seed=5).audio_encoder
    tiny_config["audio_config"]["n_window"] = None
    whole = random_reference(tiny_config, seed=5).audio_encoder
    _, (mel,), _ = random_prompt([333])
    with torch.no_grad():
        assert torch.equal(chunked(mel)[0], whole(mel)[0])


def test_a_prompt_without_audio_is_plain_qwen3(tiny: ReferenceModel):
    qwen3 = Qwen3ForCausalLM(tiny.language_model.config).eval()
    qwen3.model.load_state_dict(tiny.language_model.state_dict())
    qwen3.lm_head.load_state_dict(tiny.lm_head.state_dict())
    prompt = random_prompt([])
    with torch.no_grad():
        stages, expected = tiny(*prompt), qwen3(prompt[0]).logits
    assert stages.audio is None
    assert relative_error(stages.logits, expected) <= OUTPUT_TOLERANCE


def test_clips_and_prompt_must_agree(tiny: ReferenceModel):
    input_ids, mels, audio_token_id = random_prompt([30, 40])
    with pytest.raises(ValueError, match="1 clips make 4 audio tokens; the prompt holds 9"):
        tiny(input_ids, mels[:1], audio_token_id)
