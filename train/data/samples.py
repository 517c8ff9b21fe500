"""One example as the model reads it: decoded, log-mel, tokenised, with the tokens to learn marked.

What is learned are answers, each with the <|im_end|> after it: all of a conversation, or its last one (`answers`). An
answer of a Thinking model begins with a thought: all of it up to `</think>`, as Qwen3's chat template has it. That is
learned with the rest, or only read (`thoughts`).

Qwen3's template leaves the thoughts of earlier turns out of a prompt. So does `answers="last"`, whose sequence is the
prompt that the model will see. Where all answers are learned, a sequence holds them all and their thoughts with them: a
later turn then reads the thoughts of earlier ones, in training alone.

A plain text that is longer than a sequence becomes several samples, which learn all of it (`SampleMaker.fitting`).
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from moss_audio_jax.audio import log_mel, mel_frames, num_audio_tokens, round_bfloat16
from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.storage.paths import is_remote
from moss_audio_jax.tokens import Tokenizer, Turn, build_conversation
from train.data.augment import Augmentation, VariedClip, in_own_time
from train.data.budget import Budget, Extent, TooLong, split_text
from train.data.config import Answers, AugmentConfig, Thoughts
from train.data.manifest import THOUGHT_END, Clip, Example, Message, TimedText
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
    truncated: whether it has lost its end.
    """

    name: str
    inputs: ModelInputs
    learned: np.ndarray
    heard: np.ndarray
    num_chunks: int
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.learned)

    @property
    def audio_seconds(self) -> float:
        return float(self.inputs.chunk_frames.sum()) / FRAMES_PER_SECOND

    def within(self, budget: Budget, *, truncate: bool) -> "Sample":
        """The sample, or what `Extent.within` leaves of it, without the chunks of clips that go. Raises TooLong."""
        tokens_per_chunk = self.inputs.audio_chunks.shape[2] // DOWNSAMPLE_RATE
        extent = Extent(self.learned, self.inputs.audio_slots[0, : self.num_tokens], tokens_per_chunk)
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
            learned=self.learned[:kept],
            heard=self.heard[:kept],
            num_chunks=chunks,
            truncated=True,
        )


