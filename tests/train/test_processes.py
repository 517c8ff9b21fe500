"""A run by several processes: the curve of one, on any number of them, and an end together when one is stopped."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, to_path
from moss_audio_jax.weights.locate import locate
from tests.train.training_runs import ENVIRONMENT as OF_ONE
from tests.train.training_runs import lines
from train.running.config import DistributedConfig
from train.running.rendezvous import rendezvous

STEPS = 6
# Not all of the flags of `tests.xla_flags`: with the older emitters processes have met in different collectives.
ENVIRONMENT = OF_ONE | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
BOUND = 20  # seconds until a lost process is given up


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Run:
    """Processes of one run, whose stderr goes to files."""

    def __init__(
        self,
        arguments: list[str],
        out: AnyPath,
        count: int,
        environment: dict[str, str],
        logs: Path,
        missing: Sequence[int] = (),
    ):
        address = f"localhost:{free_port()}"
        self._logs = {number: logs / f"{number}.log" for number in range(count) if number not in missing}
        self.processes = []
        for number, log in self._logs.items():
            place = ["--coordinator", address, "--num-processes", str(count), "--process-id", str(number)]
            command = [sys.executable, "-m", "train", *arguments, *place, "--lost-after", str(BOUND), "--out", str(out)]
            with open(log, "w") as file:
                self.processes.append(subprocess.Popen(command, env=environment, stderr=file, stdout=file))

    def wait(self, seconds: float = 240) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def log(self, number: int) -> str:
        return self._logs[number].read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Callable[..., Run]]:
    """Starts `count` processes of a run, each with one device."""
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
        "optimizer.learning-rate": 1e-3,
        "optimizer.warmup-steps": 2,
        "optimizer.total-steps": 20,
        "step.remat": "none",
        "step.loss-chunk": 160,
        "step.compute-dtype": "float32",
        "microbatches": 2,
    }
    runs: list[Run] = []

    def begin(out: AnyPath, count: int, steps: int = STEPS, every: int = 2, missing: Sequence[int] = (), **more) -> Run:
        chosen = options | {"steps": steps, "checkpoint-every": every} | more
        pairs = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
        environment = os.environ | ENVIRONMENT | cache
        runs.append(Run(["run", *pairs], out, count, environment, tmp_path_factory.mktemp("logs"), missing))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture(scope="module")
def evaluated(corpus: Path) -> dict[str, object]:
    """Options of an evaluation after the fourth step and after the last."""
    options = {"every": 4, "data": corpus / "clips.jsonl", "count": 3, "tokens": 4}
    return {f"evaluate-{name}": value for name, value in options.items()} | {"best-metric": "loss"}


@pytest.fixture(scope="module")
def alone(start: Callable[..., Run], evaluated: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run = start(out, 1, **evaluated)
    assert run.wait() == [0], run.log(0)
    return out


def assert_same_curve(found: Path, expected: Path) -> None:
    """Compares with the steps of `alone`. Not bit for bit: the sum over sequences is in another order, and Adam
    magnifies the difference."""
    of_all_hosts = ("examples", "read", "audio_hours", "epoch", "token_fill", "tokens/speech", "model_flops")
    exact = dict.fromkeys(("tokens", *of_all_hosts), 1e-6)
    for name, tolerance in ({"loss": 2e-5, "grad_norm": 2e-3} | exact).items():
        curves = [[line[name] for line in lines(out)[:STEPS]] for out in (found, expected)]
        np.testing.assert_allclose(*curves, rtol=tolerance, err_msg=name)


def wait_for_step(out: Path, step: int, run: Run, seconds: float = 240) -> None:
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


@pytest.fixture(scope="module")
def of_two(start: Callable[..., Run], evaluated: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first steps of a run, by two processes."""
    out = tmp_path_factory.mktemp("of_two") / "run"
    first = start(out, 2, steps=4, **evaluated)
    assert first.wait() == [0, 0], first.log(0) + first.log(1)
    assert "step 4/" in first.log(0) and not re.search("^step", first.log(1), re.MULTILINE)
    return out


@pytest.mark.parametrize("count", [1, 4])
def test_two_processes_make_the_curve_of_one_and_others_go_on_with_it(
    count: int, of_two: Path, start: Callable[..., Run], evaluated: dict, alone: Path, tmp_path: Path
):
    out = shutil.copytree(of_two, tmp_path / "run")
    rest = start(out, count, **evaluated)
    assert rest.wait() == [0] * count, rest.log(0)
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
    assert_same_curve(out, alone)
    assert_same_evaluation(out, alone)


