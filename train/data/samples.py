"""Samples: an example -> token ids, loss mask, and mel chunks.

Supervised tokens are those of answers, each with the <|im_end|> after it: of all answers of a conversation, or of the
last one (`answers`). The thought of a Thinking model is an answer's text up to `</think>`, as in Qwen3's chat template;
it is supervised or masked (`thoughts`).

Qwen3's template removes the thoughts of earlier turns from a prompt. So does `answers="last"`: its sequence equals the
prompt at inference. With `answers="all"` earlier thoughts stay in the sequence: later turns attend to them, in training
only.

A plain text longer than a sequence becomes several samples that together supervise all of it (`SampleMaker.fitting`).
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from moss_audio_jax.audio import mel_frames, model_mel, num_audio_tokens
from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, encode_sequence
from moss_audio_jax.prompts import Turn, build_conversation
from moss_audio_jax.storage.paths import is_remote
from moss_audio_jax.tokenizer import Tokenizer
from train.data.augment import Augmentation, VariedClip, in_own_time
from train.data.budget import Budget, Extent, TooLong, split_text
from train.data.config import Answers, AugmentConfig, Thoughts
from train.data.manifest import THOUGHT_END, Clip, Example, Message, TimedText
from train.data.objectives import Rendered, render

END_OF_TEXT = "<|endoftext|>"  # Qwen's end of a text that is not a conversation
FRAMES_PER_SECOND = 100
TOKENS_PER_SECOND = FRAMES_PER_SECOND / DOWNSAMPLE_RATE


@dataclass(frozen=True)
class Sample:
    """An example, tokenised.

    inputs: a batch of one sequence, unpadded, its chunks in bfloat16.
    loss_mask: bool [num_tokens], True at the ids to learn.
    audio_labels: int32 [num_tokens], at audio tokens an id of the event there or of its time, see `_audio_labels`; -1
        where nothing is to be learned.
    truncated: whether it has lost its end.
    """

    name: str
    inputs: ModelInputs
    loss_mask: np.ndarray
    audio_labels: np.ndarray
    num_chunks: int
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.loss_mask)

    @property
    def audio_seconds(self) -> float:
        return float(self.inputs.chunk_frames.sum()) / FRAMES_PER_SECOND

    def within(self, budget: Budget, *, truncate: bool) -> "Sample":
        """Returns the sample, truncated as `Extent.within` says, without chunks of dropped clips. Raises TooLong."""
        tokens_per_chunk = self.inputs.audio_chunks.shape[2] // DOWNSAMPLE_RATE
        extent = Extent(self.loss_mask, self.inputs.audio_slots[0, : self.num_tokens], tokens_per_chunk)
        kept = extent.within(budget, truncate=truncate)
        if kept is None:
            raise budget.exceeded(self.name, f"{self.num_tokens} and {self.num_chunks}")
        if kept == self.num_tokens:
            return self
        chunks = extent.chunks(kept)
        whole = {name: getattr(self.inputs, name) for name in ("audio_chunks", "chunk_frames", "stem_frames")}
        inputs = replace(self.inputs, **{name: array[:, :chunks] for name, array in whole.items()})
        return replace(
            self,
            inputs=inputs,
            loss_mask=self.loss_mask[:kept],
            audio_labels=self.audio_labels[:kept],
            num_chunks=chunks,
            truncated=True,
        )


class SampleMaker:
    """Makes samples from examples. Cheap to send to worker processes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: MossAudioConfig,
        *,
        time_markers: bool | None = None,
        answers: Answers = "all",
        thoughts: Thoughts = "learn",
        label_times: bool = True,
        default_prompt: str = "",
        augmentation: Augmentation | None = None,
    ):
        """time_markers: None takes the checkpoint's `enable_time_marker`. answers, thoughts: see above.

        label_times: auxiliary labels are also digits of the time.

        default_prompt: of `with_prompt`.

        augmentation: of the audio of examples, but not of `sample`, which evaluation calls.
        """
        if config.audio_config.chunk_frames is None:
            raise MossAudioError(
                "expected an encoder with chunks of a fixed length to train on packed sequences, "
                "found chunk_frames=None (n_window null); set it, released models have 400."
            )
        self._chunk_frames = config.audio_config.chunk_frames
        self._tokenizer = tokenizer
        self._config = config
        self._answers: Answers = answers
        self._thoughts: Thoughts = thoughts
        self._label_times = label_times
        self._default_prompt = default_prompt
        self._augmentation = augmentation or Augmentation(AugmentConfig())
        self.time_markers = config.processor.enable_time_marker if time_markers is None else time_markers
        self._quiet, self._begins, self._ends = (tokenizer.encode(mark)[0] for mark in ".[]")
        self._digits = np.array([tokenizer.encode(str(digit))[0] for digit in range(10)], np.int32)

    def __call__(
        self, example: Example, rng: np.random.Generator, objectives: Mapping[str, float] | None = None
    ) -> Sample:
        """Draws an objective and makes its sample.

        Raises MossAudioError that names the example if a clip can't be read or labels end after it; NothingToAsk if no
        objective applies.
        """
        varied = self._augmentation.versions(example, rng)[0]
        return self._labelled(varied, render(varied, rng, objectives), rng)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Frames and mel bins of an audio chunk."""
        return self._chunk_frames, self._config.audio_config.num_mel_bins

    def content_options(self) -> dict[str, Any]:
        """Returns JSON of further options that samples depend on, which a resumed run compares."""
        return {"time_markers": self.time_markers} | self._augmentation.content_options()

    def fitting(
        self,
        example: Example,
        rng: np.random.Generator,
        objectives: Mapping[str, float] | None,
        budget: Budget,
        *,
        truncate: bool,
    ) -> list[Sample]:
        """Makes the samples of an example within a budget: one, or for a longer plain text its pieces in order.

        truncate: shorten a conversation that exceeds the budget (`Sample.within`); else raises TooLong.
        Samples depend on the arguments alone, so they can be made again. A clip that exceeds the budget according to
        its header is not decoded. Audio keeps its speed if slowing it down would make the sample too long.
        """

        def make(version: Example, rng: np.random.Generator) -> list[Sample]:
            rendered = render(version, rng, objectives)
            if isinstance(rendered, str):
                return self.text_samples(version.name, rendered, budget)
            return [self._fitting(version, rendered, rng, budget, truncate)]

        return self._varied(example, rng, make)

    def _varied(
        self,
        example: Example,
        rng: np.random.Generator,
        make: Callable[[Example, np.random.Generator], list[Sample]],
    ) -> list[Sample]:
        """Makes samples of the augmented example, at its own speed if the slower version is too long."""
        *slower, own = self._augmentation.versions(example, rng)
        for version in slower:
            try:
                samples = make(version, copy.deepcopy(rng))
            except TooLong:
                continue
            if not any(sample.truncated for sample in samples):
                return samples
        return make(own, rng)

    def text_samples(self, name: str, text: str, budget: Budget) -> list[Sample]:
        """Splits a plain text and its end mark with `split_text` into samples within a budget.

        Each id is supervised once: the first id of a later sample is the last of the previous one, and masked.
        """
        ids, learned, _ = self._encode(name, text, _mel)
        spell = functools.partial(self._tokenizer.decode_bytes, skip_special_tokens=False)
        samples = [self._sample(name, ids[piece], learned[piece]) for piece in split_text(ids, budget.tokens, spell)]
        for later in samples[1:]:
            later.loss_mask[0] = False
        return samples

    def _fitting(
        self, example: Example, rendered: Rendered, rng: np.random.Generator, budget: Budget, truncate: bool
    ) -> Sample:
        cut = truncate_turns(
            example.name, rendered, budget, self._chunk_frames, truncate=truncate, answers=self._answers
        )
        sample = self._labelled(example, cut, rng).within(budget, truncate=truncate)
        return sample if cut is rendered else replace(sample, truncated=True)

    def _labelled(self, example: Example, rendered: Rendered, rng: np.random.Generator) -> Sample:
        """Makes the sample of `rendered` and checks that labels end within its clip (labelled examples have one)."""
        sample = self.sample(example.name, rendered, example.events or example.words, rng)
        if sample.num_chunks:
            example, seconds = in_own_time(example, sample.audio_seconds)
            example.require_labels_within(seconds)
        return sample

    def extent(self, name: str, rendered: Rendered) -> Extent:
        """Returns the extent of the sample of `rendered` from the headers of its clips; no audio is decoded."""
        mel_bins, chunk_frames = self._config.audio_config.num_mel_bins, self._chunk_frames
        ids, learned, mels = self._encode(
            name, rendered, lambda clip: np.broadcast_to(np.float32(0), (mel_bins, _num_frames(clip)))
        )
        slots, begin = [np.zeros(0, int)], 0
        for mel in mels:
            slots.append(begin + np.arange(num_audio_tokens(mel.shape[1])))
            begin += _num_chunks(mel.shape[1], chunk_frames) * (chunk_frames // DOWNSAMPLE_RATE)
        of_tokens = np.full(len(ids), -1)
        of_tokens[np.asarray(ids) == self._config.processor.audio_token_id] = np.concatenate(slots)
        return Extent(np.asarray(learned, bool), of_tokens, chunk_frames // DOWNSAMPLE_RATE)

    def spelled(self, sample: Sample) -> str:
        """Returns the text of a sample under a line with its sizes: learned text between ⟦ and ⟧, audio as its length.

        Time markers are between the audio tokens that they mark.
        """
        ids, audio_id = sample.inputs.tokens[0, : sample.num_tokens], self._config.processor.audio_token_id
        heard = sample.inputs.audio_slots[0, : sample.num_tokens] >= 0
        kinds = sample.loss_mask * 2 + heard
        borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), sample.num_tokens]
        pieces = []
        for begin, end in itertools.pairwise(borders):
            text = f"<|AUDIO×{end - begin}|>"
            if ids[begin] != audio_id:
                spelled = self._tokenizer.decode_bytes(ids[begin:end].tolist(), skip_special_tokens=False)
                text = spelled.decode("utf-8", "replace")
            pieces.append(f"⟦{text}⟧" if sample.loss_mask[begin] else text)
        sizes = (
            f"{sample.name}: {sample.num_tokens} tokens, {int(sample.loss_mask.sum())} of them learned, "
            f"{sample.audio_seconds:.2f} s of audio in {sample.num_chunks} chunks"
        )
        return f"{sizes}\n{''.join(pieces)}"

    def sample(
        self,
        name: str,
        rendered: Rendered,
        labels: Sequence[TimedText] = (),
        rng: np.random.Generator | None = None,
    ) -> Sample:
        """Makes a sample of a conversation, or of a plain text and its end mark, supervised as a whole.

        labels: timed labels of its only clip. rng: draws the auxiliary target of each audio token.
        """
        return self._sample(name, *self._encode(name, rendered, _mel), labels, rng)

    def _sample(
        self,
        name: str,
        ids: list[int],
        learned: list[bool],
        mels: Sequence[np.ndarray] = (),
        labels: Sequence[TimedText] = (),
        rng: np.random.Generator | None = None,
    ) -> Sample:
        with _naming(name):
            inputs = encode_sequence(ids, mels, self._config)
        # Already rounded to bfloat16; half the size for queues between processes and transfer to devices.
        chunks = inputs.audio_chunks.astype(ml_dtypes.bfloat16)
        audio_labels = self._audio_labels(inputs.audio_slots[0], labels, rng or np.random.default_rng(0))
        inputs = replace(inputs, audio_chunks=chunks)
        return Sample(name, inputs, np.asarray(learned, bool), audio_labels, chunks.shape[1])

    def _encode(
        self, name: str, rendered: Rendered, mel: Callable[[Clip], np.ndarray]
    ) -> tuple[list[int], list[bool], list[np.ndarray]]:
        """Returns ids, whether each is supervised, and the mels [mel bins, frames] of the clips."""
        with _naming(name):
            if isinstance(rendered, str):
                return self._plain_text(rendered)
            return self._turns(with_prompt(rendered, self._default_prompt), mel)

    def _audio_labels(self, slots: np.ndarray, labels: Sequence[TimedText], rng: np.random.Generator) -> np.ndarray:
        """Ids [tokens] at the audio tokens of a labelled clip, each of them one of three things by chance.

        Half of them say what is heard: the first id of the label's text, "[" and "]" where it begins and ends, "."
        where nothing is. The others say when that is, at the middle of the token: the digit of the tenths of a second,
        or that of the whole seconds. Without `label_times` all say what is heard.
        """
        audio_labels = np.full(len(slots), -1, np.int32)
        if not labels:
            return audio_labels
        audio = np.flatnonzero(slots >= 0)
        times = (slots[audio] + 0.5) / TOKENS_PER_SECOND
        said = np.full(len(audio), self._quiet, np.int32)
        for label in labels:
            first, last = (int(time * TOKENS_PER_SECOND) for time in (label.start, label.end))
            said[first : last + 1] = self._tokenizer.encode(label.text)[0]
            said[first : first + 1], said[last : last + 1] = self._begins, self._ends
        if not self._label_times:
            audio_labels[audio] = said
            return audio_labels
        tenths = self._digits[(times * 10).astype(int) % 10]
        seconds = self._digits[times.astype(int) % 10]
        audio_labels[audio] = np.choose(rng.choice(3, len(audio), p=(0.5, 0.25, 0.25)), (said, tenths, seconds))
        return audio_labels

    def _plain_text(self, text: str) -> tuple[list[int], list[bool], list[np.ndarray]]:
        ids = self._tokenizer.encode(text + END_OF_TEXT)
        return ids, [True] * len(ids), []

    def _turns(
        self, messages: tuple[Message, ...], mel: Callable[[Clip], np.ndarray]
    ) -> tuple[list[int], list[bool], list[np.ndarray]]:
        if self._answers == "last":
            messages = (*map(without_thought, messages[:-1]), messages[-1])
        turns, mels = turns_and_mels(messages, mel)
        ids, learned = build_conversation(
            self._tokenizer, turns, time_markers=self.time_markers, processor=self._config.processor
        )
        return ids, self._supervised(ids, learned), mels

    def _supervised(self, ids: list[int], in_answer: list[bool]) -> list[bool]:
        """Returns which ids are supervised. in_answer: True at ids of answers."""
        borders = np.flatnonzero(np.diff([False, *in_answer, False])).tolist()
        spans = list(zip(borders[::2], borders[1::2], strict=True))
        learned = [False] * len(ids)
        for begin, end in spans if self._answers == "all" else spans[-1:]:
            thought = self._thought_length(ids[begin:end]) if self._thoughts == "mask" else 0
            learned[begin + thought : end] = [True] * (end - begin - thought)
        return learned

    def _thought_length(self, ids: list[int]) -> int:
        """Number of ids of an answer's thought, `</think>` included; 0 without one.

        In a vocabulary without a `</think>` token (the released one has it), the last id may extend beyond it.
        """
        pieces = [self._tokenizer.decode_bytes([token_id], skip_special_tokens=False) for token_id in ids]
        before, end, _ = b"".join(pieces).rpartition(THOUGHT_END.encode())
        if not end:
            return 0
        return int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), len(before + end))) + 1


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefixes errors with the example's name; audio errors already begin with it."""
    try:
        yield
    except MossAudioError as error:
        raise error if str(error).startswith(name) else type(error)(f"{name}: {error}") from error


