"""MOSS-Audio in JAX/Flax: what the model is and how to run it."""

from moss_audio_jax.checkpoint import load_adapter, load_model, merge_adapter, save_model
from moss_audio_jax.config import LoraConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generate import generate, stream
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor, load_processor

__all__ = [
    "LoraConfig",
    "ModelInputs",
    "MossAudio",
    "MossAudioConfig",
    "MossAudioError",
    "Processor",
    "generate",
    "load_adapter",
    "load_model",
    "load_processor",
    "make_inputs",
    "merge_adapter",
    "save_model",
    "stream",
]
