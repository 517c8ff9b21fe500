"""Estimated step time and MFU of a program: a roofline of compute, memory and communication.

computing       per part of the model, the longer of two times: executed FLOPs (with padding and recomputation) at an
                assumed share of the peak, and bytes moved by its matmuls at the HBM bandwidth
updating        memory traffic of gradients, master parameters and moments
communicating   each collective over the links that its group can use (`interconnect`), or between slices over the
                data-center network; assumed not to overlap, since most collectives of these programs are synchronous
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from train.planning.chips import Chip
from train.planning.hlo import Collective
from train.planning.interconnect import Coordinates, links

ASSUMPTIONS = {
    "matmul_efficiency": 0.85,  # share of peak FLOP/s of large bfloat16 matmuls
    "attention_efficiency": 0.5,  # of attention kernels
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that a program runs on.

    shape: chips along each axis of one slice. coordinates: of the first slice's devices, in the order of the mesh.
    devices: of all slices. cores: of one device.
    """

    chip: Chip
    shape: Coordinates
    coordinates: tuple[Coordinates, ...]
    devices: int
    cores: int

    @property
    def share(self) -> float:
        """Devices are this share of a chip: 1, or 1/2 on a TPU7x."""
        return self.cores / self.chip.cores

    def seconds(self, collective: Collective) -> float:
        """Estimates the seconds of all executions of a collective per run.

        XLA splits gathers overlapped with matmuls into permutes around a ring, half in each direction: these use at
        most two links.
        """
        if collective.between_slices:
            return collective.sent / (self.share * self.chip.dcn_bandwidth)
        groups = {frozenset(self.coordinates[device] for device in group) for group in collective.groups}
        counts = [count for group in groups if (count := links(group, self.shape, self.chip))]
        if not counts:
            return 0.0  # within chips
        used = min(2.0, *counts) if collective.kind == "collective-permute" else min(counts)
        return collective.sent / (self.share * used * self.chip.ici_link_bandwidth)


def computing_seconds(chip: Chip, flops: Mapping[str, float], moved: Mapping[str, float]) -> dict[str, float]:
    """Estimates compute seconds by part. flops, moved: FLOPs and bytes of HBM traffic of one chip, by part."""

    def seconds(part: str) -> float:
        kind = "attention_efficiency" if part == "llm_attention" else "matmul_efficiency"
        return max(flops[part] / (chip.peak_flops * ASSUMPTIONS[kind]), moved.get(part, 0.0) / chip.hbm_bandwidth)

    return {part: seconds(part) for part in flops}


def speed(
    place: Slice,
    collectives: Sequence[Collective],
    *,
    model_flops: dict[str, float],
    executed_flops: Mapping[str, float],
    moved: Mapping[str, float],
    updated: float = 0.0,
) -> dict[str, Any]:
    """Returns the estimates of a report.

    model_flops, executed_flops: of all devices by part; the latter with padding and recomputation.
    moved: HBM traffic of one device in bytes, by part. updated: the same of the optimizer's update.
    """
    chip, chips = place.chip, place.devices * place.share
    on_chip = {part: flops / chips for part, flops in executed_flops.items()}
    in_memory = {part: size / place.share for part, size in moved.items()}
    by_part = computing_seconds(chip, on_chip, in_memory)
    unlimited = sum(computing_seconds(chip, on_chip, {}).values())
    updating = updated / (place.share * chip.hbm_bandwidth)
    within = sum(place.seconds(collective) for collective in collectives if not collective.between_slices)
    between = sum(place.seconds(collective) for collective in collectives if collective.between_slices)
    step = sum(by_part.values()) + updating + within + between
    total = sum(model_flops.values())
    return {
        "model_flops": total,
        "model_flops_by_part": model_flops,
        "collectives": by_kind(collectives),
        "hbm_bytes_moved_per_chip": sum(in_memory.values()) + updated / place.share,
        "estimated_compute_seconds": sum(by_part.values()),
        "estimated_memory_bound_seconds": sum(by_part.values()) - unlimited,
        "estimated_update_seconds": updating,
        "estimated_communication_seconds": within + between,
        "estimated_seconds_between_slices": between,
        "estimated_step_seconds": step,
        "estimated_mfu": total / (chip.peak_flops * chips * step),
        "assumptions": ASSUMPTIONS,
    }


def by_kind(found: Sequence[Collective]) -> dict[str, dict[str, Any]]:
    """Sums collectives by kind: executions, payload bytes, bytes sent per chip, and their arrays, largest first."""
    kinds: dict[str, dict[str, Any]] = {}
    for collective in sorted(found, key=lambda collective: -collective.sent):
        kind = f"{collective.kind} between slices" if collective.between_slices else collective.kind
        sums = kinds.setdefault(kind, {"count": 0, "bytes": 0, "sent_bytes_per_chip": 0, "arrays": []})
        sums["count"] += collective.times
        sums["bytes"] += collective.times * collective.payload
        sums["sent_bytes_per_chip"] += collective.sent
        sums["arrays"] += [shape for shape in collective.shapes if shape not in sums["arrays"]]
    return kinds
