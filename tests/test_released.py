"""The table of names is one-to-one and its layouts invert; a damaged directory is refused with every reason."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.rehearse import write_random_checkpoint
from moss_audio_jax import MossAudioConfig, MossAudioError, load_model
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.weights.locate import INDEX_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import released_leaves
from moss_audio_jax.weights.safetensors_reader import Qwen3Checkpoint, ReleasedCheckpoint

TINY = MossAudioConfig.preset("tiny")


def with_encoder(config: MossAudioConfig, **changes) -> MossAudioConfig:
    return dataclasses.replace(config, audio_config=dataclasses.replace(config.audio_config, **changes))


CONFIGS = {
    "tiny": TINY,
    "4b": MossAudioConfig.preset("4b"),
    "8b": MossAudioConfig.preset("8b"),
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "projected": with_encoder(TINY, output_dim=24),
    "without DeepStack": dataclasses.replace(TINY, deepstack_num_inject_layers=0),
}


def published_names(config: MossAudioConfig) -> set[str]:
    """The released model's tensor names, written out independently of the table under test."""
    audio, language = config.audio_config, config.language_config
    both = ("weight", "bias")
    names = {f"audio_encoder.{part}.{end}" for part in ("conv1", "conv2", "conv3", "stem_proj") for end in both}
    names |= {f"audio_encoder.layer_norm.{end}" for end in both}
    for i in range(audio.encoder_layers):
        parts = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
        norms = ("self_attn_layer_norm", "final_layer_norm")
        names |= {f"audio_encoder.layers.{i}.{part}.{end}" for part in (*parts, *norms) for end in both}
        names.add(f"audio_encoder.layers.{i}.self_attn.k_proj.weight")
    if audio.output_dim != audio.d_model:
        names.add("audio_encoder.out_proj.weight")
    gated = ["audio_adapter", *(f"deepstack_audio_merger_list.{i}" for i in range(config.num_deepstack))]
    gated += [f"language_model.layers.{i}.mlp" for i in range(language.num_hidden_layers)]
    names |= {f"{part}.{proj}_proj.weight" for part in gated for proj in ("gate", "up", "down")}
    for i in range(language.num_hidden_layers):
        attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        names |= {f"language_model.layers.{i}.self_attn.{part}.weight" for part in attention}
        norms = ("input_layernorm", "post_attention_layernorm")
        names |= {f"language_model.layers.{i}.{part}.weight" for part in norms}
    names |= {"language_model.embed_tokens.weight", "language_model.norm.weight"}
    return names | (set() if config.tie_word_embeddings else {"lm_head.weight"})


@pytest.mark.parametrize("name", CONFIGS)
def test_table_maps_one_to_one_onto_the_published_names(name):
    config = CONFIGS[name]
    leaves = released_leaves(config)
    specs = parameter_specs(config)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: spec.shape for path, spec in specs.items()}
    used = [name for leaf in leaves.values() for name in leaf.names]
    assert len(used) == len(set(used))
    assert set(used) == published_names(config)
    for leaf in leaves.values():
        assert math.prod(leaf.shape) == len(leaf.names) * math.prod(leaf.tensor_shape)


@pytest.mark.parametrize(("name", "parameters"), [("4b", 5_222_820_736), ("8b", 9_052_463_488)])
def test_released_sizes(name, parameters):
    leaves = released_leaves(CONFIGS[name]).values()
    assert sum(len(leaf.names) for leaf in leaves) == 901
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


@pytest.mark.parametrize("path", released_leaves(CONFIGS["projected"]))
def test_layouts_move_every_element_and_work_on_blocks_of_rows(path):
    leaf = released_leaves(CONFIGS["projected"])[path]
    tensor = np.arange(math.prod(leaf.tensor_shape)).reshape(leaf.tensor_shape)
    ours = leaf.layout.from_released(tensor)
    assert ours.shape == leaf.shape[leaf.stacked :]
    np.testing.assert_array_equal(leaf.layout.to_released(ours), tensor)

    whole = np.stack([ours] * len(leaf.names)) if leaf.stacked else ours
    start, stop = tensor.shape[0] // 3, tensor.shape[0] - 1
    block = whole[leaf.region(len(leaf.names) - 1, start, stop)]
    np.testing.assert_array_equal(block, leaf.layout.from_released(tensor[start:stop]))
    np.testing.assert_array_equal(leaf.layout.to_released(block), tensor[start:stop])


