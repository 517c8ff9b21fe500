"""The step keeps its promises: accumulation, meshes, freezing, skipping, dropout, donation.

Gradients are read off Adam's first moment, which after one unclipped step is (1 - b1) times them; so the program that
trains is the one compared.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moss_audio_jax import MossAudioError, make_inputs
from moss_audio_jax.language_model import LanguageModel
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from tests.conftest import SMALL_MODEL, question_parts
from train.batch import batch_sharding, split_microbatches
from train.config import OptimizerConfig, StepConfig
from train.data.packing import TrainingBatch
from train.initialization import random_parameters
from train.state import RecentValues, TrainState, abstract_state, new_state, with_new_data
from train.step import _judged, loss_and_gradients, train_step

EXACT = StepConfig(compute_dtype="float32", remat="none", encoder_dropout=False, loss_chunk=48, z_loss=1e-3)
EVERYTHING = OptimizerConfig(clip_norm=1e9, learning_rate=1e-3, warmup_steps=0)
STAGE_ONE = dataclasses.replace(EVERYTHING, freeze=("audio_encoder.*", "language_model.*", "lm_head.*"))
AS_TRAINED = StepConfig(remat="full")  # bfloat16, with dropout
ROWS = 8
JAXPRS = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    return host(random_parameters(SMALL_MODEL, abstract_parameters(SMALL_MODEL, jnp.float32), seed=0))


@pytest.fixture(scope="module")
def graphdef(parameters) -> nnx.GraphDef:
    return nnx.split(build_model(SMALL_MODEL, parameters))[0]


def host(tree):
    """A copy that outlives the donated original."""
    return jax.tree.map(np.array, tree)


def start(parameters, **options) -> TrainState:
    return new_state(parameters, SMALL_MODEL, EVERYTHING, **options)


def changed(state: TrainState, **changes) -> TrainState:
    """A state with other scalars, on the device of the old ones, so that the step is not compiled again."""
    return jax.device_put(dataclasses.replace(state, **changes), jax.devices()[0])


def make_batch(seed: int = 0) -> TrainingBatch:
    """Rows of one clip each that supervise very different numbers of tokens, in one microbatch."""
    parts = [question_parts([237 - 8 * row], seed=seed + row) for row in range(ROWS)]
    ids, mels = zip(*parts, strict=True)
    inputs = make_inputs(ids, mels, config=SMALL_MODEL)
    targets = np.roll(inputs.tokens, -1, axis=1)
    supervised = (np.arange(inputs.tokens.shape[1]) < 4 + 3 * np.arange(ROWS)[:, None]) & (inputs.segment_ids > 0)
    return split_microbatches(TrainingBatch(inputs, targets, supervised.astype(np.float32)), 1)


def marked(*, group=0, phase=0, label=-1) -> TrainingBatch:
    """`make_batch` with all that a batch may have besides, so that tests of each share a program with 3 groups.

    group, phase: of each row, or of all. label: of each audio token, or of all.
    """
    batch = make_batch()
    tokens = batch.loss_mask.shape
    return dataclasses.replace(
        batch,
        group=np.broadcast_to(np.int32(group)[..., None], tokens),
        phase=np.broadcast_to(np.int32(phase), tokens[:2]),
        audio_labels=np.broadcast_to(np.int32(label), tokens),
    )


def gradients_of(state: TrainState) -> dict[str, np.ndarray]:
    (adam,) = (part for part in state.moments if isinstance(part, optax.ScaleByAdamState))
    return {path: np.asarray(leaf) / (1 - EVERYTHING.b1) for path, leaf in adam.mu.items()}


def equal_bits(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.fixture(scope="module")
def one_step(parameters, graphdef):
    """The state and metrics after a step in float32 on one device."""
    return host(train_step(graphdef, EXACT, EVERYTHING, start(parameters), make_batch()))


def same_step(found, expected, tolerance: float) -> None:
    (found_state, found_metrics), (state, metrics) = found, expected
    for name in ("loss", "z", "accuracy", "tokens", "grad_norm"):
        np.testing.assert_allclose(found_metrics[name], metrics[name], rtol=tolerance, err_msg=name)
    found_gradients = gradients_of(found_state)
    for path, gradient in gradients_of(state).items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found_gradients[path], gradient, atol=tolerance * scale, rtol=0, err_msg=path)


def test_accumulation_equals_the_big_batch(parameters, graphdef, one_step):
    """Rows supervise 4 to 25 tokens, so a mean of the microbatches' means would be another loss."""
    quarters = split_microbatches(jax.tree.map(lambda x: x[0], make_batch()), 4)
    assert quarters.loss_mask.shape == (4, 2, 64)
    same_step(train_step(graphdef, EXACT, EVERYTHING, start(parameters), quarters), one_step, 1e-5)


