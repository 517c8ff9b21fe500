"""A run starts from exactly what its checkpoints hold, and for the rest from what its seed makes, on any mesh."""

import dataclasses
import json
import resource
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moss_audio_jax import MossAudioConfig, MossAudioError
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.weights.checkpoint import save_model
from moss_audio_jax.weights.locate import INDEX_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import released_leaves
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from moss_audio_jax.weights.safetensors_reader import SafetensorsCheckpoint
from train import initialization as initial
from train.config import ModelSource, model_config
from train.initialization import first_parameters, random_parameters, require_no_random_frozen
from train.loop import train
from train.recipes import RECIPES
from train.running.resume import write_or_check_config

TINY = MossAudioConfig.preset("tiny")
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD, EMBEDDING = "lm_head.kernel", "language_model.embed_tokens.embedding"
SEED = 3
# Published with Qwen3-4B, its sizes replaced by ours.
QWEN3_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 512,
}
Arrays = dict[str, np.ndarray]


def random_arrays(config: MossAudioConfig, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(0, 0.1, spec.shape).astype("f4") for path, spec in parameter_specs(config).items()}


@pytest.fixture(scope="module")
def started() -> Arrays:
    """Parameters of SEED, on one device."""
    parameters = random_parameters(TINY, abstract_parameters(TINY, jnp.float32), SEED)
    return {path: np.asarray(leaf) for path, leaf in parameters.items()}


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Parameters in the directories of `checkpoints`, in float32."""
    return random_arrays(TINY, seed=1)


def write_tensors(directory: Path, tensors: Arrays, shards: int) -> None:
    """One file, or tensors dealt to several in turn, so that those of one layer lie in different files."""
    names = sorted(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [SINGLE_FILE]
    for number, file in enumerate(files):
        save_file({name: np.ascontiguousarray(tensors[name]) for name in names[number::shards]}, directory / file)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_qwen3(directory: Path, arrays: Arrays, *, tied: bool, shards: int = 1, head: bool = False, **config) -> Path:
    """A stock directory, its names written out independently of the table. head: stored though it is tied."""
    directory.mkdir()
    tensors = {
        "model.embed_tokens.weight": arrays[EMBEDDING],
        "model.norm.weight": arrays["language_model.norm.scale"],
    }
    if not tied:
        tensors["lm_head.weight"] = arrays[HEAD].T
    if head:
        tensors["lm_head.weight"] = arrays[EMBEDDING]
    for i in range(4):
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"model.layers.{i}.{name}.weight"] = arrays[f"language_model.layers.{name}.scale"][i]
        projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [
            f"mlp.{name}_proj" for name in ("gate", "up", "down")
        ]
        for name in projections:
            tensors[f"model.layers.{i}.{name}.weight"] = arrays[f"language_model.layers.{name}.kernel"][i].T
    write_tensors(directory, tensors, shards)
    (directory / "config.json").write_text(json.dumps(QWEN3_CONFIG | {"tie_word_embeddings": tied} | config))
    return directory


def write_released(directory: Path, config: MossAudioConfig, arrays: Arrays) -> Path:
    directory.mkdir()
    config.save_hf(directory)
    tensors = {}
    for path, leaf in released_leaves(config).items():
        for index, name in enumerate(leaf.names):
            tensors[name] = leaf.layout.to_released(arrays[path][index] if leaf.stacked else arrays[path])
    write_tensors(directory, tensors, shards=2)
    return directory


@pytest.fixture(scope="module")
def checkpoints(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same parameters in every layout, one directory each."""
    directory = tmp_path_factory.mktemp("checkpoints")
    in_bfloat16 = {path: array.astype(BFLOAT16) for path, array in arrays.items()}
    write_released(directory / "released", TINY, arrays)
    write_released(directory / "released, tied", TIED, arrays)
    model = build_model(TINY, {path: jnp.asarray(array) for path, array in arrays.items()})
    save_model(model, directory / "orbax")
    save_model(model, directory / "run" / "checkpoints" / "7")
    (directory / "run" / "model").mkdir()
    (directory / "run" / "checkpoints" / "7" / "config.json").rename(directory / "run" / "model" / "config.json")
    write_qwen3(directory / "qwen3", arrays, tied=False)
    write_qwen3(directory / "qwen3, sharded", arrays, tied=False, shards=3)
    write_qwen3(directory / "qwen3, tied", arrays, tied=True, shards=2)
    write_qwen3(directory / "qwen3, tied, with a head", arrays, tied=True, head=True)
    write_qwen3(directory / "qwen3, bfloat16", in_bfloat16, tied=True)
    write_released(directory / "other", TINY, random_arrays(TINY, seed=2))
    return directory


