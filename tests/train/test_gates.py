"""Programs of the released sizes, compiled for TPUs: they fit, need no more than they did, and gather no whole head.

`gates.json` names them, each by the options of `moss-audio-train plan`, with the figures last measured. `make gates`
compiles all of them, `make test` those that name `ci`. With UPDATE_GATES=1 the figures are written instead of compared.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.plan_tables import is_tabled, recomputed, row
from moss_audio_jax import MossAudioConfig
from moss_audio_jax.storage.paths import atomic_write
from train.__main__ import main

pytest.importorskip("libtpu", reason="compiles for TPUs")
FILE = Path(__file__).with_name("gates.json")
GATES: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
DOCS = Path(__file__).parents[2] / "docs" / "tpu.md"
GROWTH = 1.03  # more than this is a regression
COMPARED = ("hbm_bytes_per_chip", "sent_bytes_per_chip", "answers_hbm_bytes_per_chip")  # the last one of `reinforce`
MEASURED = (*COMPARED, "estimated_mfu", "compile_seconds")


def gates() -> list[Any]:
    marks = {True: [pytest.mark.tpu], False: [pytest.mark.tpu, pytest.mark.slow]}
    return [pytest.param(name, id=name, marks=marks["ci" in gate]) for name, gate in GATES.items()]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", gates())
def test_a_program_keeps_its_budget(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    gate = GATES[name]
    jax.clear_caches()  # a program of this size holds gigabytes
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "plan", *gate["plan"].split(), "--json", "-"])
    with jax.default_matmul_precision(
        "default"
    ):  # as it is trained: tests raise it, and splash attention serves no other
        main()  # exits where it does not fit
    report = json.loads(capsys.readouterr().out)
    assert not whole_vocabularies(report), "the embedding or the head, or a gradient, is communicated whole"
    if "rollout" in report:
        report["answers_hbm_bytes_per_chip"] = report["rollout"]["hbm_bytes_per_chip"]
    report["sent_bytes_per_chip"] = round(sum(sums["sent_bytes_per_chip"] for sums in report["collectives"].values()))
    if os.environ.get("UPDATE_GATES"):
        GATES[name] |= {figure: report[figure] for figure in MEASURED if figure in report}
        atomic_write(FILE, json.dumps(GATES, indent=2) + "\n")
        return
    if "decode_temporary_bytes_per_chip" in report:
        assert report["decode_temporary_bytes_per_chip"] <= decoding_allowance(report), "it copies weights or the cache"
    for figure in set(COMPARED) & report.keys():
        assert report[figure] <= GROWTH * gate[figure], f"{figure}: {report[figure]:,} after {gate[figure]:,}"
    for figure in {"hbm_bytes_per_chip", "answers_hbm_bytes_per_chip"} & report.keys():
        assert report[figure] <= report["hbm_usable_bytes_per_chip"]


@pytest.mark.tpu
@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if is_tabled(gate)])
def test_estimates_follow_from_the_figures(name: str):
    """And stand so in docs/tpu.md."""
    gate = GATES[name]
    report = recomputed(gate)
    assert report["estimated_mfu"] == pytest.approx(gate["estimated_mfu"], rel=0.01)
    assert row(gate, report) in DOCS.read_text()


def decoding_allowance(report: dict[str, Any]) -> float:
    """Bytes of temporaries: 2% of what stays on a chip, and a whole layer where its shards are gathered."""
    held, config = report["hbm_bytes_by_kind"], MossAudioConfig.preset(report["model"])
    kept = held["parameters"] + held["cache" if report["mode"] == "generate" else "answers"]
    gathered = 2 * report["parameters"] / config.language_config.num_hidden_layers if report["mesh"]["fsdp"] > 1 else 0
    return 0.02 * kept + gathered


def whole_vocabularies(report: dict[str, Any]) -> list[str]:
    """Communicated arrays as large as the embedding that have the vocabulary among their dimensions."""
    language = MossAudioConfig.preset(report["model"]).language_config
    whole = language.vocab_size * language.hidden_size
    kinds = [*report["collectives"].values(), *report.get("decode_collectives", {}).values()]
    arrays = [array for sums in kinds for array in sums["arrays"]]
    sizes = {array: [int(size) for size in re.findall(r"\d+", array.split("[")[1])] for array in arrays}
    return [array for array, dims in sizes.items() if language.vocab_size in dims and math.prod(dims) >= whole]


def test_a_whole_head_would_be_seen():
    report = {"model": "8b", "collectives": {"all-gather": {"arrays": ["bf16[4096,9496]", "bf16[1,4096,151936]"]}}}
    assert whole_vocabularies(report) == ["bf16[1,4096,151936]"]
