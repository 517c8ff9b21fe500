"""Links between chips of a slice that a collective can use.

Chips are on a grid of two or three axes and linked to their neighbours; axes of large slices are rings (`Chip.wraps`).
A collective uses the links along the axes that its group spans. The chip with the fewest links limits it: a corner of
an open 8x8 slice has two, every chip of the closed 16x16 has four.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from train.planning.chips import Chip

Coordinates = tuple[int, ...]


def slice_shape(devices: Iterable[Any]) -> Coordinates:
    """Number of chips along each axis of the slice that these devices fill."""
    return tuple(max(sizes) + 1 for sizes in zip(*(device.coords for device in devices), strict=True))


def links(group: Iterable[Coordinates], shape: Coordinates, chip: Chip) -> float:
    """Returns the number of links that every chip of a group can use at once; 0 for a single chip.

    Chips of a group that are not neighbours share the links between them with the groups of the chips in between. A
    chip without another of its group on any of its axes has one link, through other chips.
    """
    chips = set(group)
    if len(chips) < 2:
        return 0.0
    counts: dict[Coordinates, float] = dict.fromkeys(chips, 0.0)
    # Per axis: split the group into lines along it, and add the links of each line to its chips.
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
    """Links along one axis of the chip with the fewest, for chips at these positions."""
    if len(positions) < 2:
        return 0.0
    ordered = sorted(positions)
    gaps = [after - before for before, after in pairwise(ordered)]
    if closed:
        gaps.append(size - ordered[-1] + ordered[0])
        if len(set(gaps)) == 1:
            return 2.0 / gaps[0]  # evenly spaced: a ring
        gaps.remove(max(gaps))
    return 1.0 / max(gaps)
