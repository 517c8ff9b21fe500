"""The batches depend on data, options and seed alone: not on hosts, workers, prefetching or interruptions."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer
from tests.train.data.conftest import write_lines
from train.data.config import DataConfig
from train.data.lanes import Interrupted
from train.data.manifest import Example, Manifest
from train.data.mixture import ExampleOrder, Group, Source
from train.data.objectives import NothingToAsk
from train.data.packing import TrainingBatch
from train.data.pipeline import Prefetched, TrainingData, merge_states, total_counts
from train.data.places import first_unread, place
from train.data.samples import SampleMaker

CONFIG = DataConfig(batch_size=8, tokens=400, chunks=4, open_bins=3)


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
    sums, inputs = data.sums, batch.inputs
    assert sums["rows"] == 8
    assert sums["packed_tokens"] == (inputs.segment_ids > 0).sum()
    assert sums["packed_chunks"] == (inputs.chunk_frames > 0).sum()
    assert sums["examples"] == inputs.segment_ids.max(1).sum()
    assert sums["audio_seconds"] == pytest.approx(inputs.chunk_frames.sum() / 100)
    for number, group in enumerate(("audio", "text")):
        assert sums[f"tokens/{group}"] == ((inputs.segment_ids > 0) & (batch.group == number)).sum() > 0
    assert ((inputs.audio_slots >= 0) <= (batch.group == 0)).all()
    assert sums["read"] >= sums["examples"] and sums["unreadable"] == sums["too_long"] == 0


def test_same_seed_same_batches(order: ExampleOrder, maker: SampleMaker, corpus: Path, expected: list[TrainingBatch]):
    assert_equal(take(TrainingData(order, maker, CONFIG), 3), expected[:3])
    other = take(TrainingData(one_source(corpus / "clips.jsonl", seed=6), maker, CONFIG), 1)[0]
    assert not np.array_equal(other.inputs.tokens, expected[0].inputs.tokens)


@pytest.mark.parametrize("hosts", [2, 8])
def test_hosts_read_their_rows_of_the_same_batches(
    order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch], hosts: int
):
    by_host = [take(TrainingData(order, maker, CONFIG, host=host, hosts=hosts), 3) for host in range(hosts)]
    union = [jax.tree.map(lambda *rows: np.concatenate(rows), *batches) for batches in zip(*by_host, strict=True)]
    assert_equal(union, expected[:3])


def test_lanes_read_the_order_without_gaps(order: ExampleOrder, maker: SampleMaker):
    """Together they have read what comes first in the order, but for how far each has come."""
    read: list[int] = []
    order = ExampleOrder(
        [Group("texts", 1, (Source("texts", [Example(str(n), text="some text") for n in range(999)]),))], 0
    )

    data = TrainingData(order, Recorded(maker, read), CONFIG)
    take(data, 3)
    data.close()
    for lane in range(8):
        places = [place for place in read if place % 8 == lane]
        assert places == list(range(lane, lane + 8 * len(places), 8))


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
    with pytest.raises(MossAudioError, match="found no row 4"):
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
    assert data.sums["packed_tokens"] == (expected[1].inputs.segment_ids > 0).sum()
    assert_equal(take(data, 2), expected[2:4])
    data.set_state(state)
    assert_equal(take(data, 1), expected[2:3])
    data.close()
    data.close()  # is allowed


def test_state_is_of_this_data(order: ExampleOrder, maker: SampleMaker, corpus: Path):
    state = TrainingData(order, maker, CONFIG).get_state()
    wider = DataConfig(batch_size=8, tokens=500, chunks=4, open_bins=3)
    with pytest.raises(MossAudioError, match="expected tokens=400 as in the run it is from, found 500"):
        TrainingData(order, maker, wider).set_state(state)
    with pytest.raises(MossAudioError, match=r"expected source all=None as in .* found \{'examples': 24"):
        TrainingData(one_source(corpus / "clips.jsonl"), maker, CONFIG).set_state(state)


def joined(corpus: Path, begin: int, share: float = 0.7) -> ExampleOrder:
    """The order of the fixture, with data that join: a group before all others, and a source in the first group."""
    clips = Source("clips", Manifest(corpus / "clips.jsonl"))
    more = Source(
        "more", [Example(f"more {number}", text=f"more of {number}. " * 3) for number in range(9)], begin=begin
    )
    books = Source(
        "books", [Example(f"book {number}", text=f"book {number}. " * 5) for number in range(9)], begin=begin
    )
    texts = Source("texts", Manifest(corpus / "texts.jsonl"))
    groups = [Group("books", 0.5, (books,)), Group("audio", share, (more, clips)), Group("text", 0.3, (texts,))]
    return ExampleOrder(groups, seed=5)


def test_data_join_a_run_that_keeps_its_place(
    order: ExampleOrder, maker: SampleMaker, corpus: Path, expected: list[TrainingBatch]
):
    """As if they had been planned from the beginning: nothing is read again, and nothing left out."""
    data = TrainingData(order, maker, CONFIG)
    take(data, 2)
    state = json.loads(json.dumps(data.get_state()))
    lanes = state["lanes"].values()
    assert any(lane["open"] for lane in lanes) and first_unread(state) < place(state) == max(x["next"] for x in lanes)
    later = joined(corpus, place(state))
    planned, resumed = TrainingData(later, maker, CONFIG), TrainingData(later, maker, CONFIG, workers=1)
    before = take(planned, 2)
    assert_equal([replace(batch, group=one.group) for batch, one in zip(before, expected, strict=False)], expected[:2])
    assert resumed.set_state(state)
    try:
        assert_equal(take(resumed, 3), take(planned, 3))
        assert planned.sums == resumed.sums and planned.sums["tokens/books"] > 0
        assert resumed.get_state() == planned.get_state()
        assert resumed.get_state()["depends_on"] != state["depends_on"]
    finally:
        resumed.close()


def test_data_that_can_t_join(order: ExampleOrder, maker: SampleMaker, corpus: Path):
    data = TrainingData(order, maker, CONFIG)
    next(data)
    state = json.loads(json.dumps(data.get_state()))
    state["lanes"]["3"] |= {"next": place(state) + 3, "piece": 1}  # has begun to read this one
    after = state["lanes"]["3"]["next"] + 1
    assert place(state) == after

    def resume(order: ExampleOrder, state: dict, allow: bool = False) -> bool:
        return TrainingData(order, maker, CONFIG).set_state(state, allow_other_data=allow)

    assert resume(joined(corpus, after), state)
    with pytest.raises(MossAudioError, match=f"expected source books from example {after - 1}=None as in the run"):
        resume(joined(corpus, after - 1), state)
    assert not resume(joined(corpus, after - 1), state, allow=True)
    planned = TrainingData(joined(corpus, 500), maker, CONFIG).get_state()
    assert resume(joined(corpus, 600), planned) and resume(order, planned)  # what comes later may change
    # Where the data would start again, an example at which some join means nothing.
    with pytest.raises(MossAudioError, match="expected source clips="):
        resume(joined(corpus, after, share=0.6), state, allow=True)
    # A source that changes the seeds of others changes their order, although it takes part later.
    groups = [Group("late", 1, (Source("late", [Example("", text="a")]),), begin=after), *groups_of(corpus)]
    with pytest.raises(MossAudioError, match=r"group and shuffle of clips=\['audio', 0\] as in .* \['audio', 1\]"):
        resume(ExampleOrder(groups, seed=5), state)


def groups_of(corpus: Path) -> list[Group]:
    clips = Group("audio", 0.7, (Source("clips", Manifest(corpus / "clips.jsonl")),))
    return [clips, Group("text", 0.3, (Source("texts", Manifest(corpus / "texts.jsonl")),))]


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
    data, counted = TrainingData(one_source(damaged), maker, CONFIG), 0
    with caplog.at_level(logging.WARNING, "train.data"):
        for _ in range(4):
            next(data)
            counted += data.sums["unreadable"]
    named = [record.getMessage() for record in caplog.records]
    assert {"3.wav" in line for line in named if "7.wav" not in line} == {True}
    assert any("skipped (unreadable)" in line and "line 8: 7.wav must be wav, flac" in line for line in named)
    assert counted == len(named) == total_counts(data.get_state())["unreadable"] > 0
    state = data.get_state()
    resumed = TrainingData(one_source(damaged), maker, CONFIG)
    resumed.set_state(state)
    assert_equal(take(resumed, 1), take(data, 1))
    assert resumed.sums == data.sums


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_clips_stop_the_run(
    tmp_path: Path, maker: SampleMaker, workers: int, capfd: pytest.CaptureFixture
):
    absent = write_lines(tmp_path / "absent.jsonl", [{"audio": "absent.wav", "text": "hi"}])
    data = TrainingData(one_source(absent), maker, CONFIG, workers=workers)
    with pytest.raises(MossAudioError, match=r"at most 5\.0% of the examples to be unreadable, found 11 of 11"):
        next(data)
    data.close()
    if workers:  # logs to the run's stderr, as each happens
        assert capfd.readouterr().err.count("skipped (unreadable): ") == 11


def with_oversize(**options) -> DataConfig:
    return DataConfig(batch_size=2, tokens=120, chunks=1, open_bins=2, max_unused_rate=1.0, **options)


@pytest.mark.parametrize(
    ("line", "named"),
    [({"audio": "long.wav", "text": "hi"}, "too long"), ({"audio": "0.wav", "caption": "Hi."}, "without labels")],
)
def test_a_group_of_which_nothing_can_be_used_stops_the_run(
    corpus: Path, maker: SampleMaker, line: dict, named: str, caplog: pytest.LogCaptureFixture
):
    unfit = write_lines(corpus / f"{named}.jsonl", [line])
    groups = [
        Group("good", 4, (Source("texts", Manifest(corpus / "texts.jsonl")),)),
        Group("bad", 1, (Source("unfit", Manifest(unfit), {"transcribe": 1.0}),)),
    ]
    data = TrainingData(ExampleOrder(groups, 0), maker, with_oversize(max_skips_in_a_row=20))
    with pytest.raises(MossAudioError, match=f"none of 20 examples in a row of group bad .* last ones were {named}"):
        take(data, 1000)
    assert caplog.text.count("skipped") >= 20


def test_oversized_examples(corpus: Path, tmp_path: Path, maker: SampleMaker, caplog: pytest.LogCaptureFixture):
    lines = [
        {"text": "short"},
        {"audio": str(corpus / "long.wav"), "text": "hi"},
        {"conversation": [turn("user", "long " * 40), turn("assistant", "yes")]},
        {"conversation": [turn("user", "hi"), turn("assistant", "long " * 40)]},
    ]
    order = one_source(write_lines(tmp_path / "m.jsonl", lines))
    data = TrainingData(order, maker, with_oversize())
    take(data, 3)
    counts = total_counts(data.get_state())
    assert counts["too_long"] > 0 and counts["unreadable"] == counts["truncated"] == 0
    assert "skipped (too long): " in caplog.text and "line 2: expected at most 120 tokens and 1 chunks" in caplog.text

    data = TrainingData(order, maker, with_oversize(oversize="truncate"))
    take(data, 6)
    counts = total_counts(data.get_state())
    assert counts["too_long"] > 0  # the clip has more than one chunk
    assert counts["truncated"] > 0

    data = TrainingData(order, maker, with_oversize(oversize="refuse"))
    with pytest.raises(MossAudioError, match=r"line [234]: expected at most 120 tokens"):
        take(data, 2)


def turn(role: str, text: str) -> dict:
    return {"role": role, "message_type": "text", "content": text}


def test_options_are_checked(order: ExampleOrder, maker: SampleMaker):
    for options in ({"oversize": "cut"}, {"max_skip_rate": 2.0}, {"open_bins": 0}):
        with pytest.raises(MossAudioError, match=r"--data\..* must be "):
            DataConfig(8, 64, 1, **options)
    for grow in (("5",), ("5=0",), ("9=2", "5=4")):
        with pytest.raises(MossAudioError, match=r"data\.grow must"):
            DataConfig(8, 64, 1, grow=grow)
    for options in ({"hosts": 3}, {"host": 2, "hosts": 2}, {"workers": -1}):
        with pytest.raises(MossAudioError, match="hosts that divide the batch of 8"):
            TrainingData(order, maker, CONFIG, **options)


# Reading ahead


class Recorded(SampleMaker):
    """Writes down the numbers of the examples that are decoded."""

    def __init__(self, maker: SampleMaker, numbers: list[int]):
        vars(self).update(vars(maker))
        self._numbers = numbers

    def fitting(self, example, rng, *arguments, **options):
        self._numbers.append(rng.bit_generator.seed_seq.entropy[1])
        return super().fitting(example, rng, *arguments, **options)


def test_the_first_batch_and_a_resumed_one_read_little_ahead(order: ExampleOrder, maker: SampleMaker):
    read: list[int] = []
    data = TrainingData(order, Recorded(maker, read), CONFIG)
    examples, ahead = [], []
    for _ in range(6):
        next(data)
        examples.append(data.sums["examples"])
        ahead.append(len(read) - sum(examples))
    batch = sum(examples) / 6
    assert len(set(read)) == len(read)
    assert ahead[0] <= 1.5 * batch and max(ahead) <= CONFIG.open_bins * batch

    resumed_read: list[int] = []
    resumed = TrainingData(order, Recorded(maker, resumed_read), CONFIG)
    resumed.set_state(data.get_state())
    assert not resumed_read  # no open bin is decoded to resume
    next(resumed)
    next(data)
    again = set(resumed_read) & set(read[: int(sum(examples) + ahead[5])])
    assert len(set(resumed_read)) == len(resumed_read)
    assert len(again) <= data.sums["examples"]  # only what the batch holds


# Epochs


@pytest.mark.parametrize("hosts", [1, 2])
def test_an_epoch_has_each_example_once(corpus: Path, maker: SampleMaker, hosts: int):
    """Also where the last batches are not full, and one host has no more rows than the other."""
    found: list[int] = []
    left: list[list[bool]] = [[] for _ in range(hosts)]

    def exists(batch: int, here: bool) -> bool:
        return here or batch <= 4  # as if another host had four batches

    order, config = one_source(corpus / "clips.jsonl"), DataConfig(batch_size=4, tokens=400, chunks=4, open_bins=2)
    for host in range(hosts):
        recorded = Recorded(maker, found)
        data = TrainingData(order, recorded, config, host=host, hosts=hosts, epochs=2, exists=exists)
        progress, examples = [], 0
        for batch in data:
            progress.append(batch.progress)
            examples += data.sums["examples"]
            left[host].append(data.sums["examples"] > 0)
        assert examples == total_counts(data.get_state())["read"] == 48 / hosts
        assert (np.diff(progress, axis=0) >= 0).all() and (progress[-1] == 1).all()
        assert next(data, None) is None and next(data, None) is None
        resumed = TrainingData(order, maker, config, host=host, hosts=hosts, epochs=2)
        resumed.set_state(data.get_state())
        assert next(resumed, None) is None
    assert sorted(found) == list(range(48))
    for epoch in range(2):
        assert len({order[number].index for number in range(24 * epoch, 24 * (epoch + 1))}) == 24


def test_a_batch_that_grows_has_the_next_sequences(
    order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch]
):
    config = replace(CONFIG, grow=("2=2", "3=3"))
    data = TrainingData(order, maker, config)
    batches = take(data, 4)
    assert [len(batch.targets) for batch in batches] == [8, 8, 16, 24]
    assert_equal(batches[:2], expected[:2])
    two = jax.tree.map(lambda *rows: np.stack(rows, 1).reshape(-1, *rows[0].shape[1:]), *expected[2:4])
    assert_equal(batches[2:3], [two])
    assert data.sums["rows"] == 24
    resumed = TrainingData(order, maker, config)
    resumed.set_state(data.get_state())
    assert_equal(take(resumed, 1), take(data, 1))


# Processes


def test_any_number_of_hosts_and_workers_makes_the_same_batch(order: ExampleOrder, maker: SampleMaker):
    config = DataConfig(batch_size=16, tokens=400, chunks=4, open_bins=2)
    expected = take(TrainingData(order, maker, config), 2)
    by_host = [take(TrainingData(order, maker, config, host=host, hosts=16), 2) for host in range(16)]
    for number in range(2):
        rows = [batches[number] for batches in by_host]
        assert_equal([jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)], expected[number : number + 1])
    data = TrainingData(order, maker, config, host=1, hosts=2, workers=3)  # that do not divide its eight rows
    try:
        assert_equal(take(data, 2), [jax.tree.map(lambda rows: rows[8:], batch) for batch in expected])
    finally:
        data.close()


ORPHANS = """
import os, signal, sys
from tests.train.data.test_pipeline import CONFIG, texts_and_maker
from train.data.pipeline import TrainingData