def tied(array: Arrays) -> Arrays:
    return array | {HEAD: array[EMBEDDING].T}


def in_bfloat16(array: Arrays) -> Arrays:
    return {path: leaf.astype(BFLOAT16).astype(np.float32) for path, leaf in array.items()}


def same(array: Arrays) -> Arrays:
    return array


ENCODER, LANGUAGE_MODEL = ("audio_encoder.",), ("language_model.", "lm_head.")
REST = {"checkpoint": "other"}
# option -> directory; which parameters are those of the directory; what these are, given what was written. The rest is
# random, or where there is a checkpoint that.
CASES: dict[str, tuple[dict[str, str], tuple[str, ...], Callable[[Arrays], Arrays]]] = {
    "random": ({}, (), same),
    "encoder and the rest random": ({"encoder": "orbax"}, ENCODER, same),
    "Qwen3 and the rest random": ({"language_model": "qwen3, tied"}, LANGUAGE_MODEL, tied),
    "both and the rest random": ({"encoder": "run", "language_model": "qwen3"}, ENCODER + LANGUAGE_MODEL, same),
    "checkpoint": ({"checkpoint": "released"}, ("",), same),
    "checkpoint, Orbax": ({"checkpoint": "orbax"}, ("",), same),
    "encoder, released": (REST | {"encoder": "released"}, ENCODER, same),
    "encoder, training run": (REST | {"encoder": "run"}, ENCODER, same),
    "language model, released": (REST | {"language_model": "released"}, LANGUAGE_MODEL, same),
    "language model, released, tied": (REST | {"language_model": "released, tied"}, LANGUAGE_MODEL, tied),
    "language model, Orbax": (REST | {"language_model": "orbax"}, LANGUAGE_MODEL, same),
    "Qwen3": (REST | {"language_model": "qwen3"}, LANGUAGE_MODEL, same),
    "Qwen3, sharded": (REST | {"language_model": "qwen3, sharded"}, LANGUAGE_MODEL, same),
    "Qwen3, tied, with a head": (REST | {"language_model": "qwen3, tied, with a head"}, LANGUAGE_MODEL, tied),
    "Qwen3, bfloat16": (REST | {"language_model": "qwen3, bfloat16"}, LANGUAGE_MODEL, lambda a: in_bfloat16(tied(a))),
}


def options(checkpoints: Path, directories: dict[str, str]) -> ModelSource:
    return ModelSource(preset="tiny", **{option: str(checkpoints / name) for option, name in directories.items()})


def assert_equal(found: dict[str, jax.Array], expected: Arrays, frozen: dict[str, str]) -> None:
    assert list(found) == list(expected)
    for path, leaf in found.items():
        dtype = jnp.dtype(frozen.get(path, "float32"))
        assert leaf.dtype == dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), expected[path].astype(dtype), err_msg=path)


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "mesh") for name in CASES), ("both and the rest random", "one device")]
)
def test_each_part_is_what_its_checkpoint_holds_and_the_rest_is_random(name, where, checkpoints, arrays, started):
    """Frozen parameters are in bfloat16 at once; a head that starts as the frozen embedding still has all its bits."""
    directories, prefixes, written = CASES[name]
    source, mesh = options(checkpoints, directories), make_mesh(fsdp=4, tensor=2) if where == "mesh" else None
    stored = written(arrays)
    rest = random_arrays(TINY, seed=2) if source.checkpoint else started
    expected = {path: stored[path] if path.startswith(prefixes) else leaf for path, leaf in rest.items()}
    frozen = {path: "bfloat16" for path in expected if path.startswith(("audio_encoder.layers.", EMBEDDING))}

    found = first_parameters(source, model_config(source), dtypes=frozen, seed=SEED, mesh=mesh)
    assert_equal(found, expected, frozen)
    placed = abstract_parameters(TINY, jnp.float32, mesh)
    assert all(leaf.sharding.is_equivalent_to(placed[path].sharding, leaf.ndim) for path, leaf in found.items())


