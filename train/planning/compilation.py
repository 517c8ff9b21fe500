"""Compiles a program for TPUs and reads what the compiler reports: memory, collectives and matmuls."""

import contextlib
import math
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from train.planning.chips import GIB
from train.planning.hlo import Collective, collectives, matmul_flops


@dataclass(frozen=True)
class Compiled:
    """Memory and collectives of a compiled program.

    problem: the compiler's error if the program does not fit; the figures are then those of the failed attempt.
    arguments, temporaries, code: bytes of HBM on one chip. code is the program itself.
    largest: (bytes, shapes) of the largest buffers.
    seconds, cpu_seconds: compilation time, and that of all its threads.
    matmul_flops: executed by one device outside of kernels.
    """

    problem: str | None
    arguments: int
    temporaries: int
    code: int
    largest: tuple[tuple[int, str], ...]
    collectives: tuple[Collective, ...]
    seconds: float
    inputs: Any = None  # shardings of the arguments; None for an unused one
    outputs: Any = None  # shardings of the results
    cpu_seconds: float = 0.0
    matmul_flops: float = 0.0

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.code


def compile_for_memory(traced: Any, mesh: Mesh) -> Compiled:
    """Compiles a traced function for its mesh.

    Reads XLA's dump instead of the executable: XLA writes the dump of a program that does not fit too.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        problem, memory, inputs, outputs = None, None, None, None
        try:
            with _uncached():
                executable = traced.lower().compile(compiler_options=options)
            memory = executable.memory_analysis()
            inputs, outputs = executable.input_shardings, executable.output_shardings
        except jax.errors.JaxRuntimeError as error:
            problem = str(error)
            if "HbmOom" not in problem:
                raise
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        hlo = _dumped(dump, "after_optimizations.txt")
        found, counted = collectives(hlo, mesh.size), (cpu_seconds, matmul_flops(hlo))
        largest = largest_buffers(_dumped(dump, "memory-usage-report.txt"))
    if memory is None:
        assert problem is not None
        needed = re.search(r"\(([\d.]+)G\) exceeds", problem)
        total = int(float(needed[1]) * GIB) if needed else 0  # XLA calls it temporaries; it includes the arguments
        return Compiled(problem.splitlines()[0], 0, total, 0, largest, tuple(found), seconds, None, None, *counted)
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    return Compiled(None, arguments, temporaries, code, largest, tuple(found), seconds, inputs, outputs, *counted)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Disables JAX's cache on disk: this machine can't load the program, and a cache hit would write no dump."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _dumped(directory: str, ending: str) -> str:
    files = sorted(Path(directory).glob(f"*{ending}"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else ""


def largest_buffers(report: str, count: int = 8) -> tuple[tuple[int, str], ...]:
    """Reads (bytes, shapes) of the largest buffers from XLA's memory report.

    Lines of the report are `sum(%); size; offset; n; shapes`.
    """
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    rows = re.findall(r"^\s*\S+\(\s*\d+%\);\s*([\d.]+)([KMG]?i?B);[^;]*;[^;]*; (.*)$", report, re.MULTILINE)
    return tuple((int(float(size) * units[unit]), shapes) for size, unit, shapes in rows[:count])
