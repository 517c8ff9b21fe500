"""Adapters of LoRA go to PEFT and come from it: equal logits on the PyTorch model, equal bytes, equal training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)
peft = pytest.importorskip("peft", reason=INSTALL)
import torch.nn.functional as F  # noqa: E402

from convert.adapters import convert_from_peft, convert_to_peft  # noqa: E402
from convert.pytorch_reference import load_reference  # noqa: E402
from convert.to_hf import convert_to_hf  # noqa: E402
from moss_audio_jax import LoraConfig, MossAudio, MossAudioError, load_adapter, merge_adapter  # noqa: E402
from moss_audio_jax.int8 import int8_kernels, quantize  # noqa: E402
from moss_audio_jax.model import parameter_specs  # noqa: E402
from moss_audio_jax.weights.names import adapter_leaves, released_leaves  # noqa: E402
from moss_audio_jax.weights.parameters import build_model, parameters_of  # noqa: E402
from train.batch import split_microbatches  # noqa: E402
from train.config import OptimizerConfig, StepConfig  # noqa: E402
from train.optimizer import learning_rate  # noqa: E402
from train.running.checkpoints import Checkpoints  # noqa: E402
from train.state import new_state  # noqa: E402
from train.step import train_step  # noqa: E402

from .pairs import CONFIG, Pair, Prompt, make_batch, make_pair, make_prompt  # noqa: E402
from .reference import IGNORED_LABEL  # noqa: E402
from .test_training_step import released, supervised, training_batch  # noqa: E402

PROMPTS = [make_prompt([237]), make_prompt([403, 8], time_markers=True), make_prompt([]), make_prompt([1, 400])]
LOGITS_TOLERANCE = 1e-4  # measured: 4e-6
LOSS_TOLERANCE = 1e-5  # of the losses of 20 steps, relative; measured: 2e-7 with LoRA, 6e-7 without
STEPS = 20

# The default's seven projections, the encoder's three, the stem, whose inputs are in another order here, and a stack
# that is no stack of transformer layers; two parts trained whole, one with a bias and one that is stacked.
EVERYWHERE = LoraConfig(
    rank=3,
    alpha=7.0,
    rslora=True,
    targets=(
        *LoraConfig().targets,
        "audio_encoder.layers.self_attn.[qkv]_proj",
        "audio_encoder.stem_proj",
        "deepstack_audio_merger_list.*",
    ),
    full=("audio_adapter.*", "audio_encoder.layers.fc1.*", "language_model.norm.scale"),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(directory: Path) -> Pair:
    return make_pair(CONFIG, directory, seed=0)


def adapted(model: MossAudio, lora: LoraConfig, seed: int = 0) -> MossAudio:
    """The model with an adapter in which nothing is zero."""
    config = dataclasses.replace(model.config, lora=lora)
    parameters, rng = parameters_of(model), np.random.default_rng(seed)
    for path, spec in parameter_specs(config).items():
        if lora.trains(path):
            noise = jnp.asarray(rng.normal(0, 0.1, spec.shape), jnp.float32)
            parameters[path] = parameters[path] + noise if path in parameters else noise
    return build_model(config, parameters)


def as_run(model: MossAudio, base: Path, run: Path) -> Path:
    """The directory that a training run of this adapter leaves behind."""
    from moss_audio_jax.weights.peft import write_adapter_config

    files = run / "model"
    files.mkdir(parents=True)
    model.config.save_hf(files)
    write_adapter_config(files, model.config, str(base))
    state = new_state(parameters_of(model), model.config, OptimizerConfig())
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, dataclasses.replace(state, frozen={}), {})
    return run


@pytest.fixture(scope="module")
def run(pair: Pair, directory: Path) -> Path:
    return as_run(adapted(pair.model, EVERYWHERE), directory, directory / "run")


@pytest.fixture(scope="module")
def exported(run: Path, directory: Path) -> Path:
    convert_to_peft(run, directory / "peft")
    return directory / "peft"


def our_logits(model: MossAudio) -> list[np.ndarray]:
    logits = np.asarray(model(make_batch(PROMPTS, model)))
    return [row[: len(prompt.ids)] for row, prompt in zip(logits, PROMPTS, strict=True)]


def their_logits(reference: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return [reference(*prompt.torch_inputs).logits[0].numpy() for prompt in PROMPTS]


def largest_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def test_an_exported_adapter_gives_peft_our_logits(pair: Pair, directory: Path, run: Path, exported: Path):
    model = peft.PeftModel.from_pretrained(load_reference(directory), exported)
    adapter = load_adapter(pair.model, run)
    expected = our_logits(adapter)
    assert largest_difference(their_logits(model), expected) < LOGITS_TOLERANCE
    assert largest_difference(our_logits(pair.model), expected) > 0.1  # the adapter is felt
    # All of its tensors were taken: what PEFT holds is what the file holds.
    held = peft.get_peft_model_state_dict(model)
    assert held.keys() == {name for leaf in adapter_leaves(adapter.config).values() for name in leaf.names}


@pytest.fixture(scope="module")
def trained_by_peft(pair: Pair, directory: Path) -> Path:
    """As its users write it: names that match by their ends, whole modules, and a few steps of training."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj"],
        modules_to_save=["audio_adapter", "language_model.norm"],
    )
    model = peft.get_peft_model(load_reference(directory), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        torch_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory / "trained")
    np.save(directory / "trained.npy", np.concatenate(their_logits(model)))
    return directory / "trained"