class SampleMaker:
    """From examples to samples. Cheap to send to worker processes, where it does the work."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: MossAudioConfig,
        *,
        time_markers: bool | None = None,
        answers: Answers = "all",
        thoughts: Thoughts = "learn",
        default_prompt: str = "",
        augmentation: Augmentation | None = None,
    ):
        """time_markers: None takes the checkpoint's `enable_time_marker`. answers, thoughts: see above.

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
        self._default_prompt = default_prompt
        self._augmentation = augmentation or Augmentation(AugmentConfig())
        self.time_markers = config.processor.enable_time_marker if time_markers is None else time_markers
        self._quiet, self._begins, self._ends = (tokenizer.encode(mark)[0] for mark in ".[]")
        self._digits = np.array([tokenizer.encode(str(digit))[0] for digit in range(10)], np.int32)

    def __call__(
        self, example: Example, rng: np.random.Generator, objectives: Mapping[str, float] | None = None
    ) -> Sample:
        """Raises MossAudioError that names the example if a clip can't be read or its labels go beyond its end.

        It is NothingToAsk if the example has nothing for the objectives.
        """
        varied = self._augmentation.versions(example, rng)[0]
        return self._labelled(varied, render(varied, rng, objectives), rng)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Frames and mel bins of a chunk of audio."""
        return self._chunk_frames, self._config.audio_config.num_mel_bins

    def content_options(self) -> dict[str, Any]:
        """JSON of what samples depend on beside the data's own options, which a resumed run compares."""
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
        """The same within a budget, perhaps without its end (`Sample.within`); raises TooLong if it can't be.

        It is one sample, or of a plain text beyond the budget all its pieces (`text_samples`), in order. They depend on
        the arguments alone, so each of them can be made again. A clip whose header says that it goes beyond the budget
        is not decoded. One that is slowed down is not, where only that makes the sample too long.
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
        """What is made of the example with its audio varied, at its own speed where a slower one is too long."""
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
        """A plain text and the mark of its end as samples within a budget, cut where `split_text` says.

        Each id is learned once; the first id of a later sample, the last of the one before, is only read.
        """
        ids, learned, _ = self._encode(name, text, _mel)
        spell = functools.partial(self._tokenizer.decode_bytes, skip_special_tokens=False)
        samples = [self._sample(name, ids[piece], learned[piece]) for piece in split_text(ids, budget.tokens, spell)]
        for later in samples[1:]:
            later.learned[0] = False
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
        """The sample of `rendered`, whose clip, if it has labels, is its only one."""
        sample = self.sample(example.name, rendered, example.events or example.words, rng)
        if sample.num_chunks:
            example, seconds = in_own_time(example, sample.audio_seconds)
            example.require_labels_within(seconds)
        return sample

    def extent(self, name: str, rendered: Rendered) -> Extent:
        """That of the sample of `rendered`, as the headers of its clips tell; nothing is decoded."""
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
            inputs = make_inputs([ids], [mels], config=self._config)
        num_chunks = int((inputs.chunk_frames > 0).sum())
        # Rounded to bfloat16 already, and half as large to keep, to hand to another process and to send to a device.
        chunks = inputs.audio_chunks[:, :num_chunks].astype(ml_dtypes.bfloat16)
        heard = self._heard(inputs.audio_slots[0, : len(ids)], labels, rng or np.random.default_rng(0))
        return Sample(name, replace(inputs, audio_chunks=chunks), np.asarray(learned, bool), heard, num_chunks)

    def _encode(
        self, name: str, rendered: Rendered, mel: Callable[[Clip], np.ndarray]
    ) -> tuple[list[int], list[bool], list[np.ndarray]]:
        """Ids, whether each is learned, and the mels of the clips."""
        with _naming(name):
            if isinstance(rendered, str):
                return self._plain_text(rendered)
            return self._turns(with_prompt(rendered, self._default_prompt), mel)

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
        """Which ids are learned, of those in answers."""
        borders = np.flatnonzero(np.diff([False, *in_answer, False])).tolist()
        spans = list(zip(borders[::2], borders[1::2], strict=True))
        learned = [False] * len(ids)
        for begin, end in spans if self._answers == "all" else spans[-1:]:
            thought = self._thought_length(ids[begin:end]) if self._thoughts == "mask" else 0
            learned[begin + thought : end] = [True] * (end - begin - thought)
        return learned

    def _thought_length(self, ids: list[int]) -> int:
        """How many ids an answer's thought has, `</think>` included; 0 without one.

        Where `</think>` is no token of its own, as it is in the released vocabulary, its last id may hold more.
        """
        pieces = [self._tokenizer.decode_bytes([token_id], skip_special_tokens=False) for token_id in ids]
        before, end, _ = b"".join(pieces).rpartition(THOUGHT_END.encode())
        if not end:
            return 0
        return int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), len(before + end))) + 1


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors begin with the example's name; those of audio name the clip, and so the example, themselves."""
    try:
        yield
    except MossAudioError as error:
        raise error if str(error).startswith(name) else type(error)(f"{name}: {error}") from error


def truncate_turns(
    name: str, rendered: Rendered, budget: Budget, chunk_frames: int, *, truncate: bool, answers: Answers
) -> Rendered:
    """The turns themselves, if the headers of their clips leave them within the chunks of a budget.

    If not, and if they may be truncated, those up to the last answer before; raises TooLong if that is none, or one
    that is not to be learned. A file on gs:// counts as nothing, since its header is not read alone.
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


def with_prompt(messages: Sequence[Message], prompt: str) -> tuple[Message, ...]:
    """Messages with this prompt where the user's is blank."""
    return tuple(
        replace(message, content=(*message.content[:-1], prompt))
        if message.role == "user" and message.content[-1] == ""
        else message
        for message in messages
    )


def without_thought(message: Message) -> Message:
    """An answer without its thought and the line breaks after it, as Qwen3's template has it in a later prompt."""
    if message.role != "assistant":
        return message
    text = "\n".join(piece for piece in message.content if isinstance(piece, str))
    return Message("assistant", (text.rpartition(THOUGHT_END)[2].lstrip("\n"),))


def _num_chunks(frames: int, chunk_frames: int) -> int:
    return -(-frames // chunk_frames)


def _num_frames(clip: Clip) -> int:
    """Mel frames of `_mel`, by the clip's header."""
    samples = clip.num_samples()
    try:
        return mel_frames(samples)
    except MossAudioError as error:
        raise MossAudioError(f"{clip.name}: {error}") from error


def _mel(clip: Clip) -> np.ndarray:
    """Log-mel [mel bins, frames] as `Processor.mel` makes it."""
    wave = clip.wave()
    try:
        mel = log_mel(wave)
    except MossAudioError as error:
        raise MossAudioError(f"{clip.name}: {error}") from error
    return round_bfloat16(clip.masked(mel) if isinstance(clip, VariedClip) else mel)
