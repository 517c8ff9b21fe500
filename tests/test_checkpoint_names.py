"""Names of a checkpoint's parts: none of them leaves the checkpoint's directory."""

import json
from pathlib import Path

import pytest

from moss_audio_jax import MossAudioError, load_model
from moss_audio_jax.storage.paths import is_plain_name, to_path
from moss_audio_jax.weights.locate import locate
from moss_audio_jax.weights.orbax import stored_shapes

BEST = {"metric": "loss", "value": 0.5, "step": 5, "since": 0, "evaluated": 9}


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (5, 9):
        (tmp_path / "run" / "checkpoints" / str(step) / "params").mkdir(parents=True)
    (tmp_path / "outside" / "params").mkdir(parents=True)
    return tmp_path / "run"


def write(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("file", ["best.json", "checkpoints/9/best/metadata"])
def test_the_best_checkpoint_is_one_of_the_run(file, run):
    write(run / file, BEST)
    found = locate(run / "best")
    assert found.params is not None and Path(found.params) == run / "checkpoints" / "5" / "params"
    for step in ("../../outside", str(run.parent / "outside"), "5", 5.0, True, -1, [5]):
        write(run / file, BEST | {"step": step})
        with pytest.raises(MossAudioError, match=r"(best\.json|metadata): step must be an integer from 0"):
            locate(run / "best")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BEST | {"evaluated": "9"}, "evaluated must be an integer"),
        (BEST | {"metric": None}, "metric must be a text"),
        ([], "must hold a JSON object"),
        ({"metric": "loss"}, "does not know its best checkpoint"),
        (BEST | {"step": 7}, "step 7, which is not there"),
    ],
)
def test_a_damaged_best_is_named(content, message, run):
    write(run / "best.json", content)
    with pytest.raises(MossAudioError, match=message):
        locate(run / "best")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tree_metadata": {"('..',)": {"key_metadata": [{"key": "..", "key_type": 2}]}}}, "plain names"),
        ({"tree_metadata": {"('/etc',)": {"key_metadata": [{"key": "/etc", "key_type": 2}]}}}, "plain names"),
        ({"tree_metadata": {"('a',)": None}}, "plain names"),
        ({"tree_metadata": []}, "tree_metadata must name parameters"),
        ({}, "tree_metadata must name parameters"),
        ({"use_ocdbt": False, "tree_metadata": {"a": {}}}, "use_ocdbt must be true, not False"),
    ],
)
def test_the_names_of_a_stored_tree_are_plain(content, message, tmp_path):
    write(tmp_path / "params" / "_METADATA", content)
    with pytest.raises(MossAudioError, match=message):
        stored_shapes(to_path(tmp_path / "params"))


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    write(tmp_path / "adapter_config.json", {"base_model_name_or_path": str(tmp_path)})
    with pytest.raises(MossAudioError, match="holds an adapter itself"):
        load_model(tmp_path)


def test_plain_names():
    assert all(map(is_plain_name, ("model-00001-of-00002.safetensors", "kernel", "0", "a+b", "_x")))
    others = ("", ".", "..", "../x", "a/b", "/x", "a\\b", "a\0b", "a\n", "é", "x" * 201, "~", "gs://x", None, 1, b"x")
    assert not any(map(is_plain_name, others))
