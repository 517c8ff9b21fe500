"""The comparison with MaxText: our side is compiled at toy size, MaxText's where it is installed, which is not here."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import training_programs, vs_maxtext
from benchmarks.training_programs import Program, Work
from moss_audio_jax import MossAudioError
from moss_audio_jax.config import PRESETS
from moss_audio_jax.sharding import make_mesh
from train.planning.flops import Content, recomputed_flops, step_flops
from train.planning.plan import planned_state, with_sizes
from train.planning.topology import topology_devices
from train.recipes import RECIPES

pytest.importorskip("libtpu", reason="compiles for TPUs")
pytestmark = pytest.mark.tpu
GIB = 2**30
WORK = Work("v5e:2x2", layers=2, sequences=1, tokens=1024)


def program(side: str, **changes) -> Program:
    figures = {
        "fits": True,
        "hbm": 46.7 * GIB,
        "sent": {"all-gather bf16": 128.4 * GIB},
        "matmul_flops": 5595.55e12,
        "seconds": 421.2,
    }
    versions = training_programs.versions() | ({"maxtext": "0.2.5"} if side != "ours" else {})
    return Program(versions, **(figures | {"cpu_seconds": 800.0} | changes))


def write(file: Path, work: Work, **programs: Program) -> None:
    file.write_text(json.dumps({"work": work, "programs": programs}, default=vars), "utf-8")


def test_our_side_executes_the_matmuls_of_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Those that `flops` counts: once forward, twice backward, and what is recomputed."""
    monkeypatch.setitem(PRESETS, "8b", PRESETS["tiny"])
    file = tmp_path / "ours.json"
    with jax.default_matmul_precision("default"):
        training_programs.main("ours", json.dumps(vars(WORK)), str(file))
    ours = Program(**json.loads(file.read_text()))
    assert ours.fits and sum(ours.sent.values()) > 0 and ours.versions["jax"] == jax.__version__
    assert ours.hbm > 0 and ours.seconds > 0 and ours.cpu_seconds > 0
    config = with_sizes(RECIPES["pretrain_stage2"], "tiny", slices=1, batch=4, tokens=WORK.tokens, chunks=0)
    mesh = make_mesh(devices=topology_devices(WORK.topology))
    model = config.model_config()
    language = dataclasses.replace(model.language_config, num_hidden_layers=WORK.layers)
    model = dataclasses.replace(model, language_config=language, deepstack_num_inject_layers=WORK.layers)
    content = Content(tokens=4 * WORK.tokens, chunks=0, attention_pairs=0)
    trainable = planned_state(config, mesh, model).trainable
    once, again = step_flops(model, content, trainable), recomputed_flops(model, content, trainable, "full")
    assert ours.matmul_flops * mesh.size == sum(once.values()) + sum(again.values())


def test_maxtext_is_asked_for_the_same_work():
    options = training_programs.maxtext_options(WORK, "")
    assert {"base_num_decoder_layers=2", "compile_topology=v5e-4", "max_target_length=1024"} <= set(options)
    more = training_programs.maxtext_options(Work(), "num_vocab_tiling=8 vocab_tiling_ag_once=true")
    assert {"compile_topology=v5p-128", "num_vocab_tiling=8", "vocab_tiling_ag_once=true"} <= set(more)
    assert "num_vocab_tiling=16" in options and "num_vocab_tiling=16" not in more


def test_figures_that_a_file_has_are_tabled_without_compiling(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "figures.json"
    sent = {"all-gather bf16": 60 * GIB, "all-reduce f32": 2.1 * GIB, "x f32": 5}
    programs = {"ours": program("ours", fits=False, sent=sent), "MaxText num_vocab_tiling=8": program("MaxText")}
    write(file, Work(), **programs, another=program("MaxText"))
    vs_maxtext.run("no-such-python", file, ("num_vocab_tiling=8",))
    head, table, sent = capsys.readouterr().out.split("\n\n")
    assert "Qwen3-8B with 36 layers, 12 sequences of 8192 tokens a chip, on v5p:4x4x4 (v5p-128)" in head
    assert "ahead of time, no TPU" in head and "maxtext 0.2.5" in head and f"jax {jax.__version__}" in head
    assert table.splitlines() == [
        "                                       HBM, GiB  sends, GiB  matmuls, TFLOP  compiled in, s  CPU, s",
        "ours                        46.7 (does not fit)        62.1         5595.55             421     800",
        "MaxText num_vocab_tiling=8                 46.7       128.4         5595.55             421     800",
    ]
    assert sent.splitlines()[1:] == [
        "ours: all-gather bf16 60.0, all-reduce f32 2.1",
        "MaxText num_vocab_tiling=8: all-gather bf16 128.4",
    ]


def test_a_row_that_a_file_lacks_is_compiled_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, asked = tmp_path / "figures.json", []
    write(file, WORK, ours=program("ours"), MaxText=program("MaxText"))

    def compiled(work: Work, *side: str) -> Program:
        asked.append((work, *side))
        return program("MaxText")

    monkeypatch.setattr(vs_maxtext, "require_maxtext", lambda python: None)
    monkeypatch.setattr(vs_maxtext, "compiled", compiled)
    for _ in range(2):
        vs_maxtext.run("its-python", file, work=WORK)
    assert asked == [(WORK, "its-python", "maxtext", "vocab_tiling_ag_once=true")]
    assert len(json.loads(file.read_text())["programs"]) == 3


def test_figures_of_something_else_are_refused(tmp_path: Path):
    file = tmp_path / "figures.json"
    write(file, Work(), ours=program("ours"))
    with pytest.raises(MossAudioError, match=r"has the figures of other work, .*'layers': 36.*: name another file"):
        vs_maxtext.run(sys.executable, file, work=WORK)
    write(file, WORK, ours=dataclasses.replace(program("ours"), versions={"libtpu": "0.0.1"}))
    with pytest.raises(MossAudioError, match=r"is of libtpu 0\.0\.1, not 0\."):
        vs_maxtext.run(sys.executable, file, work=WORK)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (sys.executable, r"can't import MaxText \(.*maxtext.*\): python3.12 -m venv ENV && ENV/bin/pip install"),
        ("no-such-python", r"can't be run \(No such file or directory\): python3.12 -m venv ENV"),
    ],
)
def test_without_maxtext_the_install_lines_are_said(python: str, message: str):
    with pytest.raises(MossAudioError, match=message):
        vs_maxtext.run(python, work=WORK)


def test_both_sides_must_have_one_libtpu(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.2.5 0.12.0 0.0.1\n")
    python.chmod(0o755)
    with pytest.raises(MossAudioError, match=r"MaxText's is 0\.0\.1 and ours 0\..*libtpu==0\."):
        vs_maxtext.run(str(python), work=WORK)


def test_a_topology_that_maxtext_can_t_name_is_refused():
    with pytest.raises(MossAudioError, match=r"--topology must be one that is rented under a name.*not v5e:3x3"):
        vs_maxtext.run(sys.executable, work=Work("v5e:3x3"))


def test_a_side_that_fails_shows_its_output(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(MossAudioError, match="the step of maxtext was not compiled"):
        vs_maxtext.compiled(WORK, sys.executable, "maxtext", "")
    assert "No module named 'maxtext'" in capsys.readouterr().err
