"""The training step beside MaxText's, both compiled ahead of time for a TPU: `python -m benchmarks.vs_maxtext`.

No TPU is needed. The same work on both sides: Qwen3-8B on text alone (of this port's model: the encoder has nothing to
encode), all chips fsdp's, AdamW with float32 masters and moments, bfloat16 compute, scanned layers, everything
recomputed. Each side is compiled in a process of its own (`benchmarks.training_programs`), with the same libtpu, and
the same code reads both programs. The rest of MaxText's configuration is its default, but for `--maxtext-options`:
they make a row each. MaxText cuts the tokens of its loss into tiles, and by default all-gathers the head for each of
them; the second row is of the option that gathers it once.

MaxText needs an environment of its own, of Python 3.12; `INSTALL` says how to make it.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.training_programs import Program, Work, versions
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import atomic_write
from moss_audio_jax.text_table import align
from train.planning.chips import GIB
from train.planning.topology import accelerator_type, shown_topology, topology_of

ROOT = Path(__file__).parents[1]
INSTALL = "python3.12 -m venv ENV && ENV/bin/pip install 'maxtext[tpu]==0.2.5' libtpu=={libtpu}"
COLUMNS = ("", "HBM, GiB", "sends, GiB", "matmuls, TFLOP", "compiled in, s", "CPU, s")
_VERSIONS = "import importlib.metadata as m; print(*(m.version(name) for name in ('maxtext', 'jax', 'libtpu')))"


def require_maxtext(python: str) -> None:
    """Raises MossAudioError unless an interpreter has MaxText, and the libtpu that this one has."""
    libtpu = versions()["libtpu"]
    install = INSTALL.format(libtpu=libtpu)
    try:
        asked = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
    except OSError as error:
        raise MossAudioError(f"--maxtext-python {python} can't be run ({error.strerror}): {install}") from error
    if asked.returncode:
        why = asked.stderr.strip().splitlines()[-1]
        raise MossAudioError(f"--maxtext-python {python} can't import MaxText ({why}): {install}")
    if (found := asked.stdout.split()[-1]) != libtpu:
        raise MossAudioError(f"both sides must have one libtpu, but MaxText's is {found} and ours {libtpu}: {install}")


def compiled(work: Work, python: str, side: str, *options: str) -> Program:
    """Compiles one side in a process of its own, whose output goes to stderr if it fails."""
    print("compiling", side, *options, file=sys.stderr, flush=True)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as figures:
        given = json.dumps(dataclasses.asdict(work))
        command = [python, "-m", "benchmarks.training_programs", side, given, figures.name, *options]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if ended.returncode:
            sys.stderr.write(ended.stdout.decode(errors="replace"))
            raise MossAudioError(f"the step of {side} was not compiled: the end of its output, above, says why")
        return Program(**json.load(figures))


def table(programs: dict[str, Program]) -> str:
    rows: list[tuple[str, ...]] = [COLUMNS]
    for side, program in programs.items():
        rows.append(
            (
                side,
                f"{program.hbm / GIB:.1f}{'' if program.fits else ' (does not fit)'}",
                f"{sum(program.sent.values()) / GIB:.1f}",
                f"{program.matmul_flops / 1e12:.2f}",
                f"{program.seconds:.0f}",
                f"{program.cpu_seconds:.0f}",
            )
        )
    lines = ["", "What a chip sends, GiB:"]
    for side, program in programs.items():
        kinds = (f"{kind} {size / GIB:.1f}" for kind, size in program.sent.items() if size >= 0.05 * GIB)
        lines.append(f"{side}: {', '.join(kinds)}")
    return "\n".join([align(rows), *lines])


def described(work: Work, programs: dict[str, Program]) -> str:
    """The work, and the versions of both sides."""
    topology = shown_topology(topology_of(work.topology))
    lines = [
        f"A step of Qwen3-8B with {work.layers} layers, {work.sequences} sequences of {work.tokens} tokens a chip, on "
        f"{topology}: compiled ahead of time, no TPU. Figures are of one chip."
    ]
    for side, program in programs.items():
        lines.append(f"{side}: " + ", ".join(f"{name} {version}" for name, version in program.versions.items()))
    return "\n".join(lines)


def kept(file: Path | None, work: Work) -> dict[str, Program]:
    """Programs that FILE has. Raises MossAudioError if they are of other work, or of another libtpu than this one."""
    if file is None or not file.exists():
        return {}
    content = json.loads(file.read_text("utf-8"))
    if content["work"] != dataclasses.asdict(work):
        raise MossAudioError(f"--json {file} has the figures of other work, {content['work']}: name another file")
    programs = {side: Program(**program) for side, program in content["programs"].items()}
    libtpu = versions()["libtpu"]
    if others := {program.versions["libtpu"] for program in programs.values()} - {libtpu}:
        raise MossAudioError(f"--json {file} is of libtpu {others.pop()}, not {libtpu} as here: name another file")
    return programs


def run(
    maxtext_python: str,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    maxtext_options: tuple[str, ...] = ("", "vocab_tiling_ag_once=true"),
    work: Annotated[Work, tyro.conf.arg(name="")] = Work(),  # noqa: B008
) -> None:
    """Compiles the steps, and prints a table.

    Args:
        maxtext_python: Interpreter that has MaxText.
        json_file: File for the figures. A row that it already has is not compiled again.
        maxtext_options: More of MaxText's configuration, such as "num_vocab_tiling=8 vocab_tiling_ag_once=true"; a row
            for each.
        work: What is compiled.
    """
    if accelerator_type(topology_of(work.topology)) is None:
        raise MossAudioError(
            f"--topology must be one that is rented under a name, as MaxText knows no other, not {work.topology}: try "
            "v5p:4x4x4 or v5e:2x4"
        )
    sides: dict[str, tuple[str, ...]] = {"ours": (sys.executable, "ours")}
    for options in maxtext_options:
        sides[f"MaxText {options}".strip()] = (maxtext_python, "maxtext", options)
    programs = kept(json_file, work)
    if sides.keys() - programs.keys() - {"ours"}:
        require_maxtext(maxtext_python)
    for name, side in sides.items():
        if name in programs:
            continue
        programs[name] = compiled(work, *side)
        if json_file:
            figures = {"work": work, "programs": programs}
            atomic_write(json_file, json.dumps(figures, default=dataclasses.asdict, indent=2) + "\n")
    programs = {name: programs[name] for name in sides}
    print(f"{described(work, programs)}\n\n{table(programs)}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run))
