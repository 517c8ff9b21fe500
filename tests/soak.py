"""Runs under faults, for about an hour on two cores: `make soak`. docs/soak.md has its figures.

kills      three runs (full, LoRA, with workers), each SIGKILLed at random moments and started again until it is done
storage    a run on gs://, data and all, 1% of whose requests fail
hosts      the data of 16 hosts against that of one, and a run of 4 processes against one of one
changes    a run through three changes of hosts, workers and mesh against an undisturbed one

Every part says what it compared and ends the soak with an error if something differs. Parts that have passed are kept
in OUT/results.json and left out when the same command is run again.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from fake_gcs import FakeGcs

from moss_audio_jax.tokenizer import Tokenizer
from tests.conftest import SMALL_MODEL
from tests.train.training_runs import write_corpus
from train.data import DataConfig, ExampleOrder, Group, Manifest, SampleMaker, Source, TrainingData

BY_THE_CLOCK = ("step_seconds", "data_wait", "mfu", "time", "tokens_per_second", "restarts")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "MOSS_AUDIO_STORAGE_BACKOFF": "0.05",
}
KILLED = -signal.SIGKILL
MARK = "MOSS_AUDIO_SOAK"  # a variable of the environment, by which a run's processes are found
STEPS = 120
# Seconds until a kill at most: imports, compiling and restoring take some eight, and data workers import once more.
LONGEST = {"full": 14.0, "lora": 14.0, "workers": 40.0}


def command(data: str, out: str, steps: int, *options: str, recipe: str = "pretrain_stage2") -> list[str]:
    return [
        *(sys.executable, "-m", "train", "run", "--recipe", recipe, "--out", out),
        *("--model.checkpoint", f"{data}/model"),
        *("--mixture.speech.paths", f"{data}/clips.jsonl", "--mixture.text.paths", f"{data}/texts.jsonl"),
        *("--data.batch-size", "4", "--data.tokens", "160", "--data.chunks", "2", "--data.open-bins", "2"),
        *("--microbatches", "1", "--step.remat", "none", "--step.loss-chunk", "160", "--optimizer.warmup-steps", "5"),
        *("--optimizer.learning-rate", "1e-3", "--optimizer.total-steps", str(steps)),
        *("--checkpoint-every", "5", "--keep-last", "2", "--log-every", "50"),
        *options,
    ]


class Soak:
    """Runs the parts, and keeps what they found."""

    def __init__(self, out: Path, seed: int):
        self.out, self._random = out, random.Random(seed)
        self.data = out / "data"
        self._environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
        if not self.data.exists():
            self.data.mkdir(parents=True)
            write_corpus(self.data, clips=60, texts=40)

    def start(self, arguments: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        with log.open("a") as file:
            return subprocess.Popen(
                arguments, env=self._environment | environment, stdout=file, stderr=file, start_new_session=True
            )

    def finish(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        """Runs a command to its end. Raises RuntimeError with its last words if it fails."""
        code = self.start(arguments, log, **environment).wait()
        if code:
            raise RuntimeError(f"{log}: exit code {code}: {log.read_text()[-2000:]}")

    def fresh(self, name: str) -> Path:
        directory = self.out / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory

    # Parts

    def kills(self, kills: int) -> dict[str, Any]:
        variants = {
            "full": ("pretrain_stage2", ()),
            "lora": ("finetune_lora", ("--lora.rank", "4")),
            "workers": ("pretrain_stage2", ("--workers", "2")),
        }
        return {
            name: self._killed(name, recipe, options, kills // len(variants) + (number < kills % len(variants)))
            for number, (name, (recipe, options)) in enumerate(variants.items())
        }

    def _killed(self, name: str, recipe: str, options: Sequence[str], kills: int) -> dict[str, Any]:
        directory = self.fresh(f"kills-{name}")
        log, mark = directory / "log", {MARK: f"{directory} {os.getpid()}"}
        straight, disturbed = directory / "straight", directory / "disturbed"

        def to(out: Path) -> list[str]:
            return command(str(self.data), str(out), STEPS, *options, recipe=recipe)

        self.finish(to(straight), log)
        done = before_the_first_step = 0
        while done < kills:
            reached = steps_of(disturbed)
            process = self.start(to(disturbed), log, **mark)
            try:
                process.wait(self._random.uniform(0.5, LONGEST[name]))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)  # the run alone: its workers have to end by themselves
            code = process.wait()
            if code == KILLED:
                done += 1
                now = steps_of(disturbed)
                before_the_first_step += now == reached
                print(f"{name}: kill {done} of {kills}, after step {now} of {STEPS}", flush=True)
            elif code == 0:  # it is done before all kills: once more from the start
                compare_runs(disturbed, straight)
                shutil.rmtree(disturbed)
            else:
                raise RuntimeError(f"{log}: exit code {code}: {log.read_text()[-2000:]}")
        self.finish(to(disturbed), log, **mark)
        compare_runs(disturbed, straight)
        if orphans := processes_with(f"{MARK}={mark[MARK]}"):
            raise RuntimeError(f"data workers have outlived their runs: {orphans}")
        return {"kills": kills, "steps": STEPS, "kills that came before a step was written": before_the_first_step}

    def storage(self) -> dict[str, Any]:
        directory = self.fresh("storage")
        ends, counts = [], {}
        for rate in (0.0, 0.01):
            with FakeGcs(faults=rate) as storage:
                for path in sorted(self.data.rglob("*")):
                    if path.is_file():
                        storage.put("bucket", f"data/{path.relative_to(self.data)}", path.read_bytes())
                log = directory / f"log-{rate}"
                arguments = command("gs://bucket/data", "gs://bucket/run", 60, "--workers", "1")
                self.finish(arguments, log, **storage.environment)
                copy = directory / f"run-{rate}"
                for (_, name), stored in storage.objects.items():
                    if name.startswith("run/"):
                        (copy / name[4:]).parent.mkdir(parents=True, exist_ok=True)
                        (copy / name[4:]).write_bytes(stored.content)
                ends.append(copy)
                counts[str(rate)] = {"requests": storage.requests, "faults": dict(storage.injected)}
        compare_runs(*reversed(ends))
        return counts

    def hosts(self) -> dict[str, Any]:
        batches = 50
        config = DataConfig(batch_size=16, tokens=160, chunks=2, open_bins=2)
        maker = SampleMaker(Tokenizer.from_dir(self.data / "model"), SMALL_MODEL)
        groups = [Group(name, 1, (Source(name, Manifest(self.data / f"{name}.jsonl")),)) for name in ("clips", "texts")]
        order = ExampleOrder(groups, 0)
        one = TrainingData(order, maker, config)
        shares = [TrainingData(order, maker, config, host=host, hosts=16) for host in range(16)]
        for number in range(batches):
            expected = next(one)
            rows = [next(share) for share in shares]
            found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            if number % 10 == 9:
                print(f"hosts: {number + 1} of {batches} batches are equal", flush=True)
        directory = self.fresh("hosts")
        options = ("--data.batch-size", "16", "--step.compute-dtype", "float32", "--join-within", "600")
        for count in (1, 4):
            self._processes(directory / str(count), 20, count, options, directory)
        apart = compare_curves(directory / "4", directory / "1")
        return {"batches": batches, "steps of 4 processes": 20, "largest relative difference of loss": apart}

    def changes(self) -> dict[str, Any]:
        directory = self.fresh("changes")
        wide = {"XLA_FLAGS": f"{ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count=8", "NPROC": "32"}
        every = ("--data.batch-size", "8", "--step.compute-dtype", "float32")
        straight, changed = directory / "straight", directory / "changed"
        self._processes(straight, 40, 1, every, directory)
        self._processes(changed, 10, 1, every, directory)
        self._processes(changed, 20, 2, (*every, "--workers", "3"), directory)
        self._processes(changed, 30, 1, (*every, "--mesh.fsdp", "4", "--mesh.tensor", "2"), directory, **wide)
        # A run that resumes keeps the options that it was given before.
        of_any_size = ("--mesh.fsdp", "-1", "--mesh.tensor", "1")
        self._processes(changed, 40, 4, (*every, *of_any_size, "--workers", "1"), directory)
        return {"steps": 40, "changes": 3, "largest relative difference of loss": compare_curves(changed, straight)}

    def _processes(
        self, out: Path, steps: int, count: int, options: Sequence[str], logs: Path, **environment: str
    ) -> None:
        arguments = [*command(str(self.data), str(out), 40, *options), "--steps", str(steps)]
        address = ("--coordinator", "localhost:47101", "--num-processes", str(count))
        places = [(*address, "--process-id", str(number)) if count > 1 else () for number in range(count)]
        processes = [
            self.start([*arguments, *place], logs / f"{out.name}-{number}.log", **environment)
            for number, place in enumerate(places)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"{logs}: exit codes {codes} of {count} processes until step {steps}")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> int:
    """Number of lines of metrics of a run that may just have been killed."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare_runs(found: Path, expected: Path) -> None:
    """Every step's figures but those by the clock, and the last checkpoint: every byte of every array, and the data's
    state. Raises AssertionError."""
    apart = [{name for name in line if name not in BY_THE_CLOCK} for line in lines(expected)]
    for line, other, names in zip(lines(found), lines(expected), apart, strict=True):
        assert {name: line[name] for name in names} == {name: other[name] for name in names}, line["step"]
    one, other = (max((run / "checkpoints").iterdir(), key=lambda path: int(path.name)) for run in (found, expected))
    assert one.name == other.name
    for item in ("params", "state"):
        arrays, others = (arrays_of(step / item) for step in (one, other))
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)
    states = [json.loads(next((step / "data").glob("*")).read_text()) for step in (one, other)]
    assert states[0] == states[1]