def test_options_go_before_the_checkpoint_which_gives_the_rest(checkpoints, arrays):
    source = options(checkpoints, {"checkpoint": "other", "encoder": "run", "language_model": "qwen3, tied"})
    other, stored = random_arrays(TINY, seed=2), tied(arrays)
    given = ENCODER + LANGUAGE_MODEL
    expected = {path: stored[path] if path.startswith(given) else leaf for path, leaf in other.items()}
    assert_equal(first_parameters(source, model_config(source)), expected, {})


def test_only_what_is_missing_is_made_and_only_what_is_wanted_is_read(checkpoints, monkeypatch):
    made, assembled = [], []

    def record_made(config, wanted, seed):
        made.extend(wanted)
        return {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}

    def record_read(self, path, dtype):
        assembled.append(path)
        return assemble(self, path, dtype)

    assemble = SafetensorsCheckpoint.assemble
    monkeypatch.setattr(initial, "random_parameters", record_made)
    monkeypatch.setattr(SafetensorsCheckpoint, "assemble", record_read)
    source = options(checkpoints, {"encoder": "released", "language_model": "qwen3"})
    paths = first_parameters(source, TINY)
    assert made == [path for path in paths if path.startswith(("audio_adapter.", "deepstack_"))]
    assert sorted(assembled) == sorted(set(paths) - set(made))


def test_what_is_not_wanted_takes_no_memory():
    """The 8B model is 36 GB in float32."""
    config = MossAudioConfig.preset("8b")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wanted = {"audio_encoder.conv1.kernel": abstract_parameters(config, jnp.float32)["audio_encoder.conv1.kernel"]}
    kernel = random_parameters(config, wanted, seed=0)["audio_encoder.conv1.kernel"]
    assert kernel.shape == (3, 3, 1, 480) and float(jnp.std(kernel)) > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def test_all_differences_of_sizes_are_one_error(checkpoints, tmp_path, arrays):
    write_qwen3(tmp_path / "qwen3", arrays, tied=True, rope_theta=5_000_000, rms_norm_eps=1e-5)
    smaller = dataclasses.replace(TINY, audio_config=dataclasses.replace(TINY.audio_config, chunk_frames=200))
    write_released(tmp_path / "released", smaller, arrays)
    with pytest.raises(MossAudioError) as caught:
        first_parameters(options(tmp_path, {"encoder": "released", "language_model": "qwen3"}), TINY)
    assert str(caught.value) == (
        f"the parts don't make one model: model.encoder {tmp_path}/released: chunk_frames is 200 where the model has "
        f"400; model.language_model {tmp_path}/qwen3: rms_norm_eps is 1e-05 where the model has 1e-06; "
        f"model.language_model {tmp_path}/qwen3: rope_theta is 5000000 where the model has 1000000; "
        "choose model.preset or model.checkpoint of the parts' sizes, or other parts"
    )


def test_dropout_and_taps_may_differ(checkpoints, arrays, tmp_path):
    changed = dataclasses.replace(TINY.audio_config, dropout=0.0, deepstack_encoder_layer_indexes=(0, 2, 3))
    write_released(tmp_path / "released", dataclasses.replace(TINY, audio_config=changed), arrays)
    source = ModelSource(encoder=str(tmp_path / "released"), checkpoint=str(checkpoints / "other"))
    found = first_parameters(source, model_config(source))
    assert model_config(source) == TINY
    np.testing.assert_array_equal(found["audio_encoder.conv1.kernel"], arrays["audio_encoder.conv1.kernel"])


