"""The command line: text out, tables, and mistakes in one sentence."""

import errno
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest

from convert.to_orbax import convert_to_orbax
from moss_audio_jax import MossAudioConfig
from moss_audio_jax.cli import run_door
from moss_audio_jax.model import parameter_specs


def door(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moss_audio_jax", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("layout", ["released", "orbax"])
def test_generate_prints_the_recorded_answer(layout, goldens_dir, tmp_path):
    """The real tokenizer and a real recording, from the released layout directly and converted."""
    recorded = np.load(goldens_dir / "e2e_test_en.npz")
    checkpoint, clip = goldens_dir / "tiny-hf", goldens_dir.parent / "audio" / "test_en.mp3"
    if layout == "orbax":
        convert_to_orbax(checkpoint, tmp_path / "orbax")
        checkpoint = tmp_path / "orbax"
    result = door("generate", str(checkpoint), str(clip), "--prompt", str(recorded["text"]), "--max-new-tokens", "24")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{recorded['decoded']}\n"
    assert "158 tokens read, 24 written" in result.stderr


def test_info_adds_up(data_dir):
    result = door("info", str(data_dir / "tiny"))
    assert result.returncode == 0, result.stderr
    specs = parameter_specs(MossAudioConfig.from_hf(data_dir / "tiny"))
    total = sum(int(np.prod(spec.shape)) for spec in specs.values())
    assert result.stdout.splitlines()[-1].split() == ["all", f"{total:,}", f"{4 * total:,}"]
    for path in specs:
        assert path in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere"), "nowhere"),
        (("generate", "nowhere", "clip.wav"), "nowhere"),
        (("generate", "{tiny}", "clip.wav"), "vocab.json"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, data_dir):
    result = door(*(argument.format(tiny=data_dir / "tiny") for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert not result.stdout


COMMANDS = {"moss_audio_jax": "moss-audio", "convert": "moss-audio-convert", "train": "moss-audio-train"}


def ended(package: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    main = importlib.import_module(f"{package}.__main__").main
    monkeypatch.setattr(sys, "argv", [COMMANDS[package], *arguments])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("package", COMMANDS)
def test_version(package, monkeypatch, capsys):
    code, out, err = ended(package, ["--version"], monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"moss-audio-jax .+ \(JAX \d+\.\d+.*, Python \d+\.\d+\.\d+\)\n", out)


@pytest.mark.parametrize(
    ("package", "mistyped", "advice"),
    [
        ("moss_audio_jax", "generat", "did you mean generate"),
        ("convert", "to-orbx", "did you mean to-orbax"),
        ("train", "evalute", "did you mean evaluate"),
        ("moss_audio_jax", "xyz", "give one of generate, info"),
    ],
)
def test_a_mistyped_command_is_called_one(package, mistyped, advice, monkeypatch, capsys):
    code, _, err = ended(package, [mistyped, "x"], monkeypatch, capsys)
    assert code == 2
    assert err == f"error: {COMMANDS[package]} has no command {mistyped!r}: {advice}\n"


NO_URL = "must be a path of this machine or of gs://"


@pytest.mark.parametrize(
    ("package", "arguments", "sentence"),
    [
        ("moss_audio_jax", ["generate", "model", "https://a/b.wav"], f"https://a/b.wav {NO_URL}"),  # one of several
        ("convert", ["to-orbax", "hf://a/b", "out"], f"hf://a/b {NO_URL}"),
        ("convert", ["to-hf", "run", "out", "--base", "s3://a"], f"s3://a {NO_URL}"),  # an option that may be None
        ("train", ["evaluate", "run", "--predictions", "https://a/b"], f"https://a/b {NO_URL}"),
        ("train", ["prepare", "file:///train.jsonl", "out", "--shards", "1"], f"file:///train.jsonl {NO_URL}"),
        ("train", ["scenes", "", "--count", "1"], "a path must name a file or a directory, not be empty"),
        ("train", ["run", "--recipe", "time_events", "--out", ""], "a path must name a file or a directory"),
        ("train", ["evaluate", "run", "--predictions", ""], "a path must name a file or a directory"),
        ("convert", ["to-hf", "run", ""], "a path must name a file or a directory"),
    ],
)
def test_what_is_no_path_is_refused_in_our_words(package, arguments, sentence, monkeypatch, capsys):
    code, _, err = ended(package, arguments, monkeypatch, capsys)
    assert code == 2
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_a_bucket_without_gcsfs_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("moss_audio_jax.paths.find_spec", lambda name: None)
    code, _, err = ended("train", ["evaluate", "gs://bucket/run", "--scenes", "1"], monkeypatch, capsys)
    assert code == 2
    assert err == "error: gs://bucket/run needs gcsfs, which is not installed: pip install 'moss-audio-jax[gcs]'\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space", "/a/b"), "/a/b can't be used (No space left on device): make room there"),
        (PermissionError(errno.EACCES, "no", "/a/b"), "/a/b can't be used (Permission denied): give access to it"),
        (NotADirectoryError(errno.ENOTDIR, "no", "/a/b/c"), "/a/b/c can't be used (Not a directory): a file stands"),
        (RuntimeError("write() failed: No space left on device; writing /a/b.x; at byte 3"), "/a/b.x can't be used"),
        (ValueError('RESOURCE_EXHAUSTED: "s/0" in "/a/b/": No space left on device [28]'), "/a/b/ can't be used"),
    ],
)
def test_what_the_disk_refuses_is_one_sentence(error, sentence, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit) as end:
        run_door(fails)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


def test_other_errors_are_defects():
    def fails():
        raise RuntimeError("the disk has nothing to do with it")

    with pytest.raises(RuntimeError):
        run_door(fails)
