"""Sampling gives tokens the probabilities that transformers' `generate` gives them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)

from scipy.special import softmax  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

from moss_audio_jax import generate, make_inputs  # noqa: E402
from moss_audio_jax.sampling import SamplingArrays  # noqa: E402
from moss_audio_jax.sampling_config import Sampling  # noqa: E402

from .pairs import CONFIG, TEXT_IDS, Pair, make_pair  # noqa: E402

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
CLEAR_CHOICE = 3e-4  # between the two largest logits, so that rounding doesn't decide


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(CONFIG, tmp_path_factory.mktemp("pair"), seed=0)


@pytest.fixture(scope="module")
def qwen3(pair: Pair) -> Any:
    """The reference's language model and head, as transformers has them."""
    model = Qwen3ForCausalLM(pair.reference.language_model.config).eval()
    model.model, model.lm_head = pair.reference.language_model, pair.reference.lm_head
    return model


def transformers_answer(qwen3: Any, ids: list[list[int]], **options: Any) -> Any:
    """`sequences` [b, prompt + new] and, for each new token, its `logits` and its processed `scores` [b, vocab]."""
    prompt = torch.tensor(ids)
    outputs = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return qwen3.generate(prompt, attention_mask=torch.ones_like(prompt), **outputs, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 50},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"top_k": 20, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 1000, "top_p": 0.9, "repetition_penalty": 1.1},  # more than the vocabulary
        {"temperature": 1.3, "top_k": 12, "top_p": 0.7, "repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_probabilities_equal_transformers(qwen3: Any, options: dict[str, Any]):
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(*TEXT_IDS, (4, 12))
    new = 8
    options = PLAIN | options
    answer = transformers_answer(qwen3, ids.tolist(), do_sample=True, max_new_tokens=new, **options)
    sampling, sequences = SamplingArrays.of(Sampling(**options)), answer.sequences.numpy()
    for step in range(new):
        logits = answer.logits[step].numpy()
        seen = np.zeros(logits.shape, bool)
        np.put_along_axis(seen, sequences[:, : 12 + step], True, axis=1)
        found = softmax(sampling.log_weights(jnp.asarray(logits), jnp.asarray(seen)), axis=1)
        expected = softmax(answer.scores[step].numpy(), axis=1)
        assert np.abs(expected - softmax(logits, axis=1)).max() > 1e-3  # the option does something
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_answers_equal_transformers(pair: Pair, qwen3: Any, penalty: float):
    """A batch of texts of different lengths here, one by one there: padding counts as no token of the prompt."""
    seeds_and_lengths = ((10, 7), (86, 7), (1, 30))
    ids = [np.random.default_rng(seed).integers(*TEXT_IDS, length).tolist() for seed, length in seeds_and_lengths]
    options = {"max_new_tokens": 16, "repetition_penalty": penalty}
    expected = []
    for prompt in ids:
        answer = transformers_answer(qwen3, [prompt], do_sample=False, **options)
        first, second = torch.cat(answer.scores).topk(2).values.T
        assert (first - second).min() > CLEAR_CHOICE
        expected.append(answer.sequences[0, len(prompt) :].tolist())
    assert expected[0][0] == 0  # what shorter rows are padded with, so a penalty on padding would show
    inputs = make_inputs(ids, [[], [], []], config=pair.model.config)
    np.testing.assert_array_equal(generate(pair.model, inputs, eos_ids=(), **options), expected)