BAD: dict[str, tuple[dict[str, str], list[str]]] = {
    "stock Qwen3 has no encoder": ({"encoder": "qwen3"}, ["qwen3", "no audio_config"]),
    "stock Qwen3 is no whole model": ({"checkpoint": "qwen3"}, ["qwen3", "no audio_config"]),
    "nothing there": ({"language_model": "absent"}, ["absent does not exist"]),
    "another model": ({"language_model": "mixture of experts"}, ["'qwen3_moe'", "model.language_model"]),
    "a head of its own in a tied model": (
        {"checkpoint": "released, tied", "language_model": "qwen3"},
        ["model.language_model", "tie_word_embeddings is False where the model has True"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_directories_that_do_not_serve_are_refused_with_the_reason(name, checkpoints, arrays):
    other = checkpoints / "mixture of experts"
    if not other.exists():
        write_qwen3(other, arrays, tied=True, model_type="qwen3_moe")
    directories, expected = BAD[name]
    source = options(checkpoints, directories)
    with pytest.raises(MossAudioError) as caught:
        first_parameters(source, model_config(source))
    for text in expected:
        assert text in str(caught.value)


def test_the_tokenizer_is_the_one_named_or_the_checkpoints_or_the_language_models(checkpoints):
    named = {"tokenizer": "other", "checkpoint": "run", "language_model": "qwen3"}
    assert options(checkpoints, named).tokenizer_source == str(checkpoints / "other")
    del named["tokenizer"]
    assert options(checkpoints, named).tokenizer_source == str(checkpoints / "run")
    del named["checkpoint"]
    assert options(checkpoints, named).tokenizer_source == str(checkpoints / "qwen3")
    assert ModelSource(encoder="anywhere").tokenizer_source is None


ALL_OPTIONS = "--model.checkpoint, --model.encoder, --model.language-model"


@pytest.mark.parametrize(
    ("given", "parts", "named"),
    [
        ({}, "audio_encoder, language_model, lm_head", ALL_OPTIONS),
        ({"encoder": "a"}, "language_model, lm_head", "--model.checkpoint, --model.language-model"),
        ({"language_model": "a"}, "audio_encoder", "--model.checkpoint, --model.encoder"),
    ],
)
def test_random_parts_are_not_frozen_unless_asked_for(given: dict, parts: str, named: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("something was compiled"))
    config = RECIPES["pretrain_stage1"]
    for allowed in (False, True):
        source = ModelSource(preset="tiny", tokenizer="learned", allow_random_frozen=allowed, **given)
        config = dataclasses.replace(config, model=source)
        # Where that is allowed, the run then looks for its data.
        message = "there is nothing to train on" if allowed else f"the frozen parameters of {parts} would stay random, "
        with pytest.raises(MossAudioError) as caught:
            train(config, tmp_path / "run")
        assert str(caught.value).startswith(message)
        assert allowed or f"name one by {named}, or give --model.allow-random-frozen" in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.json"))


def test_what_a_checkpoint_gives_may_be_frozen(tmp_path: Path):
    stage1, lora = RECIPES["pretrain_stage1"], RECIPES["finetune_lora"]
    for given in ({"checkpoint": "a"}, {"encoder": "a", "language_model": "b"}):
        require_no_random_frozen(dataclasses.replace(stage1, model=ModelSource(**given)), TINY)
    for recipe in ("pretrain_stage2", "finetune", "time_events"):
        require_no_random_frozen(RECIPES[recipe], TINY)
    with pytest.raises(MossAudioError, match="lora adapts a checkpoint: name it with --init"):
        require_no_random_frozen(lora, TINY)
    # A run that was begun before there was the option may resume with it.
    old = dataclasses.replace(stage1, model=ModelSource(preset="tiny"))
    write_or_check_config(old, tmp_path, begun=False)
    write_or_check_config(
        dataclasses.replace(old, model=ModelSource(preset="tiny", allow_random_frozen=True)), tmp_path, begun=True
    )


def test_deepstack_is_the_presets_or_the_checkpoints():
    with pytest.raises(MossAudioError, match=r"model\.deepstack must be 0 to 2, the taps of small, not 3"):
        ModelSource(preset="small", deepstack=3)
    with pytest.raises(
        MossAudioError, match=r"model\.deepstack is for a model of a preset: leave it out, as anywhere has its own taps"
    ):
        ModelSource(checkpoint="anywhere", deepstack=0)
    assert model_config(ModelSource(preset="small", deepstack=1)).num_deepstack == 1
