"""Token ids of text and clips: the tokenizer, the audio span with its time markers, chat prompts.

    tokenizer = Tokenizer.from_dir("MOSS-Audio-4B-Instruct")
    build_prompt(tokenizer, "Transcribe the audio.", clip_tokens=[125])  # ten seconds of audio

gives the ids of

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n
    <|audio_bos|> 25 audio tokens, 2, 25 audio tokens, 4, ... <|audio_eos|>\\n
    Transcribe the audio.<|im_end|>\\n<|im_start|>assistant\\n

Special tokens written in a text (`<|im_end|>`) become special ids, as in the MOSS-Audio processor, so a caller can
write the chat markup by hand. Remove them first from texts that you don't trust. Audio ids never come from text, only
from clips.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.schema import INT32, integer
from moss_audio_jax.storage.foreign_files import foreign_content
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, exists, file_in, read_text, to_path
from moss_audio_jax.storage.retries import summary

# Qwen's ids. The ids of the audio span may differ between checkpoints and are in ProcessorConfig.
ENDOFTEXT, IM_START, IM_END = 151643, 151644, 151645
DIGITS = range(15, 25)  # '0'..'9'
RELEASED = ProcessorConfig()

MARKER_SECONDS = 2
MARKER_TOKENS = 25  # audio tokens in MARKER_SECONDS, at 12.5 a second

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
# The place of a clip in a prompt's text.
AUDIO_SPAN = re.compile(r"<\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>")

# Words of Qwen2's tokenizer, within which byte pairs are merged; each digit is a word.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's character -> byte: printable Latin-1 stands for itself, other bytes begin at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


_BYTE_ALPHABET = _byte_alphabet()
_TO_LATIN_1 = {ord(character): byte for character, byte in _BYTE_ALPHABET.items()}


_PROBE = "It's 10 café, 你好\n"


class Tokenizer:
    """Qwen2's byte-level BPE over text in Unicode's NFC form.

    Ids equal those of transformers' Qwen2Tokenizer for every character of Unicode 14. Newer letters depend on the
    Unicode version of the `tokenizers` library (here) or of `regex` (there).
    """

    def __init__(self, core: tokenizers.Tokenizer, source: AnyPath):
        """`source` names the files in error messages."""
        core.no_truncation()
        core.no_padding()
        vocabulary = core.get_vocab(with_added_tokens=True)
        absent = [token for token in ("<|im_start|>", "<|im_end|>", *_BYTE_ALPHABET) if token not in vocabulary]
        if absent:
            raise MossAudioError(
                f"the tokenizer of {source} lacks {absent[0]!r}, which every Qwen tokenizer has: "
                "fetch its files again from the released model"
            )
        unknown = getattr(core.model, "unk_token", None)
        if unknown is not None and unknown not in vocabulary:
            raise MossAudioError(
                f"the unk_token of {source} must be one of its tokens, not {shown(unknown)}: fetch its files again "
                "from the released model"
            )
        added = core.get_added_tokens_decoder()
        self._core = core
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        try:
            self._bytes = {
                token_id: token.encode() if token_id in added else token.translate(_TO_LATIN_1).encode("latin-1")
                for token, token_id in vocabulary.items()
            }
        except UnicodeEncodeError as error:
            raise MossAudioError(
                f"the tokenizer of {source} is not a byte-level BPE: its token {error.object!r} does not "
                "spell bytes; use the tokenizer of the released model"
            ) from error
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise MossAudioError(
                f"the tokenizer of {source} loses a part of {_PROBE!r}: fetch its files again from the released model"
            )

    @classmethod
    def from_dir(cls, directory: AnyPath) -> Self:
        """Reads the released vocab.json, merges.txt and added tokens, or tokenizer.json of transformers 5.

        If both exist, tokenizer.json is read, which may add tokens. Raises MossAudioError if the two disagree.
        """
        directory = to_path(directory)
        path = file_in(directory, "tokenizer.json")
        missing = [name for name in ("vocab.json", "merges.txt") if not exists(file_in(directory, name))]
        if missing and not exists(path):
            raise MossAudioError(
                f"{directory} holds no {' and no '.join(missing)} (and no tokenizer.json in their place): "
                "copy the tokenizer files from the released model"
            )
        if not exists(path):
            return cls(_read_released(directory), directory)
        core = _read_tokenizer_json(path)
        if not missing:
            _require_same(core, path)
        return cls(core, path)

    @property
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The part that splits text into words; tokens never cross their borders."""
        return self._core.pre_tokenizer

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, with special tokens in it; adds nothing at either end."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MossAudioError(
                f"character {error.start} of the text is U+{ord(text[error.start]):04X}, half of a surrogate "
                "pair: the text was decoded wrongly, decode it again or remove the character"
            ) from error
        # Transformers' Qwen2Tokenizer normalizes before it finds special tokens, so "<|im_end|>" with a combining
        # stroke after it is none. The `tokenizers` library alone would find one.
        text = unicodedata.normalize("NFC", text)
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; drops ids without text, and replaces invalid UTF-8 by U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """Returns the bytes of `ids`; characters may be incomplete at both ends."""
        skipped = self._special_ids if skip_special_tokens else ()
        # The model has more ids than the tokenizer: some that it can emit, such as the audio ids, have no text.
        return b"".join(self._bytes.get(token_id, b"") for token_id in ids if token_id not in skipped)


