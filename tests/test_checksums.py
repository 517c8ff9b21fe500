"""Checksums: the same on any mesh and in any pieces, another one for any change; and what a load makes of them."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moss_audio_jax import MossAudio, MossAudioConfig, MossAudioError, load_model, save_model
from moss_audio_jax.inference.loading import Loading
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.weights import checksums
from moss_audio_jax.weights.parameters import parameters_of
from tests.conftest import change_one_bit
from train.config import ModelSource
from train.initialization import first_parameters

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHANGED = "language_model.layers.mlp.up_proj.kernel"
WORD = 2**32


def of_pieces(array: np.ndarray) -> str:
    """Of every first index alone, the last one first."""
    total = checksums.Sum(array.shape, array.dtype)
    if not array.ndim:
        total.add(..., array)
    for index in reversed(range(len(array) if array.ndim else 0)):
        total.add(index, array[index])
    return total.text()


def of_device(array: np.ndarray, sharding: NamedSharding | None = None) -> str:
    return checksums.of_arrays({"a": jax.device_put(array, sharding)})["a"]


def random_array(dtype: np.dtype | type, *shape: int) -> np.ndarray:
    """Random bits, NaN and infinity among them."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return (bits & 1 if dtype.kind == "b" else bits).view(dtype).reshape(shape)


def scrambled(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % WORD
    x = (x ^ x >> 15) * 0x846CA68B % WORD
    return x ^ x >> 16


def by_definition(array: np.ndarray, start: tuple[int, ...]) -> list[int]:
    """The two sums of a piece that starts there, in Python's integers."""
    words = array.view(f"u{array.itemsize}")
    steps = [[scrambled(1 + lane * 16 + axis) | 1 for axis in range(16)] for lane in (0, 1)]
    sums = [0, 0]
    for place, word in np.ndenumerate(words):
        index = [begin + step for begin, step in zip(start, place, strict=True)]
        keys = [sum((i * s for i, s in zip(index, of, strict=False)), start=of[-1]) % WORD for of in steps]
        first = scrambled(int(word) ^ keys[0])
        second = first ^ keys[1]
        second = (second ^ second >> 15) * 0x2C1B3C6D % WORD
        sums = [(sums[0] + first) % WORD, (sums[1] + (second ^ second >> 16)) % WORD]
    return sums


@pytest.mark.parametrize(
    "dtype", [BFLOAT16, np.float16, np.float32, np.int32, np.int8, np.bool_, np.uint32], ids=lambda dtype: str(dtype)
)
def test_devices_and_pieces_agree(dtype: np.dtype):
    for shape in ((), (0,), (2, 0), (5,), (3, 2, 4)):
        array = random_array(dtype, *shape)
        assert of_device(array) == of_pieces(array), shape
    assert of_pieces(array) == of_pieces(np.asarray(array, order="F"))


def test_the_sums_are_those_of_the_definition_and_stay_so():
    """Checkpoints carry them, so other sums need another version. Indices lie beyond 2^31, as those of 8B do."""
    array, start = random_array(np.uint16, 2, 3), (3, 2**32 - 5)
    piece = checksums._sums_of_piece(array, start)
    assert piece.tolist() == by_definition(array, start) != by_definition(array, (0, 0))
    assert piece.tolist() != by_definition(array, (2, 2**32 - 5)) != by_definition(array, (3, 2**31 - 5))
    total = checksums.Sum((40, 2**32), array.dtype)
    total.add((slice(3, 5), slice(2**32 - 5, 2**32 - 2)), array)
    assert total._sums.tolist() == piece.tolist()
    whole = random_array(BFLOAT16, 4, 6)
    assert of_pieces(whole) == "bfloat16[4,6] 7de26c9f9ccd941e"
    assert of_pieces(whole)[-16:] == "{:08x}{:08x}".format(*by_definition(whole, (0, 0)))


def test_any_change_is_found():
    array = random_array(BFLOAT16, 3, 4)
    seen = {of_pieces(array), of_pieces(array.reshape(4, 3)), of_pieces(array.view(np.int16))}
    expected = 3
    for element, bit in itertools.product(range(array.size), range(16)):
        flipped = array.copy()
        flipped.view(np.uint16).reshape(-1)[element] ^= 1 << bit
        seen.add(of_pieces(flipped))
        expected += 1
    for one, other in itertools.combinations(range(array.size), 2):  # in a hundred bits, no two are equal
        swapped = array.copy().reshape(-1)
        swapped[[one, other]] = swapped[[other, one]]
        seen.add(of_pieces(swapped.reshape(array.shape)))
        expected += 1
    signs = array.copy()
    signs[1:] = -signs[1:]
    assert len(seen | {of_pieces(signs)}) == expected + 1


def test_every_sharding_gives_the_same():
    array = random_array(np.float32, 8, 16, 8)
    expected = of_pieces(array)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("replica", "fsdp", "tensor"))
    for axes in ((), ("fsdp", "tensor"), (None, ("fsdp", "tensor")), ("tensor", None, "fsdp"), ("replica", "fsdp")):
        assert of_device(array, NamedSharding(mesh, PartitionSpec(*axes))) == expected, axes


