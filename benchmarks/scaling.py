"""How a pretraining step of the 8B scales from 8 to 1024 chips, on paper: `python -m benchmarks.scaling`.

The same global batch of 1024 sequences of 8192 tokens on ever more v5p chips, compiled ahead of time; no TPU is needed,
only libtpu, and some minutes for each program. Time and MFU are the estimates of `python -m train plan`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from moss_audio_jax.cli import run_door
from moss_audio_jax.info import align
from moss_audio_jax.paths import write_whole
from train.chips import GIB
from train.config import RECIPES
from train.plan import plan_step, topology_devices, with_sizes
from train.plots import require_matplotlib

SEQUENCES, TOKENS = 1024, 8192
# Microbatches as memory asks for, and replicas: 256 is the most parts that all dimensions can be cut into.
LAYOUTS = {"v5p:2x2x2": (16, 1), "v5p:4x4x4": (2, 1), "v5p:4x8x8": (1, 1), "v5p:8x8x16": (1, 4)}
COLUMNS = ("chips", "replicas", "microbatches", "sequences a chip", "HBM, GiB", "a chip sends, GiB", "step, s", "MFU")


def compiled(topology: str, microbatches: int, replicas: int) -> dict[str, Any]:
    """What stands in the table of one topology."""
    config = with_sizes(RECIPES["pretrain_stage2"], "8b", slices=1, batch=SEQUENCES, tokens=TOKENS, chunks=None)
    mesh = dataclasses.replace(config.mesh, replica=replicas)
    devices = topology_devices(topology)
    report = plan_step(dataclasses.replace(config, microbatches=microbatches, mesh=mesh), devices)
    return {
        "chips": len(devices),
        "replicas": replicas,
        "microbatches": microbatches,
        "hbm_gib": report["hbm_bytes_per_chip"] / GIB,
        "sent_gib": sum(sums["sent_bytes_per_chip"] for sums in report["collectives"].values()) / GIB,
        "computing": report["estimated_compute_seconds"],
        "communicating": report["estimated_communication_seconds"],
        "mfu": report["estimated_mfu"],
    }


def run(results: Path = Path("scaling.json"), plot: Path = Path("scaling.png")) -> None:
    """Compiles what `results` does not hold yet, prints the table and draws it.

    Args:
        results: Figures by topology, read and added to.
        plot: A PNG file.
    """
    require_matplotlib()
    found = json.loads(results.read_text()) if results.exists() else {}
    for topology, layout in LAYOUTS.items():
        if topology not in found:
            print(f"compiling for {topology}", flush=True)
            found[topology] = compiled(topology, *layout)
            write_whole(results, json.dumps(found, indent=2) + "\n")
    rows = [found[topology] for topology in LAYOUTS]
    print(align([COLUMNS, *map(cells, rows)]))
    draw(rows, plot)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    step = row["computing"] + row["communicating"]
    return (
        str(row["chips"]),
        str(row["replicas"]),
        str(row["microbatches"]),
        f"{SEQUENCES / row['chips']:g}",
        f"{row['hbm_gib']:.1f}",
        f"{row['sent_gib']:.1f}",
        f"{step:.2f}",
        f"{row['mfu']:.1%}",
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = [row["chips"] for row in rows]
    figure, (times, mfu, memory) = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for part, color in (("computing", "#0072B2"), ("communicating", "#D55E00")):
        times.loglog(chips, [row[part] for row in rows], "o-", color=color, label=part)
    times.set_title("seconds of a step (estimate)")
    times.legend(frameon=False)
    mfu.semilogx(chips, [100 * row["mfu"] for row in rows], "o-", color="#009E73")
    mfu.set(title="MFU, % (estimate)", ylim=(0, 70))
    memory.semilogx(chips, [row["hbm_gib"] for row in rows], "o-", color="#CC79A7", label="HBM")
    memory.semilogx(chips, [row["sent_gib"] for row in rows], "o-", color="#D55E00", label="sent in a step")
    memory.set(title="GiB a chip")
    memory.legend(frameon=False)
    for axes in (times, mfu, memory):
        axes.set_xticks(chips, [str(count) for count in chips])
        axes.minorticks_off()
        axes.set_xlabel("v5p chips")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_door(lambda: tyro.cli(run))
