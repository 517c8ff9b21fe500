"""Token ids of prompts: audio spans with time markers, questions about clips, conversations in the chat format.

    tokenizer = Tokenizer.from_dir("MOSS-Audio-4B-Instruct")
    build_prompt(tokenizer, "Transcribe the audio.", clip_tokens=[125])  # ten seconds of audio

gives the ids of

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n
    <|audio_bos|> 25 audio tokens, 2, 25 audio tokens, 4, ... <|audio_eos|>\\n
    Transcribe the audio.<|im_end|>\\n<|im_start|>assistant\\n

Audio ids never come from text, only from clips. Special tokens written in a text become special ids: see `tokenizer`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.tokenizer import DIGITS, Tokenizer

RELEASED = ProcessorConfig()  # other checkpoints may have other ids of audio

MARKER_SECONDS = 2
MARKER_TOKENS = 25  # audio tokens in MARKER_SECONDS, at 12.5 a second

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
# The place of a clip in a prompt's text.
AUDIO_SPAN = re.compile(r"<\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>")


def audio_span(num_audio_tokens: int, time_markers: bool = True, processor: ProcessorConfig = RELEASED) -> list[int]:
    """Returns the ids between <|audio_bos|> and <|audio_eos|>: 12.5 audio tokens per second, with time markers.

    A time marker follows every 25 audio tokens: the whole seconds so far, one token per decimal digit, no unit. The
    span can end with one.
    """
    if num_audio_tokens < 1:
        raise MossAudioError(
            f"a clip must have at least one audio token (10 ms), but one has {num_audio_tokens}: leave out empty clips"
        )
    audio = processor.audio_token_id
    if not time_markers:
        return [audio] * num_audio_tokens
    ids: list[int] = []
    num_markers, rest = divmod(num_audio_tokens, MARKER_TOKENS)
    for marker in range(1, num_markers + 1):
        ids += [audio] * MARKER_TOKENS
        ids += [DIGITS[int(digit)] for digit in str(marker * MARKER_SECONDS)]
    return ids + [audio] * rest


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation: texts and clips in order, each on lines of its own."""

    role: str  # "system", "user" or "assistant"
    pieces: Sequence[str | int]  # an int is a clip's number of audio tokens

    def __post_init__(self):
        if self.role not in ROLES:
            raise MossAudioError(f"a turn's role must be one of {', '.join(ROLES)}, not {self.role!r}")
        if isinstance(self.pieces, str):
            raise MossAudioError(f"the pieces of a turn must be a list: write [{self.pieces!r}]")
        if self.role == "assistant" and not all(isinstance(piece, str) for piece in self.pieces):
            raise MossAudioError(
                "an assistant's turn holds a clip, but the model answers in text: move it to the user's"
            )


class EncodedConversation(NamedTuple):
    """loss_mask: True at the supervised tokens, an assistant's text and the <|im_end|> after it."""

    ids: list[int]
    loss_mask: list[bool]


def build_conversation(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    *,
    time_markers: bool | None = None,
    processor: ProcessorConfig = RELEASED,
) -> EncodedConversation:
    """Encodes turns in the chat format of MOSS-Audio, for training or as a prompt.

    Without a system turn the default one comes first. If the last turn is not the assistant's, the ids are a prompt:
    they end where the answer would begin. An answer is encoded on its own, so the ids before it equal its prompt's.

    time_markers: None takes the checkpoint's `enable_time_marker`.
    """
    if not turns or turns[0].role != "system":
        turns = [Turn("system", [DEFAULT_SYSTEM_PROMPT]), *turns]
    ids: list[int] = []
    loss_mask: list[bool] = []
    for pieces, is_learned in _segments(turns):
        segment = _encode_pieces(tokenizer, pieces, time_markers, processor)
        ids += segment
        loss_mask += [is_learned] * len(segment)
    return EncodedConversation(ids, loss_mask)


