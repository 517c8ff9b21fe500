"""Tokenizer of Qwen: text to token ids and back. `tokenizer_files` reads its files.

Special tokens written in a text (`<|im_end|>`) become special ids, as in the MOSS-Audio processor, so a caller can
write the chat markup by hand. Remove them first from texts that you don't trust.
"""

import codecs
import unicodedata
from collections.abc import Iterable
from typing import Self

import tokenizers
from tokenizers import pre_tokenizers

from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.storage.paths import AnyPath, to_path
from moss_audio_jax.tokenizer_files import read_tokenizer

ENDOFTEXT, IM_START, IM_END = 151643, 151644, 151645  # Qwen's ids
DIGITS = range(15, 25)  # '0'..'9'


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
        return cls(*read_tokenizer(to_path(directory)))

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
