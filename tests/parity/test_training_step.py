"""A training step equals PyTorch's: loss, every gradient, and what AdamW makes of them; packing changes nothing.

The batch of the step is run prompt by prompt in PyTorch; the loss there is the sum over all prompts by the number of
their supervised tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)
import torch.nn.functional as F  # noqa: E402

from moss_audio_jax import ModelInputs  # noqa: E402
from moss_audio_jax.weights.names import released_leaves  # noqa: E402
from moss_audio_jax.weights.parameters import parameters_of  # noqa: E402
from train.batch import split_microbatches  # noqa: E402
from train.config import OptimizerConfig, StepConfig  # noqa: E402
from train.data.packing import TrainingBatch  # noqa: E402
from train.optimizer import learning_rate, rate_of  # noqa: E402
from train.state import new_state  # noqa: E402
from train.step import loss_and_gradients, train_step  # noqa: E402

from .pairs import Pair, Prompt, changed, make_batch, make_pair, make_prompt  # noqa: E402
from .reference import IGNORED_LABEL  # noqa: E402
from .test_reference import above, relative_error  # noqa: E402

# Largest difference over largest magnitude. Measured: loss 1.2e-7, gradients 5e-6, three steps of AdamW 2.4e-5.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# float32 without dropout, as the reference runs; the rest as in training, in several chunks of the loss.
CONFIG = StepConfig(compute_dtype="float32", remat="full", encoder_dropout=False, loss_chunk=24, spike_sigma=0)
PROMPTS = [make_prompt([237]), make_prompt([403, 8], time_markers=True), make_prompt([]), make_prompt([1, 400])]


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory) -> Pair:
    tied = request.param == "tied head"
    return make_pair(changed({"tie_word_embeddings": tied}), tmp_path_factory.mktemp("pair"), seed=0)


def supervised(prompt: Prompt) -> torch.Tensor:
    """Targets of each position: the next label, none after the last."""
    return torch.tensor([*prompt.labels[1:], IGNORED_LABEL])


def training_batch(prompts: list[Prompt], pair: Pair) -> TrainingBatch:
    inputs = make_batch(prompts, pair.model)
    targets = np.full(inputs.tokens.shape, IGNORED_LABEL, np.int32)
    for row, prompt in enumerate(prompts):
        targets[row, : len(prompt.ids)] = supervised(prompt)
    return TrainingBatch(inputs, targets, (targets != IGNORED_LABEL).astype(np.float32))


def reference_gradients(pair: Pair) -> tuple[float, dict[str, torch.Tensor]]:
    """PyTorch's loss over PROMPTS; its gradients stay in the parameters, by released name."""
    reference = pair.reference
    reference.zero_grad()
    count = sum(int((supervised(prompt) != IGNORED_LABEL).sum()) for prompt in PROMPTS)
    losses = []
    for prompt in PROMPTS:
        logits = reference(*prompt.torch_inputs).logits[0]
        losses.append(F.cross_entropy(logits, supervised(prompt), ignore_index=IGNORED_LABEL, reduction="sum"))
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return loss.item(), dict(reference.named_parameters())


@functools.partial(jax.jit, static_argnums=0)
def step_gradients(graphdef: nnx.GraphDef, parameters: dict[str, jax.Array], batch: TrainingBatch):
    return loss_and_gradients(graphdef, CONFIG, parameters, {}, batch, jax.random.key(0))


