"""The scripts in runs/, with stand-ins for the cloud, and the commands of docs/tpu.md, parsed by the real commands."""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.__main__
from moss_audio_jax import MossAudioConfig, MossAudioError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer
from train.__main__ import PREEMPTED
from train.config import RunConfig
from train.data import ExampleOrder, Group, SampleMaker, Source, TrainingData
from train.data.manifest import Example
from train.running.distributed import LOST

REPOSITORY = Path(__file__).parents[1]
RUNS = REPOSITORY / "runs"
SCRIPTS = sorted(RUNS.glob("*.sh"))
RENTED = {"PROJECT": "a-project", "ZONE": "us-west4-a", "BUCKET": "gs://a-bucket"}
ON_HOSTS = ("create", "status", "install", "run", "logs", "stop", "delete")
VERBS = {
    "tpu_vm.sh": ON_HOSTS,
    "tpu_mig.sh": ON_HOSTS,
    "tpu_queued.sh": ON_HOSTS,
    "tpu_multislice.sh": ON_HOSTS,
    "gke_xpk.sh": ("create", "run", "status", "logs", "stop", "delete"),
}
# Writes its name and arguments down, a line a call in one piece, and answers what the scripts ask for.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$(printf '%s\t' "${0##*/}" "$@")" >>"$CALLS"
case "${0##*/} $* " in
git*) tar -c -T /dev/null ;;
*" describe "*) echo ACTIVE ;;
*" list-instances "*) for number in {0..15}; do echo "host-$number"; done ;;
esac
"""
MODULES = {"train": "train.__main__", "convert": "convert.__main__", "moss_audio_jax": "moss_audio_jax.__main__"}
PROGRAMS = {"moss-audio-train": "train", "moss-audio-convert": "convert", "moss-audio": "moss_audio_jax"}
COMMAND = re.compile(rf"(?<![\w./-])(?:python -m ({'|'.join(MODULES)})|({'|'.join(PROGRAMS)})) ([^`]*)")


@pytest.fixture(scope="module")
def bin_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands that the scripts call, without what they do."""
    directory = tmp_path_factory.mktemp("bin")
    for name in ("gcloud", "xpk", "kubectl", "git"):
        (directory / name).write_text(STAND_IN)
        (directory / name).chmod(0o755)
    return directory


