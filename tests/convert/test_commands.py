"""The commands: one sentence and exit code 2 for mistakes, nothing half-written, little memory."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert import staging
from convert.memory import peak_memory
from convert.rehearse import write_random_checkpoint
from moss_audio_jax import MossAudioConfig
from moss_audio_jax.weights.locate import SINGLE_FILE

GIB = 1 << 30


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_there_and_back_through_the_commands(invoke, released, tmp_path):
    before = listing(released)
    code, out, err = invoke("to-orbax", released, tmp_path / "a" / "orbax")
    assert (code, "wrote" in out, "peak memory" in out) == (0, True, True)
    assert "needs up to" in err
    assert "free" in err
    code, out, _ = invoke("to-hf", tmp_path / "a" / "orbax", tmp_path / "back", "--shard-gb", "0.0002")
    assert code == 0
    assert len(list((tmp_path / "back").glob("model-*-of-00003.safetensors"))) == 3
    code, out, _ = invoke("verify", released, tmp_path / "back", "--no-torch")
    assert (code, out.splitlines()[-1]) == (0, "PASSED")
    assert listing(released) == before
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["orbax"]


def test_empty_target_directory_is_used(invoke, released, tmp_path):
    (tmp_path / "orbax").mkdir()
    assert invoke("to-orbax", released, tmp_path / "orbax")[0] == 0
    assert (tmp_path / "orbax" / "params").is_dir()


def test_target_may_be_given_as_a_link(invoke, released, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "orbax")
    (tmp_path / "disk").mkdir()
    assert invoke("to-orbax", released, tmp_path / "link")[0] == 0
    assert (tmp_path / "disk" / "orbax" / "params").is_dir()


def break_shard(source: Path) -> None:
    os.truncate(source / SINGLE_FILE, 1000)


def damage_manifest(source: Path) -> None:
    (source / "params" / "manifest.ocdbt").write_bytes(b"nothing")


def remove_data(source: Path) -> None:
    shutil.rmtree(source / "params" / "ocdbt.process_0" / "d")


def damage_metadata(source: Path) -> None:
    (source / "params" / "_METADATA").write_text("{")


def change_size(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["adapter_hidden_size"] = 41
    (source / "config.json").write_text(json.dumps(config))


MISTAKES = {
    "no source": ("to-orbax", "released", lambda source: shutil.rmtree(source), "does not exist"),
    "no checkpoint": ("to-orbax", "released", lambda source: (source / SINGLE_FILE).unlink(), "holds neither"),
    "truncated": ("to-orbax", "released", break_shard, "model.safetensors is damaged"),
    "orbax to orbax": ("to-orbax", "orbax", lambda source: None, "is an Orbax checkpoint already"),
    "released to released": ("to-hf", "released", lambda source: None, "is a released directory already"),
    "another size": ("to-hf", "orbax", change_size, "audio_adapter.up_proj.kernel has shape (32, 40)"),
    **{
        f"no shards of {size} GB": (f"to-hf --shard-gb {size}", "orbax", lambda source: None, f"above 0, not {size}")
        for size in ("0.0", "-1.0", "nan", "inf", "1e-10")
    },
    "manifest damaged": ("to-hf", "orbax", damage_manifest, "params"),
    "data gone": ("to-hf", "orbax", remove_data, "params"),
    "metadata damaged": ("to-hf", "orbax", damage_metadata, "params"),
    "nothing to inspect": ("inspect", "released", lambda source: shutil.rmtree(source), "does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_and_leave_no_target(invoke, released, orbax, tmp_path, name):
    command, kind, change, expected = MISTAKES[name]
    source = Path(shutil.copytree({"released": released, "orbax": orbax}[kind], tmp_path / "source"))
    change(source)
    command, *options = command.split()
    targets = [] if command == "inspect" else [tmp_path / "target"]
    code, out, err = invoke(command, source, *targets, *options)
    assert (code, out) == (2, ""), err
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert expected in sentence
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == []


@pytest.mark.parametrize("command", ["to-orbax", "to-hf", "rehearse"])
def test_nothing_is_overwritten(invoke, released, orbax, tmp_path, command):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious.txt").write_text("mine")
    source = {"to-orbax": [released], "to-hf": [orbax], "rehearse": ["--preset", "tiny"]}[command]
    code, _, err = invoke(command, *source, tmp_path / "target")
    assert code == 2
    assert "is not an empty directory" in err
    assert listing(tmp_path) == {"target/precious.txt": b"mine"}


@pytest.mark.parametrize("inside", ["", "new/model"])
def test_a_file_is_no_target(invoke, released, tmp_path, inside):
    (tmp_path / "target").write_text("mine")
    code, _, err = invoke("to-orbax", released, tmp_path / "target" / inside)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert listing(tmp_path) == {"target": b"mine"}


def test_new_parents_of_a_target_go_with_it(invoke, released, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.os, "rename", fail)
    code, _, err = invoke("to-orbax", released, tmp_path / "new" / "deep" / "target")
    assert code == 2 and "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_beforehand(invoke, released, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    for command in (["to-orbax", released], ["rehearse", "--preset", "tiny"]):
        code, _, err = invoke(*command, tmp_path / "target")
        assert code == 2
        assert "make room" in err.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_disk_that_fails_half_way(released, orbax, tmp_path, command):
    """A limit on the size of files stands for a full disk."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "sys.argv[0] = 'convert'; runpy.run_module('convert', run_name='__main__')"
    )
    source = released if command == "to-orbax" else orbax
    arguments = [sys.executable, "-c", limited, command, str(source), str(tmp_path / "target")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    assert "can't be written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """0.43 GB of random weights, the largest stack of which takes 57 MB."""
    tiny = MossAudioConfig.preset("tiny")
    audio = dataclasses.replace(
        tiny.audio_config,
        d_model=512,
        output_dim=512,
        encoder_layers=16,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        downsample_hidden_size=64,
    )
    language = dataclasses.replace(
        tiny.language_config,
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
    )
    config = dataclasses.replace(tiny, audio_config=audio, language_config=language, adapter_hidden_size=1024)
    directory = tmp_path_factory.mktemp("large")
    write_random_checkpoint(config, directory / "released", shard_bytes=10**8)
    yield directory
    shutil.rmtree(directory)


MEASURED = "from convert.__main__ import main; from convert.memory import peak_memory; main(); print(peak_memory())"


@pytest.mark.skipif(peak_memory() is None, reason="only Linux tells how much memory a process took")
def test_conversions_stream(large):
    """Peak memory stays below twice the largest stack and half a GiB, which is less than interpreter and checkpoint."""
    bound = 2 * 12 * 768 * 3072 * 2 + GIB // 2
    total = sum(path.stat().st_size for path in (large / "released").iterdir())
    assert total > 0.42e9
    steps = (
        ["to-orbax", "released", "orbax"],
        ["to-hf", "orbax", "back"],
        ["verify", "released", "back", "--no-torch"],
    )
    for step in steps:
        command = [sys.executable, "-c", MEASURED, *step]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": root, "XLA_FLAGS": ""}
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=large, env=environment)
        assert result.returncode == 0, result.stderr
        peak = int(result.stdout.split()[-1])
        print(step[0], f"{peak / GIB:.2f} GiB")
        assert peak < bound < 0.25 * GIB + total
    shutil.rmtree(large / "orbax")
    shutil.rmtree(large / "back")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("heard_interrupts")
def test_killed_conversion_leaves_no_target(large, sent):
    target = large / "killed"
    command = [sys.executable, "-m", "convert", "to-orbax", str(large / "released"), str(target)]
    for _attempt in range(5):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not list(large.glob("killed.partial-*/params*/*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(sent)
        _, err = process.communicate(timeout=120)
        if process.returncode != 0:
            break
        shutil.rmtree(target)  # on a busy machine the conversion may be done before the signal is sent
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sent]
    assert "Traceback" not in err
    assert not target.exists()
    left = list(large.glob("killed*"))
    if sent == signal.SIGKILL:  # nobody is left to clean up, and the name says what it is
        assert [path.name for path in left] == [f"killed.partial-{process.pid}"]
        shutil.rmtree(left[0])
    else:
        assert left == []


def test_inspect_adds_up_in_both_layouts(invoke, released, orbax):
    tables = {}
    for directory, layout in ((released, "released"), (orbax, "orbax")):
        code, out, _ = invoke("inspect", directory, "--json", "-")
        assert code == 0
        found = json.loads(out)
        assert (found["layout"], found["tensors"]) == (layout, 159)
        assert (found["total_parameters"], found["total_bytes"]) == (216_304, 432_608)
        assert sum(parameter["bytes"] for parameter in found["parameters"]) == 432_608
        tables[layout] = found["parameters"]
    assert tables["released"] == tables["orbax"]
    row = next(row for row in tables["orbax"] if row["path"] == "language_model.layers.mlp.up_proj.kernel")
    assert row == {
        "path": "language_model.layers.mlp.up_proj.kernel",
        "released_name": "language_model.layers.{0..3}.mlp.up_proj.weight",
        "shape": [4, 48, 96],
        "dtype": "bfloat16",
        "count": 18432,
        "bytes": 36864,
    }
    code, out, _ = invoke("inspect", orbax)
    assert "Orbax" in out.splitlines()[0]
    assert out.splitlines()[-1].split() == ["all", "216,304", "432,608"]


def test_commands_as_programs(tmp_path):
    """In a process of its own: the exit code, no traceback, help without JAX."""
    result = run("to-orbax", tmp_path / "nowhere", tmp_path / "target")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    result = run("to-orbax", "--no-such-option")
    assert result.returncode == 2
    result = run("--help")
    assert result.returncode == 0
    for command in ("to-orbax", "to-hf", "inspect", "verify", "rehearse"):
        assert command in result.stdout
