"""Generation: the cache changes nothing, a batch changes nothing, and sampling follows its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moss_audio_jax import MossAudio, MossAudioError, attention, generate, make_inputs, stream
from moss_audio_jax import generate as generate_function
from moss_audio_jax.sampling import SamplingArrays, row_keys, row_seeds
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.tree import dotted
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from tests.conftest import TINY_AUDIO_ID, compilations, question, question_parts
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
    for token in answer[:-1]:
        hidden, cache = tiny.decode(jnp.array([token]), jnp.array([True]), cache)
        cached.append(tiny.logits(hidden)[0])

    ids, mels = question_parts([403])
    whole = make_inputs([[*ids, *answer.tolist()]], [mels], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    uncached = np.asarray(tiny(whole))[0, length - 1 : length - 1 + new]
    np.testing.assert_allclose(np.stack(cached), uncached, atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", [1, 7, 30])
def test_a_prompt_read_in_two_parts_gives_the_logits_of_the_whole(tiny, split, monkeypatch):
    """Sequences of different lengths, each cut elsewhere, in a cache of which no more than a few slots are read."""
    monkeypatch.setattr(attention, "MIN_SLOTS", 8)
    parts = [question_parts([237]), question_parts([], text=33, seed=1)]
    inputs = make_inputs(*zip(*parts, strict=True), config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    counts = (inputs.segment_ids != 0).sum(1)
    x, deepstack = tiny.embed(inputs)
    expected, _ = tiny.language_model.prefill(x, counts, x.shape[1], deepstack)
    first = np.array([split, split + 2])

    def cut(array: jax.Array, starts: np.ndarray, size: int) -> jax.Array:
        """Tokens starts[row] to starts[row] + size of each row, on the axis before the last."""
        padded = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, size), (0, 0)])
        rows = [padded[..., row, start : start + size, :] for row, start in enumerate(starts)]
        return jnp.stack(rows, axis=-3)

    begun, size = split + 2, int((counts - first).max())
    _, cache = tiny.language_model.prefill(
        cut(x, np.zeros(2, int), begun), first, begun + size, cut(deepstack, np.zeros(2, int), begun)
    )
    rest, cache = tiny.language_model.extend(cut(x, first, size), counts - first, cache, cut(deepstack, first, size))
    np.testing.assert_array_equal(cache.lengths, counts)
    for row, (start, count) in enumerate(zip(first, counts, strict=True)):
        np.testing.assert_allclose(rest[row, : count - start], expected[row, start:count], atol=1e-4, rtol=0)


def test_the_slots_read_hold_the_longest_sequence():
    sizes = attention.slot_buckets(5000)
    assert sizes == (512, 768, 1024, 1536, 2048, 3072, 4096, 5000)
    for longest, expected in ((0, 512), (512, 512), (513, 768), (4096, 4096), (4097, 5000), (5000, 5000)):
        choice = attention.choose_slots(5000, jnp.array([3, longest]))
        assert sizes[int(choice)] == max(expected, 512)


def test_an_answer_across_a_bucket_of_slots_is_that_of_the_whole_sequence(tiny):
    ids, mels = question_parts([], text=attention.MIN_SLOTS // 2 - 10)
    inputs = make_inputs([ids], [mels], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    answer = generate(tiny, inputs, max_new_tokens=40, eos_ids=())[0]
    assert len(ids) < attention.MIN_SLOTS < len(ids) + 40
    whole = make_inputs([[*ids, *answer.tolist()]], [mels], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    logits = np.asarray(tiny(whole))[0, len(ids) - 1 : len(ids) + 39]
    np.testing.assert_array_equal(logits.argmax(-1), answer)


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
    whole = generate(tiny, inputs, max_new_tokens=13, eos_ids=(), sampling=Sampling(temperature=1.0), seed=3)
    pieces = list(stream(tiny, inputs, max_new_tokens=13, every=5, eos_ids=(), temperature=1.0, seed=3))
    assert [piece.shape[1] for piece in pieces] == [5, 5, 3]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_new_lengths_in_a_bucket_compile_nothing(tiny):
    generate(tiny, question(tiny, [237]), max_new_tokens=9, eos_ids=())
    with compilations() as compiled:
        for clip, text, new in ((100, 9, 16), (399, 2, 3), (8, 20, 11)):
            generate(tiny, question(tiny, [clip], text=text), max_new_tokens=new, eos_ids=())
    assert compiled == []


def test_sampling_repeats_with_its_seed_and_differs_with_another(tiny):
    inputs = question(tiny, [237])
    draws = [generate(tiny, inputs, max_new_tokens=12, eos_ids=(), temperature=1.0, seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_other_options_compile_nothing(tiny):
    """Temperature, top-k, top-p, penalty, ends, seeds: all are arrays."""
    inputs = question(tiny, [237])
    generate(tiny, inputs, max_new_tokens=4)
    with compilations() as compiled:
        for options in (
            {"temperature": 0.7},
            {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 7},
            {"temperature": 1.3, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.2, "seeds": [2**40]},
            {"eos_ids": ()},
            {"eos_ids": (1, 2, 3)},
        ):
            generate(tiny, inputs, max_new_tokens=4, **options)
    assert compiled == []


def test_a_row_draws_the_same_alone_and_in_a_batch(tiny):
    """A row draws by its seed; equal prompts of a batch still get different answers."""
    parts = [question_parts([801]), question_parts([], text=7, seed=1), question_parts([801])]
    ids, mels = zip(*parts, strict=True)
    batch = make_inputs(ids, mels, config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    options = {"max_new_tokens": 12, "eos_ids": (), "temperature": 1.0}
    together = generate(tiny, batch, seeds=[5, 2**64 - 1, 7], **options)
    counted_up = generate(tiny, batch, seed=5, **options)
    np.testing.assert_array_equal(counted_up[[0, 2]], together[[0, 2]])
    assert (together[0] != together[2]).any()
    for row, seed in ((1, 2**64 - 1), (2, 7)):
        sequence, clips = parts[row]
        alone = make_inputs([sequence], [clips], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
        np.testing.assert_array_equal(generate(tiny, alone, seed=seed, **options)[0], together[row])


def test_seeds_of_64_bits_all_differ():
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**63, -(2**63) + 1, 2**64 - 2]
    keys = jax.random.key_data(row_keys(row_seeds(len(seeds), 0, seeds)))
    assert len({tuple(key) for key in keys.tolist()}) == len(seeds)
    np.testing.assert_array_equal(row_seeds(3, 2**64 - 2, None), row_seeds(3, 0, [2**64 - 2, -1, 0]))


def test_what_float32_cannot_hold_is_drawn_from_all_the_same():
    assert sample(Sampling(1e-38), LOGITS)[0] == 1.0
    assert sample(Sampling(1e-300, top_k=3, top_p=1e-300), LOGITS)[0] == 1.0
    np.testing.assert_allclose(sample(Sampling(1e300), LOGITS), np.full(5, 0.2), atol=0.03)
    seen = np.array([True, False, False, True, True])
    assert (
        sample(Sampling(1.0, repetition_penalty=1e300), np.array([3.0, 0.0, -200, 0, -1]), seen=seen)[[0, 1, 3]].sum()
        == 1
    )


def test_all_tokens_stay_at_a_top_p_of_one():
    """The cumulative sum of these probabilities reaches 1 in float32 before the last."""
    logits = np.array([0.0, -20, -21, -22, -23, -24])
    weights = np.asarray(
        SamplingArrays.of(Sampling(1.0, 5, 1.0)).log_weights(jnp.float32([logits]), jnp.zeros((1, 6), bool))
    )
    np.testing.assert_array_equal(np.isfinite(weights[0]), [True] * 5 + [False])


def broken(model: MossAudio, path: str, index: int) -> MossAudio:
    """The model with one NaN in that layer of a stack."""
    flat = {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return build_model(model.config, flat | {path: flat[path].at[index, 3, 5].set(jnp.nan)})


def test_logits_that_are_not_finite_end_it_and_the_tensor_is_named(tiny):
    inputs = question(tiny, [237])
    model = broken(tiny, "language_model.layers.mlp.up_proj.kernel", 1)
    with pytest.raises(MossAudioError, match=r"token 1 .* language_model\.layers\.1\.mlp\.up_proj\.weight"):
        generate(model, inputs, max_new_tokens=4)
    loud = dataclasses.replace(inputs, audio_chunks=np.full_like(inputs.audio_chunks, np.nan))
    with pytest.raises(MossAudioError, match=r"sequence 0 are not finite at token 1 .* though all weights are"):
        next(stream(tiny, loud, max_new_tokens=4))


def test_more_positions_than_the_model_has_are_refused_first(tiny):
    inputs = question(tiny, [237])
    read = int((inputs.segment_ids != 0).sum())

    def of_positions(count: int) -> MossAudio:
        """Without weights: nothing can run."""
        language = dataclasses.replace(tiny.config.language_config, max_position_embeddings=count)
        config = dataclasses.replace(tiny.config, language_config=language)
        return nnx.eval_shape(lambda: MossAudio(config, rngs=nnx.Rngs(0)))

    for ask in (generate, stream):
        with pytest.raises(MossAudioError, match=rf"sequence 0 has {read} tokens \(30 of them audio, 2 s\).*be 3, or"):
            ask(of_positions(read + 3), inputs, max_new_tokens=4)
    short = of_positions(read - 1)
    for ask in (short, lambda inputs: generate(short, inputs, max_new_tokens=4)):
        with pytest.raises(MossAudioError, match=r"max_position_embeddings are .*: give it shorter audio"):
            ask(inputs)


def test_a_mesh_is_not_left_to_the_caller_between_pieces(tiny):
    pieces = stream(tiny, question(tiny, [237]), max_new_tokens=9, every=4, eos_ids=())
    for _ in pieces:
        assert jax.sharding.get_abstract_mesh().empty


def test_no_prompts_have_no_answers(tiny):
    inputs = make_inputs([], [], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    assert generate(tiny, inputs, max_new_tokens=4).shape == (0, 0)
    assert list(stream(tiny, inputs, max_new_tokens=4)) == []


def test_a_full_cache_is_refused(tiny):
    inputs = question(tiny, [237])
    _, cache = tiny.prefill(inputs, inputs.tokens.shape[1])
    cache = dataclasses.replace(cache, lengths=jnp.array([64]))
    with pytest.raises(MossAudioError, match="a cache of 64 slots, 64 of them filled, has no room for 1 more"):
        tiny.decode(jnp.array([1]), jnp.array([True]), cache)
    with pytest.raises(MossAudioError, match="a cache of 32 slots has no room for prompts of 64 tokens"):
        tiny.prefill(inputs, 32)


def test_answers_are_the_same_in_64_bits_and_off_the_default_device(tiny):
    inputs = question(tiny, [237])
    options = {"max_new_tokens": 5, "eos_ids": (), "temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 2**33}
    expected = generate(tiny, inputs, **options)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(generate(tiny, inputs, **options), expected)
        assert np.isfinite(tiny(inputs)[0, 0]).all()
    for device in (jax.devices()[3], "cpu"):
        with jax.default_device(device):
            np.testing.assert_array_equal(generate(tiny, inputs, **options), expected)


def sample(sampling: Sampling, logits: np.ndarray, draws: int = 4000, seen: np.ndarray | None = None) -> np.ndarray:
    """Counts of the tokens drawn from one row of logits."""
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    marked = jnp.zeros(batch.shape, bool) if seen is None else jnp.broadcast_to(jnp.asarray(seen), batch.shape)
    tokens = SamplingArrays.of(sampling)(batch, marked, jax.random.split(jax.random.key(0), draws))
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
        ({"max_new_tokens": 4, "temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 4, "top_k": 2.5}, "top_k must be a whole number"),
        (
            {"max_new_tokens": 4, "seed": 99999999999999999999},
            r"seed must be a whole number from -2\^63 to",
        ),
        ({"max_new_tokens": 4, "seed": 1.5}, "seed must be a whole number"),
        ({"max_new_tokens": 4, "seeds": [1, 2]}, "seeds must hold one for each of 1 prompts, not 2"),
        ({"max_new_tokens": 4, "top_k": -1}, "top_k"),
        ({"max_new_tokens": 4, "sampling": Sampling(top_k=3), "top_p": 2}, "top_p"),
        ({"max_new_tokens": 4, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 4, "repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_impossible_options_are_named(tiny, options, message):
    with pytest.raises(MossAudioError, match=message):
        generate_function(tiny, question(tiny, [8]), **options)


def test_pieces_of_no_tokens_are_refused(tiny):
    with pytest.raises(MossAudioError, match="every must be 1 or more, not 0"):
        stream(tiny, question(tiny, [8]), max_new_tokens=4, every=0)


def on_mesh(model: MossAudio, mesh: jax.sharding.Mesh) -> MossAudio:
    flat = {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    target = abstract_parameters(model.config, jnp.float32, mesh)
    return build_model(model.config, {path: jax.device_put(flat[path], target[path].sharding) for path in flat})


def test_generation_on_a_mesh_equals_one_device(tiny):
    sharded = on_mesh(tiny, make_mesh(replica=2, fsdp=2, tensor=2))
    inputs = question(tiny, [403])
    expected = generate(tiny, inputs, max_new_tokens=8, eos_ids=())
    np.testing.assert_array_equal(generate(sharded, inputs, max_new_tokens=8, eos_ids=()), expected)


def test_a_mesh_of_explicit_axes_serves(tiny):
    """As `jax.make_mesh` makes them: where the model is loaded onto one, and where its arrays were put onto it."""
    explicit = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    inputs = question(tiny, [403])
    expected, logits = generate(tiny, inputs, max_new_tokens=4, eos_ids=()), tiny(inputs)
    loaded = on_mesh(tiny, explicit)
    by_hand = nnx.merge(
        nnx.graphdef(loaded),
        jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(explicit, leaf.sharding.spec)), nnx.state(loaded)),
    )
    for model in (loaded, by_hand):
        np.testing.assert_array_equal(generate(model, inputs, max_new_tokens=4, eos_ids=()), expected)
        valid = inputs.segment_ids != 0
        np.testing.assert_allclose(np.asarray(model(inputs))[valid], np.asarray(logits)[valid], atol=1e-5, rtol=0)
