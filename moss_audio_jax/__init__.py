"""MOSS-Audio in JAX/Flax: the model, its weights, and generation.

Names are imported on first use (PEP 562): `import moss_audio_jax` and `--help` of the commands import no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_audio_jax.config import LoraConfig, MossAudioConfig
    from moss_audio_jax.errors import MossAudioError
    from moss_audio_jax.generation import generate, stream
    from moss_audio_jax.inference.choices import choose
    from moss_audio_jax.inference.engine import Engine, Request
    from moss_audio_jax.inference.sessions import listen
    from moss_audio_jax.inputs import ModelInputs, make_inputs
    from moss_audio_jax.model import MossAudio
    from moss_audio_jax.processor import Processor, load_processor
    from moss_audio_jax.sampling_config import Sampling
    from moss_audio_jax.timelines.timeline import Timeline
    from moss_audio_jax.weights.checkpoint import load_adapter, load_model, merge_adapter, save_model

_MODULES = {
    "Engine": "inference.engine",
    "LoraConfig": "config",
    "ModelInputs": "inputs",
    "MossAudio": "model",
    "MossAudioConfig": "config",
    "MossAudioError": "errors",
    "Processor": "processor",
    "Request": "inference.engine",
    "Sampling": "sampling_config",
    "Timeline": "timelines.timeline",
    "choose": "inference.choices",
    "generate": "generation",
    "listen": "inference.sessions",
    "load_adapter": "weights.checkpoint",
    "load_model": "weights.checkpoint",
    "load_processor": "processor",
    "make_inputs": "inputs",
    "merge_adapter": "weights.checkpoint",
    "save_model": "weights.checkpoint",
    "stream": "generation",
}
__all__ = [
    "Engine",
    "LoraConfig",
    "ModelInputs",
    "MossAudio",
    "MossAudioConfig",
    "MossAudioError",
    "Processor",
    "Request",
    "Sampling",
    "Timeline",
    "choose",
    "generate",
    "listen",
    "load_adapter",
    "load_model",
    "load_processor",
    "make_inputs",
    "merge_adapter",
    "save_model",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
