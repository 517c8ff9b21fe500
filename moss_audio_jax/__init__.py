"""MOSS-Audio in JAX/Flax: what the model is and how to run it."""

import os
import signal
import sys

# The commands end at Ctrl-C during the imports below too, which take seconds; `interruption` takes over after them.
# "-m" is the program's name while Python looks for the module that `python -m` names.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and os.path.basename(
    sys.argv[0] if sys.argv else ""
) in ("-m", "moss-audio", "moss-audio-convert", "moss-audio-train"):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from moss_audio_jax.config import LoraConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import generate, stream
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor, load_processor
from moss_audio_jax.weights.checkpoint import load_adapter, load_model, merge_adapter, save_model

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
