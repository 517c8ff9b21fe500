"""How fast chips of a slice send to each other: the links that a collective can use, and their bandwidth.

Chips stand on a grid of two or three axes, each linked to its neighbours; the axes of large slices are closed to rings
(`Chip.wraps`). A collective of a group of chips uses the links along the axes that the group spans, and is as slow as
the chip with the fewest of them: a corner of an open 8x8 has two links, any chip of the closed 16x16 four.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from train.planning.chips import Chip

Coordinates = tuple[int, ...]


def slice_shape(devices: Iterable[Any]) -> Coordinates:
    """Chips along each axis of the slice that these devices fill."""
    return tuple(max(sizes) + 1 for sizes in zip(*(device.coords for device in devices), strict=True))


def links(group: Iterable[Coordinates], shape: Coordinates, chip: Chip) -> float:
    """Links that every chip of a group can use at once; 0 for a single chip, whose devices exchange nothing over links.

    Chips of a group that are no neighbours share the links between them with the groups of those that stand there. A
    chip with no other on its axes sends through others: one link.
    """
    chips = set(group)
    if len(chips) < 2:
        return 0.0
    counts: dict[Coordinates, float] = dict.fromkeys(chips, 0.0)
    for axis, (size, closed) in enumerate(zip(shape, chip.wraps(shape), strict=True)):
        lines: dict[Coordinates, list[Coordinates]] = defaultdict(list)
        for member in chips:
            lines[member[:axis] + member[axis + 1 :]].append(member)
        for line in lines.values():
            along = _links_along([member[axis] for member in line], size, closed)
            for member in line:
                counts[member] += along
    return min(counts.values()) or 1.0


def _links_along(positions: Sequence[int], size: int, closed: bool) -> float:
    """Links of the chip with the fewest, of those at these positions of an axis."""
    if len(positions) < 2:
        return 0.0
    ordered = sorted(positions)
    gaps = [after - before for before, after in pairwise(ordered)]
    if closed:
        gaps.append(size - ordered[-1] + ordered[0])
        if len(set(gaps)) == 1:
            return 2.0 / gaps[0]  # a ring
        gaps.remove(max(gaps))
    return 1.0 / max(gaps)
