"""Ids and texts equal those of transformers' Qwen2Tokenizer, the one MOSS-Audio loads (`use_fast=False`)."""

import json
import shutil
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_audio_jax.tokenizer import StreamDecoder, Tokenizer

transformers = pytest.importorskip("transformers")

RELEASED_FILES = ("config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
TEXTS = [
    "",
    "Transcribe the audio.",
    "[0.00]hello there[2.01][2.01]the weather is nice today[4.32]",
    "请转录这段音频。第１２３号、“引号”……",
    "안녕하세요. 이 음성을 받아쓰세요. \u1112\u1161\u11ab\u1100\u1173\u11af",  # ends in decomposed syllables
    "日本語のテキスト。カ\u3099キ\u3099 ｶﾞｷﾞ",
    "👩‍👩‍👧‍👦 🎧🎵 🏳️‍🌈 👍🏽 🇰🇷",
    "e\u0301 o\u0308 A\u030a q\u0307\u0323 q\u0323\u0307 \u212b \ufb01 \u1e9b\u0323",
    "don't I'LL we've THEY'RE i'd I'm it'S 'tis ''s '\u017f",
    "I'LLama you'REady it'Sand we'VEnice he'Dog I'Man '\u017fand",  # contractions end a word whatever follows
    "1 12 123 1234567890 ٣٤٥ ½ Ⅷ ₂",
    " a  b   c    d\te\t\tf\n\n\ng \n h\r\n\r\ni \t\n ",
    "   \n   \n\n  x\u00a0\u3000\u2028y\u200bz\x1c\x85",
    "#include <stdio.h>\n## heading ### #1",  # merges that begin as comments do
    "for (int i=0;i<n;++i){\n\treturn a[i]; // <tag/>\n}\n",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี Привет, мир!",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nyes<|im_end|>",
    "<|im_end|>\u0338 x<|im_end|>\u0301<|im_end|><|im_end| ><im_end>",
    "<|audio_bos|><|AUDIO|><|audio_eos|><|vision_pad|><tool_call>{}</tool_call><|fim_pad|>",
    "\x00\x01\x7f\ufeff\ufffd\ufffe\U0010ffff",
]
WORDS = ["'s", "'LL", "'\u017f", "12", "\uff17", "hello", " world", "的", "음성", "🎧", "İ", "_", "...", "://"]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000"]
COMBINING = ["e\u0301", "\u0301", "\u0338", "\u3099", "\u200d", "\u1112\u1161\u11ab"]
MARKUP = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|vision_pad|>"]
NO_MARKUP = ["<|AUDIO|>", "<|", "|>"]
FRAGMENTS = WORDS + SPACES + COMBINING + MARKUP + NO_MARKUP

# Code points that Python's Unicode tables know. On later ones the two regex engines differ with their own
# tables: `regex` may see a letter where `tokenizers` sees none, and then they cut words differently.
UNKNOWN = ("Cs", "Cn")
ASSIGNED = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in (*UNKNOWN, "Co")]
characters = st.characters(exclude_categories=UNKNOWN)
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(characters, max_size=4)).map("".join)
# Ids of single bytes and of characters cut in two are below 300 or rare; added tokens are above 151642.
token_ids = st.lists(st.integers(0, 300) | st.integers(0, 151668) | st.integers(151643, 151668), max_size=40)


@pytest.fixture(scope="module")
def files(goldens_dir):
    return goldens_dir / "tiny-hf"


@pytest.fixture(scope="module")
def reference(files):
    return transformers.AutoTokenizer.from_pretrained(files, use_fast=False)


@pytest.fixture(scope="module")
def ours(files):
    return Tokenizer.from_dir(files)


def test_the_reference_is_the_slow_tokenizer(reference):
    assert type(reference).__name__ == "Qwen2Tokenizer"


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Splits a text as before byte-pair merging."""
    pre_tokenizer = tokenizer._core.pre_tokenizer
    assert pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_equal(ours, reference, text):
    assert words_of(ours, text) == reference.pat.findall(text)
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False)


@settings(deadline=None, max_examples=3000)
@given(text=texts)
def test_encodes_random_text_equal(ours, reference, text):
    # Ids hide most word boundaries: few pairs merge across one. So the cuts are compared too.
    assert words_of(ours, text) == reference.pat.findall(text)
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False)


# After a letter or a number "'s" is a word; a symbol takes the apostrophe. A space joins letters and symbols.
@pytest.mark.parametrize("around", ["{}'s", " {}a", "1{}\n", "'{}"])
def test_cuts_words_equal_at_every_character(ours, reference, around):
    assert len(ASSIGNED) > 100_000
    texts = [around.format(character) for character in ASSIGNED]
    different = [text for text in texts if words_of(ours, text) != reference.pat.findall(text)]
    assert different == []


def test_encodes_every_character_equal(ours, reference):
    different = [c for c in ASSIGNED if ours.encode(c) != reference.encode(c, add_special_tokens=False)]
    assert different == []


@settings(deadline=None, max_examples=1000)
@given(ids=token_ids, skip_special_tokens=st.booleans())
def test_decodes_random_ids_equal(ours, reference, ids, skip_special_tokens):
    expected = reference.decode(ids, skip_special_tokens=skip_special_tokens)
    stream = StreamDecoder(ours, skip_special_tokens)
    assert ours.decode(ids, skip_special_tokens) == expected
    assert "".join(stream.feed([token_id]) for token_id in ids) + stream.flush() == expected


def test_every_token_decodes_equal(ours, reference):
    for token_id in range(151669):
        assert ours.decode([token_id], False) == reference.decode([token_id]), token_id


def test_tokenizer_json_of_the_fast_tokenizer_encodes_equal(files, reference, tmp_path):
    transformers.AutoTokenizer.from_pretrained(files).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink()
    from_json = Tokenizer.from_dir(tmp_path)
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        assert from_json.encode(text) == ids
        assert from_json.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_added_tokens_json_alone_is_read_equal(files, tmp_path):
    for name in RELEASED_FILES:
        shutil.copyfile(files / name, tmp_path / name)
    config = json.loads((files / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_dir(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
