"""Does the JAX model compute what PyTorch computes? One sound through both, compared stage by stage."""

import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moss_audio_jax.audio import SAMPLE_RATE, load_audio, log_mel, num_audio_tokens, round_bfloat16
from moss_audio_jax.checkpoint import load_model, tokenizer_files
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.layers import map_layers
from moss_audio_jax.model import MossAudio
from moss_audio_jax.tokens import Tokenizer, audio_span, build_prompt

SYNTHETIC_SECONDS = 9.3  # three chunks, the last of them partly empty, and four time markers
QUESTION = "Transcribe the audio."
PLAIN_IDS = 24  # text tokens around the audio where there is no tokenizer
TOP_K = 5


@dataclasses.dataclass(frozen=True)
class StageError:
    """The largest difference of a stage, and that divided by the reference's largest magnitude."""

    stage: str
    max_abs_error: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """Errors of the JAX model's stages, and how its next-token distributions differ from PyTorch's.

    kl: Kullback-Leibler divergence from PyTorch's distribution to JAX's, in nats. top_1_agreement: the share of
    positions with the same likeliest token. top_k_overlap: the mean share of PyTorch's TOP_K tokens among JAX's.
    """

    audio: str
    positions: int
    dtype: str
    stages: list[StageError]
    max_kl: float
    mean_kl: float
    top_1_agreement: float
    top_k_overlap: float


def compare_models(released: Path, checkpoint: Path, audio: Path | None, dtype: str) -> ModelComparison:
    """PyTorch on `released` against JAX on `checkpoint`, one after the other so that one model is in memory.

    audio: a sound file; None takes a synthetic clip. dtype: of both models' weights and computations.
    """
    from convert.pytorch_reference import reference_stages  # PyTorch may be missing

    config = MossAudioConfig.from_hf(checkpoint)
    wave = synthetic_clip() if audio is None else load_audio(audio)
    mel = round_bfloat16(log_mel(wave))
    ids = prompt_ids(released, config, num_audio_tokens(mel.shape[1]))
    expected = reference_stages(released, ids, [mel], config.processor.audio_token_id, dtype)
    gc.collect()
    found = jax_stages(checkpoint, config, ids, mel, dtype)
    name = f"synthetic clip of {SYNTHETIC_SECONDS} s" if audio is None else str(audio)
    stages = [_stage_error(stage, expected[stage], found[stage]) for stage in expected]
    return ModelComparison(
        name, len(ids), dtype, stages, **_distribution_errors(expected["logits"], found["logits"])
    )


def synthetic_clip() -> np.ndarray:
    """A sound like no other, always the same: rising harmonics, bursts of noise, and silence."""
    time = np.arange(int(SYNTHETIC_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * (110 * time + 25 * time**2)
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 9))
    noise = np.random.default_rng(0).standard_normal(time.size) * (np.sin(2 * np.pi * 1.7 * time) > 0.6)
    envelope = np.sin(2 * np.pi * 0.4 * time) ** 2 * (time < SYNTHETIC_SECONDS - 1)
    return (0.2 * envelope * (harmonics + noise)).astype(np.float32)


def prompt_ids(directory: Path, config: MossAudioConfig, clip_tokens: int) -> list[int]:
    """A question about one clip or, without a tokenizer, ids from all over the vocabulary around it."""
    processor = config.processor
    if tokenizer_files(directory):
        return build_prompt(Tokenizer.from_dir(directory), QUESTION, [clip_tokens], processor=processor)
    vocabulary = min(config.language_config.vocab_size, processor.audio_token_id)
    text = [index * vocabulary // PLAIN_IDS for index in range(PLAIN_IDS)]
    span = audio_span(clip_tokens, processor.enable_time_marker, processor)
    half = PLAIN_IDS // 2
    return [*text[:half], processor.audio_start_id, *span, processor.audio_end_id, *text[half:]]


def jax_stages(
    checkpoint: Path, config: MossAudioConfig, ids: list[int], mel: np.ndarray, dtype: str
) -> dict[str, np.ndarray]:
    """Stage -> its valid tokens [tokens, width], in float32."""
    inputs = make_inputs([ids], [[mel]], config=config)
    slots = inputs.audio_slots[0][inputs.audio_slots[0] >= 0]
    model = load_model(checkpoint, dtype=jnp.dtype(dtype))
    with jax.default_matmul_precision("highest"):
        stages = _compiled_stages(*nnx.split(model), inputs)
    return {
        stage: np.asarray(array[0], np.float32)[: len(ids) if stage == "logits" else None][
            ... if stage == "logits" else slots
        ]
        for stage, array in stages.items()
    }


@jax.jit
def _unused() -> None: ...


def _stage_error(stage: str, expected: np.ndarray, found: np.ndarray) -> StageError:
    difference = float(np.abs(expected - found).max())
    return StageError(stage, difference, difference / max(float(np.abs(expected).max()), 1e-30))
