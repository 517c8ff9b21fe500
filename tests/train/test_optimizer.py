"""Updates: the parameters that move, how far, and in which steps of the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moss_audio_jax import MossAudioConfig, MossAudioError
from moss_audio_jax.model import parameter_specs
from train.config import OptimizerConfig
from train.optimizer import apply_gradients, decays, gradient_transformation, learning_rate, rate_of, split_frozen
from train.step import expected_steps

PATHS = {path: np.zeros(spec.shape) for path, spec in parameter_specs(MossAudioConfig.preset("tiny")).items()}
PARAMETERS = {
    "audio_encoder.layers.fc1.kernel": np.float32([[1.0, -2.0]]),
    "audio_encoder.layers.fc1.bias": np.float32([3.0, 1.0]),
    "audio_adapter.up_proj.kernel": np.float32([[0.5]]),
    "language_model.norm.scale": np.float32([1.0, 2.0]),
    "lm_head.kernel": np.float32([[4.0]]),
}


def rates(config: OptimizerConfig, *steps: int) -> np.ndarray:
    return np.array([learning_rate(config, jnp.int32(step)) for step in steps])


def test_stage_one_trains_the_adapter_and_the_mergers():
    trainable, frozen = split_frozen(PATHS, ("audio_encoder.*", "language_model.*", "lm_head.*"))
    assert {path.split(".")[0] for path in trainable} == {"audio_adapter", "deepstack_audio_merger_list"}
    assert trainable.keys() | frozen.keys() == PATHS.keys() and not trainable.keys() & frozen.keys()


def test_a_pattern_may_name_one_parameter_or_cross_the_parts():
    _, frozen = split_frozen(PATHS, ("lm_head.kernel", "*.layers.*_proj.bias"))
    assert "lm_head.kernel" in frozen and "audio_encoder.layers.self_attn.q_proj.bias" in frozen
    assert "audio_encoder.layers.fc1.bias" not in frozen


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("audio_encodr.*", "audio_encoder.*"),
        ("lm_head.weight", "lm_head.kernel"),
        ("language_model.layers.mlp.*.weight", "language_model.layers.mlp.*"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(pattern, close):
    with pytest.raises(MossAudioError) as raised:
        split_frozen(PATHS, ("audio_adapter.*", pattern))
    assert repr(pattern) in str(raised.value) and close in str(raised.value).split("did you mean")[1]


def test_freezing_everything_is_refused():
    with pytest.raises(MossAudioError, match=r"freeze patterns \* leave no parameter to train"):
        split_frozen(PATHS, ("*",))


def test_kernels_and_embeddings_decay_norms_and_biases_do_not():
    undecayed = {path.split(".")[-1] for path in PATHS if not decays(path)}
    decayed = {path.split(".")[-1] for path in PATHS if decays(path)}
    assert (undecayed, decayed) == ({"scale", "bias"}, {"kernel", "embedding"})


def test_every_parameter_has_a_rate():
    config = OptimizerConfig(encoder_rate=0.1, adapter_rate=10, language_model_rate=0.5)
    assert {path.split(".")[0]: rate_of(config, path) for path in PATHS} == {
        "audio_encoder": 0.1,
        "audio_adapter": 10,
        "deepstack_audio_merger_list": 10,
        "language_model": 0.5,
        "lm_head": 0.5,
    }


def test_the_cosine_schedule():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, total_steps=24, final_fraction=0.1)
    warmup = [0.5, 1.0, 1.5, 2.0]
    np.testing.assert_allclose(rates(config, 0, 1, 2, 3), warmup, rtol=1e-6)
    np.testing.assert_allclose(rates(config, 4, 14, 24, 1000), [2.0, 1.1, 0.2, 0.2], rtol=1e-6)
    quarter = 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(rates(config, 9), [quarter], rtol=1e-6)


def test_the_wsd_schedule():
    config = OptimizerConfig(
        learning_rate=2.0, schedule="wsd", warmup_steps=2, decay_steps=10, total_steps=50, final_fraction=0.0
    )
    np.testing.assert_allclose(rates(config, 0, 1, 2, 40), [1.0, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates(config, 41, 45, 50, 60), [1.8, 1.0, 0.0, 0.0], rtol=1e-6)


def test_schedules_without_warm_up_or_decay():
    flat = OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_steps=0, decay_steps=0, total_steps=5)
    np.testing.assert_allclose(rates(flat, 0, 4), [2.0, 2.0])
    np.testing.assert_allclose(rates(OptimizerConfig(learning_rate=2.0, warmup_steps=0), 0), [2.0])


@pytest.mark.parametrize(("schedule", "halfway", "last"), [("cosine", 1.128, 0.2), ("wsd", 2.0, 0.38)])
def test_a_run_that_ends_with_its_data_has_a_rate_from_the_first_step_on(schedule, halfway, last):
    """Also where nothing is behind yet: a first batch may hold nothing but the beginnings of long texts."""
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=0, decay_steps=10, final_fraction=0.1)

    def rate(step: int, *progress: float) -> float:
        steps = expected_steps(jnp.int32(step), jnp.float32(progress))
        return float(learning_rate(config, jnp.int32(step), steps))

    assert expected_steps(jnp.int32(3), None) is None
    assert rate(0, 0.0, 0.0) == pytest.approx(2.0)
    assert rate(49, 0.4, 0.6) == pytest.approx(halfway, rel=1e-3)
    assert rate(99, 1.0, 1.0) == pytest.approx(last, rel=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of cosine, wsd, not 'linear'"),
        ({"warmup_steps": 50, "total_steps": 20}, "the warm-up of 50 steps"),
        (
            {"schedule": "wsd", "decay_steps": 30, "total_steps": 20},
            "a decay of 30, not 20",
        ),
        ({"first_moment_dtype": "float16"}, "first-moment-dtype must be one of float32, bfloat16, not 'float16'"),
        ({"learning_rate": 0.0}, "learning-rate must be above 0"),
        ({"clip_norm": float("nan")}, "clip-norm must be above 0"),
        ({"encoder_rate": -1.0}, "encoder-rate must be 0 or more"),
        ({"name": "lion"}, "name must be one of adamw, adafactor, muon, not 'lion'"),
        ({"ema_decay": 1.0}, "ema-decay must be 0 or more and below 1, not 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(MossAudioError, match=message):
        OptimizerConfig(**changes)


def test_an_update_is_optax_adamw_at_each_parts_rate():
    """Three clipped steps against one optax.adamw for each parameter, with its rate and its decay."""
    config = OptimizerConfig(encoder_rate=0.1, adapter_rate=10, learning_rate=0.01, total_steps=1000)
    rng = np.random.default_rng(0)
    parameters, moments = PARAMETERS, gradient_transformation(config).init(PARAMETERS)
    expected = dict(PARAMETERS)
    references = {
        path: optax.adamw(0.01 * rate_of(config, path), 0.9, 0.95, 1e-8, weight_decay=0.1 if decays(path) else 0.0)
        for path in PARAMETERS
    }
    states = {path: references[path].init(leaf) for path, leaf in PARAMETERS.items()}
    for _ in range(3):
        gradients = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in PARAMETERS.items()}
        parameters, moments = apply_gradients(config, parameters, moments, gradients, jnp.float32(0.01))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradients.values()))
        assert norm > 1
        for path, leaf in gradients.items():
            update, states[path] = references[path].update(leaf / norm, states[path], expected[path])
            expected[path] = optax.apply_updates(expected[path], update)
    for path, leaf in expected.items():
        np.testing.assert_allclose(parameters[path], leaf, rtol=2e-6, err_msg=path)


def test_small_gradients_are_not_scaled_up():
    config = OptimizerConfig(clip_norm=5.0, b1=0.0, b2=0.0, eps=1e3, weight_decay=0.0)
    gradients = jax.tree.map(lambda leaf: np.full_like(leaf, 0.5), PARAMETERS)
    updates, _ = gradient_transformation(config).update(
        gradients, gradient_transformation(config).init(PARAMETERS), PARAMETERS
    )
    for leaf in updates.values():
        np.testing.assert_allclose(leaf, 0.5 / 1000.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_its_dtype_and_the_second_is_float32(dtype):
    config = OptimizerConfig(first_moment_dtype=dtype)
    moments = gradient_transformation(config).init(PARAMETERS)
    gradients = jax.tree.map(np.ones_like, PARAMETERS)
    _, moments = gradient_transformation(config).update(gradients, moments, PARAMETERS)
    (adam,) = (state for state in moments if isinstance(state, optax.ScaleByAdamState))
    assert {leaf.dtype for leaf in adam.mu.values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in adam.nu.values()} == {jnp.dtype("float32")}


# Two layers of a kernel, large enough to be factored, and one of each kind that Muon leaves to AdamW.
WIDE = {
    "language_model.layers.mlp.up_proj.kernel": (2, 128, 144),
    "language_model.layers.self_attn.o_proj.kernel": (2, 24, 16),
    "audio_adapter.up_proj.kernel": (12, 20),
    "audio_encoder.conv1.kernel": (3, 3, 4, 8),
    "language_model.embed_tokens.embedding": (40, 16),
    "language_model.layers.q_proj.lora_a": (2, 16, 4),
    "language_model.norm.scale": (16,),
    "lm_head.kernel": (16, 40),
}


def three_updates(config: OptimizerConfig, references: dict[str, optax.GradientTransformation]) -> None:
    """Compares three steps, unclipped and undecayed, with a reference of learning rate 1 for each parameter alone."""
    rng = np.random.default_rng(0)
    parameters = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in WIDE.items()}
    transformation = gradient_transformation(config)
    moments = transformation.init(parameters)
    states = {path: references[path].init(leaf) for path, leaf in parameters.items()}
    for _ in range(3):
        gradients = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in WIDE.items()}
        updates, moments = transformation.update(gradients, moments, parameters)
        for path, leaf in gradients.items():
            expected, states[path] = references[path].update(leaf, states[path], parameters[path])
            np.testing.assert_allclose(updates[path], -expected, rtol=1e-4, atol=1e-5, err_msg=path)


def test_adafactor_is_optax_s_at_adamws_rates():
    config = OptimizerConfig(name="adafactor", clip_norm=1e9, weight_decay=0.0)
    reference = optax.adafactor(1.0, multiply_by_parameter_scale=False)
    three_updates(config, dict.fromkeys(WIDE, reference))
    moments = gradient_transformation(config).init({path: np.zeros(shape, np.float32) for path, shape in WIDE.items()})
    (rows,) = (state.v_row for state in moments if hasattr(state, "v_row"))
    assert rows["language_model.layers.mlp.up_proj.kernel"].shape == (2, 128)


def test_muon_moves_each_layers_kernel_as_optax_s_and_the_rest_as_adamw():
    config = OptimizerConfig(name="muon", clip_norm=1e9, weight_decay=0.0)
    muon, adam = optax.contrib.muon(1.0, consistent_rms=0.2), optax.adamw(1.0, 0.9, 0.95, weight_decay=0.0)
    stacks = optax.contrib.muon(
        1.0, consistent_rms=0.2, muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
    )
    paths = list(WIDE)
    references = dict.fromkeys(WIDE, adam) | dict.fromkeys(paths[:2], stacks) | {paths[2]: muon}
    three_updates(config, references)
    # A stack's layers are orthogonalised one by one: all singular values near 1, at the RMS of 0.2.
    gradient = {
        path: np.random.default_rng(1).standard_normal(shape).astype(np.float32) for path, shape in WIDE.items()
    }
    transformation = gradient_transformation(config)
    update = transformation.update(gradient, transformation.init(gradient), gradient)[0][paths[0]]
    values = np.linalg.svd(np.asarray(update), compute_uv=False) / (0.2 * np.sqrt(144))
    assert values.shape == (2, 128) and values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_step_that_is_not_accepted_changes_no_bit(name, dtype):
    """Parameters and moments after an accepted step, then one with other gradients that is not."""
    config = OptimizerConfig(name=name, first_moment_dtype=dtype)
    rng = np.random.default_rng(0)
    parameters, *gradients = (
        {path: rng.standard_normal(shape).astype(np.float32) for path, shape in WIDE.items()} for _ in range(3)
    )
    state = parameters, gradient_transformation(config).init(parameters)
    before = apply_gradients(config, *state, gradients[0], jnp.float32(0.01), accepted=jnp.bool(True))
    after = apply_gradients(config, *before, gradients[1], jnp.float32(0.01), accepted=jnp.bool(False))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    moved = apply_gradients(config, *before, gradients[1], jnp.float32(0.01), accepted=jnp.bool(True))
    assert all((leaf != before[0][path]).any() for path, leaf in moved[0].items())
