"""docs/finetune.md in small: its commands, as they stand but for sizes, and what they leave behind."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/finetune.md").read_text("utf-8").partition("## With a released model")[0]
# Option -> its value here.
SMALL = {
    "--count": "8",
    "--scenes": "2",
    "--optimizer.total-steps": "12",
    "--optimizer.warmup-steps": "1",
    "--evaluate-every": "6",
    "--validation.every": "6",
}
FIRST = "python -m train run --recipe time_events"
ALSO = {FIRST: ["--steps", "4", "--checkpoint-every", "4"]}  # its schedule is the recipe's

# All commands in one process, which imports and compiles once.
DRIVER = """
import importlib, json, sys
for command in json.load(sys.stdin):
    assert command[:2] == ["python", "-m"], command
    sys.argv = command[2:]
    print("$", *sys.argv, flush=True)
    importlib.import_module(f"{command[2]}.__main__").main()
"""


def documented_commands() -> list[list[str]]:
    """Those of the page's shell blocks, as lists of arguments, at the sizes of this test."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    for command in commands:
        for place, option in enumerate(command[:-1]):
            command[place + 1] = SMALL.get(option, command[place + 1])
        command += [more for start, options in ALSO.items() if command[:6] == start.split() for more in options]
    return commands


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetune")
    commands = documented_commands()
    # Of 8 clips the first is named 0.wav.
    shown = json.dumps(commands).replace("work/test/00.wav", "work/test/0.wav")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=directory,
        input=shown,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (directory / "output.txt").write_text(done.stdout)
    return directory


def test_the_page_has_commands_of_every_kind():
    commands = [" ".join(command[2:4]) for command in documented_commands()]
    assert {"train run", "train scenes", "train check", "train evaluate", "convert to-hf", "convert to-peft"} <= {
        *commands
    }
    assert len(commands) == 14


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
    shown = (work / "output.txt").read_text().split("$ moss_audio_jax generate")[1:]
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
