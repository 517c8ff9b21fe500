"""The chunked loss equals the plain one, in value and gradients, and needs a fraction of its memory."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moss_audio_jax.sharding import constrain, make_mesh
from train import loss
from train.loss import blockwise_cross_entropy, blockwise_logprobs

BATCH, LENGTH, WIDTH, VOCABULARY = 4, 50, 16, 1000


@pytest.fixture(params=[1, 4], ids=lambda count: f"{count} blocks of the vocabulary")
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """On one device; on each of two it takes half as many."""
    monkeypatch.setattr(loss, "VOCABULARY_BLOCK", VOCABULARY // request.param)
    jax.clear_caches()  # programs hold the blocks they were traced with
    return request.param


def problem(dtype=jnp.float32, seed: int = 0):
    """hidden, head, targets, weights; the unsupervised third has targets that are no token."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([0.0, 0.5, 1.0], (BATCH, LENGTH)).astype(np.float32)
    targets = np.where(weights > 0, rng.integers(0, VOCABULARY, weights.shape), -100).astype(np.int32)
    hidden, head = rng.standard_normal((BATCH, LENGTH, WIDTH)), rng.standard_normal((WIDTH, VOCABULARY))
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(head, dtype),
        targets,
        weights * rng.choice([0.5, 1.0], weights.shape),
    )


def plain(hidden, head, targets, weights, z_loss=0.0):
    """The objective, and the four sums, from all logits at once."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    correct = logits.argmax(-1) == targets
    sums = [(values * weights).sum() for values in (losses, squares, correct)] + [weights.sum()]
    return sums[0] + z_loss * sums[1], sums


@functools.partial(jax.jit, static_argnames=("function", "options"))
def value_and_gradients(function, hidden, head, targets, weights, options=()):
    of = functools.partial(function, **dict(options))
    return jax.value_and_grad(lambda *x: of(*x, targets, weights), argnums=(0, 1), has_aux=True)(hidden, head)


def close(actual, expected, tolerance):
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        wanted = np.asarray(wanted, np.float32)
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("block", [1, 16, 50, 512], ids=lambda block: f"block {block}")
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_the_plain_loss_and_its_gradients(block, z_loss, blocks):
    expected = value_and_gradients(plain, *problem(), options=(("z_loss", z_loss),))
    found = value_and_gradients(blockwise_cross_entropy, *problem(), options=(("z_loss", z_loss), ("block", block)))
    close(found, expected, 2e-6)
    # Without gradients another program runs.
    without_gradients = jax.jit(blockwise_cross_entropy, static_argnames=("z_loss", "block"))
    value = without_gradients(*problem(), z_loss=z_loss, block=block)
    close(value, expected[0], 2e-6)


def test_gradients_scale_with_what_follows_the_loss():
    hidden, head, targets, weights = problem()
    scaled = jax.grad(lambda x, w: 3.0 * blockwise_cross_entropy(x, w, targets, weights, block=16)[0] / 7.0, (0, 1))
    _, expected = value_and_gradients(plain, hidden, head, targets, weights)
    close(scaled(hidden, head), jax.tree.map(lambda x: x * 3 / 7, expected), 2e-6)


def test_the_sums_carry_no_gradient():
    hidden, head, targets, weights = problem()
    gradient = jax.grad(lambda x: blockwise_cross_entropy(x, head, targets, weights)[1].loss)(hidden)
    assert not np.asarray(gradient).any()


def test_bfloat16_accumulates_in_float32():
    """Against float32 on the same rounded inputs: only the logits' gradient and the results are rounded."""
    hidden, head, targets, weights = problem(jnp.bfloat16)
    exact = hidden.astype(jnp.float32), head.astype(jnp.float32), targets, weights
    (expected, sums), gradients = value_and_gradients(plain, *exact)
    (found, found_sums), found_gradients = value_and_gradients(
        blockwise_cross_entropy, hidden, head, targets, weights, options=(("block", 16),)
    )
    assert [x.dtype for x in found_gradients] == [jnp.bfloat16] * 2
    close((found, found_sums), (expected, sums), 1e-5)
    close(found_gradients, gradients, 2**-8)


