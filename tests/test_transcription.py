"""Many recordings: found, named, transcribed once, written whole; what can't be read is named and the rest go on."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference import transcript_files
from moss_audio_jax.inference.recording_files import find_recordings
from moss_audio_jax.inference.recordings import Ask
from moss_audio_jax.inference.transcript_files import FORMATS, Outputs, parse_formats
from moss_audio_jax.inference.transcription import Reporter, Tally, measure, transcribe_jobs
from moss_audio_jax.inference.windows import Cutting, Window
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import to_path
from tests.test_cli import ended
from tests.xla_flags import QUICK

RATE = 16000


def sound(path: Path, seconds: float = 0.5, format: str | None = None, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(round(seconds * 100)).normal(0, 0.1, int(seconds * rate))
    soundfile.write(path, wave, rate, format=format)
    return path


# Finding and naming


def found(*paths: object, lists: tuple = ()) -> dict[str, str]:
    """Names of the outputs, and the files they are of."""
    return {one.name: str(one.path) for one in find_recordings([str(path) for path in paths], lists).recordings}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "in"
    for name in ("a.wav", "a.mp3", "b/a.wav", "b/C.flac", "b/c.OGG", "b/deep/d.opus", ".hidden/e.wav", ".f.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "notes.txt").write_text("no recording")
    return folder


def test_a_folder_is_mirrored_and_no_two_outputs_have_one_name(folder):
    assert found(folder) == {
        "a.mp3": f"{folder}/a.mp3",
        "a.wav": f"{folder}/a.wav",
        "b/C.flac": f"{folder}/b/C.flac",
        "b/a": f"{folder}/b/a.wav",
        "b/c.OGG": f"{folder}/b/c.OGG",
        "b/deep/d": f"{folder}/b/deep/d.opus",
    }
    assert [path.name for path in find_recordings([str(folder)]).others] == ["notes.txt"]


def test_globs_lists_and_files(folder, tmp_path, monkeypatch):
    assert found(f"{folder}/*.wav", f"{folder}/a.wav") == {"a": f"{folder}/a.wav"}
    assert set(found(f"{folder}/**/*.wav")) == {"a", "b/a"}
    assert set(found(f"{folder}/b*")) == {"b/C.flac", "b/a", "b/c.OGG", "b/deep/d"}
    listed = tmp_path / "list.txt"
    listed.write_text("# mine\n\nin/a.wav\nin/b\n../absent.wav\n")
    expected = {"a", "C.flac", "c.OGG", "deep/d", "absent"}
    names = set(found(f"@{listed}"))
    assert {name for name in names if "/" not in name or name == "deep/d"} >= expected - {"a"}
    assert names == set(found(lists=(listed,))) and len(names) == 6
    monkeypatch.chdir(folder)
    assert found("a.wav", "./a.wav", folder / "a.wav") == {"a": "a.wav"}
    (folder / "[1].wav").write_bytes(b"x")
    assert set(found("[1].wav", "*1*.wav")) == {"[1]"}


def test_files_of_one_name_get_their_folders(tmp_path):
    names = set(found(tmp_path / "x" / "a.wav", tmp_path / "y" / "a.wav", tmp_path / "y" / "b.wav"))
    assert names == {"x/a.wav", "y/a.wav", "b"}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "there is no recording"),
        (("{}/empty",), "has no file that is named like a recording"),
        (("{}/*.xyz",), "matches no file"),
        (("@{}/no.txt",), "the list .*no.txt can't be read"),
        (("s3://a",), "must be a path of this machine or of gs://"),
    ],
)
def test_what_is_nowhere_is_refused(tmp_path, paths, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MossAudioError, match=message):
        find_recordings([path.format(tmp_path) for path in paths])


def test_an_unknown_format_is_refused():
    assert parse_formats("txt, srt,txt") == ("txt", "srt")
    for wrong in ("", "txt,doc"):
        with pytest.raises(MossAudioError, match="--format must be some of txt,json"):
            parse_formats(wrong)


# Transcribing, with a stand-in for the engine


def replies(text: str = "[0.10]hello[0.20]", reason: str = "stop") -> Ask:
    def ask(window: Window) -> Future:
        future: Future = Future()
        future.set_result(SimpleNamespace(text=text, finish_reason=reason))
        return future

    return ask


def run(paths, out, ask: Ask | None = None, *, formats=("txt",), options=None, in_flight=4) -> tuple[Tally, int, int]:
    """Returns what `transcribe_jobs` does, and how many were done before and could not be read."""
    outputs = Outputs(out, tuple(formats), options or {"prompt": "?"})
    report = Reporter(threading.Event())
    jobs, done, failed = measure(find_recordings([str(path) for path in paths]).recordings, outputs, report)
    assert [job.seconds for job in jobs] == sorted(job.seconds for job in jobs)
    cutting = Cutting.of(10)
    return transcribe_jobs(jobs, outputs, ask or replies(), report, cutting=cutting, in_flight=in_flight), done, failed


def test_what_cannot_be_read_is_named_and_the_rest_go_on(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name, format in (("a.wav", "WAV"), ("b.mp3", "MP3"), ("c.ogg", "OGG"), ("d.flac", "FLAC")):
        sound(folder / name, 0.5 + 0.1 * len(name), format)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "broken.mp3").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "pointer.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "movie.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    sound(folder / "short.wav", 0.005)
    nan = np.zeros(30 * RATE, np.float32)
    nan[25 * RATE] = np.nan  # found in the third window
    soundfile.write(folder / "nan.wav", nan, RATE, subtype="FLOAT")

    def ask(window: Window) -> Future:
        if len(window.wave) < 160:
            raise MossAudioError("the wave must have at least 160 samples")
        return replies()(window)

    tally, done, failed = run([folder, tmp_path / "absent.wav"], out, ask)
    assert (tally.written, tally.failed, done, failed) == (4, 2, 0, 5)
    said = capsys.readouterr().err
    for name in ("empty.wav", "broken.mp3", "pointer.wav", "movie.mp4", "short.wav", "nan.wav", "absent.wav"):
        (line,) = [line for line in said.splitlines() if name in line]
        assert line.startswith("[not transcribed: ")
    assert sorted(path.name for path in out.glob("*")) == [".moss-audio", "a.txt", "b.txt", "c.txt", "d.txt"]
    assert (out / "a.txt").read_text() == "[0.10-0.20] hello\n"
    again = run([folder], out, ask)
    assert again[0].written == 0 and again[1:] == (4, 4)


def test_windows_of_all_recordings_wait_together_and_results_are_in_order(tmp_path):
    """A thread answers the newest first, as an engine may."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for index in range(6):
        sound(folder / f"{index}.wav", 1 + index / 10)
    sound(folder / "long.wav", 35)
    pending: list[tuple[Window, Future]] = []
    most = 0

    def ask(window: Window) -> Future:
        nonlocal most
        pending.append((window, Future()))
        most = max(most, len(pending))
        return pending[-1][1]

    def answer():
        while not ended.wait(0.01):
            if pending:
                window, future = pending.pop()
                text = f"[0.00]{window.place.begin:.0f}[1.00]"
                future.set_result(SimpleNamespace(text=text, finish_reason="stop"))

    ended = threading.Event()
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        tally, _, _ = run([folder], out, ask, in_flight=3)
    finally:
        ended.set()
        thread.join()
    assert tally.written == 7 and 2 <= most <= 3
    lines = (out / "long.txt").read_text().splitlines()
    assert len(lines) >= 4 and lines[0] == "[0.00-1.00] 0"
    begins = [float(line.partition("-")[0][1:]) for line in lines]
    assert begins == sorted(begins) and [f"{begin:.0f}" for begin in begins] == [line.split()[-1] for line in lines]


