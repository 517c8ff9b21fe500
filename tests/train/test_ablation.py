"""The ablation: arms that differ in one thing, the choice of learning rates, paired differences, and resuming."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moss_audio_jax import MossAudioError, load_processor
from moss_audio_jax.weights.parameters import abstract_parameters
from train import ablation
from train.ablation import Run, ablate, learning_curve, questions, run_config
from train.ablation_config import ARMS, FAMILIES, FAMILY_NAMES, AblationConfig
from train.ablation_report import Result, difference_table, mean_interval, score_table, speed_table
from train.config import model_config
from train.data.config import SceneConfig
from train.evaluation.config import AnswerConfig

SCENES = SceneConfig(seconds=(2.0, 3.0), events=(1, 2), tasks=("timeline", "start", "loudness"))
SMALL = AblationConfig(
    arms=("both", "no markers"),
    steps=2,
    seeds=2,
    learning_rates=(1e-3, 2e-3),
    scenes=SCENES,
    easy_scenes=SCENES,
    test_scenes=SCENES,
    bins=((2.0, 3.0), (3.0, 6.0)),
    easy_examples=8,
    tokens=208,
    chunks=2,
    validations=1,
    validation_questions=4,
    questions=3,
    answers=AnswerConfig(batch_size=9, max_new_tokens=4),
)


def test_arms_differ_in_what_they_are_named_after():
    configs = {arm: run_config(Run(arm, 1e-3, 0), AblationConfig()) for arm in ARMS}
    models = {arm: model_config(config.model) for arm, config in configs.items()}
    for arm, of_arm in ARMS.items():
        model = models[arm]
        assert model.processor.enable_time_marker == ("no markers" not in arm)
        assert (model.num_deepstack == 0) == ("no DeepStack" in arm)
        assert (model.audio_config.encoder_layers == 6) == ("deep encoder" in arm)
        assert configs[arm].data.label_times == ("timed labels" in arm)
        assert (configs[arm].step.audio_label_weight == 0) == ("no labels" in arm)
        whole = of_arm.without
        if whole is None:
            continue
        # One thing less than the arm that it is compared with, in the configuration and in the parameters.
        assert dataclasses.replace(configs[arm], model=configs[whole].model) == configs[whole]
        names = {arm: set(abstract_parameters(models[arm], np.float32)) for arm in (arm, whole)}
        missing = names[whole] - names[arm]
        assert all(path.startswith("deepstack_audio_merger_list.") for path in missing)
        assert bool(missing) == ("no DeepStack" in arm)


def test_families_test_what_they_train():
    assert tuple(FAMILIES) == FAMILY_NAMES
    for name, family in FAMILIES.items():
        assert family.family == name and set(family.test_scenes.tasks) == set(family.scenes.tasks)
        assert all(ARMS[arm].without in (None, *family.arms) for arm in family.arms)
        config = run_config(Run(family.arms[0], 1e-3, 0), family)
        assert config.mixture.scenes.scenes == family.scenes and config.data.tokens == family.tokens
    digits = FAMILIES["digits"]
    (tested,) = digits.test_scenes.clips_only
    assert tested in digits.scenes.clips_except and tested not in digits.test_scenes.clips_except


def test_questions_are_as_many_of_every_task_in_every_test():
    items = questions(dataclasses.replace(SMALL, questions=5))
    for source, (least, most) in (("2 to 3 s", (2, 3)), ("3 to 6 s", (3, 6))):
        of_test = [item for item in items if item.source == source]
        tasks = [item.task for item in of_test]
        assert {task: tasks.count(task) for task in SCENES.tasks} == dict.fromkeys(SCENES.tasks, 5)
        assert all(least <= len(item.clips[0].wave()) / 16000 <= most for item in of_test)


def result(score: float, curve: dict[int, float]) -> Result:
    return Result({"2 to 3 s": {"start": score}}, curve)


def test_tables_compare_seed_by_seed():
    both = {0: result(0.9, {10: 0.4, 20: 0.6, 30: 0.9}), 1: result(0.7, {10: 0.5, 20: 0.4, 30: 0.7})}
    without = {0: result(0.7, {10: 0.1, 20: 0.2, 30: 0.3}), 1: result(0.6, {10: 0.1, 20: 0.5, 30: 0.6})}
    arms = {"both": both, "no markers": without}
    assert score_table(arms).splitlines() == [
        "| test | task | both | no markers |",
        "| --- | --- | --- | --- |",
        "| 2 to 3 s | start | 80.0 (70-90) | 65.0 (60-70) |",
        "| while training | all | 58.3 (53-63) | 30.0 (20-40) |",
    ]
    # Differences 20 and 10: mean 15, t(0.975, 1) = 12.706, standard error 5.
    assert mean_interval([20, 10]) == pytest.approx((15, 15 - 63.53, 15 + 63.53), abs=0.01)
    assert difference_table(arms, [("both", "no markers")]).splitlines()[2:] == [
        "| 2 to 3 s | start | +15.0 [-48.5, +78.5] |",
        "| while training | all | +28.3 [-162.3, +218.9] |",
    ]
    assert difference_table({arm: {0: runs[0]} for arm, runs in arms.items()}, [("both", "no markers")]) == ""
    assert speed_table(arms).splitlines()[2:] == [
        "| both | 15 (2 of 2 runs) | 30 (1 of 2 runs) | 80.0 |",
        "| no markers | 20 (1 of 2 runs) | - (0 of 2 runs) | 45.0 |",
    ]


def test_the_better_learning_rate_of_each_arm_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With made-up results: the rates' last validation alone chooses."""

    def fake(run: Run, config: AblationConfig, items, directory: Path) -> Result:
        right = {("both", 1e-3): 0.5, ("both", 2e-3): 0.9, ("no markers", 1e-3): 0.4, ("no markers", 2e-3): 0.2}
        tests = 0.1 * run.seed + (0.5 if run.arm == "both" else 0.3)
        scores = {"2 to 3 s": dict.fromkeys(SCENES.tasks, tests), "3 to 6 s": dict.fromkeys(SCENES.tasks, tests / 2)}
        return Result(scores, {1: 0.95, 2: right[run.arm, run.learning_rate]})

    monkeypatch.setattr(ablation, "_result", fake)
    assert ablate(SMALL, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert results["learning_rates"] == {"both": 2e-3, "no markers": 1e-3}
    assert sorted((run["arm"], run["learning_rate"], run["seed"]) for run in results["runs"]) == [
        ("both", 1e-3, 0),
        ("both", 2e-3, 0),
        ("both", 2e-3, 1),
        ("no markers", 1e-3, 0),
        ("no markers", 1e-3, 1),
        ("no markers", 2e-3, 0),
    ]
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "| 2 to 3 s | timeline | 55.0 (50-60) | 35.0 (30-40) |" in text
    assert (
        "| test | task | both less no markers, 2 seeds |" in text
        and "| 3 to 6 s | start | +10.0 [+10.0, +10.0] |" in text
    )
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_ablation_in_small_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Through the real loop and evaluation; stopped before the last run, and begun again."""
    out = tmp_path / "out"
    config = dataclasses.replace(SMALL, learning_rates=(1e-3,), seeds=1)
    train, trained = ablation.train, []

    def stopped_at_second(run, directory):
        trained.append(directory.name)
        return train(run, directory) if len(trained) != 2 else ablation_outcome(preempted=True)

    monkeypatch.setattr(ablation, "train", stopped_at_second)
    assert not ablate(config, out)
    assert "| both |" in (out / "ablation.md").read_text()  # of the runs that are done
    assert ablate(config, out)
    said = capsys.readouterr().err
    assert "run 1 of 2: both-0.001-seed_0 is done" in said and "run 2 of 2: no_markers-0.001-seed_0, about" in said
    assert trained == ["both-0.001-seed_0", "no_markers-0.001-seed_0", "no_markers-0.001-seed_0"]
    assert not load_processor(out / "runs" / "no_markers-0.001-seed_0").config.processor.enable_time_marker
    assert list(learning_curve(out / "runs" / "both-0.001-seed_0")) == [2]
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    assert [set(run["scores"]["3 to 6 s"]) for run in runs] == [{"timeline", "start", "loudness"}] * 2
    assert ablate(config, out) and len(trained) == 3  # nothing is left to train
    with pytest.raises(MossAudioError, match="steps is 3 and was 2"):
        ablate(dataclasses.replace(config, steps=3), out)


def ablation_outcome(*, preempted: bool):
    from train.loop import Outcome

    return Outcome(1, preempted)


def test_values_are_checked():
    with pytest.raises(MossAudioError, match="arms must be some of both, no markers, no DeepStack, timed labels, "):
        AblationConfig(arms=())
    with pytest.raises(MossAudioError, match="seeds must be 1 or more, not 0"):
        AblationConfig(seeds=0)
    with pytest.raises(MossAudioError, match="family must be one of times, details, drums, voices, digits, not 'all'"):
        AblationConfig(family="all")
