"""Compares the JAX model with the PyTorch model: one sound through both, stage by stage."""

import dataclasses
import functools
import gc
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import log_softmax

from moss_audio_jax.audio import SAMPLE_RATE, load_audio, model_mel, num_audio_tokens
from moss_audio_jax.compilation import jit
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.model import MossAudio
from moss_audio_jax.prompts import audio_span, build_prompt
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.checkpoint import load_model
from moss_audio_jax.weights.locate import locate

SYNTHETIC_SECONDS = 9.3  # three chunks, the last with padding, and four time markers
QUESTION = "Transcribe the audio."
PLAIN_IDS = 24  # text tokens around the audio where there is no tokenizer
TOP_K = 5


@dataclasses.dataclass(frozen=True)
class Sound:
    name: str
    wave: np.ndarray  # float32 [samples] at 16 kHz

    @classmethod
    def load(cls, path: AnyPath | None) -> Self:
        """A sound file; None takes a synthetic clip."""
        if path is None:
            return cls(f"a synthetic clip of {SYNTHETIC_SECONDS} s", synthetic_clip())
        return cls(str(path), load_audio(path))


@dataclasses.dataclass(frozen=True)
class StageError:
    """The largest absolute error of a stage, and the same relative to the reference's largest magnitude."""

    stage: str
    max_abs_error: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """Errors of the JAX model's stages, and the differences of its next-token distributions from PyTorch's.

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


def compare_models(
    released: Path, checkpoint: AnyPath, sound: Sound, dtype: str, int8: tuple[str, ...] = ()
) -> ModelComparison:
    """Compares PyTorch on `released` with JAX on `checkpoint`, one after the other: one model is in memory at a time.

    dtype: of both models' weights and computations. int8: see `load_model`.
    """
    from convert.pytorch_reference import reference_stages  # PyTorch may be missing

    config = MossAudioConfig.from_hf(locate(checkpoint, weights=False).files)
    mel = model_mel(sound.wave, sound.name)
    ids = prompt_ids(released, config, num_audio_tokens(mel.shape[1]))
    expected = reference_stages(released, ids, [mel], config.processor.audio_token_id, dtype)
    gc.collect()
    found = jax_stages(checkpoint, config, ids, mel, dtype, int8)
    stages = [stage_error(stage, expected[stage], found[stage]) for stage in expected]
    return ModelComparison(
        sound.name, len(ids), dtype, stages, **distribution_errors(expected["logits"], found["logits"])
    )


def synthetic_clip() -> np.ndarray:
    """Makes a varied sound, always the same: rising harmonics, bursts of noise, and silence."""
    time = np.arange(int(SYNTHETIC_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * (110 * time + 25 * time**2)
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 9))
    noise = np.random.default_rng(0).standard_normal(time.size) * (np.sin(2 * np.pi * 1.7 * time) > 0.6)
    envelope = np.sin(2 * np.pi * 0.4 * time) ** 2 * (time < SYNTHETIC_SECONDS - 1)
    return (0.2 * envelope * (harmonics + noise)).astype(np.float32)


def prompt_ids(directory: Path, config: MossAudioConfig, clip_tokens: int) -> list[int]:
    """Encodes a question about one clip; without a tokenizer, ids from the whole vocabulary around the clip."""
    processor = config.processor
    location = locate(directory)
    if location.tokenizer_files():
        return build_prompt(Tokenizer.from_dir(location.files), QUESTION, [clip_tokens], processor=processor)
    vocabulary = min(config.language_config.vocab_size, processor.audio_token_id)
    text = [index * vocabulary // PLAIN_IDS for index in range(PLAIN_IDS)]
    span = audio_span(clip_tokens, processor.enable_time_marker, processor)
    half = PLAIN_IDS // 2
    return [*text[:half], processor.audio_start_id, *span, processor.audio_end_id, *text[half:]]


def jax_stages(
    checkpoint: AnyPath, config: MossAudioConfig, ids: list[int], mel: np.ndarray, dtype: str, int8: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Runs the JAX model: stage -> values at audio tokens, for the logits at all positions; float32 [tokens, width]."""
    inputs = make_inputs([ids], [[mel]], config=config)
    slots = inputs.audio_slots[0][inputs.audio_slots[0] >= 0]
    graphdef, state = nnx.split(load_model(checkpoint, dtype=dtype, int8=int8))
    with jax.default_matmul_precision("highest"):
        stages = _compiled_stages(graphdef, state, inputs, slots, np.arange(len(ids)))
    return {stage: np.asarray(values, np.float32) for stage, values in stages.items()}


@functools.partial(jit, static_argnums=0)
def _compiled_stages(
    graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs, slots: jax.Array, positions: jax.Array
) -> dict[str, jax.Array]:
    model: MossAudio = nnx.merge(graphdef, state)
    encoded, taps = model.audio_encoder(inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)
    adapted, merged = model.encode_audio(inputs)
    # The pass of generation reads layers in place; the pass of training copies most of a stack.
    x, deepstack = model.embed(inputs)
    counts = (inputs.segment_ids != 0).sum(1, dtype=jnp.int32)
    hidden, _ = model.language_model.prefill(x, counts, x.shape[1], deepstack)
    logits = model.logits(hidden)
    return {
        "encoder": encoded[0, slots],
        **{f"tap {k}": tap[0, slots] for k, tap in enumerate(taps)},
        "adapter": adapted[0, slots],
        **{f"merged {k}": values[0, slots] for k, values in enumerate(merged)},
        "logits": logits[0, positions],
    }


def stage_error(stage: str, expected: np.ndarray, found: np.ndarray) -> StageError:
    difference = float(np.abs(expected - found).max())
    return StageError(stage, difference, difference / (float(np.abs(expected).max()) or 1.0))


def distribution_errors(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The last four fields of `ModelComparison`, from logits [positions, vocabulary]."""
    kl, top_1, overlap = [], [], []
    for reference, logits in zip(expected, found, strict=True):
        log_p, log_q = log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))
        kl.append(float(np.sum(np.exp(log_p) * (log_p - log_q))))
        best, candidates = np.argsort(-reference)[:TOP_K], np.argsort(-logits)[:TOP_K]
        top_1.append(best[0] == candidates[0])
        overlap.append(len(np.intersect1d(best, candidates)) / len(best))
    return {
        "max_kl": max(kl),
        "mean_kl": float(np.mean(kl)),
        "top_1_agreement": float(np.mean(top_1)),
        "top_k_overlap": float(np.mean(overlap)),
    }
