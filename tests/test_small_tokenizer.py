"""A tokenizer of bytes and learned merges: any text comes back, digits stay single, the files are the released ones."""

from pathlib import Path

import pytest

from moss_audio_jax.small_tokenizer import BYTES, SPECIAL_TOKENS, write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer

TEXTS = ["[2.7]tone[3.5][3.7]noise[4.5]", "When does the tone start?", "<|im_start|>user\n"] * 20


def test_bytes_alone(tmp_path: Path):
    write_small_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert len(tokenizer.encode("Grüße")) == len("Grüße".encode())
    assert tokenizer.encode("0123456789") == list(range(15, 25))
    assert tokenizer.encode("<|im_end|>") == [BYTES + SPECIAL_TOKENS.index("<|im_end|>")]


def test_merges_learned_from_texts(tmp_path: Path):
    write_small_tokenizer(tmp_path, TEXTS, size=300)
    tokenizer = Tokenizer.from_dir(tmp_path)
    answer = tokenizer.encode(TEXTS[0])
    assert [tokenizer.decode([token]) for token in answer[:6]] == ["[", "2", ".", "7", "]", "tone"]
    assert max(answer) < 300 and tokenizer.decode(answer) == TEXTS[0]
    assert tokenizer.encode("0123456789") == list(range(15, 25))
    unseen = "Wörter, die nie gelernt wurden 🎵"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen


def test_the_same_texts_give_the_same_files(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_small_tokenizer(tmp_path / name, TEXTS, size=300)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


@pytest.mark.parametrize("size", [259, 260])
def test_a_size_with_room_for_hardly_any_merge(tmp_path: Path, size: int):
    write_small_tokenizer(tmp_path, TEXTS, size=size)
    assert Tokenizer.from_dir(tmp_path).decode(Tokenizer.from_dir(tmp_path).encode("tone")) == "tone"