def test_stem_columns_are_regrouped_by_frequency():
    leaf = released_leaves(TINY)["audio_encoder.stem_proj.kernel"]
    channels, frequencies = 8, 16
    released = np.zeros((32, channels, frequencies))
    released[5, 3, 7] = 1.0
    ours = leaf.layout.from_released(released.reshape(32, -1))
    assert ours[7 * channels + 3, 5] == 1.0


# Bad directories. Each change makes one of a good directory, and each message says what is wrong where.


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def edit_index(directory: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(file: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def name_file(new: str) -> Callable[[Path], None]:
    """Makes the index put the head into another file."""
    return lambda directory: edit_index(directory, lambda weights: weights.update({"lm_head.weight": new}))


def link_outside(directory: Path) -> None:
    file = shards(directory)[1]
    outside = directory.parent / "outside.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)


def link_nowhere(directory: Path) -> None:
    file = shards(directory)[0]
    file.unlink()
    file.symlink_to(directory / "nowhere")


def double_header_key(directory: Path) -> None:
    """Writes the first shard's header with one tensor's entry twice, which safetensors itself accepts."""
    file = shards(directory)[0]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = json.loads(header)["audio_adapter.up_proj.weight"]
    header = header[:-1] + f',"audio_adapter.up_proj.weight":{json.dumps(entry)}' + "}"
    header += " " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])


def double_index_key(directory: Path) -> None:
    path = directory / INDEX_FILE
    first = shards(directory)[0].name
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"lm_head.weight": "{first}",'))


def double_tensor(directory: Path) -> None:
    first, *_, last = shards(directory)
    edit_tensors(last, lambda tensors: tensors.update(load_file(first)))


def header_garbage(directory: Path) -> None:
    data = bytearray(shards(directory)[0].read_bytes())
    data[9:13] = b"\xff\xfe,,"
    shards(directory)[0].write_bytes(data)


def truncate(directory: Path) -> None:
    os.truncate(shards(directory)[1], shards(directory)[1].stat().st_size - 1)


def both_layouts(directory: Path) -> None:
    shutil.copy(shards(directory)[0], directory / SINGLE_FILE)