if __name__ == "__main__":
    data = TrainingData(*texts_and_maker(sys.argv[1]), CONFIG, workers=2)
    next(data)
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {end}
"""


def texts_and_maker(directory: str) -> tuple[ExampleOrder, SampleMaker]:
    examples = [Example(str(number), text=f"some text {number}") for number in range(50)]
    maker = SampleMaker(Tokenizer.from_dir(directory), MossAudioConfig.preset("tiny"))
    return ExampleOrder([Group("texts", 1, (Source("texts", examples),))], 0), maker


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_workers_end_with_their_parent(end: str, tmp_path: Path):
    write_small_tokenizer(tmp_path)
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS.replace("{end}", end))
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    workers = [int(word) for word in run.stdout.split()]
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker has outlived its parent"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_leave_signals_to_the_run(order: ExampleOrder, maker: SampleMaker, expected: list[TrainingBatch]):
    """A terminal sends Ctrl-C to all processes, a machine that shuts down SIGTERM: the run still saves."""
    data = TrainingData(order, maker, CONFIG, workers=2)
    try:
        take(data, 1)
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker.pid, number)
        assert_equal(take(data, 4), expected[1:5])  # more than was prepared
    finally:
        data.close()


def test_a_wait_for_data_can_be_ended(maker: SampleMaker):
    class Slow(SampleMaker):
        def __init__(self):
            vars(self).update(vars(maker))

        def fitting(self, *arguments, **options):
            time.sleep(0.01)
            raise NothingToAsk("nothing")

    order = ExampleOrder([Group("texts", 1, (Source("texts", [Example("one", text="text")]),))], 0)
    config = replace(CONFIG, max_unused_rate=1.0, max_skips_in_a_row=10**9)
    data = Prefetched(TrainingData(order, Slow(), config), lambda batch: batch)
    asked = []
    with pytest.raises(Interrupted):
        data.take(lambda: len(asked) == 2 or bool(asked.append(None)))
    data.close()
