"""64 clients, in processes of their own: `benchmarks.serving` raises if anything is lost or wrong."""

import json
from pathlib import Path

import pytest

from benchmarks.serving import KINDS, measure


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_nothing_is_lost_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the server compiles as a user's does, for one device
    report = measure(clients=64, seconds=20, slots=16, preset="tiny", json_file=tmp_path / "report.json")
    assert set(report.ended) == set(KINDS) and min(report.ended.values()) > 0
    assert report.told_to_wait > 0  # the queue was full
    assert json.loads((tmp_path / "report.json").read_text())["requests_per_second"] == report.requests_per_second
