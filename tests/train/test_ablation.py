"""The ablation: arms that differ in one thing, the choice of learning rates, and a comparison that resumes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moss_audio_jax import MossAudioError, load_processor
from moss_audio_jax.weights.parameters import abstract_parameters
from train import ablation
from train.ablation import LATE_START, LONGER, TRAINED, VALIDATION, Run, ablate, questions, run_config, table
from train.ablation_config import ARMS, AblationConfig
from train.config import model_config
from train.data.config import SceneConfig
from train.evaluation.config import AnswerConfig

SCENES = SceneConfig(seconds=(2.0, 3.0), events=(1, 2), tasks=("timeline", "start", "loudness"))
SMALL = AblationConfig(
    arms=("both", "neither"),
    steps=2,
    seeds=2,
    learning_rates=(1e-3, 2e-3),
    scenes=SCENES,
    easy_scenes=SCENES,
    easy_examples=8,
    questions=3,
    answers=AnswerConfig(batch_size=9, max_new_tokens=4),
)


def test_arms_differ_in_what_they_are_named_after():
    configs = {arm: run_config(Run(arm, 1e-3, 0), AblationConfig()) for arm in ARMS}
    models = {arm: model_config(config.model) for arm, config in configs.items()}
    assert {arm: (model.processor.enable_time_marker, model.num_deepstack) for arm, model in models.items()} == {
        "both": (True, 2),
        "no markers": (False, 2),
        "no DeepStack": (True, 0),
        "neither": (False, 0),
    }
    shared = [dataclasses.replace(config, model=configs["both"].model) for config in configs.values()]
    assert all(config == configs["both"] for config in shared)
    without = set(abstract_parameters(models["neither"], np.float32))
    missing = set(abstract_parameters(models["both"], np.float32)) - without
    assert missing and all(path.startswith("deepstack_audio_merger_list.") for path in missing)


def test_questions_are_as_many_of_every_task_and_late_starts_are_their_own():
    config = dataclasses.replace(SMALL, questions=20)
    items = questions(config)
    counts = {
        source: [item.task for item in items if item.source == source] for source in (VALIDATION, TRAINED, LONGER)
    }
    for source in (VALIDATION, TRAINED):
        assert {task: counts[source].count(task) for task in SCENES.tasks} == dict.fromkeys(SCENES.tasks, 20)
    assert counts[LONGER].count("start") + counts[LONGER].count(LATE_START) == 20
    for item in items:
        seconds = len(item.clips[0].wave()) / 16000
        assert seconds == 6 if item.source == LONGER else 2 <= seconds <= 3
        if item.task in ("start", LATE_START):
            assert (float(item.reference) > 3) == (item.task == LATE_START)
    assert 5 < counts[LONGER].count(LATE_START) < 15
    questions_of = {source: [item.reference for item in items if item.source == source] for source in counts}
    assert questions_of[VALIDATION] != questions_of[TRAINED]


def test_the_better_learning_rate_of_each_arm_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With made-up measures: the rates' validation scores alone choose."""

    def fake(run: Run, config: AblationConfig, items, directory: Path) -> dict:
        right = {("both", 1e-3): 0.5, ("both", 2e-3): 0.9, ("neither", 1e-3): 0.4, ("neither", 2e-3): 0.2}
        validation = right[run.arm, run.learning_rate]
        tests = 0.1 * run.seed + (0.5 if run.arm == "both" else 0.3)
        return {
            source: {"timeline": {"f1": score}, "start": {"share_within": score}, "loudness": {"accuracy": score}}
            for source, score in ((VALIDATION, validation), (TRAINED, tests), (LONGER, tests / 2))
        }

    monkeypatch.setattr(ablation, "_measures", fake)
    assert ablate(SMALL, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert results["learning_rates"] == {"both": 2e-3, "neither": 1e-3}
    assert sorted((run["arm"], run["learning_rate"], run["seed"]) for run in results["runs"]) == [
        ("both", 1e-3, 0),
        ("both", 2e-3, 0),
        ("both", 2e-3, 1),
        ("neither", 1e-3, 0),
        ("neither", 1e-3, 1),
        ("neither", 2e-3, 0),
    ]
    lines = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert lines[0] == "| scenes | task | both | neither |"
    assert lines[2] == "| as in training | timeline | 55.0 (50-60) | 35.0 (30-40) |"
    assert "| longer | mean | 27.5 (25-30) | 17.5 (15-20) |" in lines
    assert lines[-1] == "|  | learning rate | 0.002 | 0.001 |"
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_ablation_in_small_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Through the real loop and evaluation; stopped before the last run, and begun again."""
    out = tmp_path / "out"
    config = dataclasses.replace(SMALL, learning_rates=(1e-3,), seeds=1)
    train, trained = ablation.train, []

    def stopped_at_second(run, directory):
        trained.append(directory.name)
        return train(run, directory) if len(trained) != 2 else ablation_outcome(preempted=True)

    monkeypatch.setattr(ablation, "train", stopped_at_second)
    assert not ablate(config, out)
    assert not (out / "ablation.md").exists()
    assert ablate(config, out)
    assert trained == ["both-0.001-seed_0", "neither-0.001-seed_0", "neither-0.001-seed_0"]
    assert not load_processor(out / "runs" / "neither-0.001-seed_0").config.processor.enable_time_marker
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    assert [set(run["scores"][TRAINED]) for run in runs] == [{"timeline", "start", "loudness"}] * 2
    assert ablate(config, out) and len(trained) == 3  # nothing is left to train
    with pytest.raises(MossAudioError, match="steps is 3 and was 2"):
        ablate(dataclasses.replace(config, steps=3), out)


def ablation_outcome(*, preempted: bool):
    from train.loop import Outcome

    return Outcome(1, preempted)


def test_values_are_checked():
    with pytest.raises(MossAudioError, match="arms must be some of both, no markers, no DeepStack, neither, not "):
        AblationConfig(arms=())
    with pytest.raises(MossAudioError, match="seeds must be 1 or more, not 0"):
        AblationConfig(seeds=0)
    with pytest.raises(MossAudioError, match="longer must be above 1, not 1"):
        AblationConfig(longer=1.0)
    assert table({"both": [{TRAINED: {"start": 1.0}, LONGER: {"start": 0.0}}]}, {"both": Run("both", 1e-3, 0)})
