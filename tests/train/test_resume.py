"""Changes when a run resumes, their record, and the step where it resumes."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

import train.__main__ as command_line
from moss_audio_jax import LoraConfig, MossAudioError
from tests.train.training_runs import STEPS, assert_same_end, lines, one_device, restored, until
from train.config import ModelSource, OptimizerConfig, RunConfig, ValidationConfig, with_paths
from train.loop import train
from train.recipes import RECIPES, read_recipe
from train.running.config import ResumeConfig
from train.running.config_file import stored_config
from train.running.directory import is_begun
from train.running.resume import RULES, Record, rule_of, write_or_check_config

ROOT = Path(__file__).parents[2]


def changed(config: Any, **fields: Any) -> Any:
    """With other fields, nested ones by `__`."""
    for name, value in fields.items():
        first, _, rest = name.partition("__")
        value = changed(getattr(config, first), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: value})
    return config


def options(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_option_has_a_rule_and_the_documented_one():
    named = set(options(RECIPES["finetune_lora"])) | set(options(RECIPES["pretrain_stage2"]))
    patterns = [pattern for pattern, _ in RULES]
    for name in named:
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), name) for pattern in patterns), name
    text = (ROOT / "docs" / "training.md").read_text()
    rows = dict(re.findall(r"^\| (free|asked|never) \| (.*) \|$", text, re.MULTILINE))
    for pattern, rule in RULES:
        assert f"`{pattern}`" in rows[rule], f"docs/training.md: {pattern} is {rule}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_is_read_back_as_it_was(name: str, tmp_path: Path):
    full = changed(RECIPES[name], mixture__speech__paths=("a", "b"), loop__patience=None)
    write_or_check_config(full, tmp_path, begun=False)
    assert stored_config(tmp_path) == full


def test_a_run_with_old_names_of_options_resumes(tmp_path: Path):
    """Its config.json has them; it resumes, gives a new run its defaults, and is compared under the new names."""
    validation = ValidationConfig(every=7, data=("a",), max_new_tokens=9, batch_size=3)
    recipe = changed(RECIPES["time_events"], step__audio_label_weight=0.25)
    recipe = dataclasses.replace(recipe, validation=validation)
    write_or_check_config(recipe, tmp_path, begun=False)
    file = tmp_path / "config.json"
    old = json.loads(file.read_text())
    of_validation = old.pop("validation")
    names = {"every": "every", "data": "data", "objectives": "objectives", "count": "count"}
    names |= {"max_new_tokens": "tokens", "batch_size": "batch"}
    old["loop"] |= {f"evaluate_{before}": of_validation[now] for now, before in names.items()}
    old["loop"]["show_samples"] = of_validation["show_samples"]
    old["step"]["heard_weight"] = old["step"].pop("audio_label_weight")
    file.write_text(json.dumps(old))
    assert stored_config(tmp_path) == recipe
    assert read_recipe(str(file)) == dataclasses.replace(recipe, recipe=str(file))
    louder = changed(recipe, step__audio_label_weight=0.5)
    with pytest.raises(MossAudioError, match=r"step\.audio_label_weight is 0\.5 and was 0\.25"):
        write_or_check_config(louder, tmp_path, begun=True)
    write_or_check_config(louder, tmp_path, begun=True, resume=ResumeConfig(allow_change=("step.heard_weight",)))
    written = json.loads(file.read_text())
    assert written["history"][-1]["changes"] == {"step.audio_label_weight": [0.25, 0.5]}
    assert written["validation"]["every"] == 7 and "evaluate_every" not in written["loop"]


def test_options_that_came_and_went(tmp_path: Path, capfd):
    recipe = RECIPES["finetune_lora"]
    write_or_check_config(recipe, tmp_path, begun=False)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    written["step"]["old"], written["gone"] = 3, {"a": 1}
    del written["lora"]["rslora"], written["optimizer"]["b2"], written["starts"], written["history"]
    file.write_text(json.dumps(written))
    assert stored_config(tmp_path) == recipe
    record = write_or_check_config(recipe, tmp_path, begun=True, step=7)
    assert "step.old, gone.a are ignored: these options no longer exist" in capfd.readouterr().err
    assert record.starts == 2 and [entry["step"] for entry in record.history] == [0, 7]


def test_what_may_change_is_recorded_and_what_may_not_is_refused(tmp_path: Path):
    recipe = RECIPES["finetune"]
    write_or_check_config(recipe, tmp_path, begun=False)
    faster = changed(recipe, loop__steps=900, optimizer__learning_rate=1e-4, mixture__conversations__paths=("b",))
    with pytest.raises(
        MossAudioError, match=r"give --allow-change mixture.conversations.paths optimizer.learning_rate"
    ):
        write_or_check_config(faster, tmp_path, begun=True, step=5)
    assert Record.read(tmp_path).starts == 1
    allowed = ResumeConfig(allow_change=("mixture", "optimizer.learning-rate"))
    record = write_or_check_config(faster, tmp_path, begun=True, step=5, resume=allowed)
    assert record.history[-1]["changes"] == {
        "loop.steps": [None, 900],
        "mixture.conversations.paths": [[], ["b"]],
        "optimizer.learning_rate": [2e-5, 1e-4],
    }
    assert record.has_other_data_since(5) and record.has_other_data_since(4) and not record.has_other_data_since(6)
    record = write_or_check_config(
        faster, tmp_path, begun=True, step=6, resume=allowed
    )  # the same command, started again
    assert record == Record.read(tmp_path) and record.starts == 3
    assert "changes" not in record.history[-1] and "versions" not in record.history[-1]
    assert {"python", "jax", "jaxlib", "numpy", "orbax-checkpoint"} <= record.versions.keys()

    thawed = changed(faster, optimizer__freeze=("lm_head.*",))
    with pytest.raises(MossAudioError, match=r"optimizer.freeze can't change"):
        write_or_check_config(thawed, tmp_path, begun=True, resume=ResumeConfig(allow_change=("optimizer",)))
    for name, problem in (("optimizer.freeze", "it can't change in a run"), ("optimizer.rate", "no such option")):
        with pytest.raises(MossAudioError, match=problem):
            write_or_check_config(faster, tmp_path, begun=True, resume=ResumeConfig(allow_change=(name,)))


def test_a_base_of_an_adapter_can_t_change_and_a_first_checkpoint_can():
    full = RECIPES["finetune"]
    assert rule_of("model.checkpoint", full) == "free"
    assert rule_of("model.checkpoint", dataclasses.replace(full, lora=LoraConfig())) == "never"


def test_a_wsd_schedule_is_prolonged_before_it_decays(tmp_path: Path):
    wsd = OptimizerConfig(schedule="wsd", total_steps=1000, decay_steps=200)
    recipe = changed(RECIPES["finetune"], optimizer=wsd)
    longer = changed(recipe, optimizer__total_steps=2000, optimizer__decay_steps=400)
    write_or_check_config(recipe, tmp_path, begun=False)
    with pytest.raises(MossAudioError, match=r"total_steps is 2000 and was 1000"):
        write_or_check_config(longer, tmp_path, begun=True, step=801)
    write_or_check_config(longer, tmp_path, begun=True, step=800)
    with pytest.raises(MossAudioError, match=r"total_steps is 1100 and was 2000"):
        write_or_check_config(
            changed(longer, optimizer__total_steps=1100), tmp_path, begun=True, step=800
        )  # would decay already


def test_short_options_are_compared_with_the_run_they_resume():
    begun = changed(RECIPES["finetune"], model__checkpoint="a", mixture__conversations__paths=("x",))
    assert with_paths(begun, "a", ("x",), default=begun) == begun == with_paths(begun, default=begun)
    assert with_paths(begun, "b", ("y", "z"), default=begun).mixture.conversations.paths == ("y", "z")
    with pytest.raises(MossAudioError, match=r"--init b and --model.checkpoint c name different things"):
        with_paths(changed(begun, model__checkpoint="c"), "b", default=begun)


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, ResumeConfig]:
    """Configuration that a command line trains."""
    taken = []
    monkeypatch.setattr(command_line, "_train", lambda *trained: taken.append((trained[0], trained[2])))
    tyro.cli(command_line.run_command(arguments), args=arguments)
    return taken[0]


def test_a_resumed_command_keeps_what_the_run_was_begun_with(straight: Path, monkeypatch, config: RunConfig):
    found, _ = parsed(["--out", str(straight)], monkeypatch)
    assert found == config
    found, _ = parsed(["--out", str(straight), "--seed", "4", "--recipe", "finetune"], monkeypatch)
    assert found == changed(config, seed=4)
    found, resume = parsed(["--out", "nowhere", "--branch", f"{straight}@4", "--steps", "9"], monkeypatch)
    assert found == until(config, 9) and resume.origin == (straight, 4)
    with pytest.raises(MossAudioError, match="--recipe must be given to begin a run"):
        parsed(["--out", "nowhere"], monkeypatch)


def test_another_recipe_than_the_run_was_begun_with_is_refused(tmp_path: Path, straight: Path, monkeypatch):
    run = shutil.copytree(straight, tmp_path / "run")
    written = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(written | {"recipe": "finetune"}))
    with pytest.raises(
        MossAudioError, match="--recipe must be finetune, with which the run was begun, not finetune_lora"
    ):
        parsed(["--out", str(run), "--recipe", "finetune_lora"], monkeypatch)


def test_goes_back_to_an_earlier_checkpoint_once_and_without_the_first_one(
    copy: Path,
    straight: Path,
    config: RunConfig,
):
    """The checkpoint that the run began with is gone: nothing of it is needed any more."""
    moved = changed(config, model=ModelSource(checkpoint="gone"))
    back = ResumeConfig(from_step=4)
    assert train(moved, copy, mesh=one_device(), resume=back).step == STEPS
    assert (copy / "later_checkpoints" / "6" / "params").is_dir()
    assert_same_end(copy, straight, config)
    assert train(until(moved, 7), copy, mesh=one_device(), resume=back).step == 7  # the same command, started again
    assert sorted(path.name for path in (copy / "later_checkpoints").iterdir()) == ["6", "6.txt"]
    assert [line["restarts"] for line in lines(copy)] == [0] * 4 + [1] * 2 + [2]
    with pytest.raises(MossAudioError, match="no checkpoint of step 3: there are 6, 7"):
        train(moved, copy, mesh=one_device(), resume=ResumeConfig(from_step=3))


def test_passes_over_steps_and_keeps_to_it(copy: Path, straight: Path, config: RunConfig):
    with pytest.raises(MossAudioError, match=r"--skip-steps 5:5: the run resumes after step 6.*before step 5"):
        train(config, copy, mesh=one_device(), resume=ResumeConfig(skip_steps="5:5"))
    skip = ResumeConfig(from_step=4, skip_steps="5:5")
    assert train(until(config, 5), copy, mesh=one_device(), resume=skip).step == 5
    (state, data), (before, _) = restored(copy, config), restored(straight, config)
    assert int(state.step) == data["batches"] == 5 and int(before.step) == STEPS
    shutil.rmtree(copy / "checkpoints" / "5")
    assert train(config, copy, mesh=one_device()).step == STEPS  # not asked for again
    assert [line["step"] for line in lines(copy)] == [1, 2, 3, 4, 6]
    last, expected = lines(copy)[-1], lines(straight)[-1]
    assert last["tokens"] == expected["tokens"] and last["learning_rate"] == expected["learning_rate"]
    assert last["loss"] != expected["loss"]


def test_a_branch_resumes_another_run(straight: Path, tmp_path: Path, config: RunConfig):
    before = sorted(path for path in straight.rglob("*"))
    same, other = tmp_path / "same", tmp_path / "other"
    branch = ResumeConfig(branch=f"{straight}@4")
    assert train(config, same, mesh=one_device(), resume=branch).step == STEPS
    assert restored(same, config)[1] == restored(straight, config)[1]
    assert [line["step"] for line in lines(same)] == [5, 6]
    (state, _), (expected, _) = restored(same, config), restored(straight, config)
    assert all((state.trainable[path] == leaf).all() for path, leaf in expected.trainable.items())
    assert Record.read(same).history[0]["branch"] == f"{straight}@4"

    fresh = dataclasses.replace(branch, branch_optimizer=False)
    faster = changed(until(config, 1), optimizer__learning_rate=1e-2)
    assert train(faster, other, mesh=one_device(), resume=fresh).step == 1
    assert [line["step"] for line in lines(other)] == [1]
    assert lines(other)[0]["tokens"] == lines(straight)[0]["tokens"]
    assert Record.read(other).history[0]["changes"]["optimizer.learning_rate"] == [1e-3, 1e-2]
    assert sorted(path for path in straight.rglob("*")) == before
    with pytest.raises(MossAudioError, match=r"no checkpoint of step 3, only of 4, 6"):
        train(config, tmp_path / "third", mesh=one_device(), resume=ResumeConfig(branch=f"{straight}@3"))
    with pytest.raises(MossAudioError, match=r"holds a run that was begun from .*@4: name a new --out"):
        train(config, same, mesh=one_device(), resume=ResumeConfig(branch=f"{straight}@6"))
    with pytest.raises(MossAudioError, match=r"can't have a branch of another model: optimizer.freeze"):
        thawed = changed(config, optimizer__freeze=())
        train(thawed, tmp_path / "third", mesh=one_device(), resume=branch)


def test_checkpoints_by_time_and_a_profile_on_request(tmp_path: Path, config: RunConfig):
    out = tmp_path / "run"
    out.mkdir()
    (out / "profile_now").touch()
    often = until(config, 3, checkpoint_every=100, checkpoint_minutes=1e-6, keep_last=9)
    assert train(often, out, mesh=one_device()).step == 3
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["1", "2", "3"]
    assert list(out.glob("profile/**/*.xplane.pb")) and not (out / "profile_now").exists()
    before = [line["time"] for line in lines(out)]
    assert before == sorted(before) and all(line["tokens_per_second"] > 0 for line in lines(out))


def test_other_data_begin_at_their_beginning(copy: Path, straight: Path, config: RunConfig):
    spoken = changed(until(config, STEPS + 1), mixture__text__paths=())
    with pytest.raises(MossAudioError, match=r"give --allow-change mixture.text.paths"):
        train(spoken, copy, mesh=one_device())
    allow = ResumeConfig(allow_change=("mixture.text.paths",))
    assert train(spoken, copy, mesh=one_device(), resume=allow).step == STEPS + 1
    shutil.rmtree(copy / "checkpoints" / str(STEPS + 1))  # as if it had been killed before it saved
    assert train(spoken, copy, mesh=one_device(), resume=allow).step == STEPS + 1
    assert restored(copy, config)[1]["batches"] == STEPS + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip_steps": "5"}, "FIRST:LAST"),
        ({"skip_steps": "7:5"}, "FIRST:LAST"),
        ({"branch": "runs/a"}, "RUN@STEP"),
        ({"from_step": 0}, "1 or more"),
        ({"from_step": 1, "branch": "a@1"}, "give one of them"),
    ],
)
def test_what_can_t_be_read_is_refused(fields: dict, message: str):
    with pytest.raises(MossAudioError, match=message):
        ResumeConfig(**fields)


def test_a_run_without_a_checkpoint_is_not_begun(tmp_path: Path):
    write_or_check_config(RECIPES["finetune"], tmp_path, begun=False)
    assert not is_begun(tmp_path)
