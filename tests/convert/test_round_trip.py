"""Released -> Orbax -> released gives every tensor back, bit by bit, whatever the model and however it is cut."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import blocks, to_orbax
from convert.blocks import cast, chunk_shape, row_blocks
from convert.orbax_files import OrbaxCheckpoint
from convert.rehearse import write_random_checkpoint
from convert.to_hf import convert_to_hf
from convert.to_orbax import convert_to_orbax
from moss_audio_jax import MossAudioConfig, MossAudioError, load_model, save_model
from moss_audio_jax.config import EncoderConfig, LanguageConfig, ProcessorConfig
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.tree import dotted, flatten
from moss_audio_jax.weights.locate import INDEX_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import released_leaves

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
TINY = MossAudioConfig.preset("tiny")


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def config(*, audio: dict | None = None, language: dict | None = None, **changes) -> MossAudioConfig:
    parts = {
        "audio_config": dataclasses.replace(TINY.audio_config, **(audio or {})),
        "language_config": dataclasses.replace(TINY.language_config, **(language or {})),
    }
    return dataclasses.replace(TINY, **parts, **changes)


CONFIGS = {
    "tiny": TINY,
    "tied": config(tie_word_embeddings=True),
    "projected encoder": config(audio={"output_dim": 24}),
    "no DeepStack": config(deepstack_num_inject_layers=0),
    "odd sizes": config(
        audio={"d_model": 30, "output_dim": 30, "encoder_attention_heads": 3, "encoder_ffn_dim": 77},
        language={"hidden_size": 51, "intermediate_size": 101, "vocab_size": 523},
        adapter_hidden_size=37,
    ),
    "one layer": config(
        audio={"encoder_layers": 1, "deepstack_encoder_layer_indexes": (0,), "downsample_hidden_size": 32},
        language={"num_hidden_layers": 1, "vocab_size": 32},
        eos_ids=(3,),
        processor=ProcessorConfig(audio_token_id=31, audio_start_id=29, audio_end_id=30),
    ),
}


@pytest.mark.parametrize(
    ("name", "piece_bytes", "chunk_bytes"),
    [
        *((name, blocks.PIECE_BYTES, blocks.CHUNK_BYTES) for name in CONFIGS),
        ("tiny", 20_000, 500),  # several layers in a piece
        ("odd sizes", 4000, 500),  # parts of a layer in a piece
        ("one layer", 1000, 4000),  # less than a row of stem_proj
    ],
)
def test_weights_come_back(tmp_path, monkeypatch, name, piece_bytes, chunk_bytes):
    write_random_checkpoint(CONFIGS[name], tmp_path / "released", seed=2, shard_bytes=100_000)
    monkeypatch.setattr(blocks, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(to_orbax, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", chunk_bytes)
    convert_to_orbax(tmp_path / "released", tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "released"))


def test_recorded_float32_checkpoint_comes_back(data_dir, tmp_path):
    convert_to_orbax(data_dir / "tiny", tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), load_file(data_dir / "tiny" / SINGLE_FILE))


def test_released_shards_with_the_real_tokenizer_come_back(goldens_dir, tmp_path):
    source = goldens_dir / "tiny-hf"
    convert_to_orbax(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back", shard_bytes=10**7)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(source))
    for file in source.iterdir():
        if "safetensors" not in file.name:
            for directory in ("orbax", "back"):
                assert (tmp_path / directory / file.name).read_bytes() == file.read_bytes()


def test_types_may_differ_between_parameters(released, tmp_path):
    """float16 among bfloat16, and float32 and float64 in whole stacks."""
    source = Path(shutil.copytree(released, tmp_path / "mixed"))
    tensors = load_file(source / SINGLE_FILE)
    kinds = {"lm_head": np.float16, "norm": np.float32, "fc1": np.float64}
    for name, tensor in tensors.items():
        for part, kind in kinds.items():
            if part in name:
                tensors[name] = tensor.astype(kind)
    save_file(tensors, source / SINGLE_FILE, {"format": "pt"})
    convert_to_orbax(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)


def test_types_that_differ_within_a_stack_need_a_choice(released, tmp_path):
    source = Path(shutil.copytree(released, tmp_path / "mixed"))
    tensors = load_file(source / SINGLE_FILE)
    name = "language_model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, source / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(MossAudioError, match=r"mlp\.up_proj\.weight and its like .* bfloat16 and float32.*--dtype"):
        convert_to_orbax(source, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    convert_to_orbax(source, tmp_path / "orbax", FLOAT32)
    convert_to_hf(tmp_path / "orbax", tmp_path / "back", BFLOAT16)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(released))


def test_dtype_converts_and_is_written_down(released, tmp_path):
    convert_to_orbax(released, tmp_path / "wide", FLOAT32)
    wide = OrbaxCheckpoint(tmp_path / "wide")
    assert {str(wide.dtype(name)) for name in tensors_of(released)} == {"float32"}
    before, after = (json.loads((d / "config.json").read_text()) for d in (released, tmp_path / "wide"))
    assert after == before | {"dtype": "float32"}
    convert_to_hf(tmp_path / "wide", tmp_path / "narrow", BFLOAT16)
    assert_same_bits(tensors_of(tmp_path / "narrow"), tensors_of(released))
    assert (tmp_path / "narrow" / "config.json").read_bytes() == (released / "config.json").read_bytes()


def test_float32_is_rounded_to_nearest_even(data_dir, tmp_path):
    convert_to_orbax(data_dir / "tiny", tmp_path / "orbax", BFLOAT16)
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    expected = {name: array.astype(BFLOAT16) for name, array in load_file(data_dir / "tiny" / SINGLE_FILE).items()}
    assert_same_bits(tensors_of(tmp_path / "back"), expected)


def test_values_too_large_for_the_type_are_refused(data_dir, tmp_path):
    source = Path(shutil.copytree(data_dir / "tiny", tmp_path / "large"))
    tensors = load_file(source / SINGLE_FILE)
    tensors["lm_head.weight"][3, 4] = 3.4e38
    save_file(tensors, source / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(MossAudioError, match=r"lm_head\.weight holds values too large for bfloat16"):
        convert_to_orbax(source, tmp_path / "orbax", BFLOAT16)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    infinite = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    np.testing.assert_array_equal(cast(infinite, BFLOAT16, "x").astype(np.float32), infinite)


def test_companion_files_travel_unchanged_and_others_stay(released, tmp_path):
    source = Path(shutil.copytree(released, tmp_path / "source"))
    text = (source / "config.json").read_text().replace("\n", "\r\n") + "   \n"  # formatted like nobody would
    (source / "config.json").write_bytes(text.encode())
    for name in ("tokenizer.json", "chat_template.jinja", "chat_template.json"):
        (source / name).write_bytes(b'{"a":1}')
    for name in ("modeling_moss_audio.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text("not wanted")
    convert_to_orbax(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    names = {file.name for file in source.iterdir()} - {"modeling_moss_audio.py", "pytorch_model.bin", "README.md"}
    assert {file.name for file in (tmp_path / "back").iterdir()} == names
    assert len(names) == 12
    for name in names - {SINGLE_FILE}:
        for directory in ("orbax", "back"):
            assert (tmp_path / directory / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("inside", [True, False])
def test_linked_companions(released, tmp_path, inside):
    source = Path(shutil.copytree(released, tmp_path / "source"))
    place = source / "real.txt" if inside else tmp_path / "secret.txt"
    place.write_text("#version: 0.2\n")
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to(place)
    if inside:
        convert_to_orbax(source, tmp_path / "orbax")
        assert (tmp_path / "orbax" / "merges.txt").read_text() == "#version: 0.2\n"
        assert not (tmp_path / "orbax" / "merges.txt").is_symlink()
    else:
        with pytest.raises(MossAudioError, match=r"merges\.txt must be inside the directory, not a link"):
            convert_to_orbax(source, tmp_path / "orbax")
        assert not (tmp_path / "orbax").exists()


def test_shards_and_their_index(released, tmp_path, orbax):
    convert_to_hf(orbax, tmp_path / "back", shard_bytes=60_000)
    expected = tensors_of(released)
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 6
    index = json.loads((tmp_path / "back" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values()) == 432_608
    assert index["weight_map"].keys() == expected.keys()
    for file in files:
        with safe_open(tmp_path / "back" / file, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = set(handle.keys())
            assert names == {name for name, place in index["weight_map"].items() if place == file}
            assert sum(expected[name].nbytes for name in names) <= 60_000
    assert_same_bits(tensors_of(tmp_path / "back"), expected)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(released, tmp_path, orbax):
    convert_to_hf(orbax, tmp_path / "back", shard_bytes=1)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 159
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(released))


def test_what_fits_in_one_file_has_no_index(orbax, tmp_path):
    convert_to_hf(orbax, tmp_path / "exact", shard_bytes=432_608)
    assert (tmp_path / "exact" / SINGLE_FILE).exists()
    assert not (tmp_path / "exact" / INDEX_FILE).exists()
    convert_to_hf(orbax, tmp_path / "less", shard_bytes=432_607)
    assert (tmp_path / "less" / INDEX_FILE).exists()


def test_wider_types_stand_first_so_that_all_are_aligned(released, tmp_path):
    source = Path(shutil.copytree(released, tmp_path / "mixed"))
    tensors = load_file(source / SINGLE_FILE)
    tensors = {name: array.astype(np.float32) if "norm" in name else array for name, array in tensors.items()}
    save_file(tensors, source / SINGLE_FILE, {"format": "pt"})
    convert_to_orbax(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    data = (tmp_path / "back" / SINGLE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, array in tensors.items():
        assert header[name]["data_offsets"][0] % array.dtype.itemsize == 0


def test_trained_parameters_are_exported(released, tmp_path):
    """A model that `save_model` writes from the devices of a mesh is read like a conversion."""
    model = load_model(released, dtype=BFLOAT16, mesh=make_mesh(fsdp=4, tensor=2))
    save_model(model, tmp_path / "trained")
    convert_to_hf(tmp_path / "trained", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(released))


def test_converted_checkpoint_is_plain_orbax(released, orbax):
    """Restored by Orbax alone, and by `load_model`, it is what the released directory gives."""
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten(checkpointer.restore(orbax / "params"))
    models = load_model(released, dtype=BFLOAT16), load_model(orbax, dtype=BFLOAT16)
    for path, leaf in nnx.to_flat_state(nnx.state(models[0], nnx.Param)):
        np.testing.assert_array_equal(np.asarray(leaf[...]), np.asarray(restored[dotted(path)]))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(models[0]), nnx.state(models[1]))


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((36, 2560), 2, (36, 2560)),
        ((36, 4096, 12288), 2, (1, 512, 1536)),
        ((36, 2560, 9728), 2, (1, 640, 1216)),
        ((4096, 151936), 2, (128, 4748)),
        ((3, 3, 480, 480), 2, (1, 3, 480, 480)),
        ((1, 1_048_577 * 3), 2, (1, 1_048_577 * 3)),  # no even axis: stored whole
    ],
)
def test_chunks_are_small_and_cover_evenly(shape, itemsize, expected):
    chunk = chunk_shape(shape, itemsize)
    assert chunk == expected
    assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))


@pytest.mark.parametrize("preset", ["4b", "8b", "tiny"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_cover_all_rows_in_pieces_of_whole_chunks(preset, itemsize):
    for leaf in released_leaves(MossAudioConfig.preset(preset)).values():
        chunk = chunk_shape(leaf.shape, itemsize)[leaf.rows_axis]
        end = 0
        for start, stop in row_blocks(leaf, itemsize):
            assert start == end < stop
            assert start % chunk == 0
            assert (stop - start) * math.prod(leaf.tensor_shape[1:]) * itemsize <= blocks.PIECE_BYTES
            end = stop
        assert end == leaf.tensor_shape[0]


def test_configuration_of_both_towers_can_be_anything(tmp_path):
    """A model that shares no size with a preset."""
    other = MossAudioConfig(
        audio_config=EncoderConfig(20, 12, 64, 3, 5, 28, 4, deepstack_encoder_layer_indexes=(2, 0)),
        language_config=LanguageConfig(97, 18, 26, 3, 6, 3, 10),
        adapter_hidden_size=14,
        eos_ids=(5,),
        processor=ProcessorConfig(audio_token_id=96, audio_start_id=94, audio_end_id=95),
    )
    write_random_checkpoint(other, tmp_path / "released")
    convert_to_orbax(tmp_path / "released", tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "released"))