def assert_same_evaluation(found: Path, expected: Path) -> None:
    """After the fourth step, and after the last, which is the best."""
    lines, others = ([json.loads(line) for line in (out / "scores.jsonl").open()] for out in (found, expected))
    assert [line["step"] for line in lines] == [line["step"] for line in others] == [4, STEPS]
    assert lines[0]["eval/tokens"] > 0
    assert lines[0] == pytest.approx(others[0], rel=2e-4)
    assert lines[1]["eval/loss"] == pytest.approx(others[1]["eval/loss"], rel=2e-4)
    assert (found / "answers" / "4.md").read_text() == (expected / "answers" / "4.md").read_text()
    for out in (found, expected):
        best = locate(out / "best")
        assert best.params == out / "checkpoints" / str(STEPS) / "params"


def test_processes_end_their_epochs_together(start: Callable[..., Run], tmp_path: Path):
    """The last batches are not full; one process may have no more data while the others still have some."""
    found = []
    for count in (1, 4):
        out = tmp_path / str(count)
        run = start(out, count, steps=100_000, epochs=2)
        assert run.wait() == [0] * count, run.log(0)
        found.append(lines(out))
    assert [len(of_run) for of_run in found] == [len(found[0])] * 2
    for name in ("examples", "tokens", "epoch", "read"):
        assert [line[name] for line in found[0]] == [line[name] for line in found[1]], name
    assert found[1][-1]["epoch"] >= 2


def test_processes_share_an_evaluation(corpus: Path, tmp_path: Path):
    """Three clips, two at once, so that one row of the last batch is filled up."""
    environment = os.environ | ENVIRONMENT | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    question = ["--data", str(corpus / "clips.jsonl"), "--limit", "3", "--batch-size", "2", "--max-new-tokens", "4"]
    found = {}
    for count in (1, 2):
        out, predictions = tmp_path / f"{count}.json", tmp_path / f"{count}.jsonl"
        arguments = ["evaluate", str(corpus / "model"), *question, "--predictions", str(predictions)]
        (tmp_path / str(count)).mkdir()
        run = Run(arguments, out, count, environment, tmp_path / str(count))
        try:
            assert run.wait() == [0] * count, run.log(0) + run.log(count - 1)
        finally:
            run.kill()
        results = json.loads(out.read_text())
        found[count] = results["measures"], results["unfinished"], predictions.read_text()
        assert results["devices"] == count and "transcribe" in run.log(0)
    assert found[2] == found[1]
    assert "transcribe" not in run.log(1)


def test_a_clip_that_one_process_can_t_read_ends_the_evaluation(corpus: Path, tmp_path: Path):
    """Its header is whole; only the process that decodes it meets the mistake, and all end at once."""
    shutil.copytree(corpus, tmp_path / "corpus")
    clip = tmp_path / "corpus" / "0.wav"
    soundfile.write(clip, np.zeros(100), 16000)  # too short to be read
    environment = os.environ | ENVIRONMENT | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    question = ["--data", str(tmp_path / "corpus" / "clips.jsonl"), "--limit", "2", "--max-new-tokens", "4"]
    run = Run(["evaluate", str(corpus / "model"), *question], tmp_path / "r.json", 2, environment, tmp_path)
    try:
        assert run.wait() == [2, 2], run.log(0) + run.log(1)
    finally:
        run.kill()
    logs = sorted((run.log(0), run.log(1)), key=lambda log: "another process" in log)
    assert "0.wav" in logs[0] and "another process of the evaluation has failed" in logs[1]


@pytest.mark.slow
def test_processes_share_a_run_on_gs(start: Callable[..., Run], alone: Path, bucket: str):
    for count, steps in ((2, 4), (1, STEPS)):
        run = start(f"{bucket}/run", count, steps=steps)
        assert run.wait() == [0] * count, run.log(0)
    assert_same_curve(to_path(bucket) / "run", alone)


