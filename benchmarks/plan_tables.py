"""The tables of docs/tpu.md, from the figures of tests/train/gates.json: `python -m benchmarks.plan_tables`.

Memory and bytes sent are of compiled programs; the estimates follow from them without compiling anything again, for
meshes of data-parallel parts alone, whose collectives span the whole slice. `--write` puts the estimated MFU back into
the file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import atomic_write
from train.config import RunConfig
from train.planning.chips import GIB
from train.planning.compilation import Compiled
from train.planning.hlo import Collective
from train.planning.plan import report_generation, report_step, with_sizes
from train.planning.topology import topology_devices
from train.recipes import RECIPES

GATES = Path(__file__).parents[1] / "tests" / "train" / "gates.json"
COLUMNS = ("sequences a chip", "HBM a chip, GiB", "of", "a chip sends, GiB", "estimated step, s", "estimated MFU")


def is_tabled(gate: dict[str, Any]) -> bool:
    """Returns True if `recomputed` serves the gate: one program, on a mesh of data-parallel parts alone."""
    return not any(option in gate["plan"] for option in ("--mesh.tensor", "--mode reinforce"))


def recomputed(gate: dict[str, Any]) -> dict[str, Any]:
    """The report of a gate's program, without compiling it. gate: its options, `hbm_bytes_per_chip` and
    `sent_bytes_per_chip`."""
    options = gate["plan"].split()
    recipe = options[options.index("--recipe") + 1] if "--recipe" in options else "pretrain_stage2"
    default = RECIPES[recipe]

    def report(
        *,
        topology: str,
        recipe: str = "pretrain_stage2",
        mode: Literal["train", "generate"] = "train",
        preset: str | None = None,
        batch_size: int | None = None,
        tokens: int | None = None,
        int8: tuple[str, ...] = (),
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
    ) -> dict[str, Any]:
        config = with_sizes(config, preset, slices=1, batch=batch_size, tokens=tokens, chunks=None)
        mesh = make_mesh(devices=topology_devices(topology))
        compiled = Compiled(
            None, gate["hbm_bytes_per_chip"], 0, 0, (), exchange(gate["sent_bytes_per_chip"], mesh), 0.0
        )
        data = config.data
        if mode == "train":
            return report_step(config, mesh, compiled)
        sizes = {"prompts": data.batch_size, "slots": data.tokens, "chunks": data.chunks}
        model = dataclasses.replace(config.model_config(), int8=int8)
        return report_generation(model, mesh, compiled, compiled, **sizes, cache=0)

    return tyro.cli(report, args=options)


def exchange(sent: float, mesh: Mesh) -> tuple[Collective, ...]:
    """All that a chip sends as one collective of the whole slice, or of each replica in it."""
    if not sent:
        return ()
    devices = mesh.shape["fsdp"]
    groups = tuple(tuple(range(first, first + devices)) for first in range(0, mesh.size, devices))
    return (Collective("all-gather", "", (), sent * devices / (devices - 1), devices, 1, groups),)


def row(gate: dict[str, Any], report: dict[str, Any]) -> str:
    """A line of the table, in Markdown."""
    options = gate["plan"].replace("language_model.layers.*_proj", "'language_model.layers.*_proj'")
    cells = [
        f"`{options}`",
        f"{report['sequences_per_chip']:g} × {report['tokens_per_sequence']:,}",
        f"{report['hbm_bytes_per_chip'] / GIB:.2f}",
        f"{report['hbm_usable_bytes_per_chip'] / GIB:.2f}",
        f"{gate['sent_bytes_per_chip'] / GIB:.1f}" if gate["sent_bytes_per_chip"] else "0",
        f"{report['estimated_step_seconds']:.2f}",
        f"{report['estimated_mfu']:.1%}",
    ]
    if "calibrated_mfu" in report:
        least, most = report["calibrated_mfu"]
        cells[-1] += f" ({100 * least:.0f} to {100 * most:.0f})"
    return f"| {' | '.join(cells)} |"


def run(write: bool = False) -> None:
    """Prints the table.

    Args:
        write: Put the estimated MFU of each into the file.
    """
    gates: dict[str, dict[str, Any]] = json.loads(GATES.read_text())
    print(f"| {' | '.join(('options of `plan`', *COLUMNS))} |")
    print("|" + "---|" * (1 + len(COLUMNS)))
    for gate in filter(is_tabled, gates.values()):
        report = recomputed(gate)
        gate["estimated_mfu"] = report["estimated_mfu"]
        print(row(gate, report), flush=True)
    if write:
        atomic_write(GATES, json.dumps(gates, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    run_cli(lambda: tyro.cli(run))
