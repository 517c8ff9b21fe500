"""LoRA: it begins as the base, trains what it says and nothing else; runs, meshes, adapters and merging agree."""

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_hub import FakeHub
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from convert.adapters import convert_to_peft
from convert.to_hf import convert_to_hf
from moss_audio_jax import (
    LoraConfig,
    ModelInputs,
    MossAudio,
    MossAudioConfig,
    MossAudioError,
    generate,
    load_adapter,
    load_model,
    make_inputs,
    merge_adapter,
    save_model,
)
from moss_audio_jax.__main__ import main as ask
from moss_audio_jax.lora import with_adapter_dropout
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.weights.locate import ADAPTER_CONFIG, SINGLE_FILE, forget_names
from moss_audio_jax.weights.orbax import stored_shapes
from moss_audio_jax.weights.parameters import abstract_parameters, build_model, parameters_of
from tests.conftest import SMALL_MODEL, question, question_parts
from train.batch import batch_sharding, split_microbatches
from train.config import LoopConfig, ModelSource, OptimizerConfig, RunConfig, StepConfig, ValidationConfig
from train.data import DataConfig
from train.data.config import SceneConfig
from train.data.mixture_config import MixtureConfig, SceneGroupConfig
from train.data.packing import TrainingBatch
from train.initialization import first_parameters, frozen_dtypes
from train.loop import train
from train.recipes import RECIPES
from train.running.checkpoints import Checkpoints
from train.state import abstract_state, new_state
from train.step import train_step

LORA = LoraConfig(rank=4, alpha=8.0, full=("audio_adapter.*",))
EXACT = StepConfig(compute_dtype="float32", remat="none", encoder_dropout=False, loss_chunk=48, spike_sigma=0.0)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, total_steps=20)


def with_lora(lora: LoraConfig | None) -> MossAudioConfig:
    return dataclasses.replace(SMALL_MODEL, lora=lora)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "model"
    save_model(MossAudio(SMALL_MODEL, rngs=nnx.Rngs(0)), directory)
    write_small_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def model(base: Path) -> MossAudio:
    return load_model(base)


def first(base: Path, lora: LoraConfig = LORA, **options) -> dict[str, jax.Array]:
    return first_parameters(ModelSource(checkpoint=str(base)), with_lora(lora), **options)


def stirred(base: Path, lora: LoraConfig = LORA, seed: int = 0) -> MossAudio:
    """A model whose adapter is not zero."""
    rng = np.random.default_rng(seed)
    parameters = {
        path: leaf + jnp.asarray(rng.normal(0, 0.05, leaf.shape), jnp.float32) if lora.trains(path) else leaf
        for path, leaf in first(base, lora).items()
    }
    return build_model(with_lora(lora), parameters)


def batch(rows: int = 8) -> TrainingBatch:
    inputs = question_rows(rows)
    targets = np.roll(inputs.tokens, -1, axis=1)
    weights = (inputs.segment_ids > 0).astype(np.float32)
    return split_microbatches(TrainingBatch(inputs, targets, weights), 1)


def question_rows(rows: int = 8) -> ModelInputs:
    ids, mels = zip(*[question_parts([237 - 8 * row], seed=row) for row in range(rows)], strict=True)
    return make_inputs(ids, mels, config=SMALL_MODEL)


def graphdef_of(lora: LoraConfig | None) -> nnx.GraphDef:
    return nnx.split(build_model(with_lora(lora), dict(abstract_parameters(with_lora(lora), jnp.float32))))[0]


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["default", "everywhere"])
def test_logits_begin_bit_equal_to_the_base(dtype: str, everywhere: bool, base: Path):
    targets = ("*_proj", "*.fc?") if everywhere else LoraConfig().targets
    lora = LoraConfig(rank=4, targets=targets)
    plain = load_model(base, dtype=dtype)
    dtypes = dict.fromkeys(parameter_specs(with_lora(lora)), dtype)
    adapted = build_model(with_lora(lora), first(base, lora, dtypes=dtypes))
    assert any(path.endswith("lora_a") for path in parameters_of(adapted))
    inputs = question_rows()
    bits, expected = (np.asarray(each(inputs)).view(np.uint32) for each in (adapted, plain))
    np.testing.assert_array_equal(bits, expected)


