"""Turns questions and sounds into `ModelInputs`, and generated ids back into text."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, load_audio, model_mel, num_audio_tokens, resample
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT, build_prompt
from moss_audio_jax.sound.streams import require_rate
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.locate import processor_directories

# A path, bytes, a file, an array or tensor, (array, rate), {"array": ..., "sampling_rate": ...}: see Processor.mel.
ClipLike = Any


class Processor:
    """The steps around the network that a checkpoint defines: tokenizer, prompt, time markers, mel."""

    def __init__(self, tokenizer: Tokenizer, config: MossAudioConfig):
        vocab_size = config.language_config.vocab_size
        if tokenizer.size > vocab_size:  # JAX would take the last embedding for larger ids
            raise MossAudioError(
                f"the tokenizer has ids up to {tokenizer.size - 1}, and the vocab_size of "
                f"{config.directory or 'the model'} is {vocab_size}: use the tokenizer of this model"
            )
        self.tokenizer = tokenizer
        self.config = config

    @classmethod
    def from_dir(cls, directory: AnyPath) -> Self:
        return cls(Tokenizer.from_dir(directory), MossAudioConfig.from_hf(directory))

    def __call__(
        self,
        texts: str | Sequence[str],
        audio: ClipLike | Sequence[ClipLike] | Sequence[Sequence[ClipLike]] | None = None,
        *,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        time_markers: bool | None = None,
    ) -> ModelInputs:
        """Makes a batch of prompts.

        texts: a question for each sequence, or a whole prompt with audio spans in it (see `prompts.build_prompt`).
        audio: for each text a list of its clips in order, or its only clip; with one text also the clips themselves:
            processor("Which is louder?", ["a.wav", "b.wav"]), processor("Transcribe the audio.", "a.wav").
            `mel` lists the kinds of clips.
        time_markers: None takes the checkpoint's `enable_time_marker`.
        """
        one = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else list(texts)
        audio = _clips_of_texts(audio, len(texts), one)
        mels = [[self.mel(clip) for clip in clips] for clips in audio]
        token_ids = [
            build_prompt(
                self.tokenizer,
                text,
                [num_audio_tokens(mel.shape[1]) for mel in clips],
                system_prompt=system_prompt,
                time_markers=time_markers,
                processor=self.config.processor,
            )
            for text, clips in zip(texts, mels, strict=True)
        ]
        return make_inputs(token_ids, mels, config=self.config)

    def mel(self, clip: ClipLike) -> np.ndarray:
        """Computes the log-mel [mel bins, frames], rounded to bfloat16 like the reference's, for any model dtype.

        clip: an audio file as a path (str, PathLike), as bytes, or opened to read bytes; a mono float wave [samples] at
            16 kHz, as an array of NumPy, JAX or PyTorch; (wave, rate); or, as in Hugging Face's datasets,
            {"array": wave, "sampling_rate": rate} or {"bytes": ..., "path": ...}.
        """
        return model_mel(*_wave(clip))

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Returns the text of one answer; drops ids without text."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens)


def load_processor(path: AnyPath) -> Processor:
    """Loads the processor of a checkpoint that `load_model` reads."""
    tokenizer, config = processor_directories(path)
    return Processor(Tokenizer.from_dir(tokenizer), MossAudioConfig.from_hf(config))


def _clips_of_texts(audio: Any, texts: int, one: bool) -> list[list[ClipLike]]:
    """Returns a list of clips for each text. one: the text was given without a list."""
    if audio is None:
        return [[] for _ in range(texts)]
    if _is_clip(audio):
        audio = [audio]
    elif not isinstance(audio, Sequence):
        raise MossAudioError(
            f"audio must be a clip, a list of clips, or a list of clips for each text, not {_shown(audio)}: {_CLIPS}"
        )
    elif texts == 1 and (audio or one) and all(map(_is_clip, audio)):
        audio = [audio]
    lists = [_clips_of_text(clips) for clips in audio]
    if len(lists) != texts:
        raise MossAudioError(
            f"{texts} texts but {len(lists)} lists of clips: give audio=[[clip, ...], ...], one list a text"
        )
    return lists


def _clips_of_text(clips: Any) -> list[ClipLike]:
    if clips is None:
        return []
    if _is_clip(clips):
        return [clips]
    if not isinstance(clips, Sequence):
        raise MossAudioError(f"the clips of a text must be a list, not {_shown(clips)}: {_CLIPS}")
    for clip in clips:
        if not _is_clip(clip):
            raise MossAudioError(f"a clip must be a sound, not {_shown(clip)}: {_CLIPS}")
    return list(clips)


_CLIPS = (
    "give paths, bytes, opened files, float waves at 16 kHz, (wave, rate) or {'array': wave, 'sampling_rate': rate}"
)


def _shown(thing: Any) -> str:
    return f"{type(thing).__name__} {str(thing)[:40]!r}"


def _is_clip(thing: Any) -> bool:
    return (
        isinstance(thing, str | os.PathLike | bytes | bytearray | memoryview)
        or (isinstance(thing, Mapping) and ({"array", "bytes", "path"} & thing.keys()) != set())
        or hasattr(thing, "get_all_samples")  # a decoder of torchcodec, as in datasets 4
        or hasattr(thing, "__array__")
        or hasattr(thing, "read")
        or _is_wave_with_rate(thing)
    )


def _is_wave_with_rate(thing: Any) -> bool:
    return (
        isinstance(thing, tuple)
        and len(thing) == 2
        and hasattr(thing[0], "__array__")
        and isinstance(thing[1], int | float | np.integer | np.floating)
    )


def _wave(clip: ClipLike) -> tuple[np.ndarray, str]:
    """Returns the wave, float [samples] at 16 kHz, and a name of the clip for errors."""
    if isinstance(clip, Mapping) and clip.get("array") is None and "sampling_rate" not in clip:
        clip, name = clip.get("bytes") or clip.get("path"), clip.get("path")
        if clip is None:
            raise MossAudioError(
                f"a clip given as a dict must hold an array, bytes or a path, not none of them: {_CLIPS}"
            )
        return load_audio(clip, name=name), name or "audio bytes"
    if isinstance(clip, Mapping) or hasattr(clip, "get_all_samples"):
        return _at_16_khz(_item(clip, "array"), _item(clip, "sampling_rate"))
    if _is_wave_with_rate(clip):
        return _at_16_khz(*clip)
    if isinstance(clip, bytearray | memoryview):
        clip = bytes(clip)
    if isinstance(clip, bytes):
        return load_audio(clip), "audio bytes"
    if isinstance(clip, str | os.PathLike):
        return load_audio(clip), os.fspath(clip)
    if hasattr(clip, "__array__"):
        return _at_16_khz(clip, SAMPLE_RATE)
    if hasattr(clip, "read"):
        name = str(getattr(clip, "name", "an opened file"))
        content = clip.read()
        if not isinstance(content, bytes):
            raise MossAudioError(f"{name} must be opened to read bytes, not {type(content).__name__}: open(path, 'rb')")
        return load_audio(content, name=name), name
    raise MossAudioError(f"a clip must be a sound, not {_shown(clip)}: {_CLIPS}")


def _item(clip: Any, key: str) -> Any:
    try:
        return clip[key]
    except KeyError as error:
        raise MossAudioError(f"a clip given as a dict must hold {key!r}, not only {sorted(clip)}: {_CLIPS}") from error


def _at_16_khz(array: Any, rate: Any) -> tuple[np.ndarray, str]:
    name = "a clip given as an array"
    try:
        wave = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # PyTorch tensors on a GPU, in bfloat16, with a gradient
        raise MossAudioError(f"{name} can't be converted to NumPy ({error}): convert it first") from error
    if wave.ndim == 2 and 1 in wave.shape and wave.size > 1:  # one channel, first or last
        wave = wave.reshape(-1)
    if rate != SAMPLE_RATE:
        rate = require_rate(rate, name)
        if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
            return wave, name  # log_mel raises what it must be
        wave = resample(wave.astype(np.float32, copy=False), rate, SAMPLE_RATE)
    return wave, name
