"""Generation: the cache changes nothing, a batch changes nothing, and sampling follows its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_audio_jax import MossAudioError, generate, make_inputs, stream
from moss_audio_jax import generate as generate_function
from moss_audio_jax.generate import decode_until, prefill_prompts
from moss_audio_jax.sampling import Sampling
from tests.conftest import TINY_AUDIO_ID, question, question_parts
from tests.test_model import CASES, inputs_of


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_recording(name, tiny, data_dir):
    case = dict(np.load(data_dir / "tiny" / f"case_{name}.npz"))
    answer = generate(tiny, inputs_of(case, tiny.config), max_new_tokens=16, eos_ids=())
    np.testing.assert_array_equal(answer[0], case["greedy_token_ids"].reshape(-1)[-16:])


def test_cached_steps_give_the_logits_of_the_whole_sequence(tiny):
    inputs = question(tiny, [403])
    length, new = int((inputs.segment_ids != 0).sum()), 6
    answer = generate(tiny, inputs, max_new_tokens=new, eos_ids=())[0]

    hidden, cache = tiny.prefill(inputs, inputs.tokens.shape[1] + new)
    cached = [tiny.logits(hidden)[0]]
    for step, token in enumerate(answer[:-1]):
        hidden, cache = tiny.decode(jnp.array([token]), jnp.array([length + step]), cache)
        cached.append(tiny.logits(hidden)[0])

    ids, mels = question_parts([403])
    whole = make_inputs([[*ids, *answer.tolist()]], [mels], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    uncached = np.asarray(tiny(whole))[0, length - 1 : length - 1 + new]
    np.testing.assert_allclose(np.stack(cached), uncached, atol=1e-4, rtol=0)


def test_a_prompt_gives_the_same_answer_alone_and_in_a_batch(tiny):
    parts = [question_parts([801]), question_parts([], text=7, seed=1), question_parts([8, 237], seed=2)]
    ids, mels = zip(*parts, strict=True)
    batch = make_inputs(ids, mels, config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    together = generate(tiny, batch, max_new_tokens=12, eos_ids=())
    for row, (sequence, clips) in enumerate(parts):
        alone = make_inputs([sequence], [clips], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
        np.testing.assert_array_equal(together[row], generate(tiny, alone, max_new_tokens=12, eos_ids=())[0])


def test_each_sequence_stops_at_its_own_end(tiny):
    parts = [question_parts([237]), question_parts([801], seed=1)]
    ids, mels = zip(*parts, strict=True)
    batch = make_inputs(ids, mels, config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    free = generate(tiny, batch, max_new_tokens=16, eos_ids=())
    ends = [int(free[0, 3]), int(free[1, 7])]
    stopped = generate(tiny, batch, max_new_tokens=16, eos_ids=ends)
    for row in range(2):
        end = next(i for i, token in enumerate(free[row]) if token in ends)
        np.testing.assert_array_equal(stopped[row, : end + 1], free[row, : end + 1])
        assert (stopped[row, end + 1 :] == ends[0]).all()
    assert stopped.shape[1] == max(next(i for i, t in enumerate(row) if t in ends) for row in free) + 1


def test_streaming_gives_the_same_answer_in_pieces(tiny):
    inputs = question(tiny, [237])
    whole = generate(tiny, inputs, max_new_tokens=13, eos_ids=(), temperature=1.0, seed=3)
    pieces = list(stream(tiny, inputs, max_new_tokens=13, every=5, eos_ids=(), temperature=1.0, seed=3))
    assert [piece.shape[1] for piece in pieces] == [5, 5, 3]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_new_lengths_in_a_bucket_compile_nothing(tiny):
    generate(tiny, question(tiny, [237]), max_new_tokens=9, eos_ids=())
    before = prefill_prompts._cache_size(), decode_until._cache_size()
    for clip, text, new in ((100, 9, 16), (399, 2, 3), (8, 20, 11)):
        generate(tiny, question(tiny, [clip], text=text), max_new_tokens=new, eos_ids=())
    assert (prefill_prompts._cache_size(), decode_until._cache_size()) == before


def test_sampling_repeats_with_its_seed_and_differs_with_another(tiny):
    inputs = question(tiny, [237])
    draws = [generate(tiny, inputs, max_new_tokens=12, eos_ids=(), temperature=1.0, seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def sample(sampling: Sampling, logits: np.ndarray, draws: int = 4000, seen: np.ndarray | None = None) -> np.ndarray:
    """How often each token is drawn from one row of logits."""
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    marked = jnp.zeros(batch.shape, bool) if seen is None else jnp.broadcast_to(jnp.asarray(seen), batch.shape)
    tokens = sampling.arrays()(batch, marked, jax.random.split(jax.random.key(0), draws))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


LOGITS = np.log([0.4, 0.05, 0.3, 0.15, 0.1])


def test_temperature_rescales_the_distribution():
    squared = np.array([0.4, 0.05, 0.3, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(sample(Sampling(temperature=0.5), LOGITS), squared / squared.sum(), atol=0.03)


def test_top_k_keeps_the_likeliest():
    np.testing.assert_allclose(sample(Sampling(1.0, top_k=2), LOGITS), [4 / 7, 0, 3 / 7, 0, 0], atol=0.03)
    assert sample(Sampling(1.0, top_k=1), LOGITS)[0] == 1.0
    assert (sample(Sampling(1.0, top_k=99), LOGITS) > 0).all()


def test_top_p_keeps_the_fewest_that_reach_it():
    expected = np.array([0.4, 0, 0.3, 0.15, 0]) / 0.85
    np.testing.assert_allclose(sample(Sampling(1.0, top_p=0.75), LOGITS), expected, atol=0.03)
    assert sample(Sampling(1.0, top_p=1e-6), LOGITS)[0] == 1.0
    # After top-k the probabilities are those of the tokens kept: 4/7 alone does not reach 0.6.
    np.testing.assert_allclose(sample(Sampling(1.0, top_k=2, top_p=0.6), LOGITS), [4 / 7, 0, 3 / 7, 0, 0], atol=0.03)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = np.array([2.0, 1.5, -0.5, -0.4]), np.array([True, False, False, True])
    weights = np.exp([2.0 / 1.5, 1.5, -0.5, -0.4 * 1.5])
    drawn = sample(Sampling(1.0, repetition_penalty=1.5), logits, seen=seen)
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.03)
    assert sample(Sampling(repetition_penalty=1.5), logits, seen=seen)[1] == 1.0  # greedy


def test_the_prompt_counts_as_said(tiny):
    """With a large penalty nothing of the prompt, and nothing twice, is said."""
    inputs = question(tiny, [237])
    answer = generate(tiny, inputs, max_new_tokens=16, eos_ids=(), repetition_penalty=1e9)[0].tolist()
    positive_only = set(inputs.tokens[0].tolist()) & set(answer)
    assert not positive_only and len(set(answer)) == len(answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 4, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 4, "top_k": -1}, "top_k"),
        ({"max_new_tokens": 4, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 4, "repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_impossible_options_are_named(tiny, options, message):
    with pytest.raises(MossAudioError, match=message):
        generate_function(tiny, question(tiny, [8]), **options)


def test_generation_on_a_mesh_equals_one_device(tiny):
    from moss_audio_jax.checkpoint import abstract_parameters, build_model
    from moss_audio_jax.sharding import make_mesh

    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(tiny))}
    target = abstract_parameters(tiny.config, jnp.float32, mesh)
    sharded = build_model(tiny.config, {path: jax.device_put(flat[path], target[path].sharding) for path in flat})
    inputs = question(tiny, [403])
    expected = generate(tiny, inputs, max_new_tokens=8, eos_ids=())
    np.testing.assert_array_equal(generate(sharded, inputs, max_new_tokens=8, eos_ids=()), expected)