def test_the_base_moves_no_bit_and_has_neither_gradient_nor_moments(base: Path):
    dtypes = {path: "bfloat16" for path in parameter_specs(with_lora(LORA)) if not LORA.trains(path)}
    config = dataclasses.replace(EXACT, compute_dtype="bfloat16", remat="full")
    state = new_state(first(base, dtypes=dtypes), with_lora(LORA), OPTIMIZER)
    before = host(state)
    assert {leaf.dtype.name for leaf in state.frozen.values()} == {"bfloat16"}
    assert {path.rpartition(".")[0] for path in state.trainable if path.endswith("kernel")} == {
        f"audio_adapter.{name}_proj" for name in ("gate", "up", "down")
    }
    assert sum(path.endswith("lora_b") for path in state.trainable) == 7 == len(state.trainable) // 2 - 1
    graphdef = graphdef_of(LORA)
    losses = []
    for _ in range(3):
        state, metrics = train_step(graphdef, config, OPTIMIZER, state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    for path, leaf in before.frozen.items():
        np.testing.assert_array_equal(state.frozen[path], leaf, err_msg=path)
    for path, leaf in before.trainable.items():
        assert not np.array_equal(state.trainable[path], leaf), path
    trainable = sum(leaf.size for leaf in state.trainable.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.moments)) == 2 * trainable + 1


def test_no_gradient_of_a_frozen_kernel_is_computed():
    """Among the products of the compiled step none has the shape of the head or an MLP; full training has both."""
    language = SMALL_MODEL.language_config
    width, vocabulary, hidden = language.hidden_size, language.vocab_size, language.intermediate_size
    few_rows = jax.eval_shape(functools.partial(batch, 3))  # whose number of tokens is none of the sizes

    def gradients(lora: LoraConfig | None) -> set[int]:
        state = abstract_state(with_lora(lora), OPTIMIZER)
        program = train_step.lower(graphdef_of(lora), EXACT, OPTIMIZER, state, few_rows).compile().as_text()
        found = re.findall(r"= f32\[(?:1,)?(\d+),(\d+)\]\S* dot\(", program)
        shapes = {frozenset(map(int, shape)) for shape in found}
        return {size for size in (vocabulary, hidden) if {width, size} in shapes}

    assert gradients(None) == {vocabulary, hidden} and not gradients(LORA)


def test_dropout_is_drawn_anew_for_every_layer_step_and_seed(base: Path):
    lora = dataclasses.replace(LORA, dropout=0.5)
    parameters = host(parameters_of(stirred(base, lora)))
    plain = build_model(with_lora(lora), parameters)
    layers = with_adapter_dropout(plain, jax.random.key(0)).language_model.layers
    assert not hasattr(plain.language_model.layers.mlp.up_proj, "lora_keys")
    keys = [layers.mlp.up_proj.lora_keys[...], layers.mlp.gate_proj.lora_keys[...]]
    assert keys[0].shape == (2,)
    assert len({tuple(data) for pair in keys for data in jax.random.key_data(pair).tolist()}) == 4

    def loss(seed: int = 0, step: int = 0, lora: LoraConfig = lora) -> float:
        state = new_state(parameters, with_lora(lora), OPTIMIZER, seed=seed)
        state = jax.device_put(dataclasses.replace(state, step=jnp.int32(step)), jax.devices()[0])
        return float(train_step(graphdef_of(lora), EXACT, OPTIMIZER, state, batch())[1]["loss"])

    assert loss() == loss()
    assert len({loss(), loss(seed=1), loss(step=1), loss(lora=LORA)}) == 4
    # Outside of training nothing is dropped.
    inputs = question(plain, [237])
    without = build_model(with_lora(LORA), parameters)
    np.testing.assert_array_equal(build_model(with_lora(lora), parameters)(inputs), without(inputs))


