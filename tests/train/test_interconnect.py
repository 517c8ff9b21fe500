"""Links of a group of chips: by the grid, its wraparound links, and where the group stands on it."""

from itertools import product
from types import SimpleNamespace

import pytest

from train.planning.chips import V4, V5E, V5P, V6E, V7X, Chip
from train.planning.interconnect import links, slice_shape


def grid(*shape: int) -> list[tuple[int, ...]]:
    return list(product(*map(range, shape)))


@pytest.mark.parametrize(
    ("chip", "shape", "wraps"),
    [
        (V5E, (8, 8, 1), (False, False, False)),
        (V5E, (8, 16, 1), (False, True, False)),
        (V6E, (16, 16, 1), (True, True, False)),
        (V5P, (2, 2, 1), (False, False, False)),
        (V5P, (2, 4, 4), (False, False, False)),  # no whole cube: nothing to switch optically
        (V5P, (4, 4, 4), (True, True, True)),
        (V4, (4, 8, 12), (True, True, True)),
        (V7X, (2, 2, 4), (False, False, False)),
    ],
)
def test_axes_are_rings_only_in_large_slices(chip: Chip, shape: tuple[int, ...], wraps: tuple[bool, ...]):
    assert chip.wraps(shape) == wraps


@pytest.mark.parametrize(
    ("chip", "shape", "count"),
    [
        (V5E, (1, 1, 1), 0),
        (V5E, (2, 2, 1), 2),  # an axis of two chips is one link
        (V5E, (2, 4, 1), 2),
        (V5E, (8, 8, 1), 2),  # of a chip in the corner
        (V6E, (8, 16, 1), 3),
        (V6E, (16, 16, 1), 4),
        (V5P, (2, 2, 1), 2),
        (V5P, (2, 4, 4), 3),
        (V5P, (4, 4, 4), 6),
    ],
)
def test_a_whole_slice_is_as_slow_as_its_corner(chip: Chip, shape: tuple[int, ...], count: float):
    assert links(grid(*shape), shape, chip) == count


def test_a_group_has_the_links_along_its_own_axes():
    cube = (4, 4, 4)
    plane = [(0, y, z) for y, z in grid(4, 4)]
    pair, ring, every_second = [(0, 0, 0), (0, 0, 1)], [(0, 0, z) for z in range(4)], [(0, 0, 0), (0, 0, 2)]
    assert links(plane, cube, V5P) == 4 and links(ring, cube, V5P) == 2 and links(pair, cube, V5P) == 1
    assert links(every_second, cube, V5P) == 1  # two ways round, each shared with the chips between
    assert links([(0, 0, 0), (0, 2, 0)], (8, 8, 1), V5E) == 0.5
    assert links([(0, 0, 0), (1, 1, 0)], (8, 8, 1), V5E) == 1  # through another chip
    assert links([(0, 0, 3), (0, 0, 0)], cube, V5P) == 1 and links([(0, 0, 0)] * 2, cube, V5P) == 0


def test_the_shape_of_a_slice():
    devices = [SimpleNamespace(coords=[x, y, 0]) for x, y in grid(2, 4)]
    assert slice_shape(devices) == (2, 4, 1)
