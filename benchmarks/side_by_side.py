"""Two sides of a benchmark, run in turns: what the rows of every table here are."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from moss_audio_jax.text_table import align

Timed = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """ratio: PyTorch's time over ours; above 1 the port is faster."""

    name: str
    ours_seconds: float
    pytorch_seconds: float
    ratio: float

    @classmethod
    def of_medians(cls, name: str, ours: Iterable[float], pytorch: Iterable[float]) -> "Comparison":
        mine, theirs = statistics.median(ours), statistics.median(pytorch)
        return cls(name, mine, theirs, theirs / mine)


def compare(
    name: str,
    ours: Timed,
    pytorch: Timed,
    repeats: int,
    *,
    check: Callable[..., None] = lambda ours, pytorch: None,
) -> Comparison:
    """Medians of interleaved runs, after one of each that is not counted (it compiles).

    check: is given the results of each pair of runs, and raises if they don't agree.
    """
    times: dict[Timed, list[float]] = {ours: [], pytorch: []}
    for repeat in range(repeats + 1):
        results = []
        for run, seconds in times.items():
            start = time.perf_counter()
            results.append(jax.block_until_ready(run()))
            if repeat:
                seconds.append(time.perf_counter() - start)
        check(*results)
    return Comparison.of_medians(name, *times.values())


def report(rows: Iterable[Comparison], unit: str, json_file: Path | None) -> list[Comparison]:
    """Prints each row's ratio as it is measured, then the table; writes the rows as a JSON list, if asked to."""
    measured = []
    for row in rows:
        print(f"{row.name}: {row.ratio:.2f}", file=sys.stderr, flush=True)
        measured.append(row)
    cells = [("", f"ours, {unit}", f"PyTorch, {unit}", "PyTorch / ours")]
    for row in measured:
        cells.append((row.name, f"{row.ours_seconds:.4f}", f"{row.pytorch_seconds:.4f}", f"{row.ratio:.2f}"))
    print(align(cells))
    if json_file:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in measured], indent=2) + "\n", "utf-8")
    return measured