def test_a_dropped_input_is_scaled_up_and_the_base_sees_it_whole():
    from moss_audio_jax.layers import Linear

    layer = Linear(64, 8, (None, None), rngs=nnx.Rngs(0))
    layer.lora = LoraConfig(rank=8, alpha=8.0, dropout=0.25)
    layer.lora_a, layer.lora_b = nnx.Param(jnp.eye(64, 8)), nnx.Param(jnp.eye(8))
    x = jnp.ones((500, 64))
    layer.lora_keys = nnx.Variable(jax.random.key(0))
    added = layer(x) - x @ layer.kernel[...]
    dropped = np.abs(np.asarray(added)) < 1e-4
    assert abs(dropped.mean() - 0.25) < 0.02
    np.testing.assert_allclose(np.asarray(added)[~dropped], 1 / 0.75, rtol=1e-4)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale(rslora: bool, scale: float):
    assert LoraConfig(rank=4, alpha=8.0, rslora=rslora).scale == scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_is_exact_to_the_rounding_of_the_dtype(dtype: str, base: Path):
    parameters = {path: leaf.astype(dtype) for path, leaf in parameters_of(stirred(base)).items()}
    adapted = build_model(with_lora(LORA), parameters)
    merged = parameters_of(merge_adapter(adapted))
    assert merged.keys() == parameter_specs(SMALL_MODEL).keys()
    for path, leaf in merged.items():
        layer, exact = path.removesuffix(".kernel"), np.asarray(parameters[path], np.float64)
        assert leaf.dtype == dtype
        if f"{layer}.lora_a" not in parameters:
            np.testing.assert_array_equal(leaf, parameters[path])
            continue
        a, b = (np.asarray(parameters[f"{layer}.lora_{which}"], np.float64) for which in "ab")
        exact = exact + LORA.scale * a @ b
        # Half a unit in the last place, of which bfloat16 has 8 bits and float32 24; the sum itself is in float32.
        half_unit = np.exp2(np.floor(np.log2(np.abs(exact)))) * (2.0**-8 if dtype == "bfloat16" else 2.0**-24)
        assert (np.abs(np.asarray(leaf, np.float64) - exact) <= half_unit + 4e-7 * np.abs(exact).max()).all(), path
    # And so are the outputs, to that rounding.
    inputs = question(adapted, [237])
    found, expected = (np.asarray(each(inputs)) for each in (merge_adapter(adapted), adapted))
    assert np.abs(found - expected).max() < (1e-5 if dtype == "float32" else 0.05) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("language_model.layer.*_proj",)}, r"lora.targets.*mean one of .*language_model.layers"),
        ({"targets": ("lm_head",)}, "lora.targets pattern 'lm_head' matches no linear layer that can have an adapter"),
        ({"targets": ("language_model.norm",)}, "matches no linear layer"),
        ({"full": ("audio_adaptr.*",)}, "lora.full pattern 'audio_adaptr.*' matches no parameter.*audio_adapter"),
        ({"full": ("language_model.layers.mlp.*",)}, "named by lora.targets and lora.full both"),
    ],
)
def test_patterns_are_checked(lora: dict, message: str):
    with pytest.raises(MossAudioError, match=message):
        parameter_specs(with_lora(LoraConfig(**lora)))


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}], ids=str)
def test_values_are_checked(changes: dict):
    with pytest.raises(MossAudioError, match=f"lora.{next(iter(changes))}"):
        LoraConfig(**changes)


