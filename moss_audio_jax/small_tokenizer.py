"""Writes a tokenizer for small models: bytes, and merges learned from a few texts, in the released files' layout."""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from moss_audio_jax.storage.paths import AnyPath, Path, to_path
from moss_audio_jax.tokenizer import Tokenizer

BYTES = 256  # the ids of single bytes; those of the special tokens follow, then those of the merges
_SINGLE_MARKS = Split(Regex(r"[^\s\p{L}\p{N}]"), behavior="isolated")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_small_tokenizer(directory: AnyPath, texts: Iterable[str] = (), size: int = 0) -> None:
    """Writes the released tokenizer files into a directory.

    texts: merges are learned from these, within Qwen's words. Digits stay single, as time markers need. Punctuation
        marks stay single too: Qwen has a word "]tone", but here "tone" is the same token everywhere.
    size: number of ids; without texts it has no effect, and only BYTES and SPECIAL_TOKENS are written.
    The bytes are in GPT-2's order, like the first 256 tokens of Qwen's vocabulary, so that the digits of time markers
    have the same ids, 15 to 24.
    """
    directory = to_path(directory)
    _write_files(directory, [])
    texts = list(texts)
    if texts:
        _write_files(directory, _learn_merges(directory, texts, size - BYTES - len(SPECIAL_TOKENS)))


def _learn_merges(directory: Path, texts: list[str], count: int) -> list[tuple[str, str]]:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = Tokenizer.from_dir(directory).pre_tokenizer
    core.pre_tokenizer = Sequence([_SINGLE_MARKS, words])
    alphabet = ByteLevel.alphabet()
    core.train_from_iterator(
        texts, BpeTrainer(vocab_size=BYTES + count, initial_alphabet=alphabet, show_progress=False)
    )
    return [(first, second) for first, second in json.loads(core.to_str())["model"]["merges"]]


def _write_files(directory: Path, merges: list[tuple[str, str]]) -> None:
    vocabulary = {character: token_id for token_id, character in enumerate(sorted(ByteLevel.alphabet()))}
    merged = dict.fromkeys(first + second for first, second in merges)
    vocabulary |= {token: BYTES + len(SPECIAL_TOKENS) + index for index, token in enumerate(merged)}
    added = {token: BYTES + index for index, token in enumerate(SPECIAL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    endoftext, _, im_end = SPECIAL_TOKENS
    files = {
        "vocab.json": vocabulary,
        "added_tokens.json": added,
        "special_tokens_map.json": {"eos_token": im_end, "pad_token": endoftext},
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(token_id): {"content": token, **flags} for token, token_id in added.items()},
            "eos_token": im_end,
            "pad_token": endoftext,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