class StreamDecoder:
    """Decodes text while it is generated: the results of `feed`, then `flush`, join to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Returns the text that `ids` complete; keeps the bytes of an incomplete character for the next call."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, self._skip_special_tokens))

    def flush(self) -> str:
        """Returns the rest at the end: U+FFFD for an incomplete character, mostly nothing."""
        return self._utf8.decode(b"", final=True)


def _require_same(core: tokenizers.Tokenizer, path: Path) -> None:
    """Raises MossAudioError unless tokenizer.json, read as `core`, equals the files beside it but for added tokens."""
    added = {token.content: token_id for token_id, token in core.get_added_tokens_decoder().items()}
    found = core.get_vocab(with_added_tokens=True)
    expected = read_json(path.with_name("vocab.json"))
    expected |= {token.content: token_id for token_id, token in _read_added_tokens(path.parent).items()}
    differing = [token for token in expected if found.get(token) != expected[token]]
    differing += sorted(found.keys() - expected.keys() - added.keys())
    if differing:
        token = differing[0]
        ids = [f"with the id {side[token]}" if token in side else "not" for side in (found, expected)]
        problem = f"{token!r} is {ids[0]} in the one and {ids[1]} in the others"
    elif _merges(path) != _read_merges(path.with_name("merges.txt")):
        problem = "their merges differ"
    else:
        return
    raise MossAudioError(
        f"{path} and the vocab.json, merges.txt and added tokens beside it are different tokenizers ({problem}): "
        "remove whichever the model was not trained with"
    )


def _merges(path: Path) -> list[tuple[str, ...]]:
    """Returns the merges of a checked tokenizer.json; older files hold each as one text."""
    merges = read_json(path)["model"].get("merges", [])
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def _read_released(directory: Path) -> tokenizers.Tokenizer:
    added = _read_added_tokens(directory)
    # Added tokens are in the vocabulary too: otherwise the library gives them ids of its own.
    vocabulary = _ids(read_json(directory / "vocab.json"), directory / "vocab.json")
    vocabulary |= {token.content: token_id for token_id, token in added.items()}
    merges = _read_merges(directory / "merges.txt")
    try:
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two tokens share an id")
        core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise MossAudioError(
            f"vocab.json, merges.txt and the added tokens of {directory} don't make one tokenizer "
            f"({summary(error)}): fetch them again, all from the same released model"
        ) from error
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.add_tokens(list(added.values()))
    return core


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        if what := foreign_content(path):
            raise MossAudioError(f"{path} is {what}") from error
        raise MossAudioError(f"{path} can't be read ({error}): fetch the file again") from error
    if what := foreign_content(path):  # a pointer or a page can be valid text
        raise MossAudioError(f"{path} is {what}")
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version:")):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise MossAudioError(
                f"{path} line {number} must be two tokens with a space between, not {shown(line)}: fetch the file again"
            )
        merges.append((parts[0], parts[1]))
    return merges


_TOKEN_ID = integer(0, INT32)
_ADDED_LENGTH = 256  # the library's time grows with the square: minutes for 70,000 characters
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _ids(vocabulary: Any, where: object) -> dict[str, int]:
    """Checks a vocabulary, token -> id; raises MossAudioError for an empty token, and for an id that is no int32."""
    if not isinstance(vocabulary, dict):
        raise MossAudioError(f"{where} must hold an object of tokens and ids, not {shown(vocabulary)}")
    for token, token_id in vocabulary.items():
        if not _TOKEN_ID.accepts(token_id):  # checked first: 150,000 messages would take seconds
            _TOKEN_ID.check(f"{where}: the id of {shown(token)}", token_id)
        if not token:
            raise MossAudioError(f"{where}: the token of id {token_id} must be a text, not an empty one")
    return vocabulary


def _read_added_tokens(directory: Path) -> dict[int, AddedToken]:
    """Reads tokens by id from `added_tokens_decoder` in tokenizer_config.json, or the older added_tokens.json."""
    config, names, added = (
        read_json(directory / name) if exists(file_in(directory, name)) else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if "added_tokens_decoder" in config:
        where, decoder = directory / "tokenizer_config.json", config["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise MossAudioError(f"{where}: added_tokens_decoder must be an object, not {shown(decoder)}")
        tokens = {_parse_id(token_id, where): _added_token(token, where) for token_id, token in decoder.items()}
        if len({token.content for token in tokens.values()}) < len(tokens):
            raise MossAudioError(f"{where}: a token has two ids in added_tokens_decoder: fetch the file again")
        return tokens
    _ids(added, directory / "added_tokens.json")
    special = {token for content in (names, config) for token in _special_tokens(content)}
    return {
        token_id: _added_token({"content": token, "special": token in special}, directory / "added_tokens.json")
        for token, token_id in added.items()
    }


def _parse_id(text: str, where: Path) -> int:
    if not re.fullmatch(r"(0|[1-9]\d{0,9})", text, re.ASCII):
        raise MossAudioError(f"{where}: an added token's id must be {_TOKEN_ID.expected}, not {shown(text)}")
    _TOKEN_ID.check(f"{where}: an added token's id", int(text))
    return int(text)


def _added_token(token: Any, where: Path) -> AddedToken:
    """Reads a token from an object with a content and optional flags."""
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not 0 < len(content) <= _ADDED_LENGTH:
        raise MossAudioError(
            f"{where}: an added token must be an object whose content is a text of 1 to {_ADDED_LENGTH} characters, "
            f"not {shown(token)}"
        )
    flags = {name: token[name] for name in _FLAGS if name in token}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise MossAudioError(f"{where}: {name} of the token {shown(content)} must be true or false")
    return AddedToken(content, **flags)


def _special_tokens(content: dict[str, Any]) -> Iterator[str]:
    """Yields the tokens that `eos_token`, `additional_special_tokens` and similar keys name."""
    for key, value in content.items():
        if key.endswith(("_token", "_special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                named = token.get("content") if isinstance(token, dict) else token
                if isinstance(named, str):  # other values are null, or switches such as add_bos_token
                    yield named


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Reads the parts of tokenizer.json that encode text; decoding and the tokens around a text are this module's."""
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type") not in ("BPE", None):
        raise MossAudioError(f"{path}: its model must be BPE, as Qwen's is: use the tokenizer of the released model")
    set_otherwise = [name for name in _BPE_SETTINGS if model.get(name) not in (None, False, "")]
    if set_otherwise:
        name = set_otherwise[0]
        raise MossAudioError(
            f"{path}: {name} is {shown(model[name])}, which Qwen's tokenizers leave out: use the tokenizer of the "
            "released model"
        )
    vocabulary = _ids(model.get("vocab"), f"{path}: vocab")
    if not isinstance(added, list):
        raise MossAudioError(f"{path}: added_tokens must be a list, not {shown(added)}")
    for token in added:
        _added_token(token, path)
        _TOKEN_ID.check(f"{path}: the id of {shown(token['content'])}", token.get("id"))
    ids = vocabulary | {token["content"]: token["id"] for token in added}
    if len(set(ids.values())) < len(ids):
        raise MossAudioError(f"{path}: two tokens share an id: fetch it again")
    for part, kinds in _TOKENIZER_PARTS.items():
        _require_known(content.get(part), kinds, path, part)
    content |= dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises bare Exception
        raise MossAudioError(f"{path} can't be read as a tokenizer ({summary(error)}): fetch it again") from error


# The library panics if a prefix is longer than a token; with dropout the ids of a text would be random.
_BPE_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
# The parts of a byte-level BPE. The library has others, some of which panic or hang on settings that it accepts.
_TOKENIZER_PARTS = {
    "normalizer": ("NFC", "Sequence"),
    "pre_tokenizer": ("Split", "ByteLevel", "Digits", "Sequence"),
}


def _require_known(part: Any, kinds: tuple[str, ...], path: Path, name: str) -> None:
    """Raises MossAudioError for a part of tokenizer.json, or of a sequence in it, that Qwen's tokenizers lack."""
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        raise MossAudioError(
            f"{path}: {name} must be one of {', '.join(kinds)}, not {shown(part if kind is None else kind)}: use the "
            "tokenizer of the released model"
        )
    inside = part.get(f"{name}s", part.get("pretokenizers")) or [] if kind == "Sequence" else []
    if not isinstance(inside, list):
        raise MossAudioError(f"{path}: {name} must be a list of parts, not {shown(inside)}: fetch it again")
    for each in inside:
        _require_known(each, kinds, path, name)


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
