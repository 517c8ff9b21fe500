"""adapter_config.json of PEFT: what it may say, and how its expressions are matched."""

import json
import time

import pytest

from moss_audio_jax import MossAudioConfig, MossAudioError
from moss_audio_jax.weights import peft as peft_files
from moss_audio_jax.weights.peft import adapted_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
LAYER = "language_model.layers.self_attn.{}_proj"


def targets(directory, **values) -> tuple[str, ...]:
    (directory / "adapter_config.json").write_text(json.dumps(PLAIN | values), "utf-8")
    lora = adapted_config(directory, MossAudioConfig.preset("tiny")).lora
    assert lora is not None
    return lora.targets


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": "4"}, "r must be an integer from 1"),
        ({"r": None}, "it lacks r"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number from"),
        ({"lora_dropout": 1}, "lora_dropout must be a number from 0 to below 1"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"target_modules": 7}, "target_modules must be a list of the names of modules, or one expression"),
        ({"target_modules": ["a", 7]}, "target_modules must be a list"),
        ({"modules_to_save": ["audio_adapter(.*)+"]}, "modules_to_save must be a list of the names of modules"),
        ({"target_modules": "("}, "is no expression"),
        ({"target_modules": "(?:.*){70000}{70000}"}, "is no expression"),
    ],
)
def test_other_values_are_refused(values, message, tmp_path):
    with pytest.raises(MossAudioError, match=message) as error:
        targets(tmp_path, **values)
    assert str(tmp_path / "adapter_config.json") in str(error.value)


@pytest.mark.parametrize(
    ("expression", "projections"),
    [
        (r".*language_model.*\.(q_proj|v_proj)", "qv"),
        (r"language_model\.layers\.\d+\.self_attn\.k_proj|language_model\.layers\.\d+\.self_attn\.o_proj", "ko"),
        (r"(?:language_model\.)+(?:\w+\.)*q_proj", "q"),  # groups that repeat are matched in a process of their own
        (r"(?=language).*?(?:\w+).*?(?:self_attn).*?(?:q_proj|v_proj).*?", "qv"),
    ],
)
def test_one_expression_matches_whole_names(expression, projections, tmp_path):
    assert targets(tmp_path, target_modules=expression) == tuple(map(LAYER.format, projections))


def test_an_expression_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_files, "_MATCHING_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(MossAudioError, match="takes more than 1 s to match"):
        targets(tmp_path, target_modules=r"(([a-z_.0-9]+)+)+X")
    assert time.monotonic() - began < 60
