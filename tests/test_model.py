"""The network against recorded outputs of the PyTorch code, and the promises that no recording shows."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_audio_jax import ModelInputs, MossAudio, MossAudioConfig, attention, encoder, make_inputs
from moss_audio_jax.layers import REMAT_POLICIES, gelu, map_layers
from moss_audio_jax.tree import dotted
from moss_audio_jax.weights.parameters import build_model
from tests.conftest import TINY_AUDIO_ID, question, question_parts, released_tensors

CASES = ("t1", "t8", "t237", "t400", "t403", "t801_markers", "t2998_markers", "two_clips")


@pytest.fixture(params=CASES)
def case(request, data_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(data_dir / "tiny" / f"case_{request.param}.npz"))


def inputs_of(case: dict[str, np.ndarray], config: MossAudioConfig) -> ModelInputs:
    mels = [mel[:, :frames] for mel, frames in zip(case["audio_data"], case["audio_data_seqlens"], strict=True)]
    return make_inputs([case["input_ids"][0]], [mels], config=config, audio_token_id=TINY_AUDIO_ID)


def valid_audio(inputs: ModelInputs) -> np.ndarray:
    """The encoded audio tokens that are not padding, in order."""
    return inputs.audio_slots[0][inputs.audio_slots[0] >= 0]


def cross_entropy(model: MossAudio, inputs: ModelInputs, labels: jax.Array) -> jax.Array:
    """Mean over labels that are not -100, each predicted from the position before it."""
    logits = model.logits(model.hidden_states(inputs).last)[:, : labels.shape[1] - 1]
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels[:, 1:], 0)[..., None], axis=-1)[
        ..., 0
    ]
    return -jnp.mean(log_likelihood, where=labels[:, 1:] != -100)


@functools.partial(jax.jit, static_argnums=0)
def encode(graphdef, state, inputs):
    return nnx.merge(graphdef, state).audio_encoder(inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef, state, inputs, labels):
    return jax.value_and_grad(lambda s: cross_entropy(nnx.merge(graphdef, s), inputs, labels))(state)


def test_every_module_equals_the_recording(case, tiny):
    """The encoder from the mel, then each module from the recorded outputs of the one before; last all together."""
    inputs = inputs_of(case, tiny.config)
    features, taps = encode(*nnx.split(tiny), inputs)
    recorded_features = case["encoder_last_hidden_state"]
    recorded_taps = np.stack([case[f"deepstack_{k}"] for k in range(3)])
    adapted = tiny.audio_adapter(recorded_features)
    merged = map_layers(tiny.deepstack_audio_merger_list, recorded_taps)
    audio = valid_audio(inputs)
    np.testing.assert_allclose(features[:, audio], recorded_features, atol=1e-5, rtol=0)
    np.testing.assert_allclose(taps[:, :, audio], recorded_taps, atol=1e-5, rtol=0)
    np.testing.assert_allclose(adapted, case["adapter_output"], atol=1e-5, rtol=0)
    recorded_merged = np.stack([case[f"deepstack_merged_{k}"] for k in range(3)])
    np.testing.assert_allclose(merged, recorded_merged, atol=1e-5, rtol=0)
    logits = tiny(inputs)[0, : case["logits"].shape[1]]
    np.testing.assert_allclose(logits, case["logits"][0], atol=1e-4, rtol=0)


def test_loss_and_gradients_equal_the_recording(case, tiny):
    inputs = inputs_of(case, tiny.config)
    # Labels padded to the length of the tokens, so that cases of one shape share a compilation.
    labels = np.full(inputs.tokens.shape, -100)
    labels[:, : case["labels"].shape[1]] = case["labels"]
    loss, gradients = loss_and_gradients(*nnx.split(tiny), inputs, labels)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5)
    ours = released_tensors(tiny.config, gradients)
    recorded = {name.removeprefix("grad:"): value for name, value in case.items() if name.startswith("grad:")}
    assert len(recorded) > 5
    for name, gradient in recorded.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, atol=1e-4 * scale, rtol=0, err_msg=name)


def test_a_sequence_gives_the_same_logits_alone_and_in_a_batch(tiny):
    parts = [
        question_parts([237]),  # shorter than a chunk
        question_parts([801, 403], seed=1),
        question_parts([], text=20, seed=2),
        question_parts([1, 8, 400, 5], seed=3),
    ]
    ids, mels = zip(*parts, strict=True)
    batch = make_inputs(ids, mels, config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    together = np.asarray(tiny(batch))
    assert together.dtype == np.float32
    for row, (sequence, clips) in enumerate(parts):
        alone = make_inputs([sequence], [clips], config=tiny.config, audio_token_id=TINY_AUDIO_ID)
        expected = np.asarray(tiny(alone))[0, : len(sequence)]
        np.testing.assert_allclose(together[row, : len(sequence)], expected, atol=1e-5, rtol=0)


def test_packed_examples_do_not_see_each_other(tiny):
    first, second = question(tiny, [237]), question(tiny, [403], seed=1)
    lengths = [int((x.segment_ids != 0).sum()) for x in (first, second)]

    def pack(a, b, offset=0):
        joined = np.concatenate([a[0, : lengths[0]], b[0, : lengths[1]] + offset])
        return np.pad(joined, (0, -len(joined) % 64))[None]

    # The second example's audio stands behind the first one's chunks.
    tokens_per_chunk, chunks = 50, first.audio_chunks.shape[1]
    slots = pack(
        first.audio_slots, np.where(second.audio_slots < 0, -1, second.audio_slots + tokens_per_chunk * chunks)
    )
    slots[0, sum(lengths) :] = -1
    segments = pack(first.segment_ids, second.segment_ids, offset=1)
    segments[0, sum(lengths) :] = 0
    packed = ModelInputs(
        pack(first.tokens, second.tokens),
        pack(first.positions, second.positions),
        segments,
        slots,
        *(
            np.concatenate([getattr(first, name), getattr(second, name)], axis=1)
            for name in ("audio_chunks", "chunk_frames", "stem_frames")
        ),
    )
    logits = np.asarray(tiny(packed))[0]
    np.testing.assert_allclose(logits[: lengths[0]], tiny(first)[0, : lengths[0]], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits[lengths[0] : sum(lengths)], tiny(second)[0, : lengths[1]], atol=1e-5, rtol=0)


def gradients_with(remat: str, tiny: MossAudio) -> list[jax.Array]:
    inputs = question(tiny, [403])
    graphdef, state = nnx.split(tiny)

    def objective(state):
        return jnp.square(nnx.merge(graphdef, state).hidden_states(inputs, remat=remat).last).mean()

    return jax.tree.leaves(jax.jit(jax.grad(objective))(state))


@pytest.fixture(scope="module")
def plain_gradients(tiny) -> list[jax.Array]:
    return gradients_with("none", tiny)


@pytest.mark.parametrize("policy", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialization_changes_no_gradient(tiny, plain_gradients, policy):
    for plain, recomputed in zip(plain_gradients, gradients_with(policy, tiny), strict=True):
        np.testing.assert_allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_dropout_is_in_the_encoder_only_with_a_key(tiny):
    inputs = question(tiny, [403])
    graphdef, state = nnx.split(tiny)

    @jax.jit
    def features(state, key):
        model = nnx.merge(graphdef, state)
        chunks = (inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)
        return model.audio_encoder(*chunks, dropout_key=key)[0]

    plain, again = features(state, None), features(state, None)
    first, second = features(state, jax.random.key(0)), features(state, jax.random.key(1))
    np.testing.assert_array_equal(plain, again)
    assert np.abs(first - plain).max() > 0.01 and np.abs(first - second).max() > 0.01
    # It is unbiased enough that the average over keys comes closer than one draw does.
    keys = jax.random.split(jax.random.key(2), 64)
    average = jax.lax.map(lambda key: features(state, key), keys).mean(0)
    assert np.abs(average - plain).mean() < 0.5 * np.abs(first - plain).mean()


def test_the_stem_in_groups_equals_the_stem_at_once(tiny, monkeypatch):
    inputs = question(tiny, [400 * 4 + 24])  # 5 chunks in a bucket of 6: the last group of 4 is padded
    chunks = (inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)
    at_once, _ = tiny.audio_encoder(*chunks)
    monkeypatch.setattr(encoder, "STEM_CHUNKS", 4)
    in_groups, _ = tiny.audio_encoder(*chunks)
    np.testing.assert_allclose(in_groups, at_once, atol=1e-5, rtol=0)


def test_a_tpu_s_order_of_operations_gives_the_same_numbers(tiny, request, monkeypatch):
    """The CPU has another order of operations: compares logits, and gradients with respect to all parameters."""
    monkeypatch.setattr(encoder, "PRODUCT_CHANNELS", 1)  # the convolutions of a released size
    inputs = question(tiny, [403, 237])
    graphdef, state = nnx.split(tiny)

    def logits_and_gradients():
        def total(state):
            logits = nnx.merge(graphdef, state).logits(nnx.merge(graphdef, state).hidden_states(inputs).last)
            return jnp.square(logits).mean(), logits

        (_, logits), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(state)
        return logits, released_tensors(tiny.config, gradients)

    logits, gradients = logits_and_gradients()
    request.getfixturevalue("order_of_a_tpu")
    tpu_logits, tpu_gradients = logits_and_gradients()
    np.testing.assert_allclose(tpu_logits, logits, atol=2e-5, rtol=0)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            tpu_gradients[name], gradient, atol=1e-5 * np.abs(gradient).max() + 1e-9, err_msg=name
        )


@pytest.mark.parametrize("sizes", [(21, 12), (1, 1), (2, 3), (3, 4), (8, 5), (30, 7)], ids=str)
@pytest.mark.parametrize("convolve", [encoder._conv_of_patches, encoder._conv_of_products])
def test_a_cpu_s_convolutions_equal_xlas(convolve, sizes):
    """Values, and gradients with respect to both arguments; also of bfloat16, to its rounding."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *sizes, 5)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 5, 7)).astype(np.float32)
    expected, expected_vjp = jax.vjp(encoder._conv, x, kernel)
    found, vjp = jax.vjp(convolve, x, kernel)
    cotangent = rng.standard_normal(expected.shape).astype(np.float32)
    for ours, xlas in zip((found, *vjp(cotangent)), (expected, *expected_vjp(cotangent)), strict=True):
        np.testing.assert_allclose(ours, xlas, atol=1e-4, rtol=1e-5)
    rounded = convolve(jnp.bfloat16(x), jnp.bfloat16(kernel))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), expected, atol=0.03 * np.abs(expected).max(), rtol=0)