def released(pair: Pair, by_path: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by path -> by released name, in the released layout."""
    leaves, tensors = released_leaves(pair.model.config), {}
    for path, array in by_path.items():
        leaf, array = leaves[path], np.asarray(array)
        for index, name in enumerate(leaf.names):
            tensors[name] = leaf.layout.to_released(array[index] if leaf.stacked else array)
    return tensors


def errors(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], tensor.detach().numpy()) for name, tensor in expected.items()}


def assert_equal_pytorch(pair: Pair, batch: TrainingBatch) -> None:
    """Loss and gradients over a batch that holds PROMPTS, however they are laid out in it."""
    expected_loss, parameters = reference_gradients(pair)
    (sums, _), gradients = step_gradients(nnx.split(pair.model)[0], parameters_of(pair.model), batch)
    found = errors(released(pair, gradients), {name: parameter.grad for name, parameter in parameters.items()})
    assert abs(sums.loss / sums.tokens - expected_loss) <= LOSS_TOLERANCE * expected_loss
    assert not above(GRADIENT_TOLERANCE, found)


@pytest.mark.parametrize(
    ("pair", "microbatches"), [("own head", 1), ("own head", 2), ("tied head", 2)], indirect=["pair"]
)
def test_loss_and_every_gradient_equal_pytorch(microbatches: int, pair: Pair):
    assert_equal_pytorch(pair, split_microbatches(training_batch(PROMPTS, pair), microbatches))


def packed(batch: TrainingBatch, tokens_per_chunk: int) -> TrainingBatch:
    """All rows in one: their tokens and chunks follow each other, each row a segment of its own."""
    inputs = batch.inputs
    rows, chunks = inputs.chunk_frames.shape
    segments = np.where(inputs.segment_ids > 0, 1 + np.arange(rows)[:, None], 0)
    shifted = inputs.audio_slots + tokens_per_chunk * chunks * np.arange(rows)[:, None]
    slots = np.where(inputs.audio_slots < 0, -1, shifted).astype(np.int32)
    order = np.argsort(segments.ravel() == 0, kind="stable")  # padding last

    def tokens(array: np.ndarray) -> np.ndarray:
        return array.reshape(1, -1)[:, order]

    def clips(array: np.ndarray) -> np.ndarray:
        return array.reshape(1, -1, *array.shape[2:])

    joined = ModelInputs(
        *(tokens(array) for array in (inputs.tokens, inputs.positions, segments.astype(np.int32), slots)),
        *(clips(array) for array in (inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)),
    )
    return TrainingBatch(joined, tokens(batch.targets), tokens(batch.loss_mask))


@pytest.mark.parametrize("pair", ["own head"], indirect=True)
def test_packed_rows_equal_pytorchs_prompts_one_by_one(pair: Pair):
    one_row = packed(training_batch(PROMPTS, pair), tokens_per_chunk=50)
    assert set(one_row.inputs.segment_ids[0]) == {0, *range(1, len(PROMPTS) + 1)}
    assert_equal_pytorch(pair, split_microbatches(one_row, 1))


# A large eps, so that a gradient that is rounding noise moves nothing: Adam would divide it by its own size, and each
# side would step by the sign of its own noise.
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-2, warmup_steps=2, total_steps=10, encoder_rate=0.5, adapter_rate=2.0, eps=1e-4, clip_norm=0.2
)


def torch_optimizer(parameters: dict[str, torch.Tensor], pair: Pair, config: OptimizerConfig) -> torch.optim.AdamW:
    """One group for each parameter: its own rate, and decay for matrices that are no norm's."""
    rates = {
        name: rate_of(config, leaf.path) for leaf in released_leaves(pair.model.config).values() for name in leaf.names
    }
    groups = [
        {
            "params": [parameter],
            "scale": rates[name],
            "weight_decay": config.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in parameters.items()
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)


@pytest.mark.parametrize("freeze", [(), ("audio_encoder.*", "language_model.*", "lm_head.*")], ids=["all", "stage 1"])
def test_three_steps_equal_torchs_adamw(freeze, tmp_path):
    pair = make_pair(changed({}), tmp_path, seed=1)
    config = dataclasses.replace(OPTIMIZER, freeze=freeze)
    state = new_state(jax.tree.map(jnp.copy, parameters_of(pair.model)), pair.model.config, config)
    trained = released(pair, state.trainable).keys()
    start = {name: parameter.detach().clone() for name, parameter in pair.reference.named_parameters()}
    for name, parameter in pair.reference.named_parameters():
        parameter.requires_grad_(name in trained)
    moving = {name: parameter for name, parameter in pair.reference.named_parameters() if name in trained}
    optimizer = torch_optimizer(moving, pair, config)
    batch = split_microbatches(training_batch(PROMPTS, pair), 1)
    graphdef = nnx.split(pair.model)[0]
    for step in range(3):
        expected_loss, _ = reference_gradients(pair)
        norm = torch.nn.utils.clip_grad_norm_(moving.values(), config.clip_norm)
        assert norm > config.clip_norm  # clipping is part of what is compared
        for group in optimizer.param_groups:
            group["lr"] = float(learning_rate(config, jnp.int32(step))) * group["scale"]
        optimizer.step()
        state, metrics = train_step(graphdef, CONFIG, config, state, batch)
        np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)

    # How far each tensor has moved, rather than where it is: else the start would hide the difference.
    moved = {name: tensor - start[name].numpy() for name, tensor in released(pair, state.trainable).items()}
    distances = errors(moved, {name: parameter - start[name] for name, parameter in moving.items()})
    assert not above(GRADIENT_TOLERANCE, distances)
    for name, tensor in released(pair, state.frozen).items():
        np.testing.assert_array_equal(tensor, start[name])