def test_an_adapter_that_peft_trained_gives_our_model_its_logits(pair: Pair, directory: Path, trained_by_peft: Path):
    model = load_adapter(pair.model, trained_by_peft)
    found = np.concatenate(our_logits(model))
    assert np.abs(found - np.load(directory / "trained.npy")).max() < LOGITS_TOLERANCE
    assert model.config.lora is not None and set(model.config.lora.targets) == {
        "audio_encoder.layers.self_attn.q_proj",
        "audio_encoder.layers.self_attn.v_proj",
        "language_model.layers.self_attn.o_proj",
        "language_model.layers.self_attn.q_proj",
        "language_model.layers.self_attn.v_proj",
    }


@pytest.mark.parametrize("which", ["trained_by_peft", "exported"])
def test_the_round_trip_is_byte_identical(which: str, directory: Path, request, tmp_path: Path):
    source = request.getfixturevalue(which)
    convert_from_peft(source, tmp_path / "orbax", directory)
    convert_to_peft(tmp_path / "orbax", tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_merged_weights_give_pytorch_our_logits(pair: Pair, run: Path, exported: Path, directory: Path, tmp_path: Path):
    adapter = load_adapter(pair.model, run)
    expected = our_logits(adapter)
    convert_to_hf(run, tmp_path / "merged")
    assert largest_difference(their_logits(load_reference(tmp_path / "merged")), expected) < LOGITS_TOLERANCE
    assert largest_difference(our_logits(merge_adapter(adapter)), expected) < LOGITS_TOLERANCE
    # From PEFT's own files, too, and with the model named beside them.
    convert_to_hf(exported, tmp_path / "other", base=directory)
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_int8_base_gives_the_logits_of_pytorchs_own_rounding(pair: Pair, directory: Path, run: Path, exported: Path):
    """PyTorch rounds its kernels with fake quantization, a scale for each output channel."""
    adapter = load_adapter(pair.model, run)
    lora = dataclasses.replace(EVERYWHERE, int8=("language_model.layers.*_proj", "audio_encoder.layers.self_attn.*"))
    parameters = parameters_of(adapter)
    kernels = int8_kernels(parameter_specs(dataclasses.replace(adapter.config, lora=lora)))
    for kernel, scale in kernels.items():
        parameters[kernel], parameters[scale] = quantize(parameters[kernel])
    found = our_logits(build_model(dataclasses.replace(adapter.config, lora=lora), parameters))

    model = peft.PeftModel.from_pretrained(load_reference(directory), exported)
    leaves = adapter_leaves(adapter.config) | released_leaves(pair.model.config)
    rounded = {name.removesuffix(".weight") for kernel in kernels for name in leaves[kernel].names}
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if name in rounded:
                weight = module.base_layer.weight if hasattr(module, "base_layer") else module.weight
                scale = weight.abs().amax(1) / 127
                zeros = torch.zeros_like(scale, dtype=torch.int32)
                weight.copy_(torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127))
                rounded.remove(name)
    assert not rounded
    assert largest_difference(their_logits(model), found) < LOGITS_TOLERANCE
    assert largest_difference(our_logits(adapter), found) > 10 * LOGITS_TOLERANCE  # the rounding is felt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "'use_dora' True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"target_modules": ["language_model.layers.0.self_attn.q_proj"]}, "all of them or none"),
        ({"target_modules": ["q_proj"]}, "is not part of this model"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "lora_A.weight is missing"),
        ({"r": 5}, "has shape"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number"),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_refused(changes, message, pair, trained_by_peft: Path, tmp_path: Path):
    for file in trained_by_peft.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(MossAudioError, match=message):
        load_adapter(pair.model, tmp_path)


def torch_loss(reference: Any, prompts: list[Prompt] = PROMPTS) -> torch.Tensor:
    """The mean over the supervised tokens of all prompts."""
    count = sum(int((supervised(prompt) != IGNORED_LABEL).sum()) for prompt in prompts)
    logits = [reference(*prompt.torch_inputs).logits[0] for prompt in prompts]
    losses = [
        F.cross_entropy(row, supervised(prompt), ignore_index=IGNORED_LABEL, reduction="sum")
        for row, prompt in zip(logits, prompts, strict=True)
    ]
    return torch.stack(losses).sum() / count


EXACT = StepConfig(compute_dtype="float32", remat="full", encoder_dropout=False, loss_chunk=24, spike_sigma=0)
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, warmup_steps=5, total_steps=40, weight_decay=0.01, eps=1e-8, clip_norm=1.0
)
# Every prompt twice, in an order of its own, two a batch.
BATCHES = [[PROMPTS[i] for i in np.random.default_rng(step).permutation(len(PROMPTS))[:2]] for step in range(STEPS)]


