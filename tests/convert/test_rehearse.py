"""Random checkpoints are reproducible, run, and speak bytes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.rehearse import write_random_checkpoint
from moss_audio_jax import MossAudioConfig, MossAudioError, generate, load_model, load_processor
from moss_audio_jax.small_tokenizer import SPECIAL_TOKENS, write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.locate import SINGLE_FILE
from moss_audio_jax.weights.safetensors_reader import ReleasedCheckpoint

TINY = MossAudioConfig.preset("tiny")


def test_equal_seeds_give_equal_weights_however_they_are_cut(tmp_path):
    for name, seed, shard_bytes in (("a", 5, 10**9), ("b", 5, 10**5), ("c", 6, 10**9)):
        write_random_checkpoint(TINY, tmp_path / name, seed, shard_bytes)
    a, b, c = (ReleasedCheckpoint(tmp_path / name) for name in "abc")
    for name in a.tensors:
        np.testing.assert_array_equal(a.read(name), b.read(name))
        assert not np.array_equal(a.read(name), c.read(name))


def test_weights_are_scaled_like_an_initialization(released):
    tensors = {name: array.astype(np.float32) for name, array in load_file(released / SINGLE_FILE).items()}
    assert all(np.isfinite(array).all() for array in tensors.values())
    assert tensors["audio_encoder.stem_proj.weight"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert tensors["language_model.layers.1.mlp.down_proj.weight"].std() == pytest.approx(96**-0.5, rel=0.05)
    assert tensors["audio_encoder.conv2.weight"].std() == pytest.approx(72**-0.5, rel=0.1)
    assert tensors["language_model.norm.weight"].mean() == pytest.approx(1, abs=0.1)
    assert abs(tensors["audio_encoder.layers.0.fc1.bias"]).max() < 0.1


def test_tiny_answers_a_question_about_a_sound(released):
    """From text and sound to text, with nothing but what was written."""
    model, processor = load_model(released), load_processor(released)
    wave = np.sin(np.arange(80_000) / 7).astype(np.float32)
    inputs = processor("What is it? 你好", [[wave]])
    answer = generate(model, inputs, max_new_tokens=8, temperature=1.0)
    assert answer.shape[1] <= 8
    assert isinstance(processor.decode(answer[0]), str)
    assert model.config.eos_ids == (258,)


def test_byte_tokenizer(tmp_path):
    write_small_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = "2 café\t你好 🎵\n\x00"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("0123456789") == list(range(15, 25))
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == [256, 257, 258]
    assert tokenizer.decode([*ids[:1], 258, 511]) == "2"
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(256))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MossAudioError, match="not an empty directory"):
        write_random_checkpoint(TINY, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_large_presets_come_without_a_tokenizer(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.rehearse.write_random_checkpoint", lambda config, directory, seed: None)
    assert invoke("rehearse", tmp_path / "large", "--preset", "4b")[0] == 0
    assert list((tmp_path / "large").iterdir()) == []