def test_only_what_is_done_with_the_same_options_is_skipped(tmp_path):
    path, out = sound(tmp_path / "a.wav"), tmp_path / "out"

    def written(**changes) -> bool:
        tally, done, failed = run([path], out, **changes)
        assert tally.written + done == 1 and not failed
        return bool(tally.written)

    assert written() and not written()
    assert written(options={"prompt": "!"}) and not written(options={"prompt": "!"})
    assert written(options={"prompt": "!"}, formats=("txt", "srt"))
    assert not written(options={"prompt": "!"})  # a part of the formats
    (out / "a.txt").unlink()
    assert written(options={"prompt": "!"})
    sound(path, 0.7)
    assert written(options={"prompt": "!"})


def test_outputs_of_another_recording_are_never_replaced(tmp_path, capsys):
    one, other, out = sound(tmp_path / "x" / "a.wav"), sound(tmp_path / "y" / "a.wav"), tmp_path / "out"
    assert run([one], out)[0].written == 1
    tally, done, failed = run([other], out, replies("[0.00]other[0.10]"))
    assert (tally.written, done, failed) == (0, 0, 1)
    assert "a.* in" in capsys.readouterr().err and "hello" in (out / "a.txt").read_text()
    assert run([one, other], out)[0].written == 2
    assert (out / "x" / "a.wav.txt").is_file() and (out / "y" / "a.wav.txt").is_file()


