"""The batches depend on data, options and seed alone: not on hosts, workers, prefetching or interruptions."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_audio_jax.errors import MossAudioError
from tests.train.data.conftest import write_lines
from train.data.manifest import Manifest
from train.data.mixture import ExampleOrder, Group, Source
from train.data.packing import TrainingBatch
from train.data.pipeline import DataConfig, Prefetched, TrainingData, merge_states
from train.data.samples import SampleMaker

CONFIG = DataConfig(batch_size=8, tokens=400, chunks=4, lanes=4, open_bins=3)


def take(data, count: int) -> list[TrainingBatch]:
    return [next(data) for _ in range(count)]


def assert_equal(found: Sequence[TrainingBatch], expected: Sequence[TrainingBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def one_source(manifest: Path, seed: int = 5) -> ExampleOrder:
    return ExampleOrder([Group("all", 1, (Source("all", Manifest(manifest)),))], seed)


@pytest.fixture(scope="module")
def expected(order: ExampleOrder, maker: SampleMaker) -> list[TrainingBatch]:
    return take(TrainingData(order, maker, CONFIG), 6)


def test_shapes_and_figures(order: ExampleOrder, maker: SampleMaker):
    data = TrainingData(order, maker, CONFIG)
    batch = next(data)
    assert batch.inputs.tokens.shape == batch.targets.shape == (8, 400)
    assert batch.inputs.audio_chunks.shape == (8, 4, 400, 128)
    metrics, inputs = data.metrics, batch.inputs
    assert metrics["token_fill"] == pytest.approx((inputs.segment_ids > 0).mean())
    assert metrics["chunk_fill"] == pytest.approx((inputs.chunk_frames > 0).mean())
    assert metrics["examples"] == inputs.segment_ids.max(1).sum()
    assert metrics["audio_seconds"] == pytest.approx(inputs.chunk_frames.sum() / 100)
    of_group = [((batch.group == group) & (inputs.segment_ids > 0)).sum() for group in (0, 1)]
    assert of_group == [metrics[f"tokens/{name}"] for name in order.groups] and not batch.phase.any()
    assert metrics["tokens/audio"] + metrics["tokens/text"] == (inputs.segment_ids > 0).sum()
    assert metrics["read"] >= metrics["examples"] and metrics["unreadable"] == metrics["too_long"] == 0


def test_same_seed_same_batches(order: ExampleOrder, maker: SampleMaker, corpus: Path, expected: list[TrainingBatch]):
    assert_equal(take(TrainingData(order, maker, CONFIG), 3), expected[:3])
    other = take(TrainingData(one_source(corpus / "clips.jsonl", seed=6), maker, CONFIG), 1)[0]
    assert not np.array_equal(other.inputs.tokens, expected[0].inputs.tokens)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_rows_of_the_same_batches(
    order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch], hosts: int
):
    by_host = [take(TrainingData(order, maker, CONFIG, host=host, hosts=hosts), 3) for host in range(hosts)]
    union = [jax.tree.map(lambda *rows: np.concatenate(rows), *batches) for batches in zip(*by_host, strict=True)]
    assert_equal(union, expected[:3])


def test_lanes_read_the_order_without_gaps(order: ExampleOrder, maker: SampleMaker):
    """Together they have read what comes first in the order, but for how far each has come."""
    read: list[int] = []

    class Recorded:
        groups, phase = order.groups, order.phase

        def __getitem__(self, number: int):
            read.append(number)
            return order[number]

        def fingerprint(self):
            return order.fingerprint()

    data = TrainingData(Recorded(), maker, CONFIG)  # type: ignore[arg-type]
    take(data, 3)
    data.close()
    for lane in range(4):
        numbers = [number for number in read if number % 4 == lane]
        assert numbers == list(range(lane, lane + 4 * len(numbers), 4))


def test_goes_on_exactly_from_any_step(order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch]):
    data = TrainingData(order, maker, CONFIG)
    states = [json.dumps(data.get_state())]
    for _ in expected:
        next(data)
        states.append(json.dumps(data.get_state()))
    for step in (0, 1, 4):
        resumed = TrainingData(order, maker, CONFIG)
        next(resumed)  # that it has run before must not matter
        resumed.set_state(json.loads(states[step]))
        assert json.dumps(resumed.get_state()) == states[step]
        assert_equal(take(resumed, 2), expected[step : step + 2])
        assert json.dumps(resumed.get_state()) == states[step + 2]


def test_goes_on_with_another_number_of_hosts(order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch]):
    two = [TrainingData(order, maker, CONFIG, host=host, hosts=2) for host in range(2)]
    for data in two:
        take(data, 2)
    merged = merge_states([data.get_state() for data in two])
    one = TrainingData(order, maker, CONFIG)
    one.set_state(merged)
    assert_equal(take(one, 1), expected[2:3])
    last = TrainingData(order, maker, CONFIG, host=3, hosts=4)
    last.set_state(merged)
    assert_equal(take(last, 1), [jax.tree.map(lambda rows: rows[6:], expected[2])])
    with pytest.raises(MossAudioError, match="found no lane 2"):
        one.set_state(two[0].get_state())
    next(two[0])
    with pytest.raises(MossAudioError, match="of one step of one run, found batches 3 and 2"):
        merge_states([data.get_state() for data in two])


def test_workers_change_nothing(order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch]):
    data = TrainingData(order, maker, CONFIG, workers=2)
    try:
        batches = take(data, 2)
        assert_equal(batches, expected[:2])
        assert batches[0].inputs.audio_chunks.dtype == jax.numpy.bfloat16
        state = data.get_state()
    finally:
        data.close()
    alone = TrainingData(order, maker, CONFIG)
    alone.set_state(state)
    assert_equal(take(alone, 1), expected[2:3])


def test_prefetching_changes_nothing(order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch]):
    data = Prefetched(TrainingData(order, maker, CONFIG), lambda batch: jax.tree.map(np.copy, batch))
    assert_equal(take(data, 2), expected[:2])
    state = data.get_state()
    assert state["batches"] == 2
    assert data.metrics["token_fill"] == pytest.approx((expected[1].inputs.segment_ids > 0).mean())
    assert_equal(take(data, 2), expected[2:4])
    data.set_state(state)
    assert_equal(take(data, 1), expected[2:3])
    data.close()
    data.close()  # is allowed


def test_state_is_of_this_data(order: ExampleOrder, maker: SampleMaker, corpus: Path):
    state = TrainingData(order, maker, CONFIG).get_state()
    wider = DataConfig(batch_size=8, tokens=500, chunks=4, lanes=4, open_bins=3)
    with pytest.raises(MossAudioError, match="expected tokens=400 as in the run it is from, found 500"):
        TrainingData(order, maker, wider).set_state(state)
    with pytest.raises(MossAudioError, match=r"expected source all=None as in .* found \{'examples': 24"):
        TrainingData(one_source(corpus / "clips.jsonl"), maker, CONFIG).set_state(state)


@pytest.fixture
def damaged(corpus: Path, tmp_path: Path) -> Path:
    """The corpus's clips, of which number 3 is missing and number 7 is no audio."""
    for path in corpus.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "3.wav").unlink()
    (tmp_path / "7.wav").write_bytes(b"RIFF, but not for long")
    return tmp_path / "clips.jsonl"


