"""The objective of `reinforce` equals PyTorch's by the papers' formulas, and TRL's; so do gradients of a model."""

import collections
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)

from moss_audio_jax.weights.parameters import parameters_of  # noqa: E402
from train.batch import split_microbatches  # noqa: E402
from train.config import StepConfig  # noqa: E402
from train.reinforce.config import ObjectiveConfig  # noqa: E402
from train.reinforce.objective import PolicyBatch, advantages, policy_loss  # noqa: E402
from train.reinforce.step import policy_sums  # noqa: E402

from .pairs import Pair, changed, make_pair  # noqa: E402
from .test_reference import above  # noqa: E402
from .test_training_step import PROMPTS, errors, packed, released, supervised, training_batch  # noqa: E402

TOLERANCE = 1e-5  # measured: values and gradients of the objective 3e-7, TRL's 3e-7; the model's gradients 4e-6
LENGTHS = np.array([7, 3, 12, 1, 9, 5, 12, 2])  # of the answers to two questions
CASES = {
    "dapo": ObjectiveConfig(),
    "dapo with KL": ObjectiveConfig(kl=0.1, rollout_cap=0.0),
    "grpo": ObjectiveConfig(algorithm="grpo"),
    "gspo": ObjectiveConfig(algorithm="gspo", clip_low=0.01, clip_high=0.02),
}


def answers(lengths: np.ndarray, seed: int = 1) -> dict[str, np.ndarray]:
    """Recorded log-probabilities of answers, [answers, tokens], whose ratios lie on both sides of all clips."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), lengths.max()
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.float32)
    new = rng.uniform(-4, -0.1, shape)
    rewards = rng.choice([0.0, 0.5, 1.0], (2, len(lengths) // 2))
    found = {
        "new": new,
        "old": new + rng.normal(0, 0.3, shape),
        "drawn": new + rng.normal(0, 0.6, shape),
        "reference": new + rng.normal(0, 0.5, shape),
        "mask": mask,
        "advantages": np.repeat(np.concatenate([advantages(group) for group in rewards]), shape[1]).reshape(shape),
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


def weights(mask: np.ndarray, algorithm: str) -> np.ndarray:
    """Of each token's term, as the docstring of `objective` says."""
    lengths = mask.sum(1, keepdims=True)
    return (mask / mask.sum() if algorithm == "dapo" else mask / (len(mask) * lengths)).astype(np.float32)


def batch_of(case: dict[str, np.ndarray], config: ObjectiveConfig, **more: Any) -> PolicyBatch:
    """A row for each answer, with what must not count where nothing was drawn."""
    mask, nothing = case["mask"], np.where(case["mask"] > 0, 0, -np.inf).astype(np.float32)
    inputs: Any = SimpleNamespace(segment_ids=np.ones(mask.shape, np.int32))
    arrays = {name: case[name] + nothing for name in ("drawn", "old", "reference")}
    if not config.kl:
        arrays["reference"] = None
    whole = {"inputs": inputs, "targets": None, "loss_mask": mask, "advantages": case["advantages"] * mask}
    return PolicyBatch(**whole | arrays | {"weight": weights(mask, config.algorithm)} | more)