def test_a_recording_whose_writing_was_interrupted_is_not_done(tmp_path, monkeypatch):
    path, out = sound(tmp_path / "a.wav"), tmp_path / "out"
    write = transcript_files.atomic_write

    def full(target, content):
        if str(target).endswith(".srt"):
            raise OSError(28, "No space left on device", str(target))
        write(target, content)

    monkeypatch.setattr(transcript_files, "atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        run([path], out, formats=("txt", "srt"))
    monkeypatch.undo()
    assert run([path], out, formats=("txt", "srt"))[0].written == 1
    assert run([path], out, formats=("txt", "srt"))[1] == 1


def test_every_format_has_the_segments(tmp_path):
    path, out = sound(tmp_path / "a.wav", 25), tmp_path / "out"
    run([path], out, replies("[0.10]hel, lo[0.20]bye"), formats=FORMATS)
    content = {name: (out / f"a.{name}").read_text() for name in FORMATS}
    parsed = json.loads(content["json"])
    assert parsed["seconds"] == 25 and parsed["file"] == str(path) and parsed["options"] == {"prompt": "?"}
    assert len(parsed["windows"]) >= 3 and parsed["segments"][0]["text"] == "hel, lo"
    assert len(parsed["unread"]) == len(parsed["windows"])  # "bye" has no end
    assert [json.loads(line) for line in content["jsonl"].splitlines()] == parsed["segments"]
    assert content["csv"].splitlines()[1] == '0.10,0.20,"hel, lo"'
    assert content["tsv"].splitlines()[0].split("\t")[2] == "hel, lo"
    assert content["srt"].startswith("1\n00:00:00,100 --> 00:00:00,200\nhel, lo\n")
    assert content["vtt"].startswith("WEBVTT\n\n00:00:00.100 --> ")
    assert "bye" in content["txt"]


def test_answers_without_times_are_text_and_a_segment_a_window(tmp_path, capsys):
    path, out = sound(tmp_path / "a.wav", 8), tmp_path / "out"
    run([path], out, replies("<think>hm</think>hello there", "length"), formats=("txt", "srt", "json"))
    assert (out / "a.txt").read_text() == "hello there\n"
    assert (out / "a.srt").read_text() == "1\n00:00:00,000 --> 00:00:08,000\nhello there\n"
    assert json.loads((out / "a.json").read_text())["unread"] == ["<think>hm</think>"]
    assert "1 of 1 answers are unfinished, from 0:00:00 on: cut off" in capsys.readouterr().err


def test_a_stop_leaves_whole_files_and_says_how_far_it_came(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for index in range(5):
        sound(folder / f"{index}.wav", 1 + index / 10)
    outputs, stop = Outputs(out, ("txt",), {}), threading.Event()
    report = Reporter(stop)
    jobs, _, _ = measure(find_recordings([folder]).recordings, outputs, report)

    def ask(window: Window) -> Future:
        if window.place.end > 1.25:
            stop.set()
            return Future()  # it never comes
        return replies()(window)

    with pytest.raises(KeyboardInterrupt):
        transcribe_jobs(jobs, outputs, ask, report, cutting=Cutting(), in_flight=1)
    assert sorted(path.name for path in out.glob("*.*")) == [".moss-audio", "0.txt", "1.txt", "2.txt"]
    assert report.progress().startswith("[3 of 5 files, 0.00 of 0.00 h of audio, ")


def test_recordings_and_transcripts_on_gs(storage, bucket, tmp_path):
    clip = sound(tmp_path / "a.wav")
    for name in ("in/a.wav", "in/b/c.wav", "in/b/c.mp3", "in/.x/d.wav", "in/notes.txt"):
        to_path(f"{bucket}/{name}").write_bytes(clip.read_bytes())
    out = f"{bucket}/out"
    assert set(found(f"{bucket}/in")) == {"a", "b/c.wav", "b/c.mp3"}
    assert set(found(f"{bucket}/in/b/*.wav")) == {"c"}
    assert run([f"{bucket}/in"], out)[0].written == 3
    assert run([f"{bucket}/in"], out)[1] == 3
    assert to_path(f"{out}/b/c.wav.txt").read_text() == "[0.10-0.20] hello\n"


# The commands


@pytest.fixture
def one_device(monkeypatch) -> None:
    """Models of commands that run in this process are on one of its eight devices: the programs are smaller."""
    mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
    for module in ("inference.loading", "sharding"):
        monkeypatch.setattr(f"moss_audio_jax.{module}.make_mesh", mesh)


@pytest.mark.usefixtures("heard_interrupts", "one_device")
def test_a_folder_is_transcribed_stopped_and_gone_on_with(released, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for index in range(9):
        format = ("wav", "mp3", "ogg")[index % 3]
        sound(
            folder / f"day{index % 2}" / f"{index // 2}.{format}", 1 + index / 8, rate=(16000, 44100, 48000)[index % 3]
        )
    sound(folder / "long.wav", 40)
    (folder / "broken.wav").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "empty.ogg").write_bytes(b"")
    arguments = ["transcribe", str(released), str(folder), "--out", str(out), "--max-new-tokens", "4"]
    arguments += ["--window", "10", "--slots", "2", "--format", "txt,json"]
    command = [sys.executable, "-m", "moss_audio_jax", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": QUICK}) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "answers are unfinished" in line:  # said of a file that is written
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, "".join(seen) + rest
    assert "the same command resumes from here" in rest and "Traceback" not in rest
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    texts = [path for path in before if path.suffix == ".txt"]
    assert 1 <= len(texts) < 10
    code, _, err = ended("moss_audio_jax", arguments, monkeypatch, capsys)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: 2 of 12 files were not transcribed, and are named above")
    assert f"[{len(texts)} of 12 files were transcribed before, with the same options]" in err
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix == ".txt")
    assert len(list(out.rglob("*.txt"))) == 10 and not list(out.rglob("*.partial"))
    found = json.loads((out / "long.json").read_text())
    assert found["seconds"] == 40 and len(found["windows"]) >= 4
    shutil.rmtree(folder / "day0")
    (folder / "broken.wav").unlink()
    (folder / "empty.ogg").unlink()
    start = time.process_time()
    assert ended("moss_audio_jax", arguments, monkeypatch, capsys)[0] == 0
    assert time.process_time() - start < 2, "nothing is to do: no model is loaded"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["clip.wav", "--format", "doc"], "--format must be some of txt,json,jsonl,csv,srt,vtt,tsv, not 'doc'"),
        (["clip.wav", "--window", "1"], "a window must have 5 s or more, not 1"),
        (["clip.wav", "--slots", "0"], "--slots must be 1 or more, not 0"),
        (["clip.wav", "--prompt", " "], "--prompt must be a question"),
        (["clip.wav", "--max-new-tokens", "50000"], "a window of 1 s and its answer have up to 50,0"),
        ([], "there is no recording to transcribe"),
        (["--list", "no.txt"], "the list no.txt can't be read"),
        (["clip.wav", "--timestamps", "notes"], "--timestamps must be one of"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(released, tmp_path, options, sentence, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sound(tmp_path / "clip.wav", 1)
    command = ["transcribe", str(released), *options, "--out", "out"]
    code, out, err = ended("moss_audio_jax", command, monkeypatch, capsys)
    assert code == 2 and not out
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_device")
def test_several_prompts_are_answered_about_one_clip(released, tmp_path, monkeypatch, capsys):
    clip = str(sound(tmp_path / "a.wav", 1))
    limits = ["--max-new-tokens", "4"]
    answers = []
    for prompt in ("What?", "Who?"):
        code, out, _ = ended(
            "moss_audio_jax", ["generate", str(released), clip, "--prompt", prompt, *limits], monkeypatch, capsys
        )
        assert code == 0
        answers.append(out)
    both = ["generate", str(released), clip, "--prompt", "What?", "--prompt", "Who?", *limits]
    code, out, err = ended("moss_audio_jax", both, monkeypatch, capsys)
    assert code == 0 and err.count("was not finished") == 2
    assert out == f"# What?\n{answers[0]}\n# Who?\n{answers[1]}"


@pytest.mark.usefixtures("one_device")
def test_a_file_of_requests_is_answered_in_order(released, tmp_path, monkeypatch, capsys):
    sound(tmp_path / "clips" / "a.wav", 1)
    lines = [
        {"prompt": "What?", "clips": ["clips/a.wav"], "max_new_tokens": 3},
        {"prompt": "What?", "temperature": 1.0, "top_k": 5, "seed": 3},
        {"clips": ["clips/no.wav"]},
        {"prompt": "?", "top_q": 1},
        {"prompt": "?", "temperature": -1},
        {"prompt": "?", "max_new_tokens": 50_000},
        {"prompt": ""},
        {"prompt": "What?", "temperature": 1.0, "top_k": 5, "seed": 3, "system": "Be brief."},
    ]
    batch = tmp_path / "requests.jsonl"
    batch.write_text("\n".join(map(json.dumps, lines)) + "\n\n{no json\n")
    command = ["generate", str(released), "--batch", str(batch), "--max-new-tokens", "5", "--slots", "2"]
    code, out, err = ended("moss_audio_jax", command, monkeypatch, capsys)
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and err.splitlines()[-1].startswith("error: 6 of 9 requests were not answered")
    assert [result["line"] for result in results] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert [result.get("tokens") for result in results] == [3, 5, None, None, None, None, None, 5, None]
    for result, message in (
        (results[2], "clips/no.wav must be a readable audio file"),
        (results[3], "not 'top_q'"),
        (results[4], "temperature must be 0 or more"),
        (results[5], "more than the model's 40,960 positions"),
        (results[6], "must have a prompt, or clips"),
        (results[8], "must be an object of JSON"),
    ):
        assert f"requests.jsonl, line {result['line']}" in result["error"] and message in result["error"]
    alone = ["generate", str(released), str(tmp_path / "clips" / "a.wav"), "--prompt", "What?", "--max-new-tokens", "3"]
    assert ended("moss_audio_jax", alone, monkeypatch, capsys)[1] == results[0]["text"] + "\n"
    to_file = [*command, "--out", str(tmp_path / "results.jsonl")]
    assert ended("moss_audio_jax", to_file, monkeypatch, capsys)[:2] == (1, "")
    assert (tmp_path / "results.jsonl").read_text() == out
    code, _, err = ended("moss_audio_jax", to_file, monkeypatch, capsys)
    assert code == 2 and "results.jsonl already exists" in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch", "no.jsonl"], "no.jsonl can't be read"),
        (["--batch", "a.wav", "a.wav"], "--batch takes prompts and clips from its file"),
        (["--out", "b"], "--batch takes prompts and clips from its file"),
        (["--prompt", "a", "--prompt", "b", "--special-tokens"], "--special-tokens is for one prompt"),
        (["--prompt", "a", "--prompt", "b", "--slots", "0"], "--slots must be 1 or more"),
        (["--prompt", "a", "--prompt", ""], "there is nothing to answer"),
    ],
    ids=str,
)
def test_mistakes_in_several_requests_are_one_sentence(released, tmp_path, options, sentence, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = ended("moss_audio_jax", ["generate", str(released), *options], monkeypatch, capsys)
    assert code == 2 and not out
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1
