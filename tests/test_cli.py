"""The command line: text out, tables, and mistakes in one sentence."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile

from convert.rehearse import rehearse
from convert.to_orbax import convert_to_orbax
from moss_audio_jax import MossAudioConfig
from moss_audio_jax.__main__ import main
from moss_audio_jax.commands import cli as cli_module
from moss_audio_jax.commands import progress
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.commands.compilation_cache import cpu_name
from moss_audio_jax.commands.renamed import current_arguments
from moss_audio_jax.inference.thinking import STOP_THINKING
from moss_audio_jax.model import parameter_specs
from tests.conftest import OPENED, add_thinking_tokens
from tests.xla_flags import QUICK


def invoke(*arguments: Any, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moss_audio_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def said(result: subprocess.CompletedProcess) -> list[str]:
    """The lines on stderr, without those that a slow machine adds."""
    return [line for line in result.stderr.splitlines() if not line.endswith("s so far]")]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A small checkpoint that can be asked."""
    directory = tmp_path_factory.mktemp("checkpoints") / "released"
    rehearse("tiny", directory)
    return directory


@pytest.mark.parametrize("layout", ["released", "orbax"])
def test_generate_prints_the_recorded_answer(layout, goldens_dir, tmp_path):
    """The real tokenizer and a real recording, from the released layout directly and converted."""
    recorded = np.load(goldens_dir / "e2e_test_en.npz")
    checkpoint, clip = goldens_dir / "tiny-hf", goldens_dir.parent / "audio" / "test_en.mp3"
    if layout == "orbax":
        convert_to_orbax(checkpoint, tmp_path / "orbax")
        checkpoint = tmp_path / "orbax"
    result = invoke("generate", str(checkpoint), str(clip), "--prompt", str(recorded["text"]), "--max-new-tokens", "24")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{recorded['decoded']}\n"
    assert "158 tokens read, 24 written" in result.stderr


def test_info_adds_up(data_dir):
    result = invoke("info", str(data_dir / "tiny"))
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
    result = invoke(*(argument.format(tiny=data_dir / "tiny") for argument in arguments))
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
        ("moss_audio_jax", "xyz", "give one of generate, transcribe, timeline, info, serve, env"),
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
    monkeypatch.setattr("moss_audio_jax.storage.paths.find_spec", lambda name: None)
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
        (OSError("Forbidden: b/model"), "Google Cloud Storage denied access (Forbidden: b/model): give this account"),
    ],
)
def test_what_the_disk_refuses_is_one_sentence(error, sentence, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit) as end:
        run_cli(fails)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


def test_other_errors_are_defects():
    def fails():
        raise RuntimeError("the disk has nothing to do with it")

    with pytest.raises(RuntimeError):
        run_cli(fails)


def test_an_answer_that_was_cut_off_and_several_clips_in_one_prompt_are_said(released, tmp_path):
    clips = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for clip in clips:
        soundfile.write(clip, np.sin(np.arange(8000) / 5), 16000)
    one_device = os.environ | {"XLA_FLAGS": QUICK}
    result = invoke("generate", released, *clips, "--max-new-tokens", 3, environment=one_device)
    assert result.returncode == 0, result.stderr
    lines = said(result)
    assert lines[0].startswith("[all 2 clips are in one prompt, for one answer; for an answer a file, use `moss-audio")
    assert "tokens read, 3 written" in lines[1]
    assert lines[2] == "[the answer was not finished: it was cut off after --max-new-tokens 3; give more of them]"


def test_a_thought_is_ended_and_told_from_the_answer(released, tmp_path, monkeypatch, capsys):
    checkpoint, clip = shutil.copytree(released, tmp_path / "thinking"), tmp_path / "a.wav"
    add_thinking_tokens(checkpoint)
    soundfile.write(clip, np.sin(np.arange(8000) / 5), 16000)
    command = ["generate", checkpoint, clip, "--prompt", OPENED, "--max-new-tokens", 140, "--thinking-budget", 3]
    shown = {}
    for thinking in ("show", "hide", "only"):
        code, out, err = ended("moss_audio_jax", [*map(str, command), "--thinking", thinking], monkeypatch, capsys)
        assert code == 0, err
        shown[thinking] = out.removesuffix("\n")
    assert shown["only"].endswith(STOP_THINKING) and shown["hide"]
    assert shown["show"] == f"<think>\n{shown['only']}\n</think>\n\n{shown['hide']}"


