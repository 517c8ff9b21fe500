"""Tests each Python that pyproject.toml names with the oldest and newest packages that it allows: `make test-matrix`.

Each cell is a new environment in .venv-matrix/, installed from pyproject.toml by uv, whose resolution `lowest-direct`
takes the lower bounds. An interpreter is found as `pythonX.Y` on the PATH; what is not there is skipped and said.
The output of a cell is in .venv-matrix/CELL.log. Exits with 1 if a cell fails, or if there is no interpreter at all.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [
    found[1] for line in PROJECT["classifiers"] if (found := re.fullmatch(r"Programming Language .* (3\.\d+)", line))
]
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
SHOWN = ("jax", "flax", "orbax-checkpoint", "grain")
DIRECTORY = ROOT / ".venv-matrix"
# What touches each package in the least time: the model and generation (JAX, Flax), checkpoints and their conversion
# (Orbax, TensorStore, safetensors), gs:// (etils, gcsfs), sounds and texts (SciPy, soundfile, tokenizers), the data
# (Grain, ArrayRecord, PyArrow), optimizers and whole runs (Optax, Tyro), and the endpoint. None needs PyTorch.
TESTS = (
    *("tests/convert/test_round_trip.py", "tests/convert/test_adapters.py", "tests/convert/test_orbax_hooks.py"),
    *("tests/serving/test_transcriptions.py", "tests/test_attention.py", "tests/test_checkpoint.py"),
    *("tests/test_checkpoint_names.py", "tests/test_config.py", "tests/test_generate.py", "tests/test_paths.py"),
    *("tests/test_peft_files.py", "tests/test_processor.py", "tests/test_retries.py", "tests/test_sharding.py"),
    *("tests/test_sound_files.py", "tests/test_timelines.py", "tests/test_tokens.py", "tests/train/test_gs.py"),
    *("tests/train/test_metrics.py", "tests/train/test_optimizer.py", "tests/train/data/test_pipeline.py"),
    *("tests/train/data/test_shards.py", "tests/train/data/test_sources.py"),
)
MINUTES = 20


@dataclass(frozen=True)
class Cell:
    """A Python and a choice of packages; executable: the interpreter that its environment is made with."""

    python: str
    packages: str
    executable: str

    @property
    def name(self) -> str:
        return f"{self.python}-{self.packages}"

    @property
    def interpreter(self) -> str:
        return str(DIRECTORY / self.name / "bin" / "python")


def interpreter(version: str, path: str) -> str | None:
    """Finds `pythonX.Y` in the directories of a PATH; what can't be run, as pyenv's stand-ins, does not count."""
    for directory in path.split(os.pathsep):
        command = shutil.which(f"python{version}", path=directory)
        ask = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"
        done = command and subprocess.run([command, "-c", ask], capture_output=True, text=True, timeout=60)
        if done and done.returncode == 0:
            executable, _, found = done.stdout.strip().rpartition(" ")
            if found == version:
                return executable
    return None


def cells(path: str) -> Iterator[Cell]:
    """Yields the cells of the interpreters on a PATH; prints those that are not there."""
    for version in PYTHONS:
        executable = interpreter(version, path)
        if executable is None:
            print(f"python{version} is not on the PATH: skipped", flush=True)
            continue
        for packages in RESOLUTIONS:
            yield Cell(version, packages, executable)


def commands(cell: Cell) -> Iterator[list[str]]:
    """Yields what makes a cell's environment, and runs the tests in it."""
    uv = [sys.executable, "-m", "uv"]
    yield [*uv, "venv", "--clear", "--python", cell.executable, str(DIRECTORY / cell.name)]
    # Bounds without a wheel for this Python are passed over, and named at the end.
    resolution = ["--resolution", RESOLUTIONS[cell.packages], "--only-binary", ":all:"]
    yield [*uv, "pip", "install", "--python", cell.interpreter, *resolution, "-e", f"{ROOT}[matrix]"]
    chosen = ["-m", "not slow and not alone and not tpu", "--numprocesses", "2", "--dist", "loadfile", "--durations=30"]
    yield [cell.interpreter, "-m", "pytest", *chosen, "--max-worker-restart", "0", *TESTS]


def run(cell: Cell) -> tuple[str, float]:
    """Makes a cell and tests it; returns the last line of its output, and the seconds of the tests."""
    log = DIRECTORY / f"{cell.name}.log"
    environment = os.environ | {
        # Cells with the same jaxlib compile the same programs.
        "JAX_COMPILATION_CACHE_DIR": str(DIRECTORY / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    start = time.monotonic()
    with log.open("w") as output:
        for command in commands(cell):
            if command[0] == cell.interpreter:
                start = time.monotonic()
                flags = subprocess.check_output([cell.interpreter, "tests/xla_flags.py"], cwd=ROOT, text=True)
                environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.strip()}"
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=60 * MINUTES
                )
            except subprocess.TimeoutExpired:
                return f"FAILED: not done after {MINUTES} minutes", time.monotonic() - start
            if done.returncode:
                break
    last = log.read_text().strip().splitlines()[-1].strip("= ")
    return ("FAILED: " if done.returncode else "") + last, time.monotonic() - start


# Run by a cell's Python: the versions of packages, then bounds of this project that are below what is installed.
_INSTALLED = """
import sys
from importlib.metadata import requires, version
from packaging.requirements import Requirement
from packaging.version import Version
print(*map(version, sys.argv[1].split()))
for needed in map(Requirement, requires("moss-audio-jax")):
    if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in sys.argv[2].split()):
        for bound in needed.specifier:
            if bound.operator == ">=" and Version(version(needed.name)) != Version(bound.version):
                print(f"{needed.name} {version(needed.name)} for {bound}")
"""


def installed(cell: Cell) -> tuple[list[str], list[str]]:
    """Returns a cell's versions of SHOWN, and lower bounds that it did not try: no wheel of that version fits."""
    extras = next(line for line in PROJECT["optional-dependencies"]["matrix"] if line.startswith(PROJECT["name"]))
    names = f"{extras.partition('[')[2].removesuffix(']').replace(',', ' ')} matrix"
    command = [cell.interpreter, "-c", _INSTALLED, " ".join(SHOWN), names]
    done = (
        subprocess.run(command, capture_output=True, text=True, timeout=60) if Path(cell.interpreter).exists() else None
    )
    if done is None or done.returncode:
        return ["-"] * len(SHOWN), []
    first, *others = done.stdout.splitlines()
    return first.split(), others if cell.packages == "oldest" else []


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lays out rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> None:
    shown = [name.partition("-")[0] for name in SHOWN]
    rows, notes, failed = [["python", "packages", *shown, "result"]], [], False
    DIRECTORY.mkdir(exist_ok=True)
    for cell in cells(os.environ.get("PATH", "")):
        print(f"{cell.name} ...", end=" ", flush=True)
        result, seconds = run(cell)
        print(f"{result} ({seconds:.0f} s of tests)", flush=True)
        failed |= result.startswith("FAILED")
        versions, untried = installed(cell)
        notes += [f"{cell.name} had {package}" for package in untried]
        rows.append([cell.python, cell.packages, *versions, result])
    if len(rows) == 1:
        sys.exit(f"none of python{', python'.join(PYTHONS)} is on the PATH: install one, and run this again")
    print(table(rows), *notes, sep="\n")
    if failed:
        sys.exit(f"some cells failed: their output is in {DIRECTORY.name}/CELL.log")


if __name__ == "__main__":
    main()
