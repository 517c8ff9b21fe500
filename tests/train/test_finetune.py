"""docs/finetune.md in small: its commands, as they stand but for sizes, and what they leave behind."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xla_flags import QUICK

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/finetune.md").read_text("utf-8").partition("## With a released model")[0]
# Option -> its value here.
SMALL = {
    "--count": "8",
    "--scenes": "2",
    "--optimizer.total-steps": "12",
    "--optimizer.warmup-steps": "1",
    "--validation.every": "6",
}
FIRST = "moss-audio-train run --recipe time_events"
PACKAGES = {"moss-audio-train": "train", "moss-audio-convert": "convert", "moss-audio": "moss_audio_jax"}
ALSO = {FIRST: ["--steps", "4", "--checkpoint-every", "4"]}  # its schedule is the recipe's

# All commands in one process, which imports and compiles once.
DRIVER = """
import importlib, json, sys
for command in json.load(sys.stdin):
    package, sys.argv = command[0], command[1:]
    print("$", *sys.argv, flush=True)
    importlib.import_module(f"{package}.__main__").main()
"""


def documented_commands() -> list[list[str]]:
    """Those of the page's shell blocks, as lists of arguments, at the sizes of this test."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    for command in commands:
        for place, option in enumerate(command[:-1]):
            command[place + 1] = SMALL.get(option, command[place + 1])
        command += [more for start, options in ALSO.items() if command[:4] == start.split() for more in options]
    return commands


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetune")
    commands = documented_commands()
    # Of 8 clips the first is named 0.wav.
    shown = json.dumps([[PACKAGES[command[0]], *command] for command in commands])
    shown = shown.replace("work/test/00.wav", "work/test/0.wav")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=directory,
        input=shown,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK},  # one device
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (directory / "output.txt").write_text(done.stdout)
    return directory


def test_the_page_has_commands_of_every_kind():
    commands = [" ".join(command[:2]) for command in documented_commands()]
    training = {f"moss-audio-train {command}" for command in ("run", "scenes", "check", "evaluate")}
    assert training | {"moss-audio-convert to-hf", "moss-audio-convert to-peft", "moss-audio generate"} <= {*commands}


def test_the_fine_tune_learns(work: Path):
    scores = [json.loads(line) for line in (work / "work/siren/scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in scores] == [6, 12]
    metrics = [json.loads(line) for line in (work / "work/siren/metrics.jsonl").read_text().splitlines()]
    assert scores[-1]["eval/loss"] < scores[0]["eval/loss"] < metrics[0]["loss"]
    for name in ("before-new", "before-old", "after-new", "after-old"):
        measures = json.loads((work / f"work/{name}.json").read_text())["measures"]
        (tasks,) = measures.values()
        assert all("f1" in measured for measured in tasks.values())
    assert (work / "work/after-new.png").stat().st_size > 10_000


def test_the_adapter_and_the_merged_model_answer_alike(work: Path):
    shown = (work / "output.txt").read_text().split("$ moss-audio generate")[1:]
    answers = [text.partition("\n")[2] for text in shown]
    assert len(answers) == 2 and answers[0] == answers[1] and answers[0].strip()


def test_peft_takes_the_adapter(work: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch", reason="PEFT needs PyTorch")
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(work)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(code, names)
    held = peft.get_peft_model_state_dict(names["model"])
    assert any("audio_encoder" in name and "lora_B" in name and tensor.any() for name, tensor in held.items())
