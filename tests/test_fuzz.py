"""Damaged checkpoints are read right or refused in a sentence: those found so far, and thousands of new ones."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import checkpoints
from tests.fuzz.run import CORPUS, Bench, Fuzzer, Input

FOUND = [Input.from_json(line) for line in CORPUS.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    with checkpoints.remembered_shapes():
        yield Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("number", range(len(FOUND)), ids=lambda number: f"{number}-{FOUND[number].kind}")
def test_what_was_found_stays_mended(number, bench):
    assert bench.try_input(FOUND[number], "0")[1] is None


def test_new_inputs_are_read_right_or_refused():
    fuzzer = Fuzzer(None, seed=1, inputs=12_000, processes=1, seconds=float("inf"))
    fuzzer.run()
    assert not fuzzer.defects
    kinds = {kind for kind, _ in fuzzer.counts}
    assert kinds == {kind.name for kind in checkpoints.KINDS}


def test_an_input_follows_from_its_seed_and_number(bench):
    inputs = [bench.draw(3, number) for number in range(50)]
    assert inputs == [bench.draw(3, number) for number in range(50)]
    assert len({found.content for found in inputs}) > 40
    assert [Input.from_json(found.to_json()) for found in inputs] == inputs


def fails(directory: Path, rng: random.Random) -> None:
    raise KeyError("a key")


def reads_outside(directory: Path, rng: random.Random) -> None:
    (directory / ".." / "outside" / "config.json").read_text("utf-8")


def reads_outside_in_native_code(directory: Path, rng: random.Random) -> None:
    np.fromfile(directory.parent / "outside" / "config.json", np.uint8)


def reads_wrong(directory: Path, rng: random.Random) -> None:
    raise AssertionError("eos_ids is ('x',)")


@pytest.mark.parametrize(
    ("read", "defect"),
    [
        (fails, "KeyError in test_fuzz.py:fails"),
        (reads_wrong, "AssertionError"),
        (reads_outside, "opened outside"),
        (reads_outside_in_native_code, "opened outside"),
    ],
)
def test_a_defect_is_seen(read, defect, bench, monkeypatch):
    found = next(found for found in map(bench.draw, [0] * 100, range(100)) if found.kind == "config.json")
    kind = bench.kinds["config.json"]
    monkeypatch.setitem(bench.kinds, "config.json", type(kind)(*[*vars(kind).values()][:-1], read))
    assert defect in bench.try_input(found, "0")[1]
