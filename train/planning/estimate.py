"""How fast a program might be: a roofline over what it computes, moves through memory and communicates.

computing       each part of the model takes the longer of two times: its FLOPs (model FLOPs, padding and what is
                recomputed) at the assumed share of the peak, and the bytes that its products move at the memory's rate
updating        gradients, masters and moments, read and written once: memory alone
communicating   each collective over the links that its group can use (`interconnect`), or between slices over the data
                centre's network; nothing of it is hidden, since most collectives in these programs are synchronous
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from train.planning.chips import Chip
from train.planning.hlo import Collective
from train.planning.interconnect import Coordinates, links

ASSUMPTIONS = {
    "matmul_efficiency": 0.85,  # share of the peak that large bfloat16 matmuls reach
    "attention_efficiency": 0.5,  # and that of attention kernels
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """The chips that a program runs on: their kind, their grid, and where each device of the mesh stands on it.

    coordinates: of the devices of the first slice, in the mesh's order. devices: of all slices.
    """

    chip: Chip
    shape: Coordinates
    coordinates: tuple[Coordinates, ...]
    devices: int
    cores: int  # of a device

    @property
    def share(self) -> float:
        """The part of a chip that a device is: one of a TPU7x is half of it."""
        return self.cores / self.chip.cores

    def seconds(self, collective: Collective) -> float:
        """Of all the times that it runs. XLA cuts gathers beside matmuls into permutes round a ring, half of them in
        each direction: a chip uses two links at most."""
        if collective.between_slices:
            return collective.sent / (self.share * self.chip.dcn_bandwidth)
        groups = {frozenset(self.coordinates[device] for device in group) for group in collective.groups}
        counts = [count for group in groups if (count := links(group, self.shape, self.chip))]
        if not counts:
            return 0.0  # within chips
        used = min(2.0, *counts) if collective.kind == "collective-permute" else min(counts)
        return collective.sent / (self.share * used * self.chip.ici_link_bandwidth)


def computing_seconds(chip: Chip, flops: Mapping[str, float], moved: Mapping[str, float]) -> dict[str, float]:
    """By part. flops, moved: FLOPs and bytes of memory of one chip, by part."""

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
    """The estimates of a report. executed_flops: by part, with padding and what is recomputed; all devices' like
    model_flops. moved, updated: bytes of memory on one device, by part of the model and in the optimizer's update."""
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
    """Of each kind how many run, the bytes they hold, those that a chip sends, and which arrays make most of them."""
    kinds: dict[str, dict[str, Any]] = {}
    for collective in sorted(found, key=lambda collective: -collective.sent):
        kind = f"{collective.kind} between slices" if collective.between_slices else collective.kind
        sums = kinds.setdefault(kind, {"count": 0, "bytes": 0, "sent_bytes_per_chip": 0, "arrays": []})
        sums["count"] += collective.times
        sums["bytes"] += collective.times * collective.payload
        sums["sent_bytes_per_chip"] += collective.sent
        sums["arrays"] += [shape for shape in collective.shapes if shape not in sums["arrays"]]
    return kinds
