"""Small training runs that several test files look at: their data, their configuration and their ends."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import soundfile

from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.weights.checkpoint import save_model
from moss_audio_jax.weights.parameters import build_model
from tests.conftest import SMALL_MODEL
from tests.xla_flags import QUICK
from train.config import ModelSource, RunConfig, ValidationConfig
from train.initialization import first_parameters
from train.running.checkpoints import Checkpoints
from train.state import TrainState, abstract_state

STEPS = 6
MEASURED = ("time", "step_seconds", "tokens_per_second", "data_wait", "mfu", "restarts")  # by the clock, and starts
# A subprocess has one device, and compiles quickly.
ENVIRONMENT = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}


def write_corpus(directory: Path, *, clips: int, texts: int) -> Path:
    """clips.jsonl, texts.jsonl, and in model/ a checkpoint with its tokenizer."""
    rng = np.random.default_rng(0)
    lines: dict[str, list[dict]] = {"clips": [], "texts": [{"text": f"text {number} " * 3} for number in range(texts)]}
    for number in range(clips):
        soundfile.write(directory / f"{number}.wav", rng.normal(0, 0.1, int(rng.uniform(3000, 20000))), 16000)
        lines["clips"].append({"audio": f"{number}.wav", "text": f"number {number}"})
    for name, content in lines.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    mesh = one_device()
    save_model(build_model(SMALL_MODEL, first_parameters(ModelSource(), SMALL_MODEL, mesh=mesh)), directory / "model")
    write_small_tokenizer(directory / "model")
    return directory


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def until(config: RunConfig, steps: int, **changes) -> RunConfig:
    """changes: fields of LoopConfig and of ValidationConfig, which have no name in common."""
    names = [field.name for field in dataclasses.fields(ValidationConfig) if field.name in changes]
    validation = dataclasses.replace(config.validation, **{name: changes.pop(name) for name in names})
    loop = dataclasses.replace(config.loop, steps=steps, **changes)
    return dataclasses.replace(config, loop=loop, validation=validation)


def restored(out: Path, config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> tuple[TrainState, dict]:
    frozen = {"audio_encoder.stem_proj.kernel": "bfloat16"}
    target = abstract_state(SMALL_MODEL, config.optimizer, frozen_dtypes=frozen, mesh=mesh or one_device())
    with Checkpoints(out) as checkpoints:
        found = checkpoints.restore(target)
    assert found is not None
    return found


def assert_same_end(found: Path, expected: Path, config: RunConfig) -> None:
    """Every array of the state, the data's position, and the numbers of every step."""
    assert restored(found, config)[1] == restored(expected, config)[1]
    assert_same_numbers(found, expected, config)


def assert_same_numbers(found: Path, expected: Path, config: RunConfig) -> None:
    """Every array of the state, and the numbers of every step."""
    (state, _), (expected_state, _) = restored(found, config), restored(expected, config)
    leaves, expected_leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, expected_state))
    for (path, leaf), (expected_path, other) in zip(leaves, expected_leaves, strict=True):
        assert path == expected_path and leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))
    timeless = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(found)]
    for line, other in zip(timeless, lines(expected), strict=True):
        of_all = {name: value for name, value in line.items() if not name.startswith("epoch/")}  # by the data's path
        assert of_all == {name: other[name] for name in of_all}


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
