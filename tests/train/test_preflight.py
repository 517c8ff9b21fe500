"""Every kind of bad data is named by file and line, before training starts if that can be seen without decoding."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from train.__main__ import main
from train.config import ModelSource, RunConfig, with_paths
from train.data.config import DataConfig
from train.data.manifest import Clip, Manifest
from train.evaluation.questions import manifest_questions
from train.loop import train
from train.recipes import RECIPES
from train.running.preflight import check_of, require_usable

SPAN = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def message(role: str, kind: str, content: object) -> dict:
    return {"role": role, "message_type": kind, "content": content}


def line(*audio: object, question: object = "What is it?", answer: object = "Hum.", role: str = "user") -> dict:
    clips = [message("user", "audio", path) for path in audio]
    return {"conversation": [*clips, message(role, "text", question), message("assistant", "text", answer)]}


# (the line, what is said of it)
BAD = {
    "no JSON": (b'{"conversation": [', "expected a JSON object, found none (Expecting value"),
    "no UTF-8": (b'{"text": "caf\xe9"}', "expected text in UTF-8, found none ('utf-8' codec can't decode byte 0xe9"),
    "UTF-16": (json.dumps(line("a.wav")).encode("utf-16"), "expected text in UTF-8, found none"),
    "missing audio": (line("absent.wav"), "absent.wav must be a readable audio file (No such file"),
    "no path": (line(""), "'content' in message 1 to be the path of one audio file"),
    "a directory": (line("."), "must be an audio file, not a directory"),
    "0 bytes": (line("empty.wav"), "empty.wav must be an audio file, not 0 bytes"),
    "0 samples": (line("silent.wav"), "silent.wav must hold samples, not 0 in"),
    "no audio": (
        line("text.wav"),
        "text.wav must be wav, flac, ogg or mp3, not text that begins with",
    ),
    "a short clip": (line("short.wav"), "short.wav: the wave must have at least 160 samples"),
    "a list of clips": (line(["a.wav", "a.wav"]), "of one audio file (of several clips each has a message of its own)"),
    "a list as audio": ({"audio": ["a.wav"], "text": "hi"}, "'audio' in the line to be the path of one audio file"),
    "an empty answer": (line("a.wav", answer=" "), "'content' in message 3 to be a text that is not blank, found ' '"),
    "no answer": ({"conversation": line("a.wav")["conversation"][:2]}, "found the roles user;"),
    "only a thought": (line("a.wav", answer="<think>Hm.</think>\n"), "expected an answer after </think>, found none"),
    "an endless thought": (line("a.wav", answer="<think>Hm."), "expected </think> after <think>, found none"),
    "an unknown role": (line("a.wav", role="human"), "expected a role of system, user, assistant and a message_type"),
    "two clips, one placeholder": (
        line("a.wav", "a.wav", question=f"{SPAN}What?"),
        "no placeholder in a text, found 2 clips, 1 placeholders",
    ),
    "a label past the end": (
        {"audio": "a.wav", "events": [{"text": "tone", "start": 0, "end": 99}]},
        "expected labels within the clip, which ends at 1.00 s, found 'tone' from 0 to 99 s",
    ),
    "a label past the end of a cut": (
        {"audio": "a.wav", "start": 0.5, "words": [{"text": "a", "start": 0.75, "end": 1.25}]},
        "expected labels within the clip, which ends at 1.00 s, found 'a' from 0.75 to 1.25 s",
    ),
    "labels beside a conversation past the end": (
        line("a.wav") | {"segments": [{"text": "a", "start": 80, "end": 85}]},
        "which ends at 1.00 s, found 'a' from 80 to 85 s",
    ),
    "times that run backwards": (
        {"audio": "a.wav", "words": [{"text": "a", "start": 0.7, "end": 0.8}, {"text": "b", "start": 0.2, "end": 0.3}]},
        "expected words in the order in which they begin, found words[2] at 0.2 s after one at 0.7 s",
    ),
    "a repeated key": (
        b'{"audio": "a.wav", "text": "first", "text": "second"}',
        "expected each key once in an object, found 'text' twice",
    ),
    "a URL": (
        line("https://example.com/0.wav"),
        "expected the path of a file or gs://bucket/file (nothing is fetched from elsewhere: download it first), "
        "found the URL 'https://example.com/0.wav'",
    ),
    "text alone": ({"text": "fine"}, "found only 'text'; give the manifest as --mixture.text.paths"),
    "half a placeholder": (line("a.wav", question="<|AUDIO|>What?"), "found 1 clips, 1 placeholders"),
}
TOO_LONG = {
    "three hours": (line("long.wav"), "expected at most 150 tokens and 2 chunks of audio, found 2700 chunks"),
    "three hours of labels": ({"audio": "long.wav", "text": "hi"}, "150 tokens and 2 chunks of audio, found 2700 ch"),
    "a long answer": (line("a.wav", answer="Hum. " * 30), "150 tokens and 2 chunks of audio, found "),
    "a long second turn": (
        {"conversation": line("a.wav")["conversation"] + line("long.wav")["conversation"]},
        "found 2701 chunks",
    ),
}
TRUNCATED = ("a long answer", "a long second turn")


def as_bytes(content: object) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The audio that the lines name, and in tokenizer/ one with a token for each byte."""
    directory = tmp_path_factory.mktemp("data")
    for name, samples, rate in (("a", 16000, 16000), ("short", 100, 16000), ("silent", 0, 16000)):
        soundfile.write(directory / f"{name}.wav", np.full(samples, 0.1), rate)
    soundfile.write(directory / "long.wav", np.zeros(3 * 3600 * 100, np.int16), 100)  # 2 MB at 100 Hz
    (directory / "empty.wav").touch()
    (directory / "text.wav").write_text("no audio at all")
    (directory / "tokenizer").mkdir()
    write_small_tokenizer(directory / "tokenizer")
    return directory


