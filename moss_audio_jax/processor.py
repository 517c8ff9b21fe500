"""From questions and sounds to `ModelInputs`, and from generated ids back to text."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, load_audio, log_mel, num_audio_tokens, round_bfloat16
from moss_audio_jax.checkpoint import processor_directories
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.paths import AnyPath
from moss_audio_jax.tokens import DEFAULT_SYSTEM_PROMPT, Tokenizer, build_prompt

Clip = np.ndarray | AnyPath | bytes


class Processor:
    """Everything around the network that a checkpoint defines: tokenizer, prompt, time markers, mel."""

    def __init__(self, tokenizer: Tokenizer, config: MossAudioConfig):
        vocab_size = config.language_config.vocab_size
        if tokenizer.size > vocab_size:  # JAX would take the last embedding for ids past it
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
        audio: Sequence[Sequence[Clip]] | None = None,
        *,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        time_markers: bool | None = None,
    ) -> ModelInputs:
        """A batch of prompts.

        texts: a question for each sequence (or one whole prompt with audio spans in it: see `tokens.build_prompt`).
        audio: for each sequence its clips in order, each a path, the bytes of an audio file, or a mono float wave
            [samples] at 16 kHz.
        time_markers: None takes the checkpoint's `enable_time_marker`.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        audio = [[] for _ in texts] if audio is None else list(audio)
        if len(texts) != len(audio):
            raise MossAudioError(
                f"{len(texts)} texts but {len(audio)} lists of clips: give audio=[[clip, ...], ...], one list a text"
            )
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

    def mel(self, clip: Clip) -> np.ndarray:
        """Log-mel [mel bins, frames], rounded to bfloat16 as the reference rounds it whatever the model's dtype."""
        if isinstance(clip, np.ndarray):
            wave, name = clip, "a clip given as an array"
        else:
            wave, name = load_audio(clip, sample_rate=SAMPLE_RATE), "audio bytes" if isinstance(clip, bytes) else clip
        try:
            return round_bfloat16(log_mel(wave))
        except MossAudioError as error:
            raise MossAudioError(f"{name}: {error}") from error

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Text of one answer; ids without text are dropped."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens)


def load_processor(path: AnyPath) -> Processor:
    """The processor of whatever `load_model` reads."""
    tokenizer, config = processor_directories(path)
    return Processor(Tokenizer.from_dir(tokenizer), MossAudioConfig.from_hf(config))