def test_an_embedding_that_is_also_the_head_gets_both_gradients():
    hidden, head, targets, weights = problem()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, LENGTH))

    def tied(function, embedding):
        return function(hidden + embedding[tokens], embedding.T, targets, weights)[0]

    close(
        *(jax.grad(functools.partial(tied, function))(head.T) for function in (blockwise_cross_entropy, plain)),
        2e-6,
    )


@pytest.mark.parametrize("layout", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_sums_by_group(layout, blocks):
    """Those of each group are the sums where all other groups weigh nothing; they add up to the whole."""
    hidden, head, targets, weights = problem()
    groups = np.random.default_rng(2).integers(0, 3, targets.shape).astype(np.int32)
    groups[groups == 1] = 3  # nothing is of group 1

    @functools.partial(jax.jit, static_argnames="num_groups")
    def sums(weights, num_groups=0):
        arrays = constrain(hidden, "batch", None, None), constrain(head, "embed", "vocab"), targets, weights
        return blockwise_cross_entropy(*arrays, block=16, groups=groups, num_groups=num_groups)

    expected = [sums(weights * (groups == group))[1] for group in range(4)]
    with jax.set_mesh(make_mesh(**layout)) if layout else contextlib.nullcontext():
        objective, found = sums(weights, 4)
        by_group = functools.partial(blockwise_cross_entropy, groups=groups, num_groups=4)
        by_hidden = jax.jit(jax.grad(lambda x: by_group(x, head, targets, weights)[0]))(hidden)
    losses, tokens = found.by_group
    np.testing.assert_allclose(losses, [each.loss for each in expected], rtol=2e-6)
    np.testing.assert_allclose(tokens, [each.tokens for each in expected])
    np.testing.assert_allclose(losses.sum(), found.loss, rtol=2e-6)
    whole = jax.grad(lambda x: blockwise_cross_entropy(x, head, targets, weights)[0])(hidden)
    close(by_hidden, whole, 2e-6)
    np.testing.assert_allclose(objective, found.loss, rtol=2e-6)
    assert sums(weights)[1].by_group is None


@pytest.mark.parametrize("layout", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "tensor": 2}])
def test_on_a_mesh_equals_one_device(layout, blocks):
    def sharded(hidden, head, targets, weights, block):
        return blockwise_cross_entropy(
            constrain(hidden, "batch", None, None),
            constrain(head, "embed", "vocab"),
            targets,
            weights,
            block=block,
        )

    expected = value_and_gradients(plain, *problem())
    with jax.set_mesh(make_mesh(**layout)):
        close(value_and_gradients(sharded, *problem(), options=(("block", 16),)), expected, 2e-6)


@pytest.mark.parametrize(
    ("entries", "count"),
    [(1, 1), (16_384, 1), (16_386, 2), (151_936, 16), (151_936 // 2, 8), (3 * 16_384 + 1, 13), (65_537, 1)],
)
def test_blocks_are_equal(entries, count):
    """The fewest that divide the vocabulary; of a prime number, which only single entries divide, all at once."""
    assert loss._block_count(entries) == count


def test_memory_is_that_of_a_chunk():
    """Temporary bytes by XLA's analysis, over those of all logits. Measured: 0.106, and 2.06 for the plain loss."""
    shapes = (2, 1024, 64), (64, 8192), (2, 1024), (2, 1024)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.float32), strict=True)
    ]

    def temporary(function, **options):
        compiled = value_and_gradients.lower(function, *arrays, options=tuple(options.items())).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * 1024 * 8192 * 4
    assert temporary(plain) > logits  # what is measured here shows up in the analysis
    assert temporary(blockwise_cross_entropy, block=32) < logits / 8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_all_logits(temperature: float, blocks):
    """Values, entropy, and the gradients of a function of them that weighs each token differently."""
    hidden, head, targets, weights = problem()
    targets = np.maximum(targets, 0)

    def of_all_logits(hidden, head):
        logits = jax.nn.log_softmax(hidden @ head / temperature)
        return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], -(jnp.exp(logits) * logits).sum(-1)

    def blockwise(hidden, head):
        return blockwise_logprobs(hidden, head, targets, temperature=temperature, block=16)

    def objective(function, hidden, head):
        logprobs, entropy = function(hidden, head)
        return (weights * jnp.sin(logprobs)).sum(), (logprobs, entropy)

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(objective, function), (0, 1), has_aux=True))(hidden, head)
        for function in (blockwise, of_all_logits)
    )
    close(found, expected, 2e-5)
