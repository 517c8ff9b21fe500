"""Outputs of a run, read back: files, event files, Weights & Biases, progress, profiles."""

import json
import os
import re
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moss_audio_jax import MossAudioError
from train.running.profiling import Profile
from train.running.report import RunReport, ShownSample, by_name

OPTIONS = {"last_step": 6, "log_every": 2, "max_skipped_in_a_row": 3}
PEAK = 1e12


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("train.running.report.time.perf_counter", lambda: clock.now)
    return clock


def step_metrics(loss: float = 2.5, **changes) -> dict[str, jax.Array]:
    values = {"loss": loss, "grad_norm": 0.5, "tokens": 300.0}
    counts = {"skipped": 0, "skipped_total": 0, "skipped_in_a_row": 0} | changes
    return {name: jnp.float32(value) for name, value in values.items()} | {
        name: jnp.int32(value) for name, value in counts.items()
    }


def host_metrics(**changes) -> Callable[[], dict[str, float]]:
    return lambda: {"data_wait": 0.5, "packed_tokens": 500, "model_flops": 1e12} | changes


def run(out: Path, clock: SimpleNamespace, steps: range, **options) -> None:
    """Steps of two seconds, of which the first compiles for a minute."""
    out.mkdir(exist_ok=True)
    with RunReport(out, start=steps[0] - 1, **OPTIONS | options) as report:
        clock.now += 60
        for step in steps:
            report.add(step, step_metrics(float(step)), host_metrics())
            clock.now += 2