UP = "audio_adapter.up_proj.weight"  # in the first shard
BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "path traversal": (name_file("../model.safetensors"), ["'../model.safetensors'", "plain file names"]),
    "absolute path": (name_file("/etc/passwd"), ["'/etc/passwd'", "plain file names"]),
    "subdirectory": (name_file("sub/model.safetensors"), ["'sub/model.safetensors'", "plain file names"]),
    "backslashes": (name_file("..\\model.safetensors"), ["plain file names"]),
    "parent": (name_file(".."), ["'..'", "plain file names"]),
    "no name": (name_file(""), ["plain file names"]),
    "zero byte": (name_file("model\0.safetensors"), ["plain file names"]),
    "endless name": (name_file("m" * 5000), ["plain file names"]),
    "no text": (lambda d: edit_index(d, lambda w: w.update({"lm_head.weight": 7})), ["7 is missing"]),
    "link outside": (link_outside, ["must be inside the directory, not a link"]),
    "dangling link": (link_nowhere, ["model-00001-of-", "is missing"]),
    "missing shard": (lambda d: shards(d)[0].unlink(), ["model-00001-of-", "is missing"]),
    "truncated shard": (truncate, ["model-00002-of-", "damaged"]),
    "empty shard": (lambda d: shards(d)[0].write_bytes(b""), ["model-00001-of-", "damaged"]),
    "corrupt header": (header_garbage, ["model-00001-of-", "damaged"]),
    "doubled key in a header": (double_header_key, [UP, "more than once"]),
    "doubled key in the index": (double_index_key, ["lm_head.weight", "more than once"]),
    "tensor in two files": (double_tensor, [f"{UP} is in both model-00001-of-", "problem(s)"]),
    "missing tensor": (
        lambda d: (edit_tensors(shards(d)[0], lambda t: t.pop(UP)), edit_index(d, lambda w: w.pop(UP))),
        [f"{UP} is missing"],
    ),
    "tensor only in the index": (lambda d: edit_tensors(shards(d)[0], lambda t: t.pop(UP)), [f"puts {UP} into"]),
    "tensor not in the index": (lambda d: edit_index(d, lambda w: w.pop(UP)), [f"{UP} in", "is not in model.safete"]),
    "surplus tensor": (
        lambda d: (
            edit_tensors(shards(d)[0], lambda t: t.update(stranger=np.zeros(3, np.float32))),
            edit_index(d, lambda w: w.update(stranger=shards(d)[0].name)),
        ),
        ["stranger in model-00001-of-", "is not part of this model"],
    ),
    "wrong shape": (
        lambda d: edit_tensors(shards(d)[0], lambda t: t.update({UP: t[UP].reshape(-1)})),
        [f"{UP} in model-00001-of-", "(1280,)", "(40, 32)"],
    ),
    "transposed": (
        lambda d: edit_tensors(shards(d)[0], lambda t: t.update({UP: np.ascontiguousarray(t[UP].T)})),
        ["(32, 40)", "(40, 32)"],
    ),
    "integers": (
        lambda d: edit_tensors(shards(d)[0], lambda t: t.update({UP: np.zeros((40, 32), np.int8)})),
        [f"{UP} in model-00001-of-", "type I8", "BF16"],
    ),
    "index is no JSON": (lambda d: (d / INDEX_FILE).write_text("{"), [INDEX_FILE, "can't be read"]),
    "index is a list": (lambda d: (d / INDEX_FILE).write_text("[]"), [INDEX_FILE, "list"]),
    "index nested endlessly": (lambda d: (d / INDEX_FILE).write_text("[" * 100_000), [INDEX_FILE, "can't be read"]),
    "index without weight_map": (lambda d: (d / INDEX_FILE).write_text("{}"), ["no weight_map"]),
    "index and another single file": (both_layouts, [SINGLE_FILE, "stale"]),
    "no weights": (
        lambda d: [file.unlink() for file in (*shards(d), d / INDEX_FILE)],
        ["model.safetensors is missing"],
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json"]),
    "another model's config": (lambda d: edit_config(d, model_type="qwen3"), ["model_type", "'qwen3'"]),
    "config of another size": (lambda d: edit_config(d, adapter_hidden_size=48), ["(40, 32)", "(48, 32)"]),
}


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("released") / "tiny"
    write_random_checkpoint(TINY, directory, seed=3, shard_bytes=150_000)
    assert len(shards(directory)) == 3
    return directory


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_are_refused_with_the_reason(sharded, tmp_path, name):
    change, expected = BAD[name]
    directory = Path(shutil.copytree(sharded, tmp_path / "bad"))
    ReleasedCheckpoint(directory)
    change(directory)
    with pytest.raises(MossAudioError) as caught:
        ReleasedCheckpoint(directory)
    for text in expected:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_all_problems_are_reported_together(sharded, tmp_path):
    """One shard gone, one damaged, and a wrong shape in the third."""
    directory = Path(shutil.copytree(sharded, tmp_path / "bad"))
    first, second, third = shards(directory)
    first.unlink()
    os.truncate(second, 100)
    edit_tensors(third, lambda tensors: tensors.update({"lm_head.weight": np.zeros((3, 4), np.float32)}))
    with pytest.raises(MossAudioError) as caught:
        ReleasedCheckpoint(directory)
    message = str(caught.value)
    assert "3 problem(s)" in message  # and not one for each tensor of the unread files
    for text in (f"{first.name} is missing", f"{second.name} is damaged", "lm_head.weight in", "(3, 4)"):
        assert text in message


def test_stored_sinusoids_are_ignored_whatever_they_are(data_dir, tmp_path):
    directory = Path(shutil.copytree(data_dir / "tiny", tmp_path / "music"))
    name = "audio_encoder.embed_positions.inv_timescales"
    edit_tensors(directory / SINGLE_FILE, lambda tensors: tensors.update({name: np.zeros(16, np.int32)}))
    edit_config(directory, model_type="moss_music", architectures=["MossMusicModel"])
    checkpoint = ReleasedCheckpoint(directory)
    assert name not in checkpoint.tensors
    assert checkpoint.config.model_type == "moss_music"


@pytest.mark.parametrize("head", ["absent", "equal", "different", "of another type"])
def test_tied_head(tmp_path, head):
    """A tied checkpoint may store the head once more, if it is the embedding."""
    write_random_checkpoint(CONFIGS["tied"], tmp_path)
    embedding = load_file(tmp_path / SINGLE_FILE)["language_model.embed_tokens.weight"]
    different = embedding.copy()
    different[-1, -1] += 1
    heads = {"equal": embedding, "different": different, "of another type": embedding.astype(np.float32)}
    if head in heads:
        edit_tensors(tmp_path / SINGLE_FILE, lambda tensors: tensors.update({"lm_head.weight": heads[head]}))
    if head in ("absent", "equal"):
        assert "lm_head.weight" not in ReleasedCheckpoint(tmp_path).tensors
        assert not hasattr(load_model(tmp_path), "lm_head")
    else:
        with pytest.raises(MossAudioError, match=r"lm_head\.weight that differs from language_model\.embed_tokens"):
            ReleasedCheckpoint(tmp_path)


