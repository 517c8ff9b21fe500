"""A run by several processes: the curve of one, on any number of them, and an end together when one is stopped."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_loop import ENVIRONMENT, corpus, lines  # noqa: F401 - a fixture

from moss_audio_jax import MossAudioError
from train.distributed import DistributedConfig

STEPS = 6
BOUND = 20  # seconds until a lost process is given up
pytestmark = pytest.mark.slow


class Run:
    """Processes of one run, whose stderr goes to files."""

    def __init__(self, arguments: list[str], out: Path, count: int, environment: dict[str, str]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self._logs = [out.with_name(f"{out.name}-{count}-{number}.log") for number in range(count)]
        self.processes = []
        for number, log in enumerate(self._logs):
            place = ["--coordinator", address, "--num-processes", str(count), "--process-id", str(number)]
            command = [sys.executable, "-m", "train", *arguments, *place, "--lost-after", str(BOUND), "--out", str(out)]
            with open(log, "w") as file:
                self.processes.append(subprocess.Popen(command, env=environment, stderr=file, stdout=file))

    def wait(self, seconds: float = 150) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def log(self, number: int) -> str:
        return self._logs[number].read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Callable[..., Run]]:  # noqa: F811
    """Starts `count` processes of a run of so many steps, each with one device."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    options = {
        "recipe": "pretrain_stage2",
        "keep-last": 3,
        "log-every": 1,
        "model.checkpoint": corpus / "model",
        "mixture.speech.paths": corpus / "clips.jsonl",
        "mixture.text.paths": corpus / "texts.jsonl",
        "data.batch-size": 8,
        "data.tokens": 160,
        "data.chunks": 2,
        "data.open-bins": 2,
        "data.lanes": 4,
        "optimizer.learning-rate": 1e-3,
        "optimizer.warmup-steps": 2,
        "optimizer.total-steps": 20,
        "step.remat": "none",
        "step.loss-chunk": 160,
        "step.compute-dtype": "float32",
        "microbatches": 2,
    }
    runs: list[Run] = []

    def begin(out: Path, count: int, steps: int = STEPS, every: int = 2, **more) -> Run:
        chosen = options | {"steps": steps, "checkpoint-every": every} | more
        pairs = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
        runs.append(Run(["run", *pairs], out, count, ENVIRONMENT | cache))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture(scope="module")
def alone(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run = start(out, 1)
    assert run.wait() == [0], run.log(0)
    return out


def assert_same_curve(found: Path, expected: Path) -> None:
    """Not bit for bit: the sum over sequences is in another order, and Adam magnifies what is left of it."""
    for name, tolerance in (("loss", 2e-5), ("grad_norm", 2e-3), ("tokens", 0)):
        curves = [[line[name] for line in lines(out)] for out in (found, expected)]
        np.testing.assert_allclose(*curves, rtol=tolerance, err_msg=name)


def wait_for_step(out: Path, step: int, run: Run, seconds: float = 120) -> None:
    waited = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if (out / "metrics.jsonl").exists() and any(line["step"] >= step for line in complete_lines(out)):
            return
        assert all(process.poll() is None for process in run.processes), run.log(0)
        waited.wait(0.1)
    raise AssertionError(f"no step {step} in time: {run.log(0)}")


def complete_lines(out: Path) -> list[dict]:
    return [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1:] == "\n"
    ]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.mark.parametrize("count", [1, 4])
def test_two_processes_make_the_curve_of_one_and_others_go_on_with_it(
    count: int, start: Callable[..., Run], alone: Path, tmp_path: Path
):
    out = tmp_path / "run"
    first = start(out, 2, steps=4)
    assert first.wait() == [0, 0], first.log(0) + first.log(1)
    assert "step 4/" in first.log(0) and "step" not in first.log(1)
    rest = start(out, count)
    assert rest.wait() == [0] * count, rest.log(0)
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
    assert_same_curve(out, alone)


def test_sigterm_to_one_stops_all_after_the_same_step(start: Callable[..., Run], tmp_path: Path):
    out = tmp_path / "run"
    run = start(out, 2, steps=100_000, every=1000)
    wait_for_step(out, 2, run)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait(60) == [75, 75], run.log(0) + run.log(1)
    reached = lines(out)[-1]["step"]
    assert checkpoints(out) == [reached]
    assert f"stopped after step {reached}, which is saved" in run.log(0) and "stopped" not in run.log(1)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_in_time(killed: int, start: Callable[..., Run], tmp_path: Path):
    out = tmp_path / "run"
    run = start(out, 2, steps=100_000)
    wait_for_step(out, 5, run)
    run.processes[killed].kill()
    assert run.processes[1 - killed].wait(2 * BOUND) not in (0, None)
    assert "another process of the run has died" in run.log(1 - killed) or "another task died" in run.log(1 - killed)
    reached = max(checkpoints(out))
    rest = start(out, 2, steps=reached + 1)
    assert rest.wait() == [0, 0], rest.log(0) + rest.log(1)
    assert [line["step"] for line in lines(out)] == list(range(1, reached + 2))


def test_unfit_options_are_refused():
    with pytest.raises(MossAudioError, match="need all of --coordinator HOST:PORT, --num-processes and --process-id"):
        DistributedConfig(coordinator="localhost:1234", num_processes=2)
    with pytest.raises(MossAudioError, match=r"must be HOST:PORT, such as 10\.0\.0\.1:1234, not 'localhost'"):
        DistributedConfig(coordinator="localhost", num_processes=2, process_id=0)
    with pytest.raises(MossAudioError, match="below the 2 of --num-processes, not 2"):
        DistributedConfig(coordinator="localhost:1234", num_processes=2, process_id=2)
