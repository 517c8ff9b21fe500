"""Evaluation while a run trains: it changes nothing of the training, and is written down once."""

import json
from pathlib import Path

from test_loop import assert_same_end, config, copy, corpus, lines, one_device, straight, until  # noqa: F401 - fixtures

from train.config import RunConfig
from train.loop import train


def written(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_an_evaluation_changes_nothing_and_resuming_repeats_none(
    straight: Path,  # noqa: F811
    config: RunConfig,  # noqa: F811
    corpus: Path,  # noqa: F811
    tmp_path: Path,
):
    """Stopped after step 4, whose evaluation is done, and run again from there."""
    out = tmp_path / "run"
    asked = {
        "evaluate_every": 2,
        "evaluate_data": (str(corpus / "clips.jsonl"),),
        "evaluate_count": 3,
        "evaluate_tokens": 4,
        "show_samples": 1,
        "best_metric": "loss",
        "keep_last": 1,
    }
    train(until(config, 4, **asked), out, mesh=one_device())
    train(until(config, config.last_step, **asked), out, mesh=one_device())
    assert_same_end(out, straight, config)
    scores, samples = written(out, "scores"), written(out, "samples")
    assert [line["step"] for line in scores] == [line["step"] for line in samples] == [2, 4, 6]
    name = f"eval/{corpus / 'clips.jsonl'}"
    for line in scores:
        items = [value for key, value in line.items() if key.startswith(name) and key.endswith("/items")]
        assert items == [3]
    assert len({(line["name"], line["reference"]) for line in samples}) == 1 and samples[0]["reference"]