@pytest.fixture(autouse=True)
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moss_audio_jax.sound.decode._read_cut", lambda *_: pytest.fail("audio was decoded"))


def config_of(directory: Path, **data) -> RunConfig:
    return dataclasses.replace(
        RECIPES["finetune"],
        data=DataConfig(batch_size=2, tokens=150, chunks=2, **data),
        model=ModelSource(preset="tiny", tokenizer=str(directory / "tokenizer")),
    )


def write(directory: Path, name: str, lines: list) -> Path:
    path = directory / name
    path.write_bytes(b"\n".join(map(as_bytes, lines)))
    return path


def files(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_all_problems_are_listed_by_line(directory: Path):
    cases = list((BAD | TOO_LONG).values())
    path = write(
        directory, "all.jsonl", [line("a.wav"), *(content for content, _ in cases), {"audio": "a.wav", "text": "hi"}]
    )
    check = check_of(config_of(directory), path)
    problems = list(check.problems())
    for number, (problem, (_, complaint)) in enumerate(zip(problems, cases, strict=True), start=2):
        assert problem.startswith(f"{path} line {number}: ") and complaint in problem and "\n" not in problem
    assert (check.examples, check.unusable, check.too_long) == (len(cases) + 2, len(BAD), len(TOO_LONG))
    assert check.truncated == 0 and f"{len(BAD)} can't be used" in check.summary()


def test_what_is_too_long_may_be_truncated(directory: Path):
    path = write(directory, "long.jsonl", [content for content, _ in TOO_LONG.values()])
    check = check_of(config_of(directory, oversize="truncate"), path)
    problems = list(check.problems())
    assert [problem.startswith(f"{path} line {number}: ") for number, problem in enumerate(problems, 1)] == [True] * 2
    assert (check.too_long, check.truncated, check.unusable) == (2, len(TRUNCATED), 0)
    # Without a tokenizer, clips alone count; and a later clip is not cut out of an answer that must be the last.
    silent = dataclasses.replace(config_of(directory), model=ModelSource(preset="tiny"))
    check = check_of(silent, path)
    assert len(list(check.problems())) == 3 and "counting audio only" in check.summary()
    check = check_of(config_of(directory, oversize="truncate", answers="last"), path)
    assert len(list(check.problems())) == 3 and check.truncated == 1


@pytest.mark.parametrize("case", BAD)
def test_a_run_is_not_begun(case: str, directory: Path, tmp_path: Path):
    path = write(directory, "bad.jsonl", [line("a.wav"), b"", BAD[case][0]])
    config = with_paths(config_of(directory), data=(str(path),))
    with pytest.raises(MossAudioError) as error:
        train(config, tmp_path / "run")
    assert f"{path} line 3: " in str(error.value) and BAD[case][1] in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_begun_without_what_is_too_long_unless_told_otherwise(
    directory: Path, caplog: pytest.LogCaptureFixture
):
    path = write(directory, "mixed.jsonl", [line("a.wav"), line("long.wav")])
    require_usable(with_paths(config_of(directory), data=(str(path),)))
    assert "2 examples, 3.00 hours of audio; 0 can't be used, 1 are too long and would be skipped" in caplog.text
    with pytest.raises(MossAudioError, match=r"mixed\.jsonl line 2: expected at most 150 tokens"):
        require_usable(with_paths(config_of(directory, oversize="refuse"), data=(str(path),)))
    path = write(directory, "hours.jsonl", [line("long.wav")])
    with pytest.raises(MossAudioError, match="every example is too long"):
        require_usable(with_paths(config_of(directory), data=(str(path),)))


def test_labels_may_end_a_little_after_the_clip_and_events_may_be_in_any_order(directory: Path):
    events = [{"text": "tone", "start": 0.5, "end": 1.08}, {"text": "hum", "start": 0, "end": 0.7}]
    path = write(directory, "fine.jsonl", [{"audio": "a.wav", "events": events}])
    assert not list(check_of(config_of(directory), path).problems())


def test_long_texts_are_split(directory: Path):
    path = write(directory, "texts.jsonl", [{"text": "a word " * 20}, {"text": "a word " * 100}])
    for oversize in ("skip", "truncate", "refuse"):
        config = config_of(directory, oversize=oversize)
        check = check_of(config, path, "text")
        assert not list(check.problems()) and (check.split, check.truncated, check.examples) == (1, 0, 2)
        assert "1 texts split; read as --mixture.text.paths" in check.summary()


def test_the_objectives_are_those_of_the_group_that_the_manifest_is_for(directory: Path):
    lines = [{"audio": "a.wav", "caption": "A hum."}, {"audio": "a.wav", "text": "hi"}, line("a.wav"), {"text": "fine"}]
    path = write(directory, "kinds.jsonl", lines)
    config = config_of(directory)
    conversation = "--mixture.captions.paths or --mixture.conversations.paths."
    unasked = {
        "conversations": {4: "--mixture.text.paths."},
        "speech": {1: conversation, 3: conversation, 4: "--mixture.text.paths."},
        "text": {1: conversation, 2: "--mixture.speech.paths or --mixture.conversations.paths.", 3: conversation},
    }
    for group, others in unasked.items():
        named = dataclasses.replace(getattr(config.mixture, group), paths=(str(path),))
        mixed = dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, **{group: named}))
        for check in (check_of(config, path, group), check_of(mixed, path)):
            problems = list(check.problems())
            assert len(problems) == len(others) == check.unusable
            for problem, (number, advice) in zip(problems, others.items(), strict=True):
                assert problem.startswith(f"{path} line {number}: ") and problem.endswith(f"the manifest as {advice}")
        with pytest.raises(
            MossAudioError, match=rf"{len(others)} of 4 examples can't be .* --group {group}` lists all"
        ):
            require_usable(mixed)
    with pytest.raises(MossAudioError, match=r"--group must be one of speech, captions, .*, not 'music'"):
        check_of(config, path, "music")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["moss-audio-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code  # type: ignore[return-value]


def test_the_command_lists_problems_and_writes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write(directory, "two.jsonl", [line("absent.wav"), line("a.wav"), line("long.wav")])
    before = files(directory)
    assert run(monkeypatch, "check", path, "--data.tokens", 200) == 1
    out = capsys.readouterr().out.splitlines()
    assert [text.partition(": ")[0] for text in out] == [f"{path} line 1", f"{path} line 3", str(path), str(path)]
    assert out[2].endswith(
        ": seconds of audio of an example: 1.00 to 1.00, half of them at most 1.00, 95% at most 1.00"
    )
    assert files(directory) == before


def test_short_options_are_those_they_are_short_for(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write(directory, "absent.jsonl", [line("absent.wav")])
    out, tokenizer = tmp_path / "run", directory / "tokenizer"
    common = ("run", "--recipe", "finetune", "--out", out, "--model.preset", "tiny", "--model.tokenizer", tokenizer)
    assert run(monkeypatch, *common, "--data", path, "--data.tokens", 200) == 2
    assert f"{path} line 1: absent.wav must be a readable" in capsys.readouterr().err and not out.exists()
    recipe = RECIPES["finetune_lora"]
    config = with_paths(recipe, "moss-4b", ("a.jsonl",), ("b.jsonl",))
    assert (config.model.checkpoint, config.mixture.conversations.paths) == ("moss-4b", ("a.jsonl",))
    assert config.validation.data == ("b.jsonl",) and config.validation.every == config.loop.checkpoint_every
    assert with_paths(recipe) == recipe and with_paths(config, "moss-4b", ("a.jsonl",), ("b.jsonl",)) == config
    for others in (("moss-8b",), (None, ("b.jsonl",)), (None, (), ("c.jsonl",))):
        with pytest.raises(MossAudioError, match="name different things: give one of them"):
            with_paths(config, *others)


def test_the_command_takes_the_group(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write(directory, "speech.jsonl", [{"audio": "a.wav", "text": "hi"}, line("a.wav")])
    for options in (("--group", "speech"), ("--mixture.speech.paths", path)):
        assert run(monkeypatch, "check", path, *options) == 1
        out = capsys.readouterr().out.splitlines()
        assert len(out) == 3 and out[0].startswith(f"{path} line 2: expected what the objectives transcribe, ")
        assert out[2].endswith("; read as --mixture.speech.paths")


def test_clips_know_their_length(directory: Path):
    assert Clip(str(directory / "long.wav"), 3600, 7200).num_samples() == 3600 * 16000
    assert Clip(np.zeros(32000, np.float32), 0.5).num_samples() == 24000


def test_ignored_keys_are_counted_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog
):
    timed = line("a.wav")
    timed["conversation"][0]["duration"] = 1.0
    path = write(directory, "keys.jsonl", [timed | {"dataset": "mine"}, timed, line("a.wav")])
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "check", str(path)])
    main()
    noted = f"{path}: unknown keys are ignored: 'dataset' in the line (1 times), "
    noted += "'duration' in message (2 times)"
    assert capsys.readouterr().out.splitlines()[0] == noted
    require_usable(with_paths(config_of(directory), data=(str(path),)))
    assert caplog.messages == [noted]


def test_a_default_prompt_is_part_of_a_sample(directory: Path):
    audio, _, answer = line("a.wav")["conversation"]
    path = write(directory, "unasked.jsonl", [{"conversation": [audio, answer]}])
    lengths = {}
    for prompt in ("", "What is it?"):
        maker = check_of(config_of(directory, default_prompt=prompt), path).maker
        (item,) = manifest_questions(path, default_prompt=prompt)
        assert maker is not None and item.text == prompt
        example = Manifest(path)[0]
        lengths[prompt] = len(maker.extent(example.name, example.conversation).loss_mask)
    assert lengths["What is it?"] - lengths[""] == len("What is it?")  # a token for each byte


def test_what_is_refused_after_the_directory_was_made_leaves_nothing(directory: Path, tmp_path: Path):
    path = write(directory, "good.jsonl", [line("a.wav")])
    config = with_paths(config_of(directory), data=(str(path),), eval_data=("nowhere.jsonl",))
    with pytest.raises(MossAudioError, match=r"nowhere\.jsonl: expected a readable manifest"):
        train(config, tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(MossAudioError, match=r"nowhere\.jsonl"):
        train(config, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]