def truncate_turns(
    name: str, rendered: Rendered, budget: Budget, chunk_frames: int, *, truncate: bool, answers: Answers
) -> Rendered:
    """Returns the turns if, according to the headers of their clips, they fit the chunks of a budget.

    If not, and with `truncate`, returns those up to the last answer that fits; raises TooLong if there is none, or it
    is not supervised. Files on gs:// count as 0 chunks, since their headers can't be read cheaply.
    """
    if isinstance(rendered, str):
        return rendered
    chunks, answered = 0, 0
    for number, message in enumerate(rendered, start=1):
        for piece in message.content:
            if isinstance(piece, Clip) and not (isinstance(piece.audio, str) and is_remote(piece.audio)):
                chunks += _num_chunks(_num_frames(piece), chunk_frames)
        if message.role == "assistant" and chunks <= budget.chunks:
            answered = number
    if chunks <= budget.chunks:
        return rendered
    if not (truncate and answered and answers == "all"):
        raise budget.exceeded(name, f"{chunks} chunks")
    return rendered[:answered]


def turns_and_mels(
    messages: Sequence[Message], mel: Callable[[Clip], np.ndarray]
) -> tuple[list[Turn], list[np.ndarray]]:
    """Replaces clips by their number of audio tokens; returns the turns, and the mels [mel bins, frames]."""
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


