"""A picture of runs from their records: what is read of them, and what is drawn where."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moss_audio_jax.errors import MossAudioError
from train.__main__ import main
from train.running.curves import _draw, _names, _smoothed, read_curves

pytest.importorskip("matplotlib")


def write_run(directory: Path, losses: list[float | None], joins: int, rate: float = 1e-3) -> Path:
    directory.mkdir(parents=True)
    lines = [
        {"step": step, "loss": loss, "learning_rate": rate, "tokens/easy": 10, "tokens/hard": 5 * (step >= joins)}
        for step, loss in enumerate(losses, start=1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # as a kill leaves it
    scores = [{"step": 2, "eval/f1": 0.5, "eval/loss": 2.0, "eval/scenes/f1": 0.1}, {"step": 4, "eval/loss": None}]
    (directory / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    return directory


def test_what_is_read(tmp_path: Path):
    run = read_curves(write_run(tmp_path / "a", [4.0, None, 2.0, 1.0], joins=3), "a")
    steps, loss = run.metrics["loss"]
    np.testing.assert_array_equal(steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(loss, [4.0, np.nan, 2.0, 1.0])
    assert run.joins == {"hard": 3}
    np.testing.assert_array_equal(run.scores["eval/loss"], ([2, 4], [2.0, np.nan]))


def test_smoothing_leaves_out_what_is_not_finite():
    np.testing.assert_array_equal(_smoothed(np.array([1.0, np.nan, 3.0, 5.0]), 1), [1.0, 2.0, 4.0, 4.0])
    assert np.isnan(_smoothed(np.array([np.nan]), 1)).all()


def test_what_is_drawn(tmp_path: Path):
    losses = [8.0, 4.0, 2.0, 1.0, 6.0, 0.5]
    runs = [read_curves(write_run(tmp_path / name, losses, joins=5), name) for name in ("a", "b")]
    loss, rate, *scores = _draw(runs).axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]
    assert [panel.get_ylabel() for panel in scores] == ["eval/loss", "eval/f1"]
    smooth = loss.lines[1].get_ydata()
    assert smooth[3] == 1.5 and smooth[4] == 3.25  # nothing is averaged across the border
    assert [text.get_text().strip() for text in loss.texts] == ["hard joins:\n other examples from here on"]  # once
    assert len(rate.lines) == 3 and rate.lines[2].get_xdata()[0] == 5


def test_names_are_as_short_as_they_can_be():
    assert _names(["runs/a", "runs/b"]) == ["a", "b"]
    assert _names(["x/run", "y/run"]) == ["x/run", "y/run"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    runs = [str(write_run(tmp_path / name, [2.0, 1.0], joins=1)) for name in ("a", "b")]
    out = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["moss-audio-train", "plot", *runs, "--plot", str(out)])
    main()
    assert capsys.readouterr().out == f"wrote {out}\n" and out.read_bytes()[1:4] == b"PNG"


def test_what_is_no_run_is_named(tmp_path: Path):
    with pytest.raises(MossAudioError, match=r"absent/metrics\.jsonl must have a line for each step, and has none"):
        read_curves(tmp_path / "absent", "absent")
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(MossAudioError, match="must be JSON lines with a step each"):
        read_curves(tmp_path, "damaged")