def test_an_answer_that_repeats_itself_is_ended_and_hot_words_are_read(released, monkeypatch, capsys):
    """A penalty that is a reward makes sure of it."""
    command = ["generate", str(released), "--prompt", "?", "--max-new-tokens", "400", "--repetition-penalty", "0.5"]
    code, _, err = ended("moss_audio_jax", [*command, "--loops", "stop"], monkeypatch, capsys)
    assert code == 0, err
    read, written = map(int, re.search(r"\[(\d+) tokens read, (\d+) written", err).groups())
    assert 48 <= written < 400
    assert err.splitlines()[-1] == "[the answer was not finished: it repeated itself, and --loops ended it]"
    _, _, err = ended("moss_audio_jax", [*command, "--hot-words", "Amsel", "Fink"], monkeypatch, capsys)
    added = len("These words may occur: Amsel, Fink.\n")  # a token for each byte
    assert f"[{read + added} tokens read, " in err


def test_the_help_says_that_clips_are_of_one_prompt():
    shown = " ".join(invoke("generate", "--help").stdout.replace("│", " ").split())
    assert "CLIP_OF_ONE_PROMPT" in shown.split("Answers one question")[0]
    assert "For an answer per file, use `moss-audio transcribe`, with its --prompt, or" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is nothing to answer: give a clip, or a question with --prompt, or both"),
        (("--prompt", ""), "there is nothing to answer"),
        (("--prompt", "?", "--seed", 99999999999999999999), "seed must be a whole number from -2^63 to 2^64 - 1"),
        (
            ("--prompt", "?", "--max-new-tokens", 40_960),
            "max_position_embeddings of 40,960: let max_new_tokens be 40,9",
        ),
        (("--prompt", "?", "--thinking-budget", 5), "a thinking_budget needs a tokenizer with the tokens <think> and"),
        (("--prompt", "?", "--temperature", -1), "temperature must be 0 or more"),
        (("--prompt", "?", "--adapter", ""), "a path must name a file or a directory, not be empty"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(released, options, message, monkeypatch, capsys):
    code, out, err = ended("moss_audio_jax", ["generate", str(released), *map(str, options)], monkeypatch, capsys)
    assert code == 2 and not out
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("program", ["moss_audio_jax", "convert", "train"])
@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_during_the_imports_of_a_command(program, tmp_path):
    (tmp_path / "tyro.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", program, "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\ninterrupted\n")


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_during_the_imports_says_nothing(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "convert", "inspect", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:  # a line for each import that is done
            seen.append(line)
            if line.endswith(" numpy\n"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert seen[-1].endswith(" numpy\n")
    assert process.returncode == 130
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


HEAVY = {"jax", "flax", "orbax", "optax", "grain", "matplotlib", "scipy", "soundfile", "torch", "starlette", "uvicorn"}
LOADED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command",
    [
        *("moss_audio_jax generate", "moss_audio_jax transcribe", "moss_audio_jax timeline", "moss_audio_jax serve"),
        *("convert verify", "train", "train run", "train evaluate"),
    ],
)
def test_help_imports_nothing_heavy(command):
    shown = subprocess.run([sys.executable, "-c", LOADED, *command.split(), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "usage: moss-audio" in shown.stdout, shown.stderr
    assert not HEAVY & set(shown.stderr.split())


@pytest.mark.parametrize("package", COMMANDS)
@pytest.mark.parametrize("recipe", ["finetune_lora", "time_events"])
def test_every_option_has_help(package, recipe, monkeypatch):
    """Options of `run`, `check` and `plan` are those of a recipe; named groups have options of their own."""
    bare = []

    def cli(self, *, config=(), **options):
        for name in self._subcommands:
            actions = self.parser(name, config)._actions
            assert actions
            bare.extend(
                (name, action.option_strings or action.dest)
                for action in actions
                if not re.sub(r"\((default|required|repeatable|optional)[^\n]*\)", "", action.help or "").strip()
            )

    monkeypatch.setattr(cli_module.Commands, "cli", cli)
    named = ["--recipe", recipe, "--mixture.mine.share", "1"]
    for command in ("run", "check", "plan") if package == "train" else ("",):
        monkeypatch.setattr(sys, "argv", [COMMANDS[package], *([command, *named] if command else [])])
        importlib.import_module(f"{package}.__main__").main()
    assert not bare


RUN = ["run", "--recipe", "time_events", "--out", "nowhere"]


@pytest.mark.parametrize(
    ("package", "arguments", "sentence"),
    [
        ("train", [*RUN, "--steps", "0"], "--steps must be 1 or more, not 0"),
        ("train", [*RUN, "--optimizer.schedule", "foo"], "--optimizer.schedule must be one of cosine, wsd, not 'foo'"),
        ("train", [*RUN, "--mesh.fsdp", "x"], "--mesh.fsdp must be a whole number, not 'x'"),
        ("train", [*RUN, "--steps", "x"], "--steps must be None or a whole number, not 'x'"),
        ("train", [*RUN, "--optimizer.b1", "x"], "--optimizer.b1 must be a number, not 'x'"),
        ("train", [*RUN, "--microbatches", "3"], "--microbatches must divide the batch of 16 sequences, not 3"),
        (
            "train",
            [*RUN, "--optimizer.learning-rat", "1"],
            "there is no option --optimizer.learning-rat: did you mean --",
        ),
        (
            "train",
            [*RUN, "--mixture.scenes.scenes.events", "3", "1"],
            "--mixture.scenes.scenes.events must be a lower and",
        ),
        ("train", ["run", "--recipe", "nothing", "--out", "nowhere"], "--recipe must be one of pretrain_stage1, "),
        ("train", ["run", "--recipe", "time_events"], "--out must be given: `moss-audio-train run --help` lists"),
        ("train", ["ablate", "nowhere", "--answers.batch-size", "0"], "--answers.batch-size must be 1 or more, not 0"),
        ("train", ["evaluate", "nowhere", "--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
        ("train", ["evaluate"], "CHECKPOINT must be given: `moss-audio-train evaluate --help`"),
        ("train", ["plot", "--plot"], "--plot must be followed by PATH"),
        ("train", [], "moss-audio-train needs a command: give one of prepare, scenes, "),
        ("convert", ["inspect", "a", "b"], "there is no argument 'b': leave it out"),
        ("moss_audio_jax", ["generate", "a", "--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
    ],
    ids=str,
)
def test_a_mistake_in_an_argument_is_one_sentence(package, arguments, sentence, monkeypatch, capsys):
    code, out, err = ended(package, arguments, monkeypatch, capsys)
    assert code == 2 and not out
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_old_names_of_options_still_work(capsys):
    given = ["run", "--evaluate-every", "5", "--evaluate_batch=2", "--step.heard-weight", "0.5", "--out", "a"]
    now = ["run", "--validation.every", "5", "--validation.batch-size=2", "--step.audio-label-weight", "0.5"]
    assert current_arguments(given) == [*now, "--out", "a"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "--evaluate-every is now --validation.every" and len(said) == 3
    assert current_arguments(["evaluate", "a", "--out", "b", "--fsdp", "2"]) == [
        *("evaluate", "a", "--json", "b", "--mesh.fsdp", "2")
    ]
    assert current_arguments(["plan", "--json", "--model", "8b"]) == ["plan", "--json", "-", "--preset", "8b"]
    assert current_arguments(["inspect", "a", "--json"]) == ["inspect", "a", "--json", "-"]
    capsys.readouterr()
    assert current_arguments(now) == now and not capsys.readouterr().err


def compiled_files(directory: Path) -> set[str]:
    return {file.name for file in directory.rglob("*-cache")}


def test_commands_keep_compiled_programs_unless_told_otherwise(released, tmp_path):
    command = ("generate", released, "--prompt", "?", "--max-new-tokens", 2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    off = environment | {"JAX_COMPILATION_CACHE_DIR": ""}
    (tmp_path / "taken").write_text("a file where a directory would be made")
    nowhere = environment | {"XDG_CACHE_HOME": str(tmp_path / "taken")}
    answers = []
    for variables in (off, nowhere, environment, environment):
        result = invoke(*command, environment=variables)
        assert result.returncode == 0 and len(said(result)) == 2, result.stderr
        answers.append(result.stdout)
        found = compiled_files(tmp_path / "cache")
        assert bool(found) == (variables is environment)
        assert not found or any("prefill_prompts" in name for name in found)
    assert len(set(answers)) == 1
    (cpu,) = (tmp_path / "cache" / "moss-audio-jax" / "compiled").iterdir()
    assert cpu.name == cpu_name() and cpu.stat().st_mode & 0o077 == 0


def test_what_takes_long_is_said_on_a_terminal_and_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE", 0.01)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.05)
    with progress.waiting("reading"):
        time.sleep(0.6)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and all(line.startswith("[reading: ") for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.waiting("reading"):
        time.sleep(1.3)
    said = capsys.readouterr().err
    assert "\rreading: 1 s" in said.replace("\x1b[K", "") and said.endswith("\r\x1b[K")
    monkeypatch.setattr(progress, "SILENCE", 3.0)
    with progress.waiting("reading"):
        pass
    assert not capsys.readouterr().err


def test_env_says_what_a_report_needs_and_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("MOSS_AUDIO_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setattr("sys.argv", ["moss-audio", "env", "--json", "-"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["jax"] == jax.__version__ and found["devices"]["kind"] == "cpu"
    assert found["settings"]["MOSS_AUDIO_API_KEY"] == "(set)" and found["settings"]["HF_HOME"] == "/somewhere"
    monkeypatch.setattr("sys.argv", ["moss-audio", "env"])
    main()
    table = capsys.readouterr().out
    assert f"package jax  {jax.__version__}" in re.sub(" {2,}", "  ", table) and "sk-secret" not in table
