"""The checkpoints that are damaged, and what reads each of their files. All are tiny, and no weight is computed."""

import dataclasses
import functools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from convert.rehearse import write_random_checkpoint
from moss_audio_jax import LoraConfig, MossAudioConfig, model
from moss_audio_jax.schema import INT32
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights import checksums, names, orbax, safetensors_reader
from moss_audio_jax.weights import peft as peft_files
from moss_audio_jax.weights.locate import ADAPTER_FILE, base_name, locate
from tests.fuzz.mutations import BINARY_FILE, JSON_FILE, LINES_FILE, OUTSIDE, SAFETENSORS_FILE, Mutation

TEXT = "<|im_start|>Ein Bär, 3 cafés\n\t你好<|im_end|> the quick brown fox"


def tiny_config() -> MossAudioConfig:
    preset = MossAudioConfig.preset("tiny")
    encoder = dataclasses.replace(
        preset.audio_config,
        d_model=8,
        output_dim=8,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=8,
        downsample_hidden_size=2,
        deepstack_encoder_layer_indexes=(0, 1),
    )
    language = dataclasses.replace(
        preset.language_config,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return dataclasses.replace(
        preset, audio_config=encoder, language_config=language, adapter_hidden_size=8, deepstack_num_inject_layers=2
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files that are damaged alike.

    name: for the summary. directory, pattern: where they are. share: of all inputs, relative to the others.
    read: reads the checkpoint as the product does, and raises AssertionError if it is accepted but not read right.
    """

    name: str
    directory: str
    pattern: str
    mutations: tuple[Mutation, ...]
    share: float
    read: Callable[[Path, random.Random], None]


def read_configuration(directory: Path, rng: random.Random) -> None:
    config = MossAudioConfig.from_hf(directory)
    _assert_sound(config)
    files = {name: json.loads((directory / name).read_text("utf-8")) for name in config.raw}
    assert _is_written_back(config.to_hf(), files), "not written back equal"
    if rng.random() < 0.02:  # what costs as much as a hundred other inputs
        names.released_leaves(config)


def _is_written_back(written: Any, read: Any) -> bool:
    """Returns True if nothing changed, except that a null may have become a value."""
    if isinstance(read, dict) and isinstance(written, dict):
        return read.keys() == written.keys() and all(_is_written_back(written[key], read[key]) for key in read)
    return read is None or json.dumps(written) == json.dumps(read)


def _assert_sound(part: Any) -> None:
    """Every number is one that a model can have, whatever the product's own rules say."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            _assert_sound(value)
        elif field.name in ("eos_ids", "deepstack_encoder_layer_indexes"):
            assert all(type(each) is int and 0 <= each < 2**31 for each in value), f"{field.name} is {value}"
        elif "dropout" in field.name:
            assert 0 <= value < 1, f"{field.name} is {value}"
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            least = 0 if field.name.endswith("_id") or "inject" in field.name or "range" in field.name else math.ulp(0)
            most = 1e15 if field.name == "rope_theta" else INT32
            assert math.isfinite(value) and least <= value <= most, f"{field.name} is {value}"
        if value is not None and field.name.endswith(("size", "layers", "heads", "dim", "_id", "position_embeddings")):
            assert type(value) is int, f"{field.name} is {value!r}"


_remembered = {
    module: {name: functools.lru_cache(maxsize=64)(getattr(module, name)) for name in names}
    for module, names in (
        (model, ("parameter_specs",)),
        (names, ("parameter_specs", "released_leaves")),
        (safetensors_reader, ("released_leaves",)),
        (orbax, ("parameter_specs",)),
        (peft_files, ("released_leaves", "adapter_leaves")),
    )
}


@contextmanager
def remembered_shapes() -> Iterator[None]:
    """Tracing a model costs as much as a hundred inputs, most of which have the same one."""
    with ExitStack() as patches:
        for module, functions in _remembered.items():
            patches.enter_context(mock.patch.multiple(module, **functions))
        yield


def read_tensors(directory: Path, rng: random.Random) -> None:
    found = safetensors_reader.ReleasedCheckpoint(directory)
    for name, header in found.tensors.items():
        array = found.read(name)
        assert array.shape == header.shape and array.dtype == header.dtype


def read_tokenizer(directory: Path, rng: random.Random) -> None:
    tokenizer = Tokenizer.from_dir(directory)
    ids = tokenizer.encode(TEXT)
    assert all(0 <= token_id < 2**31 for token_id in ids), f"ids are {ids}"
    found = tokenizer.decode(ids, skip_special_tokens=False)
    # Blanks beside a special token may go: added tokens with "lstrip" or "rstrip" take them.
    assert "".join(found.split()) == "".join(TEXT.split()), f"{TEXT!r} became {found!r}"


def read_adapter(directory: Path, rng: random.Random) -> None:
    config = peft_files.adapted_config(directory, tiny_config())
    assert config.lora is not None and math.isfinite(config.lora.scale) and config.lora.scale > 0
    base_name(directory)
    if config.lora == _adapter_lora() or rng.random() < 0.02:
        adapter = peft_files.PeftAdapter(directory, tiny_config())
        for name, header in adapter.tensors.items():
            assert adapter.read(name).shape == header.shape


def read_stored(directory: Path, rng: random.Random) -> None:
    params = epath.Path(directory / "params")
    stored = orbax.stored_shapes(params)
    assert stored
    if rng.random() < 0.1:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for name, a in ARRAYS.items()}
        if {name: (a.shape, a.dtype) for name, a in ARRAYS.items()} == stored:
            orbax.restore_tree(params, target)


def read_best(directory: Path, rng: random.Random) -> None:
    found = locate(directory / "best")
    assert found.params is not None
    inside = Path(found.params).resolve().relative_to(directory.resolve())
    assert len(inside.parts) == 3 and inside.parts[0] == "checkpoints" and inside.parts[1].isdigit(), inside


def read_checksums(directory: Path, rng: random.Random) -> None:
    found = checksums.recorded(epath.Path(directory))
    assert found is not None and all(isinstance(sums, dict) and "/" not in item for item, sums in found.items())
    checksums.differences(found.get("params", {}), dict.fromkeys(ARRAYS, "float32[3,2] 0123456789abcdef"))


ARRAYS = {"a.kernel": np.ones((3, 2), np.float32), "a.bias": np.ones(2, np.float32), "b": np.ones((), np.float32)}

CONFIGURATION = "config.json", "processor_config.json", "generation_config.json"
TOKENIZER = "vocab.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
KINDS = (
    Kind("config.json", "released", "config.json", JSON_FILE, 24, read_configuration),
    Kind("processor_config.json", "released", "processor_config.json", JSON_FILE, 10, read_configuration),
    Kind("generation_config.json", "released", "generation_config.json", JSON_FILE, 10, read_configuration),
    Kind("index", "released", "*.index.json", JSON_FILE, 5, read_tensors),
    Kind("safetensors", "released", "*.safetensors", SAFETENSORS_FILE, 6, read_tensors),
    Kind("vocab.json", "released", "vocab.json", JSON_FILE, 5, read_tokenizer),
    Kind("merges.txt", "released", "merges.txt", LINES_FILE, 5, read_tokenizer),
    Kind("tokenizer_config.json", "released", "tokenizer_config.json", JSON_FILE, 6, read_tokenizer),
    Kind("added_tokens.json", "older", "added_tokens.json", JSON_FILE, 4, read_tokenizer),
    Kind("special_tokens_map.json", "older", "special_tokens_map.json", JSON_FILE, 4, read_tokenizer),
    Kind("tokenizer.json", "single", "tokenizer.json", JSON_FILE, 6, read_tokenizer),
    Kind("adapter_config.json", "adapter", "adapter_config.json", JSON_FILE, 6, read_adapter),
    Kind("adapter's tensors", "adapter", "*.safetensors", SAFETENSORS_FILE, 4, read_adapter),
    Kind("Orbax metadata", "orbax", "params/_*", JSON_FILE, 1, read_stored),
    Kind("Orbax data", "orbax", "params/**/[!_]*", BINARY_FILE, 1, read_stored),
    Kind("checksums.json", "orbax", "checksums.json", JSON_FILE, 1, read_checksums),
    Kind("a run's best.json", "run", "best.json", JSON_FILE, 4, read_best),
    Kind("a checkpoint's best", "older_run", "checkpoints/*/best/metadata", JSON_FILE, 1, read_best),
)


def write_checkpoints(directory: Path) -> None:
    """One of each layout, and a whole one outside of them."""
    config = tiny_config()
    _write_released(directory / "released", config)
    shutil.copytree(directory / "released", directory / OUTSIDE)
    shutil.copytree(directory / "released", directory / "older")
    older = directory / "older"
    settings = json.loads((older / "tokenizer_config.json").read_text("utf-8"))
    del settings["added_tokens_decoder"]
    (older / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (directory / "single").mkdir()
    Tokenizer.from_dir(older)._core.save(str(directory / "single" / "tokenizer.json"))
    _write_adapter(directory / "adapter", config)
    _save(directory / "orbax" / "params")
    arrays = {name: jnp.asarray(array) for name, array in ARRAYS.items()}
    checksums.write(epath.Path(directory / "orbax" / "params"), checksums.of_arrays(arrays))
    for run in ("run", "older_run"):
        for step in (5, 9):
            _save(directory / run / "checkpoints" / str(step) / "params")
        (directory / run / "model").mkdir()
    best = {"metric": "loss", "value": 0.5, "step": 5, "since": 1, "evaluated": 9}
    (directory / "run" / "best.json").write_text(json.dumps(best), "utf-8")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(directory / "older_run" / "checkpoints" / "9" / "best", best)
    _save(directory / OUTSIDE / "params")


def _write_released(directory: Path, config: MossAudioConfig) -> None:
    write_random_checkpoint(config, directory, shard_bytes=12_000)
    write_small_tokenizer(directory, ["the quick brown fox the fox " * 3], 280)
    settings = json.loads((directory / "config.json").read_text("utf-8"))
    settings["language_config"] |= {"eos_token_id": 258, "bos_token_id": 256}
    (directory / "config.json").write_text(json.dumps(settings), "utf-8")
    generation = {"eos_token_id": [258, 256], "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 512}
    (directory / "generation_config.json").write_text(json.dumps(generation), "utf-8")


def _adapter_lora() -> LoraConfig:
    return LoraConfig(rank=2, alpha=4, targets=("language_model.layers.self_attn.q_proj",))


def _write_adapter(directory: Path, config: MossAudioConfig) -> None:
    from safetensors.numpy import save_file

    directory.mkdir()
    config = dataclasses.replace(config, lora=_adapter_lora())
    peft_files.write_adapter_config(directory, config, "a/model")
    leaves = names.adapter_leaves(config).values()
    tensors = {name: np.zeros(leaf.tensor_shape, np.float32) for leaf in leaves for name in leaf.names}
    save_file(tensors, directory / ADAPTER_FILE)


def _save(params: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(params.absolute(), unflatten({name: jnp.asarray(a) for name, a in ARRAYS.items()}))