def test_what_is_heard_is_learned_beside_the_answers(parameters, graphdef, one_step):
    """At weight 0 nothing changes; else the gradient is the sum of both losses', and only labelled tokens count."""
    batch = make_batch()
    labels = np.where(batch.inputs.audio_slots >= 0, 7, -1)
    labels[..., ::2] = -1
    same_step(train_step(graphdef, EXACT, EVERYTHING, start(parameters), marked(label=labels), 3), one_step, 1e-6)

    listening = dataclasses.replace(EXACT, audio_label_weight=0.5)
    labelled = dataclasses.replace(batch, audio_labels=labels)
    state, metrics = host(train_step(graphdef, listening, EVERYTHING, start(parameters), labelled))
    np.testing.assert_allclose(metrics["loss"], one_step[1]["loss"], rtol=1e-6)

    def label_loss(parameters):
        model = build_model(SMALL_MODEL, parameters)
        inputs = jax.tree.map(lambda x: x[0], batch.inputs)
        x, deepstack = model.embed(inputs)
        half = range(SMALL_MODEL.language_config.num_hidden_layers // 2)
        read = model.language_model.run_layers(half, x, inputs.positions, inputs.segment_ids, deepstack)
        losses = [-jax.nn.log_softmax(model.logits(model.language_model.norm(at)))[..., 7] for at in (x, read)]
        return sum(jnp.mean(loss, where=labels[0] >= 0) for loss in losses), losses[1]

    with jax.default_matmul_precision("highest"):
        (_, last), gradients = jax.jit(jax.value_and_grad(label_loss, has_aux=True))(dict(parameters))
    np.testing.assert_allclose(metrics["audio_label_loss"], np.mean(last, where=labels[0] >= 0), rtol=1e-5)
    answers, both = gradients_of(one_step[0]), gradients_of(state)
    for path, gradient in gradients.items():
        expected = answers[path] + 0.5 * np.asarray(gradient)
        np.testing.assert_allclose(both[path], expected, atol=1e-5 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        ("audio_adapter.up_proj.kernel", True),  # as in stage one
        ("language_model.norm.scale", True),  # not of a layer
        ("language_model.layers.mlp.up_proj.kernel", False),
    ],
)
def test_layers_that_are_not_trained_run_in_one_loop(
    parameters, graphdef, one_step, trained: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
):
    """One scan where two would copy their weights; the gradients are the same."""
    found, run_layers = [], LanguageModel.run_layers

    def watched(model, *arguments, **options):
        found.append(options["frozen"])
        return run_layers(model, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "run_layers", watched)
    rest = {path: leaf for path, leaf in parameters.items() if path != trained}
    function = jax.jit(functools.partial(loss_and_gradients, graphdef, EXACT))
    _, gradients = function({trained: parameters[trained]}, rest, make_batch(), jax.random.key(0))
    assert set(found) == {frozen}
    expected = gradients_of(one_step[0])[trained]
    np.testing.assert_allclose(gradients[trained], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(MossAudioError, match="8 sequences can't be cut into 3"):
        split_microbatches(jax.tree.map(lambda x: x[0], make_batch()), 3)


# In a process of their own (`make test` gives them one): late in a long process XLA's collectives between simulated
# devices have blocked for good and aborted it.
@pytest.mark.alone
@pytest.mark.parametrize("layout", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(layout, parameters, graphdef, one_step):
    mesh = make_mesh(**layout)
    target = abstract_state(SMALL_MODEL, EVERYTHING, mesh=mesh)
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    state = start(parameters, mesh=mesh)
    with jax.set_mesh(mesh):
        first = train_step(graphdef, EXACT, EVERYTHING, state, batch)
        same_step(host(first), one_step, 1e-5)
        second, _ = train_step(graphdef, EXACT, EVERYTHING, first[0], batch)
    # The state lies as it was given: else the next step would be compiled again, or a restore would move it.
    for leaf, wanted in zip(jax.tree.leaves(second), jax.tree.leaves(target), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    (adam,) = (part for part in second.moments if isinstance(part, optax.ScaleByAdamState))
    kernel = adam.nu["language_model.layers.mlp.up_proj.kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / (mesh.shape["fsdp"] * mesh.shape["tensor"])


@pytest.mark.parametrize("mesh_sizes", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_a_new_state_is_as_the_abstract_one_says(mesh_sizes, parameters):
    mesh = None if mesh_sizes is None else make_mesh(**mesh_sizes)
    halves = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in parameters.items()}
    state = new_state(halves, SMALL_MODEL, STAGE_ONE, mesh=mesh)
    dtypes = dict.fromkeys(state.frozen, jnp.bfloat16)
    target = abstract_state(SMALL_MODEL, STAGE_ONE, frozen_dtypes=dtypes, mesh=mesh)
    assert jax.tree.structure(state) == jax.tree.structure(target)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in state.frozen.values()} == {jnp.dtype("bfloat16")}


def test_random_parameters_are_the_same_on_every_mesh(parameters):
    mesh = make_mesh(fsdp=4, tensor=2)
    on_mesh = random_parameters(SMALL_MODEL, abstract_parameters(SMALL_MODEL, jnp.float32, mesh), seed=0)
    assert parameters.keys() == parameter_specs(SMALL_MODEL).keys()
    assert equal_bits(host(on_mesh), parameters)


def test_stage_one_as_it_is_trained(parameters, graphdef):
    """bfloat16, rematerialized, with dropout, most of the model frozen."""
    batch, start = make_batch(), host(new_state(parameters, SMALL_MODEL, STAGE_ONE))
    state, metrics = host(
        train_step(graphdef, AS_TRAINED, STAGE_ONE, new_state(parameters, SMALL_MODEL, STAGE_ONE), batch)
    )
    assert metrics["skipped"] == 0 and metrics["tokens"] == batch.loss_mask.sum()
    assert state.frozen.keys() and equal_bits(state.frozen, start.frozen)
    assert {path.split(".")[0] for path in state.trainable} == {"audio_adapter", "deepstack_audio_merger_list"}
    assert all(not np.array_equal(leaf, start.trainable[path]) for path, leaf in state.trainable.items())
    assert {leaf.dtype for leaf in state.trainable.values()} == {np.dtype("float32")}

    # Neither moments nor gradients of anything that is frozen.
    trainable_size = sum(leaf.size for leaf in state.trainable.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.moments)) == 2 * trainable_size + 1
    _, gradients = jax.eval_shape(
        lambda *arguments: loss_and_gradients(graphdef, AS_TRAINED, *arguments),
        *(state.trainable, state.frozen, batch, jax.random.key(0)),
    )
    assert gradients.keys() == state.trainable.keys()


@pytest.mark.parametrize(("freeze", "losses"), [((), 3), (STAGE_ONE.freeze, 1)], ids=["trained", "frozen"])
def test_the_encoder_s_dropout(freeze, losses: int, parameters, graphdef):
    """Drawn again in every step and for every seed, the same again for the same ones; none where it is not trained."""
    optimizer, batch = dataclasses.replace(EVERYTHING, freeze=freeze), make_batch()

    def loss(seed: int = 0, step: int = 0) -> float:
        state = changed(new_state(parameters, SMALL_MODEL, optimizer, seed=seed), step=jnp.int32(step))
        return float(train_step(graphdef, AS_TRAINED, optimizer, state, batch)[1]["loss"])

    again, later, seeded = loss(), loss(step=1), loss(seed=1)
    assert again == loss() and len({again, later, seeded}) == losses


@pytest.mark.parametrize("changes", [{"compute_dtype": "bfloat16"}, {"gradient_dtype": "bfloat16"}], ids=str)
def test_bfloat16_comes_near_float32(changes, parameters, graphdef, one_step):
    config = dataclasses.replace(EXACT, **changes)
    state, metrics = host(train_step(graphdef, config, EVERYTHING, start(parameters), make_batch()))
    np.testing.assert_allclose(metrics["loss"], one_step[1]["loss"], rtol=0.01)
    found, expected = (np.concatenate([x.ravel() for x in gradients_of(s).values()]) for s in (state, one_step[0]))
    assert not np.array_equal(found, expected)
    assert found @ expected > 0.99 * np.linalg.norm(found) * np.linalg.norm(expected)


def test_the_loss_falls_and_the_buffers_are_reused(parameters, graphdef):
    batch, state, losses = make_batch(), start(parameters), []
    for _ in range(60):
        before = state
        state, metrics = train_step(graphdef, EXACT, EVERYTHING, state, batch)
        losses.append(float(metrics["loss"]))
        assert all(leaf.is_deleted() for leaf in before.trainable.values())
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 60 and int(state.skipped) == 0 and int(state.recent_loss.count) == 60


def unusable(how: str) -> TrainingBatch:
    batch = make_batch()
    if how == "nothing supervised":
        return dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    chunks = batch.inputs.audio_chunks.copy()
    chunks[0, 3, 0, 10, 5] = {"NaN": np.nan, "infinite": np.inf}[how]
    return dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, audio_chunks=chunks))


