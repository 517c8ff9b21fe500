"""Scaling of a pretraining step of the 8B from 8 to 1024 chips, estimated: `python -m benchmarks.scaling`.

The same global batch of 1024 sequences of 8192 tokens on ever more v5p chips, compiled ahead of time; no TPU is needed,
only libtpu, and some minutes for each program. benchmarks/scaling.json keeps memory and bytes sent of the compiled
programs; time and MFU are the estimates that `python -m train plan` makes of them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro
from jax.sharding import Mesh

from benchmarks.plan_tables import exchange
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.pictures import require_matplotlib
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import atomic_write
from moss_audio_jax.text_table import align
from train.config import RunConfig
from train.planning.chips import GIB, V5P
from train.planning.compilation import Compiled
from train.planning.plan import plan_step, report_step, with_sizes
from train.planning.topology import topology_devices
from train.recipes import RECIPES

SEQUENCES, TOKENS = 1024, 8192
# Microbatches as memory asks for, and replicas: 256 is the most parts that all dimensions can be cut into.
LAYOUTS = {"v5p:2x2x2": (16, 1), "v5p:4x4x4": (2, 1), "v5p:4x8x8": (1, 1), "v5p:8x8x16": (1, 4)}
COLUMNS = ("chips", "replicas", "microbatches", "sequences a chip", "HBM, GiB", "a chip sends, GiB", "step, s", "MFU")
RESULTS = Path(__file__).with_name("scaling.json")


def program(microbatches: int, replicas: int) -> RunConfig:
    config = with_sizes(RECIPES["pretrain_stage2"], "8b", slices=1, batch=SEQUENCES, tokens=TOKENS, chunks=None)
    mesh = dataclasses.replace(config.mesh, replica=replicas)
    return dataclasses.replace(config, microbatches=microbatches, mesh=mesh)


def compiled(topology: str) -> dict[str, float]:
    """Memory and bytes sent of one topology's program."""
    report = plan_step(program(*LAYOUTS[topology]), topology_devices(topology))
    sent = sum(sums["sent_bytes_per_chip"] for sums in report["collectives"].values())
    return {"hbm_gib": report["hbm_bytes_per_chip"] / GIB, "sent_gib": sent / GIB}


def estimated(topology: str, found: dict[str, float]) -> dict[str, Any]:
    """Figures of one topology in the table, from its compiled program."""
    microbatches, replicas = LAYOUTS[topology]
    mesh: Mesh = make_mesh(replica=replicas, devices=topology_devices(topology))
    sent = exchange(found["sent_gib"] * GIB, mesh)
    report = report_step(program(microbatches, replicas), mesh, Compiled(None, 0, 0, 0, (), sent, 0.0))
    return found | {
        "chips": mesh.size,
        "replicas": replicas,
        "microbatches": microbatches,
        "computing": report["estimated_compute_seconds"],
        "updating": report["estimated_update_seconds"],
        "communicating": report["estimated_communication_seconds"],
        "step": report["estimated_step_seconds"],
        "mfu": report["estimated_mfu"],
        "calibrated": report["calibrated_mfu"],
    }


def run(results: Path = RESULTS, plot: Path = Path("scaling.png")) -> None:
    """Compiles what `results` does not hold yet, prints the table and draws it.

    Args:
        results: Figures of compiled programs by topology, read and added to.
        plot: A PNG file.
    """
    require_matplotlib()
    found = json.loads(results.read_text()) if results.exists() else {}
    for topology in LAYOUTS:
        if topology not in found:
            print(f"compiling for {topology}", flush=True)
            found[topology] = compiled(topology)
            atomic_write(results, json.dumps(found, indent=2) + "\n")
    rows = [estimated(topology, found[topology]) for topology in LAYOUTS]
    print(align([COLUMNS, *map(cells, rows)]))
    draw(rows, plot)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    least, most = row["calibrated"]
    return (
        str(row["chips"]),
        str(row["replicas"]),
        str(row["microbatches"]),
        f"{SEQUENCES / row['chips']:g}",
        f"{row['hbm_gib']:.1f}",
        f"{row['sent_gib']:.1f}",
        f"{row['step']:.2f}",
        f"{row['mfu']:.1%} ({100 * least:.0f} to {100 * most:.0f})",
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Four panels over the number of chips: seconds, MFU, memory with its limit, and bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = [row["chips"] for row in rows]
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    times, mfu, memory, sent = panels
    for part, color in (("computing", "#0072B2"), ("communicating", "#D55E00")):
        times.loglog(chips, [row[part] for row in rows], "o-", color=color, label=part)
    times.set_title("seconds of a step (estimate)")
    times.legend(frameon=False, loc="upper right")
    ends = [[100 * row["calibrated"][end] for row in rows] for end in (0, 1)]
    mfu.fill_between(chips, *ends, color="#009E73", alpha=0.2, linewidth=0, label="calibrated")
    mfu.semilogx(chips, [100 * row["mfu"] for row in rows], "o-", color="#009E73", label="estimate")
    mfu.set(title="MFU, %", ylim=(0, 75))
    mfu.legend(frameon=False, loc="lower left")
    memory.semilogx(chips, [row["hbm_gib"] for row in rows], "o-", color="#CC79A7")
    limit = V5P.usable_hbm_bytes / GIB
    memory.axhline(limit, color="black", linestyle="--", linewidth=1)
    memory.annotate(f"usable: {limit:.1f}", (chips[-1], limit), ha="right", va="bottom")
    memory.set(title="HBM, GiB a chip", ylim=(0, 1.15 * limit))
    sent.semilogx(chips, [row["sent_gib"] for row in rows], "o-", color="#D55E00")
    sent.set(title="sent in a step, GiB a chip", ylim=(0, None))
    for axes in panels:
        axes.set_xticks(chips, [str(count) for count in chips])
        axes.minorticks_off()
        axes.set_xlabel("v5p chips")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run))
