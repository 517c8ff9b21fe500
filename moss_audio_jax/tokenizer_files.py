"""Reads the files of a tokenizer: vocab.json, merges.txt and added tokens, or tokenizer.json."""

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.schema import INT32, integer
from moss_audio_jax.storage.foreign_files import foreign_content
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import Path, exists, file_in, read_text
from moss_audio_jax.storage.retries import summary

# Words of Qwen2's tokenizer, within which byte pairs are merged; each digit is a word.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(directory: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """Returns the tokenizer of a directory, and the path that error messages name; see `Tokenizer.from_dir`."""
    path = file_in(directory, "tokenizer.json")
    missing = [name for name in ("vocab.json", "merges.txt") if not exists(file_in(directory, name))]
    if missing and not exists(path):
        raise MossAudioError(
            f"{directory} holds no {' and no '.join(missing)} (and no tokenizer.json in their place): "
            "copy the tokenizer files from the released model"
        )
    if not exists(path):
        return _read_released(directory), directory
    core = _read_tokenizer_json(path)
    if not missing:
        _require_same(core, path)
    return core, path


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
    """Reads the parts of tokenizer.json that encode text; `tokenizer` decodes and adds nothing around a text."""
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