def test_rows_are_read_as_they_are_stored(data_dir):
    checkpoint = ReleasedCheckpoint(data_dir / "tiny")
    tensors = load_file(data_dir / "tiny" / SINGLE_FILE)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor)
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight", 17, 400), tensors["lm_head.weight"][17:400])
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight", 500, 600), tensors["lm_head.weight"][500:])


def test_assembled_parameters_are_stacked_and_cast(data_dir):
    checkpoint = ReleasedCheckpoint(data_dir / "tiny")
    tensors = load_file(data_dir / "tiny" / SINGLE_FILE)
    kernels = checkpoint.assemble("language_model.layers.mlp.up_proj.kernel", ml_dtypes.bfloat16)
    names = [f"language_model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    expected = np.stack([tensors[name].T for name in names]).astype(ml_dtypes.bfloat16)
    assert kernels.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kernels, expected)


def test_file_that_shrinks_while_it_is_read(sharded, tmp_path):
    directory = Path(shutil.copytree(sharded, tmp_path / "shrinking"))
    checkpoint = ReleasedCheckpoint(directory)
    os.truncate(directory / checkpoint.tensors["lm_head.weight"].file, 1000)
    with pytest.raises(MossAudioError, match="became shorter"):
        checkpoint.read("lm_head.weight")


# Stock Qwen3: sizes and names as published with Qwen3-4B and Qwen3-8B.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_SIZES = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


def write_empty_qwen3(directory: Path, config: dict) -> None:
    """A directory whose tensors are a hole in the file: it takes no room, and only its header is read."""
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "input_layernorm": [width],
        "post_attention_layernorm": [width],
        "self_attn.q_norm": [head],
        "self_attn.k_norm": [head],
        "self_attn.q_proj": [queries, width],
        "self_attn.k_proj": [keys, width],
        "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, queries],
        "mlp.gate_proj": [hidden, width],
        "mlp.up_proj": [hidden, width],
        "mlp.down_proj": [width, hidden],
    }
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], width], "model.norm.weight": [width]}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], width]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_presets_take_the_published_qwen3(size, tmp_path):
    write_empty_qwen3(tmp_path, QWEN3 | QWEN3_SIZES[size])
    qwen3, preset = Qwen3Checkpoint(tmp_path), CONFIGS[size]
    assert qwen3.config == preset.language_config
    assert qwen3.tied == (size == "4b")
    parts = ("language_model.",) if qwen3.tied else ("language_model.", "lm_head.")
    expected = {path: spec.shape for path, spec in parameter_specs(preset).items() if path.startswith(parts)}
    assert {path: leaf.shape for path, leaf in qwen3.leaves.items()} == expected


BAD_QWEN3: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another activation": (lambda d: edit_config(d, hidden_act="gelu"), ["hidden_act is 'gelu'", "'silu' only"]),
    "scaled positions": (
        lambda d: edit_config(d, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        ["rope_scaling is", "'yarn'"],
    ),
    "without a size": (lambda d: edit_config(d, hidden_size=None), ["lacks hidden_size"]),
    "another width": (
        lambda d: edit_config(d, hidden_size=2048),
        ["model.norm.weight in model.safetensors has shape (2560,), config.json makes it (2048,)"],
    ),
    "untied without a head": (lambda d: edit_config(d, tie_word_embeddings=False), ["lm_head.weight is missing"]),
    "more layers": (lambda d: edit_config(d, num_hidden_layers=37), ["model.layers.36.mlp.up_proj.weight is missing"]),
}


@pytest.mark.parametrize("name", BAD_QWEN3)
def test_bad_qwen3_directories_are_refused_with_the_reason(name, tmp_path):
    change, expected = BAD_QWEN3[name]
    write_empty_qwen3(tmp_path, QWEN3 | QWEN3_SIZES["4b"])
    change(tmp_path)
    with pytest.raises(MossAudioError) as caught:
        Qwen3Checkpoint(tmp_path)
    for text in (str(tmp_path), *expected):
        assert text in str(caught.value)
