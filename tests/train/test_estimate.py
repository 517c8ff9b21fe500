"""Rooflines: each part takes the longer of computing and memory, and communication comes on top."""

from dataclasses import replace
from itertools import product

import pytest

from train.planning.chips import V5E, V5P, V7X
from train.planning.estimate import Slice, by_kind, computing_seconds, speed
from train.planning.hlo import Collective

EIGHT = Slice(V5E, (2, 4, 1), tuple(product(range(2), range(4), range(1))), devices=8, cores=1)
ALL = (tuple(range(8)),)


def test_a_part_takes_the_longer_of_computing_and_memory():
    flops = {"head": 0.85 * 197e12, "llm_attention": 0.5 * 197e12, "adapter": 0.0}
    assert computing_seconds(V5E, flops, {}) == pytest.approx({"head": 1.0, "llm_attention": 1.0, "adapter": 0.0})
    moved = {"head": 2 * 819e9, "llm_attention": 0.5 * 819e9}
    assert computing_seconds(V5E, flops, moved) == pytest.approx({"head": 2.0, "llm_attention": 1.0, "adapter": 0.0})


def test_a_collective_takes_the_links_of_its_groups():
    whole = Collective("all-gather", "", (), payload=800e9, devices=8, times=1, groups=ALL)
    assert EIGHT.seconds(whole) == pytest.approx(700e9 / 100e9)
    pairs = Collective("all-gather", "", (), 100e9, 2, times=3, groups=((0, 4), (1, 5), (2, 6), (3, 7)))
    assert EIGHT.seconds(pairs) == pytest.approx(3 * 50e9 / 50e9)
    cube = Slice(V5P, (4, 4, 4), tuple(product(range(4), repeat=3)), devices=64, cores=2)
    ring = Collective("collective-permute", "", (), 600e9, 64, times=1, groups=(tuple(range(64)),))
    assert cube.seconds(ring) == pytest.approx(600e9 / 200e9)  # two of its six links
    assert cube.seconds(replace(ring, kind="all-to-all")) == pytest.approx(600e9 * 63 / 64 / 600e9)
    between = Collective("all-reduce", "", (), 3.125e9, 2, times=2, between_slices=True)
    assert EIGHT.seconds(between) == pytest.approx(2.0)


def test_half_a_chip_has_half_its_links():
    cores = Slice(V7X, (2, 1, 1), ((0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)), devices=4, cores=1)
    exchange = Collective("all-gather", "", (), 4e11, 4, times=1, groups=((0, 1, 2, 3),))
    assert cores.seconds(exchange) == pytest.approx(3e11 / 50e9)
    within = Collective("all-gather", "", (), 4e11, 2, times=1, groups=((0, 1), (2, 3)))
    assert cores.seconds(within) == 0
    report = speed(
        cores, [], model_flops={"head": 2 * 0.85 * 2307e12}, executed_flops={"head": 2 * 0.85 * 2307e12}, moved={}
    )
    assert report["estimated_step_seconds"] == pytest.approx(1.0) and report["estimated_mfu"] == pytest.approx(0.85)


def test_a_report():
    place = Slice(V5P, (4, 4, 4), tuple(product(range(4), repeat=3)), devices=128, cores=2)
    found = [
        Collective("all-gather", "a", ("bf16[2]",), 64e9, 64, times=1, groups=(tuple(range(64)),)),
        Collective("all-reduce", "b", ("f32[4]",), 6.25e9, 2, times=1, between_slices=True),
    ]
    flops = {"head": 128 * 459e12}
    report = speed(
        place, found, model_flops=flops, executed_flops={"head": 0.85 * flops["head"]}, moved={}, updated=2765e9
    )
    assert report["estimated_compute_seconds"] == pytest.approx(1.0) and report["estimated_update_seconds"] == 1.0
    assert report["estimated_seconds_between_slices"] == pytest.approx(1.0)
    assert report["estimated_communication_seconds"] == pytest.approx(63e9 / 600e9 + 1.0)
    assert report["estimated_mfu"] == pytest.approx(1 / report["estimated_step_seconds"])
    assert list(by_kind(found)) == ["all-gather", "all-reduce between slices"]
