"""The order of examples: shares, square roots of sizes, every example once an epoch, the same for everyone."""

import collections
import json
import math

import numpy as np
import pytest

from moss_audio_jax.errors import MossAudioError
from train.data.manifest import Example
from train.data.mixture import SHUFFLE_WINDOW, ExampleOrder, Group, Source, facts_before, source_weights


def source(name: str, size: int, **options: dict) -> Source:
    return Source(name, [Example(f"{name} {number}", text="text") for number in range(size)], **options)


GROUPS = (
    Group("asr", 0.3, (source("small", 25), source("large", 100))),
    Group("caption", 0.4, (source("captions", 60),)),
    Group("text", 0.3, (source("texts", 9),)),
)


def test_weights_are_group_shares_times_square_roots():
    weights = {source.name: weight for _, source, weight in source_weights(GROUPS)}
    assert weights == pytest.approx({"small": 0.1, "large": 0.2, "captions": 0.4, "texts": 0.3})
    doubled = [Group(group.name, 2 * group.share, group.sources) for group in GROUPS]
    assert [weight for *_, weight in source_weights(doubled)] == pytest.approx(list(weights.values()))


def test_order_holds_the_shares_overall_and_for_every_reader_of_some():
    order = ExampleOrder(GROUPS, seed=3)
    count = 2 * SHUFFLE_WINDOW
    names = [order[number].source.name for number in range(count)]
    expected = {source.name: weight for _, source, weight in source_weights(GROUPS)}
    for step, tolerance in ((1, 0.01), (8, 0.05)):
        for first in range(step):
            found = collections.Counter(names[first::step])
            for name, weight in expected.items():
                assert found[name] / len(names[first::step]) == pytest.approx(weight, abs=tolerance)