@pytest.mark.parametrize("how", ["NaN", "infinite", "nothing supervised"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(how, parameters, graphdef, one_step):
    state, before = start(parameters), host(start(parameters))
    for count in (1, 2):
        state, metrics = train_step(graphdef, EXACT, EVERYTHING, state, unusable(how))
        assert not np.isfinite(metrics["loss"])
        assert [int(metrics[name]) for name in ("skipped", "skipped_total", "skipped_in_a_row")] == [1, count, count]
    after = host(state)
    assert after.step == 2
    for name in ("trainable", "frozen", "moments", "rng", "recent_loss", "recent_norm"):
        assert equal_bits(getattr(after, name), getattr(before, name)), name
    # The next good batch finds everything in order.
    state, metrics = host(train_step(graphdef, EXACT, EVERYTHING, state, make_batch()))
    same_step((state, metrics), one_step, 1e-6)
    assert [int(metrics[name]) for name in ("skipped", "skipped_total", "skipped_in_a_row")] == [0, 2, 0]


@pytest.mark.parametrize("spiking", ["recent_loss", "recent_norm"])
def test_a_spike_of_loss_or_gradient_norm_is_skipped(spiking, parameters, graphdef, one_step):
    metrics = one_step[1]
    value = metrics["loss"] if spiking == "recent_loss" else metrics["grad_norm"]

    def skipped(sigmas: float) -> int:
        """Returns 1 if a step is skipped whose value is `sigmas` standard deviations above the mean."""
        recent = RecentValues(jnp.int32(64), jnp.float32(value * 0.5), jnp.float32((value * 0.5 / sigmas) ** 2))
        state = changed(start(parameters), **{spiking: recent})
        state, metrics = train_step(graphdef, EXACT, EVERYTHING, state, make_batch())
        moved = not equal_bits(state.trainable, parameters)
        assert moved != bool(metrics["skipped"])
        return int(metrics["skipped"])

    assert (skipped(6.1), skipped(5.9)) == (1, 0)


def recorded(values, sigma: float = 6.0, window: int = 128) -> RecentValues:
    array = jnp.asarray(values)
    return jax.lax.fori_loop(
        0, len(values), lambda i, recent: recent.record(array[i], sigma, window), RecentValues.empty()
    )


def test_recent_values_are_plain_moments_within_the_window():
    values = np.random.default_rng(0).normal(3.0, 2.0, 100).astype(np.float32)
    recent = recorded(values, sigma=0.0)
    np.testing.assert_allclose([recent.mean, recent.variance], [values.mean(), values.var()], rtol=1e-4)


def test_no_spike_before_half_a_window_and_six_deviations_after():
    assert math.isinf(recorded(np.float32([1, 2, 3]), window=8).limit(6.0, 8))
    limit = recorded(np.float32([1, 2, 3, 4]), window=8).limit(6.0, 8)
    np.testing.assert_allclose(limit, 2.5 + 6 * np.std([1, 2, 3, 4]), rtol=1e-5)
    assert math.isinf(recorded(np.float32([1, 2, 3, 4]), 0.0, 8).limit(0.0, 8))


def test_one_spike_does_not_hide_the_next_and_a_lasting_rise_passes_in_time():
    spike = (6.0, 128)  # deviations, window
    quiet = np.random.default_rng(0).normal(1.0, 0.05, 200).astype(np.float32)
    recent = recorded(quiet, *spike)
    assert recent.record(jnp.float32(1e9), *spike).limit(*spike) < 1.6
    assert recent.record(jnp.float32(np.inf), *spike).limit(*spike) == recent.limit(*spike)
    raised = recorded(np.concatenate([quiet, np.full(30, 3.0, np.float32)]), *spike)
    assert recent.limit(*spike) < 1.5 and raised.limit(*spike) > 3


QUIET = np.random.default_rng(0).normal(0.1, 0.002, 100).astype(np.float32)


def judged(losses, phases=None, **changes) -> list[bool]:
    """Returns True for each accepted step, given the losses of the steps in order; the gradient norm is constant."""
    config = StepConfig(**changes)
    watched = {"phase": jnp.int32(0), "spikes_in_a_row": jnp.int32(0)}
    watched |= dict.fromkeys(("recent_loss", "recent_norm"), RecentValues.empty())

    def step(watched, of_step):
        accepted, watched = _judged(SimpleNamespace(**watched), of_step[1], of_step[0], jnp.float32(1), config)
        return watched, accepted

    phases = np.zeros(len(losses), np.int32) if phases is None else np.asarray(phases, np.int32)
    return jax.lax.scan(step, watched, (jnp.asarray(losses, jnp.float32), jnp.asarray(phases)))[1].tolist()


def test_a_lasting_rise_is_accepted_after_the_stated_number_of_spikes():
    risen = np.full(30, 11.7, np.float32)
    assert judged([*QUIET, *risen], spike_patience=10) == [True] * 100 + [False] * 10 + [True] * 20
    # What falls back before that was no lasting rise, and its mean is the old one: the next spike is one as well.
    assert judged([*QUIET, *risen[:9], *QUIET[:5], *risen[:11]]) == [True] * 100 + [False] * 9 + [True] * 5 + [
        False
    ] * 10 + [True]


def test_a_step_that_is_not_finite_is_never_accepted_and_interrupts_the_row():
    assert not any(judged([*QUIET, *[np.nan] * 40])[100:])
    assert not any(judged([*QUIET, *[11.7, np.inf] * 20])[100:])
    assert judged([*QUIET, *[11.7] * 5, np.nan, *[11.7] * 11])[100:] == [False] * 16 + [True]


def test_a_new_phase_of_the_mixture_restarts_what_a_spike_is():
    losses, phases = [*QUIET, *np.full(30, 11.7)], [0] * 100 + [1] * 30
    assert all(judged(losses, phases))
    # Sequences of the phase before may still come; and within the new one a spike is a spike again.
    assert all(judged(losses, phases[:110] + [0] * 20))
    assert judged([*QUIET, *11.7 + QUIET, 40], [0] * 100 + [1] * 101) == [True] * 200 + [False]


def test_a_batch_says_its_phase_and_other_data_are_a_new_one(parameters, graphdef):
    def skips(phases: list[int], state: TrainState) -> bool:
        return bool(train_step(graphdef, EXACT, EVERYTHING, state, marked(phase=phases), 3)[1]["skipped"])

    def alarmed() -> TrainState:
        low = RecentValues(jnp.int32(100), jnp.float32(0.1), jnp.float32(1e-4))
        return changed(start(parameters), recent_loss=low, phase=jnp.int32(1))

    assert skips([1] * ROWS, alarmed()) and skips([0] * ROWS, alarmed())
    assert not skips([1] * (ROWS - 1) + [2], alarmed())
    assert not skips([1] * ROWS, with_new_data(alarmed()))


def test_losses_by_group_and_norms_by_part(parameters, graphdef, one_step):
    """Rows belong to groups 0 and 2 of 3; a group's loss is that of a batch in which its rows alone supervise."""
    batch = make_batch()
    rows = np.int32([0, 2] * (ROWS // 2))
    found = train_step(graphdef, EXACT, EVERYTHING, start(parameters), marked(group=rows), 3)
    same_step(host(found), one_step, 1e-6)
    metrics = host(found[1])
    assert metrics["tokens_of_group"][1] == 0 and math.isnan(metrics["loss_of_group"][1])
    for group in (0, 2):
        alone = dataclasses.replace(batch, loss_mask=batch.loss_mask * (rows == group)[:, None])
        _, expected = train_step(graphdef, EXACT, EVERYTHING, start(parameters), alone)
        np.testing.assert_allclose(metrics["loss_of_group"][group], expected["loss"], rtol=1e-6)
        assert metrics["tokens_of_group"][group] == expected["tokens"]

    parts = {"encoder": "audio_e", "adapter": "audio_a", "deepstack": "deepstack", "language_model": "l"}
    for part, prefix in parts.items():
        gradients = [gradient for path, gradient in gradients_of(one_step[0]).items() if path.startswith(prefix)]
        norm = np.linalg.norm(np.concatenate([gradient.ravel() for gradient in gradients]))
        np.testing.assert_allclose(metrics[f"grad_norm/{part}"], norm, rtol=1e-4)
    assert "loss_of_group" not in one_step[1]
    _, stage_one = train_step(graphdef, AS_TRAINED, STAGE_ONE, new_state(parameters, SMALL_MODEL, STAGE_ONE), batch)
    assert {name for name in stage_one if "/" in name} == {"grad_norm/adapter", "grad_norm/deepstack"}


def test_the_moving_average_follows_accepted_steps(parameters, graphdef):
    optimizer = dataclasses.replace(EVERYTHING, ema_decay=0.3)
    assert start(parameters).ema is None
    state = new_state(parameters, SMALL_MODEL, optimizer)
    expected = dict(parameters)
    for decay, batch in ((0.1, make_batch()), (None, unusable("NaN")), (2 / 11, make_batch()), (0.25, make_batch())):
        state, _ = train_step(graphdef, EXACT, optimizer, state, batch)
        if decay is not None:
            for path, leaf in state.trainable.items():
                expected[path] = decay * expected[path] + (1 - decay) * np.asarray(leaf)
    assert state.ema is not None and state.ema.keys() == state.trainable.keys()
    for path, leaf in state.ema.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)


def learned(parameters, graphdef, optimizer: OptimizerConfig, mesh=None) -> tuple[TrainState, list[float]]:
    """The state after some steps on one batch, and their losses."""
    batch, state, losses = make_batch(), new_state(parameters, SMALL_MODEL, optimizer, mesh=mesh), []
    target = abstract_state(SMALL_MODEL, optimizer, mesh=mesh)
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for _ in range(12):
            state, metrics = train_step(graphdef, EXACT, optimizer, state, batch)
            losses.append(float(metrics["loss"]))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    return host(state), losses


@pytest.mark.alone
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_learn_and_are_sharded(name, parameters, graphdef, monkeypatch: pytest.MonkeyPatch):
    """On eight devices as on one, averages included; the tiny model's kernels are factored as large ones are."""
    factored = functools.partial(optax.scale_by_factored_rms, min_dim_size_to_factor=16)
    monkeypatch.setattr(optax, "scale_by_factored_rms", factored)
    optimizer = dataclasses.replace(EVERYTHING, name=name, learning_rate=3e-3, ema_decay=0.9, clip_norm=1.0)
    state, losses = learned(parameters, graphdef, optimizer)
    assert losses[-1] < 0.6 * losses[0]
    adam = 2 * sum(leaf.size for leaf in state.trainable.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.moments)) < (0.25 if name == "adafactor" else 0.85) * adam
    _, sharded = learned(parameters, graphdef, optimizer, make_mesh(fsdp=4, tensor=2))
    np.testing.assert_allclose(sharded, losses, rtol=2e-3)
    np.testing.assert_allclose(sharded[:3], losses[:3], rtol=1e-5)


def test_float32_sums_leave_the_loss_and_round_no_gradient(parameters, graphdef, one_step):
    """In bfloat16 each gradient of a kernel is rounded before chips add theirs up; in float32 it is not."""
    rounded, exact = (dataclasses.replace(EXACT, compute_dtype="bfloat16", reduce_dtype=d) for d in DTYPES)
    found = [loss_and_gradients_of(graphdef, config, parameters) for config in (rounded, exact)]
    assert found[0][0] == found[1][0]
    gradients = [gradients for _, gradients in found]

    def is_rounded(gradient: np.ndarray) -> bool:
        return np.array_equal(gradient, gradient.astype(jnp.bfloat16).astype(np.float32))

    assert all(map(is_rounded, gradients[0].values()))
    # The head's own loss sums in float32 and then rounds once.
    assert {path for path, gradient in gradients[1].items() if is_rounded(gradient)} <= {"lm_head.kernel"}
    distances = [
        sum(np.square(gradient - gradients_of(one_step[0])[path]).sum() for path, gradient in side.items())
        for side in gradients
    ]
    assert distances[1] < distances[0]


DTYPES = ("bfloat16", "float32")


def loss_and_gradients_of(graphdef, config: StepConfig, parameters) -> tuple[float, dict[str, np.ndarray]]:
    function = jax.jit(functools.partial(loss_and_gradients, graphdef, config))
    (sums, _), gradients = function(dict(parameters), {}, make_batch(), jax.random.key(0))
    return float(sums.loss), host(gradients)


def shapes_in(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """The shapes of all that a program computes, within its loops too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, JAXPRS)):
            if isinstance(value, JAXPRS):
                yield from shapes_in(getattr(value, "jaxpr", value))


def test_a_step_never_holds_the_logits_of_the_whole_batch(parameters, graphdef):
    vocabulary, tokens = SMALL_MODEL.language_config.vocab_size, ROWS * 64

    def holds_them(chunk: int) -> bool:
        config = dataclasses.replace(EXACT, loss_chunk=chunk)
        traced = train_step.trace(graphdef, config, EVERYTHING, start(parameters), make_batch())
        shapes = shapes_in(traced.jaxpr.jaxpr)
        return any(vocabulary in shape and math.prod(shape) >= tokens * vocabulary for shape in shapes)

    assert holds_them(64) and not holds_them(32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": "some"}, "remat must be one of none, dots, attention, full, offload, not 'some'"),
        ({"compute_dtype": "float16"}, "compute-dtype must be one of bfloat16, float32, not 'float16'"),
        ({"gradient_dtype": "float16"}, "gradient-dtype must be one of bfloat16, float32, not 'float16'"),
        ({"loss_chunk": 0}, "loss-chunk must be 1 or more"),
        ({"reduce_dtype": "float16"}, "reduce-dtype must be one of bfloat16, float32, not 'float16'"),
        ({"spike_patience": 0}, "spike-patience must be 1 or more, not 0"),
        ({"spike_sigma": -1.0}, "spike-sigma must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(MossAudioError, match=message):
        StepConfig(**changes)