def test_adapters_are_cut_over_all_devices_by_their_long_side():
    mesh = make_mesh(fsdp=4, tensor=2)
    config = dataclasses.replace(MossAudioConfig.preset("8b"), lora=LoraConfig())
    abstract = abstract_parameters(config, jnp.float32, mesh)
    adapters = {path: leaf for path, leaf in abstract.items() if "lora_" in path}
    assert len(adapters) == 14 and sum(leaf.size for leaf in adapters.values()) == 174_587_904
    for path, leaf in adapters.items():
        wide = ("fsdp", "tensor")
        assert leaf.sharding.spec == (P(None, wide, None) if path.endswith("a") else P(None, None, wide)), path
        assert leaf.size == 8 * np.prod(leaf.sharding.shard_shape(leaf.shape))


def test_the_step_of_8b_can_be_lowered_from_shapes():
    mesh = make_mesh(fsdp=8)
    config = dataclasses.replace(MossAudioConfig.preset("8b"), lora=LoraConfig(dropout=0.1))
    graphdef = nnx.split(build_model(config, dict(abstract_parameters(config, jnp.float32))))[0]
    dtypes = {path: "bfloat16" for path in parameter_specs(config) if not config.lora.trains(path)}
    state = abstract_state(config, OPTIMIZER, frozen_dtypes=dtypes, mesh=mesh)
    bytes_per_device = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    assert bytes_per_device < 2.6e9  # 18.1 GB of base and 2.1 GB of adapter and moments, over eight
    rows = jax.eval_shape(batch)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), rows)
    with jax.set_mesh(mesh):
        lowered = train_step.lower(graphdef, StepConfig(), OPTIMIZER, state, rows)
    assert "stablehlo.while" in lowered.as_text()