def test_every_example_comes_once_an_epoch_in_a_new_order():
    order = ExampleOrder([Group("all", 1, (source("one", SHUFFLE_WINDOW),))], seed=0)
    epochs = [[order[epoch * SHUFFLE_WINDOW + number].index for number in range(SHUFFLE_WINDOW)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(SHUFFLE_WINDOW))
    same = sum(a == b for a, b in zip(*epochs, strict=True))
    assert same < 20 and sum(a == b for a, b in enumerate(epochs[0])) < 20


def test_order_depends_on_the_seed_alone():
    def drawn(seed: int) -> list[tuple[str, int, float]]:
        order = ExampleOrder(GROUPS, seed)
        return [(order[n].source.name, order[n].index, order[n].rng.random()) for n in (5, 3, 70_000, 10**12)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len({value for *_, value in drawn(1)}) == 4  # every example draws for itself
    assert ExampleOrder(GROUPS, 2**32 - 1)[10**12].example.text == "text"


def test_fingerprint_changes_with_whatever_changes_the_examples():
    def fingerprint(size: int = 3, seed: int = 7, share: float = 0.5, **options: dict) -> str:
        groups = [Group("a", share, (source("one", size, **options),)), Group("b", 0.5, (source("two", 3),))]
        return json.dumps(ExampleOrder(groups, seed).fingerprint())

    changed = [fingerprint(), fingerprint(size=4), fingerprint(seed=8), fingerprint(share=0.6)]
    changed.append(fingerprint(objectives={"caption": 1.0}))
    assert len(set(changed)) == 5 and fingerprint() == changed[0]


def test_errors():
    with pytest.raises(MossAudioError, match="source none: expected examples"):
        source("none", 0)
    with pytest.raises(MossAudioError, match="found 'transcrib'"):
        source("one", 1, objectives={"transcrib": 1.0})
    with pytest.raises(MossAudioError, match="group g: expected a share above 0"):
        Group("g", 0, (source("one", 1),))
    with pytest.raises(MossAudioError, match="different names"):
        ExampleOrder([Group("g", 1, (source("one", 1), source("one", 2)))], 0)
    with pytest.raises(MossAudioError, match="seed"):
        ExampleOrder(GROUPS, -1)


def test_a_curriculum_changes_the_mixture_where_it_says():
    groups = [
        Group("easy", 1.0, (source("easy", 40),), end=100),
        Group("both", 1.0, (source("both", 40),)),
        Group("hard", 3.0, (source("hard", 40),), begin=100),
    ]
    names = [ExampleOrder(groups, seed=3)[number].group for number in range(500)]
    assert set(names[:100]) == {"easy", "both"} and abs(names[:100].count("easy") - 50) < 10
    assert set(names[100:]) == {"both", "hard"} and abs(names[100:].count("hard") - 300) < 10
    with pytest.raises(MossAudioError, match="from example 100 on no group takes part"):
        ExampleOrder(groups[:1], seed=3)
    with pytest.raises(MossAudioError, match="expected 0 <= begin < end, found 5 and 5"):
        Group("empty", 1.0, (source("easy", 40),), begin=5, end=5)
    # What has left the mixture is not read any more, and what has not begun is not read yet.
    order = ExampleOrder([groups[2], *groups[:2]], seed=3)
    assert order.epochs(5000)["easy"] == order.epochs(100)["easy"] == names[:100].count("easy") / 40
    assert "hard" not in order.epochs(99) and order.epochs(100)["hard"] == 0
    late = ExampleOrder([groups[2], groups[1]], seed=3)
    assert late.epochs(late.examples_of(1))["hard"] == 1 > late.epochs(late.examples_of(1) - 1)["hard"]


# Data that join


def with_addition(begin: int | None) -> list[Group]:
    """A group of two sources, one that ends, one of a curriculum, and later one more in the first and a new group."""
    added = () if begin is None else (source("added", 40, begin=begin),)
    groups = [
        Group("a", 2.0, (*added, source("large", 40), source("small", 10, weight=2.0))),
        Group("easy", 1.0, (source("easy", 30),), end=90),
        Group("hard", 1.0, (source("hard", 40),), begin=90),
    ]
    return groups if begin is None else [Group("new", 2.0, (source("new", 20, begin=begin),)), *groups]


def drawn(order: ExampleOrder, count: int) -> list[tuple[str, str, int]]:
    examples = (order[number] for number in range(count))
    return [(example.group, example.source.name, example.index) for example in examples]


def test_a_source_that_joins_changes_nothing_before_it():
    before = ExampleOrder(with_addition(None), seed=3)
    begin = before.end_of_epoch("a", 100)
    order = ExampleOrder(with_addition(begin), seed=3)
    count = 1500
    found, unchanged = drawn(order, begin + count), drawn(before, begin + 9)
    assert found[:begin] == unchanged[:begin] and begin > 90
    assert found[begin : begin + 9] != unchanged[begin:]
    assert order.fingerprint(begin) == before.fingerprint(begin) == facts_before(before.fingerprint(), begin)
    assert order.fingerprint() != before.fingerprint() and order.fingerprint(begin + 1) != before.fingerprint(begin + 1)
    # The largest source that took part has just completed an epoch.
    large = [index for _, name, index in found if name == "large"]
    assert [name for _, name, _ in found[:begin]].count("large") % 40 == 0 and found[begin - 1][1] == "large"
    # Shares from then on, and each example once in each epoch, also of what was there before.
    shares = collections.Counter(name for _, name, _ in found[begin:])
    rest = math.sqrt(40) / (2 * math.sqrt(40) + 2)
    expected = {"new": 0.4, "hard": 0.2, "large": 0.4 * rest, "added": 0.4 * rest, "small": 0.4 * (1 - 2 * rest)}
    assert {name: share / count for name, share in shares.items()} == pytest.approx(expected, abs=0.03)
    for name in ("large", "added", "new"):
        indices = [index for _, of, index in found if of == name]
        size = 20 if name == "new" else 40
        for epoch in range(len(indices) // size):
            assert sorted(indices[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert len(large) > 40 * 4 and order.phase(begin) == order.phase(begin - 1) + 1
    assert order.begins == {"new": begin, "a": 0, "easy": 0, "hard": 90}


def test_seeds_of_some_sources_are_the_first_of_more():
    for seed in (0, 7, 2**32 - 1):
        few, many = (np.random.SeedSequence(seed).generate_state(count).tolist() for count in (3, 9))
        assert many[:3] == few


def test_the_end_of_an_epoch():
    order = ExampleOrder([Group("one", 1.0, (source("one", 40), source("small", 10)))], seed=0)
    first = order.end_of_epoch("one", 0)
    read = [name for _, name, _ in drawn(order, 200)]
    assert read[:first].count("one") == 40 and read[first - 1] == "one"
    assert order.end_of_epoch("one", first) == order.end_of_epoch("other", 1) == first
    assert read[: order.end_of_epoch("one", first + 3)].count("one") == 80
    leaving = ExampleOrder([Group("one", 1.0, (source("one", 40),), end=30), GROUPS[0]], seed=0)
    with pytest.raises(MossAudioError, match="one leaves the mixture before it completes its epoch"):
        leaving.end_of_epoch("one", 10)
    with pytest.raises(MossAudioError, match="expected a begin of 0 or more, found -1"):
        source("one", 1, begin=-1)
    with pytest.raises(MossAudioError, match="which begins at 30, and the end 30"):
        Group("one", 1.0, (source("one", 40, begin=30),), end=30)


def test_neighbours_in_a_shuffle_are_no_neighbours_in_the_data():
    """One of Grain's shuffles alone gives 0.4 here, of a deviation of 0.007."""
    order = ExampleOrder([Group("all", 1, (Source("all", range(10**6)),))], seed=0)
    indexes = np.array([order[number].index for number in range(20_000)])
    assert abs(np.corrcoef(indexes[:-1], indexes[1:])[0, 1]) < 0.03
