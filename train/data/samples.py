"""One example as the model reads it: decoded, log-mel, tokenised, with the tokens to learn marked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from moss_audio_jax.audio import log_mel, num_audio_tokens, round_bfloat16
from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.tokens import Tokenizer, Turn, build_conversation
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.objectives import Rendered, render

END_OF_TEXT = "<|endoftext|>"  # what Qwen puts after a text that is not a conversation
FRAMES_PER_SECOND = 100
TOKENS_PER_SECOND = FRAMES_PER_SECOND / DOWNSAMPLE_RATE


@dataclass(frozen=True)
class Sample:
    """An example, tokenised.

    inputs: a batch of one sequence, its tokens padded, its chunks in bfloat16.
    learned: bool [num_tokens], True at the ids to learn.
    heard: int32 [num_tokens], at audio tokens an id that says what is heard there or when it is, see `_heard`; -1 where
        nothing is to be learned.
    """

    name: str
    inputs: ModelInputs
    learned: np.ndarray
    heard: np.ndarray
    num_chunks: int

    @property
    def num_tokens(self) -> int:
        return len(self.learned)

    @property
    def audio_seconds(self) -> float:
        return float(self.inputs.chunk_frames.sum()) / FRAMES_PER_SECOND

    def truncated(self, num_tokens: int) -> "Sample | None":
        """The first `num_tokens` tokens; None if that cuts audio off or leaves nothing to learn."""
        if (self.inputs.audio_slots[0, num_tokens:] >= 0).any() or not self.learned[1:num_tokens].any():
            return None
        return replace(self, learned=self.learned[:num_tokens], heard=self.heard[:num_tokens])


class SampleMaker:
    """From examples to samples. Cheap to send to worker processes, where it does the work."""

    def __init__(self, tokenizer: Tokenizer, config: MossAudioConfig, *, time_markers: bool | None = None):
        """time_markers: None takes the checkpoint's `enable_time_marker`."""
        if config.audio_config.chunk_frames is None:
            raise MossAudioError(
                "expected an encoder with chunks of a fixed length to train on packed sequences, "
                "found chunk_frames=None (n_window null); set it, released models have 400."
            )
        self._tokenizer = tokenizer
        self._config = config
        self.time_markers = config.processor.enable_time_marker if time_markers is None else time_markers
        self._quiet, self._begins, self._ends = (tokenizer.encode(mark)[0] for mark in ".[]")
        self._digits = np.array([tokenizer.encode(str(digit))[0] for digit in range(10)], np.int32)

    def __call__(
        self, example: Example, rng: np.random.Generator, objectives: Mapping[str, float] | None = None
    ) -> Sample:
        """Raises MossAudioError that names the example if a clip can't be read or nothing can be asked about it."""
        return self.sample(example.name, render(example, rng, objectives), example.events or example.words, rng)

    def sample(
        self,
        name: str,
        rendered: Rendered,
        labels: Sequence[TimedText] = (),
        rng: np.random.Generator | None = None,
    ) -> Sample:
        """A sample of the turns of a conversation, or of a plain text and the mark of its end, all of it learned.

        labels: what is heard in its only clip, and when. rng: decides what is said of each of its audio tokens.
        """
        try:
            ids, learned, mels = self._plain_text(rendered) if isinstance(rendered, str) else self._turns(rendered)
            inputs = make_inputs([ids], [mels], config=self._config)
        except MossAudioError as error:
            # Errors of audio name the clip, and so the example, themselves.
            raise error if str(error).startswith(name) else MossAudioError(f"{name}: {error}") from error
        num_chunks = int((inputs.chunk_frames > 0).sum())
        # Rounded to bfloat16 already, and half as large to keep, to hand to another process and to send to a device.
        chunks = inputs.audio_chunks[:, :num_chunks].astype(ml_dtypes.bfloat16)
        heard = self._heard(inputs.audio_slots[0, : len(ids)], labels, rng or np.random.default_rng(0))
        return Sample(name, replace(inputs, audio_chunks=chunks), np.asarray(learned, bool), heard, num_chunks)

    def _heard(self, slots: np.ndarray, labels: Sequence[TimedText], rng: np.random.Generator) -> np.ndarray:
        """Ids [tokens] at the audio tokens of a labelled clip, each of them one of three things by chance.

        Half of them say what is heard: the first id of the label's text, "[" and "]" where it begins and ends, "."
        where nothing is. The others say when that is, at the middle of the token: the digit of the tenths of a second,
        or that of the whole seconds.
        """
        heard = np.full(len(slots), -1, np.int32)
        if not labels:
            return heard
        audio = np.flatnonzero(slots >= 0)
        times = (slots[audio] + 0.5) / TOKENS_PER_SECOND
        said = np.full(len(audio), self._quiet, np.int32)
        for label in labels:
            first, last = (int(time * TOKENS_PER_SECOND) for time in (label.start, label.end))
            said[first : last + 1] = self._tokenizer.encode(label.text)[0]
            said[first : first + 1], said[last : last + 1] = self._begins, self._ends
        tenths = self._digits[(times * 10).astype(int) % 10]
        seconds = self._digits[times.astype(int) % 10]
        heard[audio] = np.choose(rng.choice(3, len(audio), p=(0.5, 0.25, 0.25)), (said, tenths, seconds))
        return heard

    def _plain_text(self, text: str) -> tuple[list[int], list[bool], list[np.ndarray]]:
        ids = self._tokenizer.encode(text + END_OF_TEXT)
        return ids, [True] * len(ids), []

    def _turns(self, messages: tuple[Message, ...]) -> tuple[list[int], list[bool], list[np.ndarray]]:
        turns, mels = turns_and_mels(messages, _mel)
        ids, learned = build_conversation(
            self._tokenizer, turns, time_markers=self.time_markers, processor=self._config.processor
        )
        return ids, learned, mels


def turns_and_mels(
    messages: Sequence[Message], mel: Callable[[Clip], np.ndarray]
) -> tuple[list[Turn], list[np.ndarray]]:
    """Messages with the number of its tokens in each clip's place, and the mels [mel bins, frames] of the clips."""
    mels: list[np.ndarray] = []
    turns = []
    for message in messages:
        pieces: list[str | int] = []
        for piece in message.content:
            if isinstance(piece, Clip):
                mels.append(mel(piece))
                pieces.append(num_audio_tokens(mels[-1].shape[1]))
            else:
                pieces.append(piece)
        turns.append(Turn(message.role, pieces))
    return turns, mels


def _mel(clip: Clip) -> np.ndarray:
    """Log-mel [mel bins, frames] as `Processor.mel` makes it."""
    wave = clip.wave()
    try:
        return round_bfloat16(log_mel(wave))
    except MossAudioError as error:
        raise MossAudioError(f"{clip.name}: {error}") from error