def test_unreadable_clips_are_skipped_counted_and_named(
    damaged: Path, maker: SampleMaker, caplog: pytest.LogCaptureFixture
):
    data = TrainingData(one_source(damaged), maker, CONFIG)
    with caplog.at_level(logging.WARNING, "train.data"):
        take(data, 4)
    named = [record.getMessage() for record in caplog.records]
    assert {"3.wav" in line for line in named if "7.wav" not in line} == {True}
    assert any("line 8: 7.wav: expected wav, flac, ogg or mp3" in line for line in named)
    assert data.metrics["unreadable"] == len(named) > 0
    state = data.get_state()
    resumed = TrainingData(one_source(damaged), maker, CONFIG)
    resumed.set_state(state)
    assert_equal(take(resumed, 1), take(data, 1))
    assert resumed.metrics == data.metrics


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_clips_stop_the_run(corpus: Path, tmp_path: Path, maker: SampleMaker, workers: int):
    absent = write_lines(tmp_path / "absent.jsonl", [{"audio": "absent.wav", "text": "hi"}])
    data = TrainingData(one_source(absent), maker, CONFIG, workers=workers)
    with pytest.raises(MossAudioError, match=r"at most 5\.0% of the examples to be unreadable, found 11 of 11"):
        next(data)
    data.close()


def with_oversize(**options) -> DataConfig:
    return DataConfig(batch_size=2, tokens=120, chunks=1, lanes=1, open_bins=2, **options)


def test_oversized_examples(corpus: Path, tmp_path: Path, maker: SampleMaker, caplog: pytest.LogCaptureFixture):
    lines = [{"text": "short"}, {"text": "long " * 40}, {"audio": str(corpus / "long.wav"), "text": "hi"}]
    order = one_source(write_lines(tmp_path / "m.jsonl", lines))
    data = TrainingData(order, maker, with_oversize())
    batch = next(data)
    assert data.metrics["too_long"] > 0 and data.metrics["unreadable"] == data.metrics["truncated"] == 0
    assert not (batch.inputs.tokens == maker.sample("a", "long").inputs.tokens[0, 0]).any()  # no "l" was read
    assert "line 2: expected at most 120 tokens and 1 chunks of audio, found 201 and 0" in caplog.text

    data = TrainingData(order, maker, with_oversize(oversize="truncate"))
    batch = next(data)
    long = np.resize(maker.sample("a", "long ").inputs.tokens[0, :5], 120)
    assert any(np.array_equal(row, long) for row in batch.inputs.tokens)
    for _ in range(6):  # until the clip has come
        next(data)
    assert data.metrics["too_long"] > 0  # the clip has more than one chunk
    assert data.metrics["truncated"] > 0

    data = TrainingData(order, maker, with_oversize(oversize="refuse"))
    with pytest.raises(MossAudioError, match=r"line [23]: expected at most 120 tokens"):
        next(data)


def test_options_are_checked(order: ExampleOrder, maker: SampleMaker):
    assert [DataConfig(size, 64, 1).num_lanes for size in (1, 6, 7, 32, 22)] == [1, 6, 7, 8, 2]
    for options in ({"lanes": 3}, {"oversize": "cut"}, {"max_skip_rate": 2.0}):
        with pytest.raises(MossAudioError, match="expected"):
            DataConfig(8, 64, 1, **options)
    for options in ({"hosts": 3}, {"host": 2, "hosts": 2}, {"workers": 3}):
        with pytest.raises(MossAudioError, match="hosts that divide the 4 lanes"):
            TrainingData(order, maker, CONFIG, **options)
