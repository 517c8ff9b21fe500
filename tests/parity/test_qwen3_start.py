"""A language model that starts from stock Qwen3 weights gives the logits that transformers gives."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
transformers = pytest.importorskip("transformers", reason=INSTALL)

from moss_audio_jax import MossAudioConfig, make_inputs  # noqa: E402
from moss_audio_jax.small_tokenizer import write_small_tokenizer  # noqa: E402
from moss_audio_jax.tokenizer import Tokenizer  # noqa: E402
from moss_audio_jax.weights.parameters import build_model  # noqa: E402
from train.config import ModelSource  # noqa: E402
from train.initialization import first_parameters  # noqa: E402

from .test_reference import relative_error  # noqa: E402

TINY = MossAudioConfig.preset("tiny")
SIZES = {key: value for key, value in dataclasses.asdict(TINY.language_config).items() if key != "initializer_range"}
TOLERANCE = 1e-5  # largest difference over largest magnitude


@pytest.mark.parametrize(("tied", "shard_size"), [(True, "60KB"), (False, "1GB")])
def test_logits_of_text_are_those_of_transformers(tied: bool, shard_size: str, tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied, initializer_range=0.2)
    reference = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == tied

    parameters = first_parameters(ModelSource(preset="tiny", language_model=str(tmp_path)), TINY)
    model = build_model(TINY, parameters)
    ids = np.random.default_rng(0).integers(0, 500, 37).tolist()
    logits = np.asarray(model(make_inputs([ids], [[]], config=TINY)))[0, : len(ids)]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    assert relative_error(logits, expected) < TOLERANCE


def test_the_tokenizer_of_a_stock_directory_is_read(tmp_path: Path):
    """vocab.json, merges.txt and tokenizer.json together, as published, or tokenizer.json alone."""
    written, stock = tmp_path / "written", tmp_path / "stock"
    written.mkdir()
    write_small_tokenizer(written)
    reference = transformers.Qwen2TokenizerFast.from_pretrained(written)
    reference.save_pretrained(stock)
    text = "<|im_start|>user\nhello number 12, thérè\u0301<|im_end|>"
    expected = reference.encode(text)
    assert (stock / "tokenizer.json").exists() and (stock / "vocab.json").exists()
    assert Tokenizer.from_dir(stock).encode(text) == expected
    (stock / "vocab.json").unlink()
    assert Tokenizer.from_dir(stock).encode(text) == expected