def build_prompt(
    tokenizer: Tokenizer,
    text: str,
    clip_tokens: Sequence[int] = (),
    *,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    time_markers: bool | None = None,
    processor: ProcessorConfig = RELEASED,
) -> list[int]:
    """Encodes a question about clips, up to the beginning of the answer. clip_tokens: audio tokens of each clip.

    The clips come first, in order, one per line, then the text. (The MOSS-Audio processor does the same for no clip and
    for one, and refuses several.)

    A text with spans, `<|audio_bos|><|AUDIO|><|audio_eos|>`, is the whole prompt with its chat markup: each span is
    replaced by a clip, in order, and nothing is added. A span may repeat `<|AUDIO|>`; the clip decides its length.
    Raises MossAudioError if the numbers of spans and clips differ.

    time_markers: None takes the checkpoint's `enable_time_marker`.
    """
    first_text, *texts_after_spans = AUDIO_SPAN.split(text)
    if not texts_after_spans:
        turns = [Turn("system", [system_prompt]), Turn("user", [*clip_tokens, text])]
        return build_conversation(tokenizer, turns, time_markers=time_markers, processor=processor).ids
    if len(texts_after_spans) != len(clip_tokens):
        raise MossAudioError(
            f"the prompt holds {len(texts_after_spans)} audio span(s) <|audio_bos|><|AUDIO|><|audio_eos|>, "
            f"but {len(clip_tokens)} clip(s) were given: write one span for each clip, or none at all"
        )
    pieces: list[str | int] = [first_text]
    for clip, text_after in zip(clip_tokens, texts_after_spans, strict=True):
        pieces += [clip, text_after]
    return _encode_pieces(tokenizer, pieces, time_markers, processor)


def _segments(turns: Sequence[Turn]) -> Iterator[tuple[list[str | int], bool]]:
    """Yields the turns in chat markup, split where supervision begins and ends: (pieces, are they supervised)."""
    line_break = ""
    for turn in turns:
        opening = f"{line_break}<|im_start|>{turn.role}\n"
        content = [*_on_lines(turn.pieces), "<|im_end|>"]
        if turn.role == "assistant":
            yield [opening], False
            yield content, True
        else:
            yield [opening, *content], False
        line_break = "\n"
    if turns[-1].role != "assistant":
        yield [f"{line_break}<|im_start|>assistant\n"], False


def _on_lines(pieces: Sequence[str | int]) -> Iterator[str | int]:
    """Yields the pieces with line breaks between them, and one after a clip at the end."""
    for number, piece in enumerate(pieces, start=1):
        yield piece
        if number < len(pieces) or not isinstance(piece, str):
            yield "\n"


def _encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[str | int], time_markers: bool | None, processor: ProcessorConfig
) -> list[int]:
    """Encodes texts and clips; all texts between two clips are encoded as one."""
    if time_markers is None:
        time_markers = processor.enable_time_marker
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        else:
            ids += _encode_text(tokenizer, text, processor)
            text = ""
            span = audio_span(piece, time_markers, processor)
            ids += [processor.audio_start_id, *span, processor.audio_end_id]
    return ids + _encode_text(tokenizer, text, processor)


def _encode_text(tokenizer: Tokenizer, text: str, processor: ProcessorConfig) -> list[int]:
    span = AUDIO_SPAN.search(text)
    if span:
        raise MossAudioError(
            f"a text holds the audio span {span[0]!r} where none can stand: give the clip as a piece of a "
            "turn, or write the whole prompt as one text"
        )
    ids = tokenizer.encode(text)
    for audio_id in (processor.audio_token_id, processor.audio_start_id, processor.audio_end_id):
        if audio_id in ids:
            # The released vocabulary spells the audio token <|vision_pad|>; the model would expect audio there.
            spelling = tokenizer.decode([audio_id], skip_special_tokens=False)
            raise MossAudioError(
                f"a text holds {spelling!r}, whose id {audio_id} stands for audio: remove it from the text, "
                "or mark a clip's place with <|audio_bos|><|AUDIO|><|audio_eos|>"
            )
    return ids
