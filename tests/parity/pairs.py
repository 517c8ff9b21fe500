"""A random model on both sides: one released directory, read by the PyTorch reference and by the port."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from convert.pytorch_reference import ReferenceModel, load_reference, token_count
from moss_audio_jax import ModelInputs, MossAudio, load_model, make_inputs
from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.prompts import audio_span
from moss_audio_jax.weights.names import IGNORED_TENSORS

from .reference import IGNORED_LABEL, random_reference, save_released

# Tensors this small gain nothing from threads, which wait for one another where the machine is busy.
torch.set_num_threads(1)

VOCABULARY = 96
PROCESSOR = ProcessorConfig(audio_token_id=95, audio_start_id=94, audio_end_id=93)
TEXT_IDS = (25, 93)  # below them are the digits of the time markers

# Sizes differ where they can, so that an array laid out the wrong way does not fit.
CONFIG: dict[str, Any] = {
    "model_type": "moss_audio",
    "architectures": ["MossAudioModel"],
    "adapter_hidden_size": 36,
    "deepstack_num_inject_layers": 3,
    "tie_word_embeddings": False,
    "audio_config": {
        "d_model": 24,
        "output_dim": 24,
        "num_mel_bins": 128,
        "encoder_layers": 5,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 44,
        "downsample_hidden_size": 5,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "layer_norm_eps": 1e-5,
        "deepstack_encoder_layer_indexes": [0, 1, 3],
    },
    "language_config": {
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
    },
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """CONFIG with some of its values replaced; those of its two inner tables key by key."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return config


@dataclass(frozen=True)
class Pair:
    reference: ReferenceModel
    model: MossAudio


def make_pair(
    config: dict[str, Any],
    directory: Path,
    *,
    seed: int,
    shards: int = 1,
    rewrite: Callable[[Path], None] = lambda directory: None,
) -> Pair:
    """Random weights, written once and read by both. rewrite: changes the files to a form that only the port reads."""
    save_released(random_reference(config, seed), directory, shards)
    reference = load_reference(directory)
    rewrite(directory)
    return Pair(reference, load_model(directory))


def move_rope_theta(directory: Path) -> None:
    """config.json as transformers 5 writes it, with `rope_parameters`; 4.57.1 would not read the theta in there."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    language = config["language_config"]
    language["rope_parameters"] = {"rope_type": "default", "rope_theta": language.pop("rope_theta")}
    path.write_text(json.dumps(config), "utf-8")


def store_sinusoid_rates(directory: Path) -> None:
    """Adds the buffer that MOSS-Music's files hold, with values that would show if they were used."""
    path = directory / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(12) for name in IGNORED_TENSORS}, path)


@dataclass(frozen=True)
class Prompt:
    """One sequence of ids and the mels [mel bins, frames] of its clips."""

    name: str
    ids: list[int]
    mels: list[np.ndarray]

    @property
    def labels(self) -> list[int]:
        """Labels of the loss: all but audio."""
        return [IGNORED_LABEL if token == PROCESSOR.audio_token_id else token for token in self.ids]

    @property
    def torch_inputs(self) -> tuple[Any, list[Any], int]:
        """Arguments of the reference."""
        return torch.tensor([self.ids]), [torch.from_numpy(mel) for mel in self.mels], PROCESSOR.audio_token_id


def make_prompt(clips: list[int], *, time_markers: bool = False, mel_bins: int = 128, seed: int = 0) -> Prompt:
    """Random clips with these numbers of mel frames, with random text before, between and after them."""
    rng = np.random.default_rng([seed, *clips])
    ids = rng.integers(*TEXT_IDS, 4).tolist()
    for frames in clips:
        span = audio_span(token_count(frames), time_markers, PROCESSOR)
        ids += [PROCESSOR.audio_start_id, *span, PROCESSOR.audio_end_id, *rng.integers(*TEXT_IDS, 3).tolist()]
    ids += rng.integers(*TEXT_IDS, 5).tolist()
    mels = [rng.uniform(-1.0, 1.5, (mel_bins, frames)).astype(np.float32) for frames in clips]
    return Prompt(f"clips {clips}{' with time markers' * time_markers}", ids, mels)


def make_batch(prompts: list[Prompt], model: MossAudio) -> ModelInputs:
    ids, mels = [prompt.ids for prompt in prompts], [prompt.mels for prompt in prompts]
    return make_inputs(ids, mels, config=model.config, audio_token_id=PROCESSOR.audio_token_id)