def arrays_of(directory: Path) -> dict[str, np.ndarray]:
    """All arrays of an Orbax item, by name."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(directory.absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def compare_curves(found: Path, expected: Path) -> float:
    """The largest relative difference of a loss; what was read has to be equal. Raises AssertionError."""
    runs = lines(found), lines(expected)
    for line, other in zip(*runs, strict=True):
        for name in ("step", "examples", "tokens", "read"):
            assert line[name] == other[name], (line["step"], name)
    losses = [np.array([line["loss"] for line in run]) for run in runs]
    apart = float(np.abs(losses[0] / losses[1] - 1).max())
    assert apart < 1e-3, apart
    return apart


def processes_with(variable: str) -> list[int]:
    """Processes whose environment holds this variable, as that of a run's data workers does."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def run(out: Path = Path("soak-out"), kills: int = 100, seed: int = 0) -> None:
    """Runs all parts that OUT/results.json does not hold yet, and prints what each found.

    Args:
        out: Where runs, logs and results go.
        kills: SIGKILLs over the three runs.
        seed: Of the moments at which they come.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    soak = Soak(out, seed)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "hosts": soak.hosts,
        "changes": soak.changes,
        "storage": soak.storage,
        "kills": lambda: soak.kills(kills),
    }
    for name, part in parts.items():
        if name not in found:
            began = time.monotonic()
            found[name] = part() | {"minutes": round((time.monotonic() - began) / 60, 1)}
            results.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}: {json.dumps(found[name])}", flush=True)


if __name__ == "__main__":
    tyro.cli(run)