def with_prompt(messages: Sequence[Message], prompt: str) -> tuple[Message, ...]:
    """Replaces blank user texts by a prompt."""
    return tuple(
        replace(message, content=(*message.content[:-1], prompt))
        if message.role == "user" and message.content[-1] == ""
        else message
        for message in messages
    )


def without_thought(message: Message) -> Message:
    """Removes the thought of an answer and the line breaks after it, as Qwen3's template does for earlier turns."""
    if message.role != "assistant":
        return message
    text = "\n".join(piece for piece in message.content if isinstance(piece, str))
    return Message("assistant", (text.rpartition(THOUGHT_END)[2].lstrip("\n"),))


def _num_chunks(frames: int, chunk_frames: int) -> int:
    return -(-frames // chunk_frames)


def _num_frames(clip: Clip) -> int:
    """Number of mel frames, from the clip's header."""
    samples = clip.num_samples()
    try:
        return mel_frames(samples)
    except MossAudioError as error:
        raise MossAudioError(f"{clip.name}: {error}") from error


def _mel(clip: Clip) -> np.ndarray:
    """Log-mel [mel bins, frames] as `Processor.mel` makes it; masked if the clip is augmented."""
    return model_mel(clip.wave(), clip.name, clip.masked if isinstance(clip, VariedClip) else None)
