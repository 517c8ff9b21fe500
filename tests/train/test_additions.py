"""Data that join a run at an example of it: at its next epoch, at once, and where they can't."""

import json
import re
import shutil
from pathlib import Path

import pytest

from moss_audio_jax.errors import MossAudioError
from tests.train.test_resume import changed
from tests.train.training_runs import STEPS, assert_same_end, one_device, restored, until
from train.config import RunConfig
from train.data import ExampleOrder
from train.data.places import first_unread, place
from train.loop import train
from train.running.additions import data_state, with_begins
from train.running.config import ResumeConfig
from train.running.config_file import stored_config
from train.running.resume import Record

ALLOWED = ResumeConfig(allow_change=("mixture.text",))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("more") / "more.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"more of {number}"}) for number in range(30)))
    return str(path)


def with_more(config: RunConfig, more: str, *begins: int | str) -> RunConfig:
    return changed(config, mixture__text__paths=(*config.mixture.text.paths, more), mixture__text__begins=begins)


def test_data_join_a_run_at_its_next_epoch_and_the_command_is_repeated(
    copy: Path, straight: Path, config: RunConfig, more: str, tmp_path: Path, capfd: pytest.CaptureFixture
):
    joins = with_more(until(config, STEPS + 1), more, 0, "next-epoch")
    with pytest.raises(MossAudioError, match=r"give --allow-change mixture\.text\.begins mixture\.text\.paths"):
        train(joins, copy, mesh=one_device())
    # 1. It resumes at its place, and the example is in config.json.
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    assert train(joins, copy, mesh=one_device(), resume=ALLOWED).step == STEPS + 1
    begin = stored_config(copy).mixture.text.begins[1]
    state = data_state(straight, 4)
    order = ExampleOrder(config.mixture.groups(0), 0)
    assert begin == order.end_of_epoch("text", first_unread(state)) > place(state) + 5
    assert json.loads((copy / "config.json").read_text())["mixture"]["text"]["begins"] == [0, begin]
    assert f"text (8 examples, 30 examples from example {begin} on)" in capfd.readouterr().err
    assert Record.read(copy).history[-1]["changes"]["mixture.text.begins"] == [[], [0, begin]]
    # 2. The same command, started again, needs no permission, and neither does one without the begins.
    joins = until(joins, STEPS + 2)
    assert train(joins, copy, mesh=one_device()).step == STEPS + 2
    assert stored_config(copy).mixture.text.begins == (0, begin)
    stored = stored_config(copy)
    assert with_begins(stored, copy, ResumeConfig()) == stored
    # 3. It ends as if the data had been planned from the beginning.
    planned = with_more(until(config, STEPS + 2), more, 0, begin)
    assert train(planned, tmp_path / "planned", mesh=one_device()).step == STEPS + 2
    assert_same_end(copy, tmp_path / "planned", config)
    assert place(restored(copy, config)[1]) > begin


def test_begins_of_a_new_run_and_of_a_branch(straight: Path, config: RunConfig, more: str, tmp_path: Path):
    order, state = ExampleOrder(config.mixture.groups(0), 0), data_state(straight, 4)

    def begins(config: RunConfig, out: Path = tmp_path, **resume) -> tuple:
        return with_begins(config, out, ResumeConfig(**resume)).mixture.text.begins

    joins, at_once = with_more(config, more, 0, "next-epoch"), with_more(config, more, 0, "now")
    first = order.end_of_epoch("text", 0)
    assert begins(joins) == (0, first) and begins(at_once) == begins(with_more(config, more, 0, 0)) == ()
    assert begins(at_once, branch=f"{straight}@4") == (0, place(state))
    assert begins(at_once, straight, from_step=4) == (0, place(state)) < begins(at_once, straight)
    assert begins(joins, branch=f"{straight}@4", branch_optimizer=False) == (0, first)
    with pytest.raises(MossAudioError, match=r"begins next-epoch: .*texts.jsonl leaves the mixture before"):
        begins(changed(joins, mixture__text__end=first - 1))
    with pytest.raises(MossAudioError, match="no data are read from the beginning on"):
        begins(changed(with_more(config, more, "now", "now"), mixture__speech__paths=()))
    new = changed(config.mixture, named={"new": changed(config.mixture.text, paths=(more,), begins=("now",))})
    found = with_begins(changed(config, mixture=new), straight, ResumeConfig())
    assert found.mixture.named["new"].begins == (place(data_state(straight, STEPS)),)


@pytest.mark.parametrize(
    ("fields", "begins", "message"),
    [
        (
            {},
            (0, 3),
            r"mixture\.text\.begins 3: .*more\.jsonl can't join there, since the run has read on to example 33",
        ),
        ({}, (0,), r"mixture\.text\.begins must be one for each of its 2 paths, not 1"),
        ({}, (0, -1), r"mixture\.text\.begins must be 0 or more, not -1"),
        (
            {"mixture__speech__share": 1.0},
            (0, "now"),
            r"can't join, since the data .* not those of the run \(source .*",
        ),
    ],
)
def test_data_that_can_t_join_change_nothing(
    copy: Path, config: RunConfig, more: str, fields: dict, begins: tuple, message: str
):
    before = (copy / "config.json").read_bytes()
    with pytest.raises(MossAudioError, match=message):
        train(changed(with_more(config, more, *begins), **fields), copy, mesh=one_device(), resume=ALLOWED)
    assert (copy / "config.json").read_bytes() == before


def test_a_checkpoint_that_is_not_there(straight: Path, config: RunConfig, more: str):
    with pytest.raises(MossAudioError, match=re.escape(f"{straight} has no checkpoint of step 3")):
        with_begins(with_more(config, more, 0, "now"), straight, ResumeConfig(from_step=3))