def called(
    script: str, *arguments: str, bin_directory: Path, tmp_path: Path, environment: dict[str, str] = RENTED
) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """A script's end, and what it called."""
    calls = tmp_path / "calls"
    calls.write_text("")
    path = f"{bin_directory}{os.pathsep}{os.environ['PATH']}"
    temporary = {"TMPDIR": str(tmp_path)}
    end = subprocess.run(
        ["bash", RUNS / script, *arguments],
        env=temporary | environment | {"PATH": path, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return end, [line.split("\t") for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_the_script(script):
    end = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (0, "")
    if script.name not in ("config.sh", "hosts.sh"):  # these are sourced by the others
        assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", VERBS)
def test_every_verb_runs_and_the_run_is_a_command_that_train_takes(script, bin_directory, tmp_path, monkeypatch):
    for verb in VERBS[script]:
        options = ("--steps", "7") if verb == "run" else ()
        end, calls = called(script, verb, *options, bin_directory=bin_directory, tmp_path=tmp_path)
        assert end.returncode == 0, (verb, end.stderr)
        assert calls, verb
        if verb == "run":
            runs = [run for call in calls for word in call for run in commands(word)]
            assert runs and all(run == runs[0] for run in runs), "hosts that run different commands never meet"
            assert not refusal(runs[0], monkeypatch)
            assert runs[0][-2:] == ["--steps", "7"]
            assert ("--distributed" in runs[0]) == (script != "tpu_vm.sh")
            slices = "2" if script == "tpu_multislice.sh" else "1"
            assert runs[0][runs[0].index("--mesh.replica") + 1] == slices


def test_every_script_that_rents_is_tried():
    assert {script.name for script in SCRIPTS} - VERBS.keys() == {
        "config.sh",
        "hosts.sh",
        "on_host.sh",
        "demo.sh",
        "reinforce.sh",
        "spoken_digits.sh",
    }


@pytest.mark.parametrize("script", VERBS)
@pytest.mark.parametrize("missing", RENTED)
def test_a_missing_variable_is_named(script, missing, bin_directory, tmp_path):
    environment = {name: value for name, value in RENTED.items() if name != missing}
    end, calls = called(script, "create", bin_directory=bin_directory, tmp_path=tmp_path, environment=environment)
    assert (end.returncode, calls) == (2, [])
    assert re.fullmatch(rf"error: {missing} is not set: export {missing}=\S+ \(.+\)\n", end.stderr)


def test_a_host_that_fails_fails_the_group(bin_directory, tmp_path):
    end, _ = called(
        "tpu_mig.sh",
        "logs",
        bin_directory=bin_directory,
        tmp_path=tmp_path,
        environment=RENTED | {"TOPOLOGY": "16x16"},  # of which the stand-in has a quarter of the hosts
    )
    assert end.returncode == 1
    assert "it failed on 0 of 16 hosts, and there should be 64" in end.stderr


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A copy of the repository as on a TPU VM, as far as on_host.sh needs it."""
    (tmp_path / "runs").mkdir()
    shutil.copy(RUNS / "on_host.sh", tmp_path / "runs")
    return tmp_path


def on_host(host: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "runs/on_host.sh", *arguments],
        cwd=host,
        env=os.environ | {"PAUSE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# Ends with the codes it is given, one after the other.
ENDS = 'n=$(cat count 2>/dev/null || echo 0); echo $((n + 1)) >count; shift "$n"; exit "$1"'


@pytest.mark.parametrize(
    ("codes", "long", "end", "times"),
    [
        ((PREEMPTED, LOST, 0), 600, 0, 3),  # interrupted: again, until it is done
        ((2, 0), 600, 2, 1),  # a mistake in the options is not worth repeating
        ((2, 0), 0, 2, 1),  # nor after a long time: bad data, a full disk
        ((1, 0), 600, 1, 1),  # nor is a crash at the start
        ((134, 0), 0, 0, 2),  # but one after a long time: JAX ends a process so whose peer is lost
        ((PREEMPTED,) * 9, 600, PREEMPTED, 5),  # without progress it is not repeated for ever
        ((PREEMPTED,) * 7 + (0,), 0, 0, 8),  # with progress it is
    ],
)
def test_a_host_runs_again_what_was_interrupted(host, codes, long, end, times):
    result = on_host(host, "run", "bash", "-c", ENDS, "bash", *map(str, codes), LONG=str(long))
    assert result.returncode == end, result.stderr
    assert int((host / "count").read_text()) == times


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_lets_the_command_save(host):
    """The script hears it, and the command, as all that a script starts in the background, does not."""
    saves = 'trap "sleep 0.3; echo saved >>saved; exit 75" TERM; echo begun >begun; while :; do sleep 0.05; done'
    command = ["bash", "runs/on_host.sh", "run", "bash", "-c", saves]
    process = subprocess.Popen(command, cwd=host, process_group=0)
    try:
        wait_for(lambda: (host / "begun").exists())
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == PREEMPTED
    finally:
        process.kill()
    assert (host / "saved").read_text() == "saved\n"


def test_stop_lets_the_command_save_and_is_not_followed_by_another(host):
    saves = 'trap "echo saved >>saved; exit 75" TERM; echo begun >begun; while :; do sleep 0.05; done'
    assert "nothing is running" in on_host(host, "stop").stdout
    assert "started" in on_host(host, "start", "bash", "-c", saves).stdout
    wait_for(lambda: (host / "begun").exists())
    assert "already running" in on_host(host, "start", "bash", "-c", saves).stdout
    process = int((host / "train.pid").read_text())
    try:
        assert "told to save" in on_host(host, "stop").stdout
        wait_for(lambda: not is_alive(process))
    finally:
        if is_alive(process):
            os.killpg(process, signal.SIGKILL)
    assert (host / "saved").read_text() == "saved\n"
    assert "ended with 75" in (host / "train.log").read_text()


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def commands(text: str) -> Iterator[list[str]]:
    """Package and arguments of each `python -m PACKAGE ...` and `moss-audio ...` of a text."""
    for line in text.replace("\\\n", " ").splitlines():
        for found in COMMAND.finditer(line):
            package, program, arguments = found.groups()
            lexer = shlex.shlex(arguments, posix=True, punctuation_chars=";|&<>()")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
            ends = [place for place, word in enumerate(words) if set(word) <= set(";|&<>()")]
            yield [package or PROGRAMS[program], *words[: min(ends, default=len(words))]]


def refusal(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Error of a command for its arguments, empty if it accepts them; the command is not run."""
    module = importlib.import_module(MODULES[command[0]])
    taken = []

    def quiet(function: Callable) -> Callable:
        return functools.wraps(function)(lambda *_, **__: taken.append(function.__name__))

    def cli(**options: Any) -> None:
        commands = module.app._subcommands
        for name, spec in commands.items():
            meant = name.replace("_", "-") == command[1]
            target = quiet(spec.target) if meant else lambda: None  # reading the options of all takes long
            commands[name] = dataclasses.replace(spec, target=target)
        type(module.app).cli(module.app, **options)

    said = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patched.setattr(sys, "argv", list(command))
        patched.setattr(module.app, "_subcommands", dict(module.app._subcommands))
        patched.setattr(module.app, "cli", cli, raising=False)
        patched.setattr(module, "run_cli", lambda command: command())
        patched.setattr("train.__main__.is_begun", lambda out: False)  # nobody's bucket is asked
        patched.setattr("train.__main__.stored_config", lambda run, kind: None)  # nor the run of `--branch`
        try:
            module.main()
        except SystemExit as end:
            return f"{shlex.join(command)}: exit code {end.code}\n{said.getvalue()}"
        except MossAudioError as error:  # which the real `run_cli` says, with code 2
            return f"{shlex.join(command)}: exit code 2\n{error}"
    return "" if len(taken) == 1 else f"{shlex.join(command)}: called {taken}"


def written(file: Path) -> list[list[str]]:
    text = file.read_text()
    if file.suffix == ".md":
        text = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return [command for command in commands(text) if len(command) > 1]


PAGES = {  # the fewest commands that each has; the other pages have none
    "README.md": 10,
    "runs/demo.sh": 8,
    "docs/ablation.md": 3,
    "docs/conversion.md": 7,
    "docs/data.md": 2,
    "docs/evaluation.md": 4,
    "docs/finetune.md": 15,
    "docs/parity.md": 3,
    "docs/reinforce.md": 3,
    "docs/speech.md": 1,
    "docs/timelines.md": 7,
    "docs/tpu.md": 8,
    "docs/training.md": 20,
}


@pytest.mark.parametrize("file", PAGES)
def test_every_command_written_down_is_one_that_its_module_takes(file, monkeypatch):
    found = written(REPOSITORY / file)
    assert len(found) >= PAGES[file]
    assert not "".join(refusal(command, monkeypatch) for command in found)


def test_a_command_that_no_module_takes_is_found(monkeypatch):
    assert refusal(["train", "run", "--recipe", "finetune", "--out", "x"], monkeypatch) == ""
    for mistaken in (
        ["train", "run", "--recipe", "finetune", "--out", "x", "--loop.steps", "3"],
        ["train", "rum", "--recipe", "finetune", "--out", "x"],
        ["convert", "to-orbax", "x"],
    ):
        assert "exit code 2" in refusal(mistaken, monkeypatch)


def config_of(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Configuration that `train run` would train with these arguments."""
    found: list[RunConfig] = []
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", list(command))
        patched.setattr(train.__main__, "_train", lambda config, *_, **__: found.append(config))
        patched.setattr("train.running.distributed.join", lambda config: None)
        patched.setattr(train.__main__.app, "_subcommands", {})
        train.__main__.main()
    return found[0]


@pytest.mark.usefixtures("storage")  # a command looks for its run
def test_sixteen_hosts_share_the_batch_of_the_scripts(bin_directory: Path, tmp_path: Path, monkeypatch):
    """The run command of the scripts for pods, as it is, with the batch of docs/tpu.md: no host is refused."""
    configs = []
    for script in (script for script in VERBS if script != "tpu_vm.sh"):
        end, calls = called(script, "run", "--data.batch-size", "64", bin_directory=bin_directory, tmp_path=tmp_path)
        assert end.returncode == 0
        configs.append(config_of(next(run for call in calls for word in call for run in commands(word)), monkeypatch))
    config = configs[0]
    assert {(other.loop.workers, other.data) for other in configs} == {(8, config.data)}
    assert config.data.batch_size == 64
    write_small_tokenizer(tmp_path)
    maker = SampleMaker(Tokenizer.from_dir(tmp_path), MossAudioConfig.preset("tiny"))
    texts = [Example(str(number), text=f"some text {number}") for number in range(30)]
    order = ExampleOrder([Group("texts", 1, (Source("texts", texts),))], seed=0)
    small = dataclasses.replace(config.data, tokens=60, chunks=1)
    for hosts in (1, 2, 4, 8, 16):
        for host in range(hosts):
            TrainingData(order, maker, small, host=host, hosts=hosts, workers=config.loop.workers).close()
    rows = [next(TrainingData(order, maker, small, host=host, hosts=16)).targets for host in range(16)]
    np.testing.assert_array_equal(np.concatenate(rows), next(TrainingData(order, maker, small)).targets)
    data = TrainingData(order, maker, small, host=3, hosts=16, workers=config.loop.workers)
    np.testing.assert_array_equal(next(data).targets, rows[3])
    data.close()