def test_sigterm_to_one_stops_all_after_the_same_step(start: Callable[..., Run], tmp_path: Path):
    out = tmp_path / "run"
    run = start(out, 2, steps=100_000, every=1000)
    wait_for_step(out, 2, run)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait(60) == [75, 75], run.log(0) + run.log(1)
    reached = lines(out)[-1]["step"]
    assert checkpoints(out) == [reached]
    assert f"stopped after step {reached}, which is saved" in run.log(0) and "stopped" not in run.log(1)


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_to_all_saves_the_same_step_and_so_does_the_clock(start: Callable[..., Run], tmp_path: Path):
    """A terminal sends it to all processes; what is due by the first one's clock is saved at every tenth step."""
    out = tmp_path / "run"
    run = start(out, 2, steps=100_000, every=1000, **{"checkpoint-minutes": 1e-6})
    wait_for_step(out, 12, run)
    for process in run.processes:
        process.send_signal(signal.SIGINT)
    assert run.wait(60) == [75, 75], run.log(0) + run.log(1)
    *by_time, last = checkpoints(out)
    assert 10 in by_time and not any(step % 10 for step in by_time) and last == lines(out)[-1]["step"]


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_others_in_time(killed: int, start: Callable[..., Run], tmp_path: Path):
    out = tmp_path / "run"
    run = start(out, 2, steps=100_000, every=5)
    wait_for_step(out, 8, run)
    run.processes[killed].kill()
    assert run.processes[1 - killed].wait(2 * BOUND) not in (0, None)
    assert "another process of the run has died" in run.log(1 - killed) or "another task died" in run.log(1 - killed)
    before, reached = complete_lines(out), max(checkpoints(out))
    last = max(len(before), reached + 1)
    rest = start(out, 2, steps=last, every=5)
    assert rest.wait() == [0, 0], rest.log(0) + rest.log(1)
    assert [line["step"] for line in lines(out)] == list(range(1, last + 1))
    for name in ("loss", "grad_norm", "tokens"):  # of those after the checkpoint, which were run twice, too
        assert [line[name] for line in lines(out)][: len(before)] == [line[name] for line in before]


def test_a_process_that_does_not_come_is_named(start: Callable[..., Run], tmp_path: Path):
    run = start(tmp_path / "run", 3, missing=[2], **{"join-within": 30})
    assert run.wait() == [2, 2], run.log(0) + run.log(1)
    host = socket.gethostname()
    for number in (0, 1):
        assert (
            "the processes of the run did not meet (30 s to wait): process 2 of 3 did not come, processes 0, 1 did "
            f"(0 on {host}, 1 on {host}); start all of them"
        ) in run.log(number)


def met(places: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, seconds: float = 20) -> list[str]:
    """Messages to processes, given as (number, expected count); here they are threads."""
    monkeypatch.setattr("train.running.rendezvous.os.getpid", threading.get_ident)
    address = f"localhost:{free_port()}"

    def join(place: tuple[int, int]) -> str:
        try:
            rendezvous(address, place[1], place[0], seconds)
        except MossAudioError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(join, places))


def test_all_processes_meet_in_any_order(monkeypatch: pytest.MonkeyPatch):
    assert met([(3, 4), (1, 4), (0, 4), (2, 4)], monkeypatch) == [""] * 4


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([(0, 3), (1, 3), (1, 3)], "two have the number 1, one on .* and one on "),
        ([(0, 2), (1, 3)], "process 1 on .* expects 3 processes, the one on .* 2"),
        ([(0, 4), (2, 4)], "processes 1, 3 of 4 did not come, processes 0, 2 did"),
    ],
)
def test_processes_that_do_not_make_one_run(
    places: list[tuple[int, int]], problem: str, monkeypatch: pytest.MonkeyPatch
):
    for told in met(places, monkeypatch, seconds=2):
        assert re.search(problem, told)


def test_process_0_does_not_come(monkeypatch: pytest.MonkeyPatch):
    for number, told in zip((1, 2), met([(1, 3), (2, 3)], monkeypatch, seconds=1), strict=True):
        assert re.search(f"process {number} on .* can't reach process 0 at localhost:.* .Connection refused", told)


def test_others_on_the_port_are_not_counted(monkeypatch: pytest.MonkeyPatch):
    address = ("localhost", free_port())
    monkeypatch.setattr("train.running.rendezvous.os.getpid", threading.get_ident)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(rendezvous, f"localhost:{address[1]}", 2, 0, 20)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1}\n', b""):
            with connected(address) as stranger:
                stranger.sendall(said)
        threads.submit(rendezvous, f"localhost:{address[1]}", 2, 1, 20).result()
        first.result()


def connected(address: tuple[str, int]) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(address)
        except ConnectionRefusedError:
            threading.Event().wait(0.1)
    raise AssertionError("nobody listens")


def test_unfit_options_are_refused():
    with pytest.raises(MossAudioError, match="need all of --coordinator HOST:PORT, --num-processes and --process-id"):
        DistributedConfig(coordinator="localhost:1234", num_processes=2)
    with pytest.raises(MossAudioError, match=r"must be HOST:PORT, such as 10\.0\.0\.1:1234, not 'localhost'"):
        DistributedConfig(coordinator="localhost", num_processes=2, process_id=0)
    with pytest.raises(MossAudioError, match="below the 2 of --num-processes, not 2"):
        DistributedConfig(coordinator="localhost:1234", num_processes=2, process_id=2)