def in_pytorch(new: Any, case: dict[str, np.ndarray], config: ObjectiveConfig) -> Any:
    """DAPO's equations 8 and 9, GRPO's 3 and 4 and GSPO's 5 to 7, with the rollout's truncated ratio, to minimise."""
    of = {name: torch.from_numpy(array) for name, array in case.items()}
    mask, log_ratio = of["mask"], new - of["old"]
    lengths = mask.sum(1, keepdim=True)
    if config.algorithm == "gspo":
        log_ratio = ((log_ratio * mask).sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(*config.ratios)
    loss = -torch.minimum(ratio * of["advantages"], clipped * of["advantages"])
    if config.rollout_cap:
        loss = loss * (of["old"] - of["drawn"]).exp().clamp(max=config.rollout_cap)
    if config.kl:
        towards = of["reference"] - new
        loss = loss + config.kl * (towards.exp() - towards - 1)
    if config.algorithm == "dapo":
        return (loss * mask).sum() / mask.sum()
    return ((loss * mask).sum(1, keepdim=True) / lengths).mean()


@pytest.mark.parametrize("name", CASES)
def test_the_objective_and_its_gradient_equal_the_papers_formulas(name: str):
    config, case = CASES[name], answers(LENGTHS)
    new = torch.tensor(case["new"], requires_grad=True)
    expected = in_pytorch(new, case, config)
    expected.backward()
    (found, sums), gradient = jax.value_and_grad(policy_loss, has_aux=True)(case["new"], batch_of(case, config), config)
    np.testing.assert_allclose(found, expected.item(), rtol=TOLERANCE)
    largest = np.abs(new.grad.numpy()).max()
    np.testing.assert_allclose(gradient, new.grad.numpy(), rtol=0, atol=TOLERANCE * largest)
    assert sums["tokens"] == LENGTHS.sum() and sums["clipped_low"] > 0 and sums["clipped_high"] > 0


@pytest.mark.parametrize("name", CASES)
def test_the_objective_and_its_gradient_equal_those_of_trl(name: str):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="compared with TRL after: pip install trl")
    config, case = CASES[name], answers(LENGTHS)
    of = {name: torch.from_numpy(array) for name, array in case.items()}
    new = torch.tensor(case["new"], requires_grad=True)
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        loss_type="dapo" if config.algorithm == "dapo" else "grpo",
        importance_sampling_level="sequence" if config.algorithm == "gspo" else "token",
        epsilon_low=1 - config.ratios[0],
        epsilon_high=config.ratios[1] - 1,
        beta=config.kl,
        use_vllm=bool(config.rollout_cap),
        vllm_importance_sampling_correction=True,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
    )
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 0, dtype=torch.long),
        "prompt_mask": torch.zeros(len(LENGTHS), 0, dtype=torch.long),
        "completion_ids": torch.zeros(new.shape, dtype=torch.long),
        "completion_mask": of["mask"],
        "advantages": of["advantages"][:, 0],
        "old_per_token_logps": of["old"],
        "ref_per_token_logps": of["reference"],
        "importance_sampling_ratio": (of["old"] - of["drawn"]).exp().clamp(max=config.rollout_cap),
        "num_items_in_batch": of["mask"].sum(),
    }
    expected = trainer.GRPOTrainer._compute_loss(fake, None, inputs)
    expected.backward()
    (found, _), gradient = jax.value_and_grad(policy_loss, has_aux=True)(case["new"], batch_of(case, config), config)
    np.testing.assert_allclose(found, expected.item(), rtol=TOLERANCE)
    largest = np.abs(new.grad.numpy()).max()
    np.testing.assert_allclose(gradient, new.grad.numpy(), rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize("pair", ["own head"], indirect=True)
def test_gradients_of_a_model_on_packed_answers_equal_pytorch(pair: Pair):
    """The answers are the texts of four prompts, which share a sequence; PyTorch runs them one by one."""
    config, step = CASES["gspo"], StepConfig(compute_dtype="float32", remat="full", loss_chunk=24)
    temperature = 0.7
    # 1. Recorded log-probabilities of all targets, in the order of the packed row.
    batch = packed(training_batch(PROMPTS, pair), tokens_per_chunk=50)
    mask = batch.loss_mask[0] > 0
    lengths = np.array([int((supervised(prompt) >= 0).sum()) for prompt in PROMPTS])
    case = answers(lengths)
    in_row = {name: np.zeros(mask.shape, np.float32) for name in ("drawn", "old", "advantages", "weight")}
    of_answers = case | {"weight": weights(case["mask"], config.algorithm)}
    for name, row in in_row.items():
        row[mask] = of_answers[name][case["mask"] > 0]
    whole = PolicyBatch(
        batch.inputs, np.maximum(batch.targets, 0), batch.loss_mask, **{name: row[None] for name, row in in_row.items()}
    )
    # 2. PyTorch, one by one.
    reference = pair.reference
    reference.zero_grad()
    new = torch.zeros(case["mask"].shape)
    for row, prompt in enumerate(PROMPTS):
        logits = reference(*prompt.torch_inputs).logits[0] / temperature
        targets = supervised(prompt)
        logprobs = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[:, None])[:, 0][targets >= 0]
        new = torch.index_put(new, (torch.full((len(logprobs),), row), torch.arange(len(logprobs))), logprobs)
    # Old ones near the new, so that some ratios are within the clips and some are not.
    case["old"] = (new.detach().numpy() + np.random.default_rng(1).normal(0, 0.01, new.shape)).astype(np.float32)
    in_row["old"][mask] = case["old"][case["mask"] > 0]
    case["drawn"] = (case["old"] + 0.1).astype(np.float32)
    in_row["drawn"][mask] = case["drawn"][case["mask"] > 0]
    expected = in_pytorch(new, case, config)
    expected.backward()
    # 3. The program of an update.
    parameters, graphdef = parameters_of(pair.model), nnx.split(pair.model)[0]
    program = jax.jit(policy_sums, static_argnums=(0, 1, 2, 3))
    sums, gradients = program(graphdef, step, config, temperature, parameters, {}, split_microbatches(whole, 1))
    # Advantages of both signs nearly cancel: rounding is of the size of the terms, not of their sum.
    size = float(np.abs(in_row["weight"] * in_row["advantages"]).sum())
    np.testing.assert_allclose(sums["loss"], expected.item(), rtol=0, atol=TOLERANCE * size)
    gradients_in_pytorch = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert not above(TOLERANCE, errors(released(pair, gradients), gradients_in_pytorch))


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(changed({}), tmp_path_factory.mktemp("pair"), seed=0)
