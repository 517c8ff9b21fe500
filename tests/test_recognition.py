"""Paths that are no checkpoint are called what they are, with what helps; the Hugging Face cache is read in place."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from moss_audio_jax import LoraConfig, MossAudioConfig, MossAudioError, load_adapter, load_model, load_processor
from moss_audio_jax.weights.checkpoint import save_model
from moss_audio_jax.weights.info import describe
from moss_audio_jax.weights.locate import ADAPTER_CONFIG, ADAPTER_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import adapter_leaves
from moss_audio_jax.weights.parameters import parameters_of
from moss_audio_jax.weights.peft import write_adapter_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 432608\n"
PAGE = "<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.fixture(scope="session")
def orbax(released: Path) -> Path:
    """`released`, loaded and saved."""
    directory = released.parent / "saved"
    save_model(load_model(released), directory)
    return directory


@pytest.fixture(scope="session")
def adapter(released: Path) -> Path:
    """As PEFT lays it out, for `released`: without configuration and tokenizer of its own."""
    directory = released.parent / "adapter"
    directory.mkdir()
    config = dataclasses.replace(MossAudioConfig.from_hf(released), lora=LoraConfig(rank=2))
    write_adapter_config(directory, config, str(released))
    shapes = {name: leaf.tensor_shape for leaf in adapter_leaves(config).values() for name in leaf.names}
    save_file({name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}, directory / ADAPTER_FILE)
    return directory


def in_cache(directory: Path, cache: Path) -> Path:
    """A snapshot as `hf download` makes it: each file a link into the blobs of its repository."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0123", cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in directory.rglob("*") if file.is_file())):
        blob = Path(shutil.copy(file, blobs / f"{number:064x}"))
        link = snapshot / file.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("layout", ["released", "orbax"])
def test_a_snapshot_in_the_hugging_face_cache_is_read_in_place(layout: str, request, tmp_path: Path):
    directory = request.getfixturevalue(layout)
    snapshot = in_cache(directory, tmp_path)
    expected = parameters_of(load_model(directory))
    for path, leaf in parameters_of(load_model(snapshot)).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert load_processor(snapshot).tokenizer.encode("12") == [16, 17]
    assert str(snapshot) in describe(snapshot)
    with pytest.raises(
        MossAudioError, match=f"is a repository of the Hugging Face cache: give its snapshot {snapshot}"
    ):
        load_model(tmp_path / "models--a--b")


def test_a_snapshot_may_not_link_into_another_repository(released: Path, tmp_path: Path):
    snapshot = in_cache(released, tmp_path)
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    moved = Path(shutil.move((snapshot / "config.json").resolve(), other / "0"))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(moved)
    with pytest.raises(MossAudioError, match=r"config\.json must be inside the directory, not a link"):
        load_model(snapshot)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json", SINGLE_FILE]
)
def test_links_to_outside_are_refused(released: Path, tmp_path: Path, name: str):
    directory = Path(shutil.copytree(released, tmp_path / "model"))
    outside = shutil.move(directory / name, tmp_path / name)
    (directory / name).symlink_to(outside)
    with pytest.raises(MossAudioError, match=rf"{name} must be inside the directory, not a link"):
        load_model(directory)
        load_processor(directory)


@pytest.mark.parametrize("inside", [".", "_METADATA", "d"])
def test_parameters_outside_are_refused(orbax: Path, tmp_path: Path, inside: str):
    directory = Path(shutil.copytree(orbax, tmp_path / "model"))
    outside = shutil.move(directory / "params" / inside, tmp_path / "outside")
    (directory / "params" / inside).symlink_to(outside)
    with pytest.raises(MossAudioError, match=r"must be inside of .*/model, not a link"):
        load_model(directory)


def test_an_adapter_file_outside_is_refused(adapter: Path, tmp_path: Path):
    directory = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (directory / ADAPTER_CONFIG).unlink()
    (directory / ADAPTER_CONFIG).symlink_to(adapter / ADAPTER_CONFIG)
    with pytest.raises(MossAudioError, match=r"adapter_config\.json must be inside the directory"):
        load_model(directory)


def rename(change: Callable[[str], str]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / SINGLE_FILE)
        assert tensors["lm_head.weight"].dtype == ml_dtypes.bfloat16
        save_file({change(name): tensor for name, tensor in tensors.items()}, directory / SINGLE_FILE)

    return apply


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def move(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / SINGLE_FILE).rename(directory / name)