def torch_losses(model: Any) -> list[float]:
    """20 steps of clipped AdamW on whatever requires a gradient."""
    moving = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameter], "weight_decay": OPTIMIZER.weight_decay if parameter.ndim > 1 else 0.0}
        for parameter in moving.values()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps)
    losses = []
    for step, prompts in enumerate(BATCHES):
        optimizer.zero_grad()
        loss = torch_loss(model, prompts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving.values(), OPTIMIZER.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(learning_rate(OPTIMIZER, jnp.int32(step)))
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(model: MossAudio, pair: Pair) -> tuple[list[float], Any]:
    state = new_state(jax.tree.map(jnp.copy, parameters_of(model)), model.config, OPTIMIZER)
    graphdef, losses = nnx.split(model)[0], []
    # One shape for all batches: all prompts are in each, and those that are left out supervise nothing.
    whole = training_batch(PROMPTS, pair)
    for prompts in BATCHES:
        used = np.array([[any(prompt is other for other in prompts)] for prompt in PROMPTS], np.float32)
        batch = dataclasses.replace(whole, loss_mask=whole.loss_mask * used)
        state, metrics = train_step(graphdef, EXACT, OPTIMIZER, state, split_microbatches(batch, 1))
        losses.append(float(metrics["loss"]))
    return losses, state


def test_twenty_steps_of_lora_equal_peft(pair: Pair, directory: Path, tmp_path: Path):
    """Both begin with the adapter as our recipe draws it, B zero; the loss falls, and equally on both sides."""
    lora = LoraConfig(rank=4, alpha=8.0, full=("audio_adapter.*",))
    config = dataclasses.replace(pair.model.config, lora=lora)
    drawn = parameters_of(MossAudio(config, rngs=nnx.Rngs(0)))
    parameters = parameters_of(pair.model)
    model = build_model(config, {path: parameters.get(path, leaf) for path, leaf in drawn.items()})
    convert_to_peft(as_run(model, directory, tmp_path / "run"), tmp_path / "peft")
    reference = peft.PeftModel.from_pretrained(load_reference(directory), tmp_path / "peft", is_trainable=True)
    expected = torch_losses(reference)
    found, state = our_losses(model, pair)
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=LOSS_TOLERANCE)

    held = peft.get_peft_model_state_dict(reference)
    for path, leaf in adapter_leaves(config).items():
        for index, name in enumerate(leaf.names):
            array = np.asarray(state.trainable[path])
            ours = leaf.layout.to_released(array[index] if leaf.stacked else array)
            theirs = held[name].numpy()
            assert np.abs(ours - theirs).max() < 0.02 * max(np.abs(theirs).max(), 1e-2), name


def test_twenty_steps_of_full_fine_tuning_equal_pytorch(pair: Pair, directory: Path):
    reference = load_reference(directory)
    for parameter in reference.parameters():
        parameter.requires_grad_(True)
    expected = torch_losses(reference)
    found, state = our_losses(pair.model, pair)
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=LOSS_TOLERANCE)
    for name, tensor in released(pair, state.trainable).items():
        theirs = dict(reference.named_parameters())[name].detach().numpy()
        assert np.abs(tensor - theirs).max() < 0.02 * np.abs(theirs).max(), name