def run_config(base: Path, steps: int) -> RunConfig:
    """The recipe, but for sizes, on sound scenes, with dropout."""
    recipe = RECIPES["finetune_lora"]
    scenes = SceneGroupConfig(1.0, SceneConfig(seconds=(2.0, 3.0), events=(1, 1)))
    return dataclasses.replace(
        recipe,
        data=DataConfig(batch_size=2, tokens=200, chunks=2, open_bins=2),
        model=ModelSource(checkpoint=str(base)),
        mixture=dataclasses.replace(MixtureConfig(), scenes=scenes),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1e-2, total_steps=40),
        lora=dataclasses.replace(LORA, dropout=0.1),
        step=StepConfig(remat="none", loss_chunk=200),
        loop=LoopConfig(steps=steps, checkpoint_every=2, log_every=1),
    )


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop."""
    out = tmp_path_factory.mktemp("run") / "lora"
    train(run_config(base, 4), out, mesh=make_mesh(devices=jax.devices()[:1]))
    return out


def end_of(run: Path) -> Any:
    lora = run_config(Path(), 4).lora
    mesh = make_mesh(devices=jax.devices()[:1])
    target = dataclasses.replace(abstract_state(with_lora(lora), OPTIMIZER, mesh=mesh), frozen={})
    with Checkpoints(run) as checkpoints:
        return checkpoints.restore(target)


def test_a_resumed_run_ends_with_the_same_bits(run: Path, base: Path, tmp_path: Path):
    mesh = make_mesh(devices=jax.devices()[:1])
    train(run_config(base, 2), tmp_path / "run", mesh=mesh)
    train(run_config(base, 4), tmp_path / "run", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, end_of(tmp_path / "run"), end_of(run))


def test_a_run_on_an_int8_base_is_evaluated_resumed_and_loaded(run: Path, base: Path, tmp_path: Path):
    """Its base is quantized again to the same bits; what it leaves is an adapter like any other."""
    mesh = make_mesh(devices=jax.devices()[:1])

    def config(steps: int) -> RunConfig:
        usual = run_config(base, steps)
        validation = ValidationConfig(every=4, count=1, max_new_tokens=4)
        lora = dataclasses.replace(usual.lora, int8=("language_model.layers.*_proj",))
        return dataclasses.replace(usual, validation=validation, lora=lora)

    train(config(2), tmp_path / "run", mesh=mesh)
    train(config(4), tmp_path / "run", mesh=mesh)
    train(config(4), tmp_path / "whole", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, end_of(tmp_path / "run"), end_of(tmp_path / "whole"))
    (scores,) = map(json.loads, (tmp_path / "whole" / "scores.jsonl").read_text().splitlines())
    assert np.isfinite(scores["eval/loss"])
    found, without = (host(parameters_of(load_model(each))) for each in (tmp_path / "whole", run))
    assert found.keys() == without.keys()
    adapter = "language_model.layers.mlp.up_proj.lora_b"
    difference, size = (np.linalg.norm(x) for x in (found[adapter] - without[adapter], without[adapter]))
    assert 0 < difference < 0.2 * size


def test_int8_kernels_are_the_same_on_every_mesh(base: Path):
    lora = dataclasses.replace(LORA, int8=("language_model.layers.*_proj",))
    config = RunConfig(DataConfig(batch_size=8, tokens=8, chunks=1), OPTIMIZER, lora=lora)
    dtypes = frozen_dtypes(config, parameter_specs(with_lora(lora)))
    kernels = {path for path, dtype in dtypes.items() if dtype == "int8"}
    assert len(kernels) == 7
    alone = first(base, lora, dtypes=dtypes)
    cut = first(base, lora, dtypes=dtypes, mesh=make_mesh(fsdp=4, tensor=2))
    for path, leaf in alone.items():
        assert leaf.dtype == dtypes.get(path, "float32"), path
        np.testing.assert_array_equal(leaf, cut[path], err_msg=path)
    up = cut["language_model.layers.mlp.up_proj.kernel"]
    assert up.addressable_shards[0].data.nbytes == up.size // 8


def test_a_run_is_a_small_checkpoint_and_a_model(run: Path, base: Path, model: MossAudio):
    lora = run_config(base, 4).lora
    assert lora is not None
    stored = stored_shapes(run / "checkpoints" / "4" / "params")
    assert stored.keys() == {path for path in parameter_specs(with_lora(lora)) if lora.trains(path)}
    inputs = question(model, [237])
    found = load_model(run, verify=True)
    assert found.config.lora is not None and found.config.lora.scale == lora.scale
    np.testing.assert_array_equal(found(inputs), load_adapter(model, run)(inputs))
    assert np.abs(np.asarray(found(inputs)) - np.asarray(model(inputs))).max() > 1e-3


def test_several_adapters_stand_on_one_base(base: Path, model: MossAudio, run: Path, tmp_path: Path):
    """Each answers as if it were alone, the base too, and all of them share its arrays."""
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "4")
    models = {name: load_adapter(model, path) for name, path in {"last": run, "earlier": other}.items()}
    inputs = question(model, [237])
    alone = {"base": np.asarray(model(inputs)), "last": np.asarray(load_model(run)(inputs))}
    answers = {name: np.asarray(each(inputs)) for name, each in (models | {"base": model}).items()}
    for name, logits in alone.items():
        np.testing.assert_array_equal(answers[name], logits)
    assert not np.array_equal(answers["last"], answers["earlier"])
    kernel = "language_model.layers.mlp.up_proj.kernel"
    assert parameters_of(models["last"])[kernel] is parameters_of(model)[kernel]
    assert nnx.split(models["last"])[0] == nnx.split(models["earlier"])[0]  # and one compiled program
    merged = merge_adapter(models["last"])
    np.testing.assert_array_equal(
        generate(models["last"], inputs, max_new_tokens=8), generate(merged, inputs, max_new_tokens=8)
    )
    with pytest.raises(MossAudioError, match="has an adapter already"):
        load_adapter(models["last"], run)
    with pytest.raises(MossAudioError, match="can't be saved whole"):
        save_model(models["last"], tmp_path / "saved")


def test_an_adapter_lies_on_the_mesh_of_its_model(base: Path, model: MossAudio, run: Path):
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    sharded = load_adapter(load_model(base, mesh=mesh), run)
    leaf = parameters_of(sharded)["language_model.layers.mlp.up_proj.lora_b"]
    assert leaf.sharding.mesh == mesh and leaf.addressable_shards[0].data.size == leaf.size // 4


def test_generate_takes_an_adapter(base: Path, run: Path, capsys, monkeypatch):
    def says(*arguments: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["moss-audio", "generate", *arguments, "--prompt", "Hello", "--mesh.fsdp", "1"]
        )
        one_device = functools.partial(make_mesh, devices=jax.devices()[:1])
        monkeypatch.setattr("moss_audio_jax.inference.loading.make_mesh", one_device)
        ask()
        return capsys.readouterr().out

    adapted = says(str(base), "--adapter", str(run), "--max-new-tokens", "12", "--special-tokens")
    assert adapted == says(str(run), "--max-new-tokens", "12", "--special-tokens")
    assert adapted != says(str(base), "--max-new-tokens", "12", "--special-tokens")


def test_what_does_not_fit_is_refused(base: Path, run: Path, model: MossAudio, tmp_path: Path):
    config = run_config(base, 4)
    with pytest.raises(MossAudioError, match="lora adapts one checkpoint"):
        dataclasses.replace(config, model=ModelSource(checkpoint=str(base), encoder=str(base)))
    preset = dataclasses.replace(config, model=ModelSource(preset="small", tokenizer="learned"))
    with pytest.raises(MossAudioError, match=r"name it with --init or --model\.checkpoint"):
        train(preset, tmp_path / "preset")
    with pytest.raises(MossAudioError, match="holds an adapter, not a model: merge it"):
        first(run)
    moved = shutil.copytree(run, tmp_path / "moved")
    path = moved / "model" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/where"}))
    with pytest.raises(MossAudioError, match="some/where, which is no directory here"):
        load_model(moved)
    np.testing.assert_array_equal(*(load_adapter(model, each)(question(model, [8])) for each in (moved, run)))


def test_a_run_from_the_hub_keeps_its_commit(
    run: Path, base: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that names a branch resumes from the commit of its beginning, and says so in what it leaves."""
    monkeypatch.chdir(tmp_path)
    mesh = make_mesh(devices=jax.devices()[:1])
    convert_to_hf(base, tmp_path / "released")
    commit = hub.publish("Someone/base", tmp_path / "released")

    def config(steps: int, name: str = "Someone/base") -> RunConfig:
        return dataclasses.replace(run_config(base, steps), model=ModelSource(checkpoint=name))

    train(config(2), tmp_path / "out", mesh=mesh)
    # The branch moves to other weights.
    tensors = load_file(tmp_path / "released" / SINGLE_FILE)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "released" / SINGLE_FILE)
    moved = hub.publish("Someone/base", tmp_path / "released")
    assert moved != commit
    forget_names()
    with pytest.raises(MossAudioError, match=r"model\.checkpoint"):
        train(config(4, f"Someone/base@{moved}"), tmp_path / "out", mesh=mesh)
    train(config(4), tmp_path / "out", mesh=mesh)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["model"]["checkpoint"] == f"Someone/base@{commit}"
    assert not any("model.checkpoint" in entry.get("changes", ()) for entry in stored["history"])
    jax.tree.map(np.testing.assert_array_equal, end_of(tmp_path / "out"), end_of(run))

    convert_to_peft(tmp_path / "out", tmp_path / "peft")
    adapter = json.loads((tmp_path / "peft" / ADAPTER_CONFIG).read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("Someone/base", commit)
    convert_to_hf(tmp_path / "out", tmp_path / "merged", model_card=True)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: Someone/base\n" in card and f"`Someone/base` at commit `{commit}`" in card
