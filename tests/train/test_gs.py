"""All of training on gs://: data, shards, a run that resumes, evaluation. The service is `fake_gcs`, in memory."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_gcs import FAULTS, FakeGcs

from moss_audio_jax import MossAudioError, load_model
from moss_audio_jax.storage import paths
from moss_audio_jax.storage.paths import to_path
from moss_audio_jax.weights.locate import locate
from moss_audio_jax.weights.parameters import parameters_of
from tests.train.training_runs import STEPS, assert_same_numbers, one_device, restored, until
from train.__main__ import main
from train.config import RunConfig
from train.data.manifest import Manifest
from train.data.shard_writing import prepare
from train.data.shards import Shards
from train.loop import Outcome, train
from train.running.additions import data_state
from train.running.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def data(corpus: Path, storage: FakeGcs) -> str:
    """The corpus, on gs://."""
    local = paths.local_directory("gs://corpus/data")
    shutil.copytree(corpus, local, dirs_exist_ok=True)
    paths.upload(local, "gs://corpus/data")
    return "gs://corpus/data"


@pytest.fixture(scope="module")
def run(config: RunConfig, data: str) -> paths.Path:
    """A run on gs:// that was stopped once; its configuration is that of `straight` apart from where things are."""
    moved = moved_to(config, data)
    out = to_path("gs://corpus/run")
    first = until(moved, 4, profile_first=2, profile_steps=1)
    assert train(first, out, mesh=one_device()) == Outcome(4, preempted=False)
    assert train(moved, out, mesh=one_device()) == Outcome(6, preempted=False)
    return out


def moved_to(config: RunConfig, data: str) -> RunConfig:
    mixture = config.mixture
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, checkpoint=f"{data}/model"),
        mixture=dataclasses.replace(
            mixture,
            speech=dataclasses.replace(mixture.speech, paths=(f"{data}/clips.jsonl",)),
            text=dataclasses.replace(mixture.text, paths=(f"{data}/texts.jsonl",)),
        ),
    )


def test_a_run_that_went_on_ends_like_one_on_a_disk(run: paths.Path, straight: Path, config: RunConfig):
    assert_same_numbers(run, straight, config)  # the data's state has the names of its sources, which differ
    found = {path.name for path in paths.children(run)}
    assert found >= {path.name for path in straight.iterdir()} and "profile" in found
    assert {path.name for path in paths.children(run / "model")} == {
        path.name for path in (straight / "model").iterdir()
    }
    assert len(paths.children(run / "tensorboard")) == 2
    assert list(run.glob("profile/plugins/profile/*/*"))
    assert data_state(run, STEPS) == restored(run, config)[1]  # where data that join look it up


def test_storage_that_fails_changes_nothing(
    run: paths.Path,
    straight: Path,
    config: RunConfig,
    storage: FakeGcs,
    hasty: None,
):
    """One request in twenty, a quarter of those with their work done: on a run of its own, stopped once."""
    out = to_path("gs://corpus/flaky")
    moved = moved_to(config, "gs://corpus/data")
    with storage.failing(0.05):
        assert train(until(moved, 4), out, mesh=one_device()) == Outcome(4, preempted=False)
        assert train(moved, out, mesh=one_device()) == Outcome(6, preempted=False)
        assert sum(storage.injected.values()) > 20 and all(storage.injected[fault] for fault in FAULTS)
    assert_same_numbers(out, straight, config)
    assert restored(out, config)[1] == restored(run, config)[1]
    assert not (out / "damaged_checkpoints").exists()
    assert [path.name for path in paths.children(out) if path.name.endswith(".piece")] == []


def test_what_is_not_whole_is_not_taken(run: paths.Path, straight: Path, storage: FakeGcs):
    storage.put("corpus", "run/checkpoints/7/params/manifest.ocdbt", b"being written")
    found = locate(run)
    assert found.params == run / "checkpoints" / "6" / "params"
    with Checkpoints(run) as checkpoints:  # which clears away what is not whole
        assert checkpoints.steps == [4, 6]
    expected = parameters_of(load_model(straight))
    for path, leaf in parameters_of(load_model(run)).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert not (run / "checkpoints" / "7").exists()


def test_a_damaged_checkpoint_is_put_aside(run: paths.Path, config: RunConfig, storage: FakeGcs):
    copy = to_path("gs://corpus/copy")
    for (bucket, name), stored in list(storage.objects.items()):
        if bucket == "corpus" and name.startswith("run/"):
            storage.put(bucket, name.replace("run/", "copy/", 1), stored.content)
    storage.put("corpus", "copy/checkpoints/6/state/manifest.ocdbt", b"damaged")
    found = restored(copy, config)
    assert int(found[0].step) == 4
    assert (copy / "damaged_checkpoints" / "6" / "params").is_dir()
    assert not (copy / "checkpoints" / "6").exists()


def test_a_manifest_and_its_shards(corpus: Path, data: str, config: RunConfig):
    manifest = Manifest(f"{data}/clips.jsonl")
    first = manifest[0].clip
    assert first is not None and first.audio == f"{data}/0.wav"
    local = Manifest(corpus / "clips.jsonl")
    assert prepare(f"{data}/clips.jsonl", f"{data}/shards", 3)[0].path == to_path(data) / "shards" / (
        "shard-00000-of-00003.arrayrecord"
    )
    assert [report.already_there for report in prepare(f"{data}/clips.jsonl", f"{data}/shards", 3)] == [True] * 3
    for examples in (manifest, Shards(f"{data}/shards")):
        assert len(examples) == len(local)
        for found, expected in zip(examples, local, strict=True):
            assert found.text == expected.text and found.clip is not None and expected.clip is not None
            np.testing.assert_array_equal(found.clip.wave(), expected.clip.wave())
    with pytest.raises(MossAudioError, match=r"gs://.*/shards/shards.json: expected shards of this manifest"):
        prepare(f"{data}/texts.jsonl", f"{data}/shards", 3)


def test_evaluation(run: paths.Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    out = "gs://corpus/results"
    files = ["--json", f"{out}/all.json", "--predictions", f"{out}/each.jsonl"]
    options = ["--data", f"{data}/clips.jsonl", "--limit", "2", "--max-new-tokens", "4", "--scenes", "1"]
    arguments = ["evaluate", str(run), *options, *files, "--plot", f"{out}/timelines.png"]
    monkeypatch.setattr(sys, "argv", ["moss-audio-train", *arguments, "--scenes.events", "1", "1"])
    main()
    assert "transcribe" in capsys.readouterr().out
    results = json.loads((to_path(out) / "all.json").read_text())
    assert results["checkpoint"] == str(run) and results["config"]["data"] == [f"{data}/clips.jsonl"]
    assert len((to_path(out) / "each.jsonl").read_text().splitlines()) == results["items"]