# Changes to a directory, and what is said of it.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "DataParallel": (
        rename(lambda n: f"module.{n}"),
        "159 of 159 tensors have 'module.' in their names, as DataParallel",
    ),
    "compiled": (
        rename(lambda n: f"_orig_mod.{n}"),
        "159 of 159 tensors have '_orig_mod.' in their names, as torch.comp",
    ),
    "compiled layers": (
        rename(lambda n: n.replace("language_model.layers.1.", "language_model.layers.1._orig_mod.")),
        "11 of 159 tensors have '_orig_mod.' in their names",
    ),
    "wrapped by PEFT": (
        rename(lambda n: "base_model.model." + n.replace("up_proj.weight", "up_proj.base_layer.weight")),
        "159 of 159 tensors have 'base_model.model.' in their names, and 8 of 159 tensors have 'base_layer.'",
    ),
    "in another model": (rename(lambda n: f"thinker.{n}"), "have 'thinker.' in their names, as another model around"),
    "weights are a pointer": (
        write(SINGLE_FILE, POINTER),
        "model.safetensors is a pointer of Git LFS.* `git lfs pull`",
    ),
    "weights are a page": (write(SINGLE_FILE, PAGE), "model.safetensors is a web page.* `hf download`"),
    "weights are a pickle": (
        lambda directory: (directory / SINGLE_FILE).write_bytes(b"PK\x03\x04" + bytes(100)),
        "model.safetensors is a pickle of PyTorch, which is never read here",
    ),
    "configuration is a pointer": (write("config.json", POINTER), r"config\.json is a pointer of Git LFS"),
    "configuration is a page": (write("config.json", PAGE), r"config\.json is a web page"),
    "vocabulary is a pointer": (write("vocab.json", POINTER), r"vocab\.json is a pointer of Git LFS"),
    "merges are a pointer": (write("merges.txt", POINTER), r"merges\.txt is a pointer of Git LFS"),
    "pickled": (move("pytorch_model.bin"), r"holds pytorch_model\.bin, a pickle of PyTorch.* `save_pretrained"),
    "a checkpoint of Lightning": (move("last.ckpt"), r"holds last\.ckpt, a pickle of PyTorch"),
    "llama.cpp": (move("model.gguf"), r"holds model\.gguf, weights for llama\.cpp"),
    "a shard without an index": (
        move("model-00001-of-00003.safetensors"),
        r"holds model-00001-of-00003\.safetensors, which nothing leads to",
    ),
    "no weights": (lambda directory: (directory / SINGLE_FILE).unlink(), "holds neither params/ nor model.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_directory_holds_is_said(released: Path, tmp_path: Path, name: str):
    change, expected = CHANGES[name]
    directory = Path(shutil.copytree(released, tmp_path / "model"))
    change(directory)
    with pytest.raises(MossAudioError, match=expected) as caught:
        load_model(directory)
        load_processor(directory)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("load", [load_model, load_processor, describe])
def test_what_a_path_is_is_said(load: Callable, released: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "clip.wav", np.zeros(1600), 16000)
    shutil.copytree(released, tmp_path / "models" / "tiny")
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fetch = "`hf download OpenMOSS-Team/MOSS-Audio-4B-Instruct --local-dir MOSS-Audio-4B-Instruct`"
    cases = {
        "OpenMOSS-Team/MOSS-Audio-4B-Instruct": rf"pip install 'moss-audio-jax\[hub\]'`, or run {fetch}",
        "MOSS-Audio-4B-Instruct": f"give OpenMOSS-Team/MOSS-Audio-4B-Instruct, .* {fetch}",
        "models/tinny": "does not exist in models: did you mean models/tiny",
        "models/large": "does not exist in models: give a released .*; or, .* Face hub's model .*, models/large@main",
        "model/tiny": "pip install .* did you mean models/tiny",
        "models/tiny/tinny": "does not exist: give a released",
        "elsewhere": "elsewhere does not exist: give a released MOSS-Audio directory",
        "clip.wav": "clip.wav is a sound: give the model first, then the clips",
        "models": "models holds no model itself: did you mean models/tiny",
        f"models/tiny/{SINGLE_FILE}": "is a file of weights: give the directory that holds it",
        "models/tiny/config.json": "is a file: give a released MOSS-Audio directory",
        "empty": "empty is empty: give a released",
    }
    for path, expected in cases.items():
        with pytest.raises(MossAudioError, match=expected):
            load(path)


def test_what_is_no_adapter_is_said(released: Path, adapter: Path, tmp_path: Path):
    model = load_model(released)
    pickled = Path(shutil.copytree(adapter, tmp_path / "pickled"))
    (pickled / ADAPTER_FILE).rename(pickled / "adapter_model.bin")
    alone = Path(shutil.copytree(adapter, tmp_path / "alone"))
    (alone / ADAPTER_CONFIG).unlink()
    cases = {
        released: "holds a model and no LoRA adapter: give the directory of an adapter",
        released / "config.json": "is a file: give the directory of an adapter",
        released.with_name("adaptr"): f"does not exist: did you mean {adapter}",
        pickled: r"holds adapter_model\.bin, a pickle of PyTorch",
        alone: r"holds adapter_model\.safetensors, the weights of an adapter, and no adapter_config\.json",
    }
    for path, expected in cases.items():
        with pytest.raises(MossAudioError, match=expected):
            load_adapter(model, path)


def test_the_processor_of_an_adapter_is_its_models(adapter: Path, released: Path, tmp_path: Path):
    processor = load_processor(adapter)
    assert processor.tokenizer.encode("12") == [16, 17]
    assert processor.config == load_processor(released).config
    with_own = Path(shutil.copytree(adapter, tmp_path / "with_own"))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(released / name, with_own)
    vocabulary = json.loads((with_own / "vocab.json").read_text("utf-8"))
    vocabulary |= {"1": vocabulary["2"], "2": vocabulary["1"]}
    (with_own / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    assert load_processor(with_own).tokenizer.encode("12") == [17, 16]
    assert "adapter in PEFT's layout" in describe(adapter)


def test_an_adapter_s_base_must_be_a_model(adapter: Path, tmp_path: Path):
    directory = Path(shutil.copytree(adapter, tmp_path / "itself"))
    content = json.loads((directory / ADAPTER_CONFIG).read_text())
    for base, expected in {
        str(directory): "which holds an adapter itself",
        "OpenMOSS-Team/MOSS-Audio-4B-Instruct": "which is no directory here",
        7: "base_model_name_or_path must be a name of .*, not 7",
    }.items():
        (directory / ADAPTER_CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": base}))
        for load in (load_model, load_processor):
            with pytest.raises(MossAudioError, match=expected):
                load(directory)