def test_a_groups_loss_bears_its_name():
    metrics = {"loss": np.float32(2), "skipped": np.int32(0)}
    grouped = {"loss_of_group": np.float32([1.5, np.nan]), "tokens_of_group": np.float32([8, 0])}
    named = by_name(metrics | grouped, ["speech", "text"])
    assert named == {"loss": 2, "skipped": 0, "loss/speech": 1.5, "learned_tokens/speech": 8, "learned_tokens/text": 0}
    assert by_name(metrics, ["speech"]) == {"loss": 2, "skipped": 0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def events(out: Path) -> list[Event]:
    """The records of all event files, in TensorBoard's order: the file with the first step first."""
    found = []
    for path in sorted((out / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return found


def scalars(out: Path, tag: str) -> dict[int, float]:
    """Values that TensorBoard shows: a restart drops the values from its step on; then no step may be there twice."""
    shown: dict[int, float] = {}
    for event in events(out):
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == tag:
                assert event.step not in shown
                shown[event.step] = value.simple_value
    return shown


def png() -> bytes:
    """A grey image, 3 wide and 2 high."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\1\2\3" * 2)) + chunk(b"IEND", b"")


def test_a_line_a_step(tmp_path: Path, clock):
    run(tmp_path, clock, range(1, 4), peak_flops=PEAK)
    first = re.sub(r'"time": [\d.]+', '"time": 0', (tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    rate = 500 / 62
    assert first == (
        f'{{"step": 1, "time": 0, "step_seconds": 62.0, "tokens_per_second": {rate}, "restarts": 0, '
        '"grad_norm": 0.5, "loss": 1.0, "skipped": 0, "skipped_in_a_row": 0, '
        '"skipped_total": 0, "tokens": 300.0, "data_wait": 0.5, "packed_tokens": 500, "model_flops": 1000000000000.0, '
        f'"mfu": {1 / 62}}}'
    )
    assert [(line["step"], line["step_seconds"]) for line in lines(tmp_path / "metrics.jsonl")[1:]] == [(2, 2), (3, 2)]
    assert lines(tmp_path / "metrics.jsonl")[1]["mfu"] == 0.5


def test_progress(tmp_path: Path, clock, capsys: pytest.CaptureFixture):
    """Rates and the time left leave out the first step, which compiles."""
    run(tmp_path, clock, range(1, 5), peak_flops=PEAK)
    mfu = (
        "MFU: model FLOPs, forward and backward, with causal attention halved and no recomputation, "
        "over the bf16 peak of 1 TFLOP/s"
    )
    assert capsys.readouterr().err.splitlines() == [
        mfu,
        "step 2/6  loss 2.0000  skipped 0  250 tokens/s  MFU 50.0%  data wait 25%  0:00:08 left",
        "step 4/6  loss 4.0000  skipped 0  250 tokens/s  MFU 50.0%  data wait 25%  0:00:04 left",
    ]
    run(tmp_path / "unknown", clock, range(1, 3), log_every=1)
    assert capsys.readouterr().err.splitlines() == [
        "FLOP/s: model FLOPs, forward and backward, with causal attention halved and no recomputation; "
        "the peak of these devices is unknown",
        "step 1/6  loss 1.0000  skipped 0  62.0 s with compilation",
        "step 2/6  loss 2.0000  skipped 0  250 tokens/s  500.0 GFLOP/s  data wait 25%  0:00:08 left",
    ]


def test_a_group_that_joins_and_the_time_a_run_takes(tmp_path: Path, clock, capsys: pytest.CaptureFixture):
    options = OPTIONS | {"last_step": 100, "log_every": 50, "joining": {"hard": 48, "later": 9000}}
    with RunReport(tmp_path, start=0, **options) as report:
        report.say("a run of nothing")
        for step in range(1, 9):
            report.add(step, step_metrics(), host_metrics(**{"tokens/hard": 3 * (step > 2), "tokens/later": 0}))
            clock.now += 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "a run of nothing",
        "step 3: group hard joins, from example 48 on: if its examples are harder, the loss rises for a while",
        "2 s per step: about 0:03:08 left",
    ]


def test_progress_of_a_run_that_ends_with_its_data(tmp_path: Path, clock, capsys: pytest.CaptureFixture):
    with RunReport(
        tmp_path,
        start=0,
        **OPTIONS | {"last_step": None},
        figures=lambda sums: sums | {"epoch": 0.25, "audio_hours": 1.5},
    ) as report:
        for step in (1, 2):
            report.add(step, step_metrics(), host_metrics())
            clock.now += 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "step 2  epoch 0.25  1.50 h of audio  loss 2.5000  skipped 0  250 tokens/s  500.0 GFLOP/s  data wait 25%"
    ]


def test_a_resumed_run_shows_every_step_once(tmp_path: Path, clock):
    """It was killed after step 5, in the middle of a line; its last checkpoint is that of step 3."""
    run(tmp_path, clock, range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    (tmp_path / "scores.jsonl").write_text('{"step": 2, "eval/loss": 1.0}\n{"step": 4, "eval/loss": 0.9}\n')
    run(tmp_path, clock, range(4, 7))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step_seconds"] for line in lines(tmp_path / "metrics.jsonl")] == [62, 2, 2, 62, 2, 2]
    assert [line["step"] for line in lines(tmp_path / "scores.jsonl")] == [2]
    assert scalars(tmp_path, "train/loss") == {step: float(step) for step in range(1, 7)}
    assert scalars(tmp_path, "train/step_seconds")[4] == 62
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_what_is_no_number_is_null(tmp_path: Path, clock):
    with RunReport(tmp_path, start=0, **OPTIONS) as report:
        report.add(1, step_metrics(float("nan")), host_metrics(token_fill=float("inf")))
        report.add_scores(1, {"eval/loss": float("nan")})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["token_fill"] is None and line["grad_norm"] == 0.5
    assert lines(tmp_path / "scores.jsonl") == [{"step": 1, "eval/loss": None}]


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n')
    with pytest.raises(MossAudioError, match=r"metrics\.jsonl, line 2: expected a JSON object .* found 'rubbish'"):
        RunReport(tmp_path, start=5, **OPTIONS)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(MossAudioError, match=r"the run's records can't be written into .*tensorboard"):
        RunReport(tmp_path, start=0, **OPTIONS)


def test_gives_up_after_the_skipped_steps_are_written(tmp_path: Path, clock):
    with RunReport(tmp_path, start=0, **OPTIONS) as report:
        report.add(1, step_metrics(1.0, skipped_in_a_row=2), host_metrics())
        clock.now += 2
        report.add(2, step_metrics(float("nan"), skipped=1, skipped_total=3, skipped_in_a_row=3), host_metrics())
        clock.now += 2
        with pytest.raises(MossAudioError, match=r"step 2: 3 steps in a row .* \(loss nan, gradient norm 0.5\)"):
            report.add(3, step_metrics(), host_metrics())
        assert lines(tmp_path / "metrics.jsonl")[-1]["skipped_in_a_row"] == 3
        assert scalars(tmp_path, "train/skipped_total") == {1: 0, 2: 3}


def test_an_evaluation_between_steps(tmp_path: Path, clock, capsys: pytest.CaptureFixture):
    figure = tmp_path / "figures" / "clip.png"
    figure.parent.mkdir()
    figure.write_bytes(png())
    samples = [
        ShownSample("clip", "What is said?\nAnd when?", "hello <b>", "jello \x1b[31m" + "x" * 200, figure),
        ShownSample("other", "", "你好", ""),
    ]
    with RunReport(tmp_path, start=0, **OPTIONS) as report:
        report.add(1, step_metrics(), host_metrics())
        clock.now += 2
        with report.paused():
            clock.now += 1000
            report.add_scores(1, {"eval/loss": 1.25, "eval/a/task/f1": 0.5})
            report.add_samples(1, samples)
            report.add_answers(1, [*samples, ShownSample("last", "a|b*", "<think>\n[0.1]x[0.2]", "`")])
        report.add(2, step_metrics(), host_metrics())
        clock.now += 3
    assert [line["step_seconds"] for line in lines(tmp_path / "metrics.jsonl")] == [2, 3]
    assert lines(tmp_path / "scores.jsonl") == [{"step": 1, "eval/loss": 1.25, "eval/a/task/f1": 0.5}]
    assert scalars(tmp_path, "eval/loss") == {1: 1.25} and scalars(tmp_path, "eval/a/task/f1") == {1: 0.5}
    shown = lines(tmp_path / "samples.jsonl")
    assert shown[0] == {"step": 1} | samples[0]._asdict() | {"figure": "figures/clip.png"}
    assert shown[1] == {"step": 1} | samples[1]._asdict()
    table = (tmp_path / "answers" / "1.md").read_text("utf-8").splitlines()
    assert table[:2] == ["| name | question | reference | prediction |", "| --- | --- | --- | --- |"]
    assert table[2].startswith("| clip | What is said?<br>And when? | hello &lt;b&gt; | jello ")
    assert table[3:] == ["| other |  | 你好 |  |", r"| last | a\|b\* | &lt;think&gt;<br>[0.1]x[0.2] | \` |"]

    values = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    image = values["samples/clip"].image
    assert (image.width, image.height, image.colorspace, image.encoded_image_string) == (3, 2, 1, png())
    text = values["samples/clip/text_summary"].tensor.string_val[0].decode()
    assert text.startswith("**Question**\n\n    What is said?\n    And when?\n\n**Expected**\n\n    hello <b>\n\n")
    assert "你好" in values["samples/other/text_summary"].tensor.string_val[0].decode()

    printed = capsys.readouterr().err.splitlines()
    assert "step 1  eval/loss 1.25" in printed and "step 1, clip: What is said? And when?" in printed
    assert "  expected  hello <b>" in printed and "  answer    jello  [31m" + "x" * 86 + "..." in printed


@pytest.mark.parametrize(("content", "message"), [(b"JPEG", "must be a PNG image"), (None, "can't be read")])
def test_a_figure_that_is_none_is_named(tmp_path: Path, content: bytes | None, message: str):
    figure = tmp_path / "figure.png"
    if content is not None:
        figure.write_bytes(content)
    with (
        RunReport(tmp_path, start=0, **OPTIONS) as report,
        pytest.raises(MossAudioError, match=f"figure.png.*{message}"),
    ):
        report.add_samples(1, [ShownSample("clip", "", "", "", figure)])


def test_other_processes_are_silent(tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch, capsys):
    """But they give up at the same step as the first one, so that it need not wait for them."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with RunReport(tmp_path / "out", start=0, wandb="project", **OPTIONS) as report:
        report.add_samples(0, [ShownSample("clip", "", "", "")])
        report.add(1, step_metrics(skipped_in_a_row=3), host_metrics())
        with pytest.raises(MossAudioError, match="3 steps in a row"):
            report.flush()
    with Profile(tmp_path / "out", 1, 1) as profile:
        profile.before(1)
        profile.after(1, jnp.ones(()))
    assert not (tmp_path / "out").exists() and capsys.readouterr().err == ""


class FakeWandb:
    """Weights & Biases, as far as it is used: it gives a run an id unless it is told one."""

    def __init__(self):
        self.calls: list[tuple] = []

    def init(self, **options):
        self.calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "made-up",
            log=lambda values, step: self.calls.append(("log", step, values)),
            finish=lambda: self.calls.append(("finish",)),
        )

    def Table(self, columns: list[str], data: list[list[str]]):
        return [dict(zip(columns, row, strict=True)) for row in data]


def test_weights_and_biases(tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.json").write_text('{"seed": 3}')
    run(tmp_path, clock, range(1, 3), wandb="project")
    run(tmp_path, clock, range(2, 4), wandb="project")
    begun = {"project": "project", "resume": "allow", "dir": str(tmp_path), "config": {"seed": 3}}
    inits = [call[1] for call in fake.calls if call[0] == "init"]
    assert inits == [begun | {"id": None}, begun | {"id": "made-up"}]
    logged = [(call[1], call[2]["loss"]) for call in fake.calls if call[0] == "log"]
    assert logged == [(1, 1.0), (2, 2.0), (2, 2.0), (3, 3.0)]
    assert [call[0] for call in fake.calls].count("finish") == 2
    with RunReport(tmp_path, start=3, wandb="project", **OPTIONS) as report:
        report.add_answers(4, [ShownSample("clip", "What?", "this", "that")])
    row = {"name": "clip", "question": "What?", "reference": "this", "prediction": "that"}
    assert fake.calls[-2] == ("log", 4, {"eval/answers": [row]})


def test_weights_and_biases_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MossAudioError, match=r"not installed: pip install 'moss-audio-jax\[wandb\]'"):
        RunReport(tmp_path, start=0, wandb="project", **OPTIONS)


def traced(out: Path) -> list[Path]:
    return list(out.rglob("*.xplane.pb"))


def test_a_profile(tmp_path: Path):
    """A trace of steps 2 and 3 of 4, or of as many as there are."""
    step = jax.jit(lambda x: x + 1)
    x = jnp.zeros(())
    with Profile(tmp_path / "whole", 2, 2) as profile:
        for number in range(1, 5):
            profile.before(number)
            x = step(x)
            profile.after(number, x)
            assert len(traced(tmp_path / "whole" / "profile")) == (number >= 3)
    with Profile(tmp_path / "cut", 2, 2) as profile:
        profile.before(2)
        profile.after(2, step(x))
    assert len(traced(tmp_path / "cut" / "profile")) == 1
    for first, count in ((2, 2), (4, 0)):  # past, and none
        with Profile(tmp_path / "none", first, count) as profile:
            profile.before(4)
            profile.after(4, step(x))
    assert not (tmp_path / "none").exists()
    with pytest.raises(
        MossAudioError, match="--profile-first must be 1 or more and --profile-steps 0 or more, not 0 and 2"
    ):
        Profile(tmp_path, 0, 2)


@pytest.mark.parametrize("by", ["file", "signal"])
def test_a_profile_that_is_asked_for(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its file is found by a thread: no step looks for it."""
    monkeypatch.setattr("train.running.profiling.LOOK_SECONDS", 0.01)
    step, x = jax.jit(lambda x: x + 1), jnp.zeros(())
    with Profile(tmp_path, 1, 0) as profile:
        profile.before(1)
        profile.after(1, step(x))
        assert not traced(tmp_path / "profile")
        if by == "file":
            (tmp_path / "profile_now").touch()
            deadline = time.monotonic() + 10
            while (tmp_path / "profile_now").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        else:
            os.kill(os.getpid(), signal.SIGUSR1)
        for number in range(2, 6):
            profile.before(number)
            profile.after(number, step(x))
            assert len(traced(tmp_path / "profile")) == (number >= 4)