def test_gelu_is_the_exact_one_and_keeps_its_derivative():
    x = jnp.linspace(-12, 12, 4001)
    ours, exact = (
        jax.vmap(jax.value_and_grad(f))(x) for f in (gelu, functools.partial(jax.nn.gelu, approximate=False))
    )
    for one, other in zip(ours, exact, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-6)


def test_attention_in_query_blocks_equals_attention_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 37, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 37)))[:, ::-1])
    arguments = (query, key, value, jnp.arange(37), segments, segments)
    at_once = attention.causal_attend(*arguments)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    in_blocks = attention.causal_attend(*arguments)
    valid = np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(in_blocks)[valid], np.asarray(at_once)[valid], atol=1e-6, rtol=0)


def test_bfloat16_weights_compute_in_bfloat16_and_stay_near(tiny):
    graphdef, state = nnx.split(tiny)
    half = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    inputs = question(tiny, [403])
    hidden = jax.eval_shape(lambda: half.hidden_states(inputs).last)
    assert hidden.dtype == jnp.bfloat16
    logits, exact = half(inputs), tiny(inputs)
    assert logits.dtype == jnp.float32
    valid = inputs.segment_ids[0] != 0
    assert np.abs(logits - exact)[0, valid].mean() < 0.05 * np.abs(exact)[0, valid].mean()


def test_a_tied_head_reads_the_embedding(tiny):
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    flat = {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(tiny))}
    embedding = flat["language_model.embed_tokens.embedding"]
    del flat["lm_head.kernel"]
    tied = build_model(config, flat)
    hidden = jnp.ones((1, tiny.config.language_config.hidden_size))
    np.testing.assert_allclose(tied.logits(hidden), hidden @ embedding.T, rtol=1e-6)