@pytest.fixture(scope="module")
def saved(tiny: MossAudio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checksums") / "saved"
    save_model(tiny, directory)
    return directory


def test_a_verified_load_is_the_same(saved: Path):
    """Also where it casts, shards and rounds."""
    options = {"dtype": "bfloat16", "mesh": make_mesh(fsdp=8), "int8": [CHANGED.removesuffix(".kernel")]}
    plain, verified = (parameters_of(load_model(saved, verify=verify, **options)) for verify in (False, True))
    for path, leaf in plain.items():
        assert verified[path].sharding == leaf.sharding and verified[path].dtype == leaf.dtype
        np.testing.assert_array_equal(verified[path], leaf, err_msg=path)


def test_a_changed_bit_is_named(saved: Path, tiny: MossAudio, tmp_path: Path):
    changed = Path(shutil.copytree(saved, tmp_path / "changed"))
    change_one_bit(changed / "params", CHANGED)
    loaded, original = (np.asarray(parameters_of(model)[CHANGED]) for model in (load_model(changed), tiny))
    assert (loaded != original).sum() == 1  # without a word
    for options in ({}, {"dtype": "bfloat16"}, {"int8": [CHANGED.removesuffix(".kernel")]}):
        with pytest.raises(
            MossAudioError, match=rf"{changed}/params is damaged, {CHANGED} is float32\[.* copy or convert"
        ):
            load_model(changed, verify=True, **options)


def test_checkpoints_without_checksums_and_with_damaged_ones(saved: Path, released: Path, tmp_path: Path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    file = copy / checksums.CHECKSUMS_FILE
    record = json.loads(file.read_text())
    for content, message in (
        (record | {"version": 2}, "has checksums of version 2, where this program knows 1"),
        (record | {"items": {"../params": {}}}, "must hold version 1 and checksums"),
        (record | {"items": {"params": {CHANGED: "?"}}}, "must hold version 1 and checksums"),
        (record | {"items": {}}, "was written without a checksum"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(MossAudioError, match=message):
            load_model(copy, verify=True)
    file.unlink()
    tiny = MossAudioConfig.preset("tiny")
    for directory in (copy, released):
        load_model(directory)
        for load in (
            lambda path: load_model(path, verify=True),
            lambda path: Loading(path, None, None, (), {}, 1, verify=True).model(),
            lambda path: first_parameters(ModelSource(checkpoint=str(path), verify=True), tiny),
        ):
            with pytest.raises(MossAudioError, match=f"{directory} has no checksums, which only Orbax checkpoints"):
                load(directory)
    assert checksums.recorded(epath.Path(copy)) is None
