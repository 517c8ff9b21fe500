"""Lines of a manifest become examples; each kind of bad line is an error that names it."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import to_path
from train.data import line_index
from train.data.list_files import TsvRows
from train.data.manifest import Clip, Manifest, TimedText, parse_line
from train.data.samples import with_prompt

RELEASED = {
    "conversation": [
        {"role": "user", "message_type": "audio", "content": "a.wav"},
        {"role": "user", "message_type": "text", "content": "Transcribe the audio."},
        {"role": "assistant", "message_type": "text", "content": " Hello world.\n"},
    ]
}


def parse(line: object, directory: Path = Path("/data")):
    text = line if isinstance(line, bytes) else json.dumps(line).encode()
    return parse_line(text, "m.jsonl line 3", directory)


def test_released_format():
    user, assistant = parse(RELEASED).conversation
    clip, prompt = user.content
    assert isinstance(clip, Clip) and clip.audio == "/data/a.wav" and (clip.start, clip.end) == (None, None)
    assert (user.role, prompt) == ("user", "Transcribe the audio.")
    assert (assistant.role, assistant.content) == ("assistant", ("Hello world.",))


def test_system_message_several_turns_and_clips():
    def message(role: str, kind: str, content: str, **cut: float) -> dict:
        return {"role": role, "message_type": kind, "content": content, **cut}

    example = parse(
        {
            "conversation": [
                message("system", "text", "Answer briefly."),
                message("user", "audio", "a.wav", start=1, end=2.5),
                message("user", "text", "And"),
                message("user", "audio", "/b.wav"),
                message("assistant", "text", "One."),
                message("user", "text", "More?"),
                message("assistant", "text", "No."),
            ]
        }
    )
    assert [turn.role for turn in example.conversation] == ["system", "user", "assistant", "user", "assistant"]
    first, text, second = example.conversation[1].content
    assert isinstance(first, Clip) and (first.start, first.end) == (1, 2.5)
    assert text == "And" and isinstance(second, Clip) and second.audio == "/b.wav"
    assert example.clip is None  # labels could not say which


def test_labels_count_from_the_start_of_the_cut_and_are_sorted():
    events = [{"text": "tone", "start": 3.5, "end": 4}, {"text": "hum", "start": 3, "end": 3.75}]
    example = parse({"audio": "a.wav", "start": 2, "end": 4, "events": events, "text": "hello there", "id": 7})
    assert example.events == (TimedText("hum", 1, 1.75), TimedText("tone", 1.5, 2))
    beside = parse(RELEASED | {"events": events})
    assert beside.clip is beside.conversation[0].content[0] and beside.events[0].start == 3


@pytest.mark.parametrize("key", ["words", "segments"])
def test_what_is_said_stands_in_its_order(key: str):
    def said(*starts: float) -> dict:
        return {"audio": "a.wav", key: [{"text": "a", "start": start, "end": start + 1} for start in starts]}

    assert [label.start for label in getattr(parse(said(0, 2, 1.95, 2.5)), key)] == [0, 1.95, 2, 2.5]  # of rounding
    with pytest.raises(
        MossAudioError, match=rf"line 3: expected {key} in the order .* found {key}\[3\] at 1.8 s after "
    ):
        parse(said(0, 2, 1.8, 2.5))


@pytest.mark.parametrize("path", ["http://a.org/a.wav", "s3://b/a.wav", "file:///a.wav", "data:audio/wav;base64,UklG"])
def test_nothing_is_fetched(path: str):
    for line in ({"audio": path, "text": "hi"}, {"conversation": [message("audio", path), *RELEASED["conversation"]]}):
        with pytest.raises(
            MossAudioError, match=r"line 3: expected the path of a file or gs://bucket/file .*found the URL"
        ):
            parse(line)
    assert parse({"audio": "gs://b/a.wav", "text": "hi"}).clip is not None


def message(kind: str, content: str) -> dict:
    return {"role": "user", "message_type": kind, "content": content}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "expected a JSON object, found none"),
        (
            b'{"text": "\xff"}',
            "expected text in UTF-8, found none ('utf-8' codec can't decode byte 0xff in position 10",
        ),
        (b'{"text": "\\ud800"}', "expected text in UTF-8, found none"),
        (b"[" * 100_000, "expected a JSON object, found none"),
        (
            b'{"audio": "a.wav", "text": "one", "text": "two"}',
            "expected each key once in an object, found 'text' twice",
        ),
        (b'{"audio": "a.wav", "words": [{"text": "a", "start": 1, "end": 2, "end": 3}]}', "found 'end' twice"),
        ([1], "expected a JSON object, found [1]"),
        ({}, "'conversation', 'audio' or 'text'"),
        ({"text": "  "}, "'text' in a line without audio to be a text that is not blank, found '  '"),
        ({"audio": "a.wav", "txt": "hi"}, "found 'txt'"),
        ({"audio": "a.wav"}, "labels beside 'audio'"),
        ({"audio": "a.wav", "text": "hi", "start": 3, "end": 2}, "start < end, found start=3 and end=2"),
        ({"audio": "a.wav", "text": "hi", "start": True}, "'start' in the line to be a time"),
        (b'{"audio": "a.wav", "text": "hi", "end": NaN}', "a time of 0 s or more, found nan"),
        ({"audio": "a\0", "text": "hi"}, "expected a path"),
        ({"audio": "a.wav", "words": []}, "a list that is not empty, found []"),
        ({"audio": "a.wav", "words": [{"text": "a", "start": 1}]}, "'end' in words[1]"),
        ({"audio": "a.wav", "words": [{"text": "a", "start": 2, "end": 1}]}, "times in order"),
        ({"audio": "a.wav", "end": 1, "words": [{"text": "a", "start": 0, "end": 1.5}]}, "within the clip, 0.0 to 1 s"),
        ({"conversation": RELEASED["conversation"][:2]}, "found the roles user;"),
        ({"conversation": RELEASED["conversation"][2:]}, "found the roles assistant;"),
        ({"conversation": ["hello"]}, "message 1 to be a JSON object"),
        ({"conversation": [{"role": "user", "content": "a"}]}, "'message_type' in message 1"),
        ({"conversation": [{"role": "bot", "message_type": "text", "content": "a"}]}, "a role of system"),
        (
            {"conversation": [{"role": "assistant", "message_type": "audio", "content": "a"}]},
            "audio from the user only",
        ),
        ({"conversation": RELEASED["conversation"][1:], "text": "hi"}, "found 0 clips"),
    ],
)
def test_bad_lines(line: object, complaint: str):
    with pytest.raises(MossAudioError) as error:
        parse(line)
    assert str(error.value).startswith("m.jsonl line 3: expected ") and complaint in str(error.value)


def test_manifest_counts_lines_as_an_editor_does(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('\n{"text": "one"}\n\n{"text": "zwölf"}\n{"text": "drei"}', "utf-8")
    manifest = Manifest(path)
    assert [example.text for example in manifest] == ["one", "zwölf", "drei"]
    assert [example.name for example in manifest] == [f"{path} line {number}" for number in (2, 4, 5)]
    path.write_text('{"text": "one"}\n{"text": 2}\n', "utf-8")
    with pytest.raises(MossAudioError, match=r"m\.jsonl line 2: expected 'text'"):
        Manifest(path)


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a few lines count as large, and their parts end everywhere within lines. Returns the cache directory."""
    monkeypatch.setattr(line_index, "_IN_MEMORY", 0)
    monkeypatch.setattr(line_index, "_SPAN", 37)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_large_manifest_is_checked_once_by_processes(in_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, texts = tmp_path / "m.jsonl", [f"number {index} " + "ä" * (index % 60) for index in range(40)]
    path.write_text("\n\n" + "\n".join(json.dumps({"text": text}) + "\n" * (len(text) % 3) for text in texts), "utf-8")
    manifest = Manifest(path)
    numbers = [number for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1) if line]
    for found in (manifest, pickle.loads(pickle.dumps(manifest))):
        assert [(example.text, example.name) for example in found] == [
            (text, f"{path} line {number}") for text, number in zip(texts, numbers, strict=True)
        ]
    assert len(pickle.dumps(manifest)) < 1000  # processes map the index
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b'"text": "number 33', b'"txet": "number 33').replace(b'{"text": "number 37', b"x")
    )
    with pytest.raises(MossAudioError, match=rf"m\.jsonl line {numbers[33]}: expected 'conversation'"):
        Manifest(path)
    path.write_bytes(content)
    monkeypatch.setattr(line_index, "_rows_of", None)  # nothing is read again
    assert len(Manifest(path)) == 40


def test_an_index_that_is_cut_off_is_made_again(in_parts: Path, tmp_path: Path):
    path = tmp_path / "x.tsv"
    path.write_text("path\tsentence\n" + "".join(f"{index}.mp3\tsentence {index}\n" for index in range(9)))
    assert len(TsvRows(to_path(path))) == 9
    (file,) = in_parts.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-9])
    rows = TsvRows(to_path(path))
    rows.select({"text": "sentence"})
    assert [rows.row(index)["sentence"] for index in range(len(rows))] == [f"sentence {index}" for index in range(9)]
    assert rows.place(8) == "line 10"
    blocked = tmp_path / "cache"
    shutil.rmtree(blocked)
    blocked.write_text("")  # a cache that can't be written
    assert len(TsvRows(to_path(path))) == 9


def test_missing_and_empty_manifests(tmp_path: Path):
    with pytest.raises(MossAudioError, match="No such file"):
        Manifest(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MossAudioError, match="found no line"):
        Manifest(tmp_path / "empty.jsonl")


def test_clips_are_cut(tmp_path: Path):
    wave = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    example = parse({"audio": "a.wav", "start": 0.25, "end": 0.5, "text": "hi"}, tmp_path)
    assert example.clip is not None
    np.testing.assert_array_equal(example.clip.wave(), wave[4000:8000])
    np.testing.assert_array_equal(Clip(wave, 0.25, 0.5).wave(), wave[4000:8000])
    absent = parse({"audio": "../b.wav", "text": "hi"}, tmp_path)
    assert absent.clip is not None
    with pytest.raises(MossAudioError, match=r"m\.jsonl line 3: \.\./b\.wav must be a readable audio file"):
        absent.clip.wave()


# What MOSS-Audio's fine-tuning script takes


def test_keys_that_mean_nothing_are_ignored_and_noted():
    conversation = [dict(piece) for piece in RELEASED["conversation"]]
    conversation[0]["duration"] = 3.2
    events = [{"text": "hum", "start": 0, "end": 1, "confidence": 0.9}]
    example = parse({"conversation": conversation, "dataset": "mine", "events": events, "id": 7})
    assert example.ignored == ("'dataset' in the line", "'duration' in message", "'confidence' in events")
    assert example.conversation[0].content[1] == "Transcribe the audio."


@pytest.mark.parametrize("key", ["evnts", "Words", "start_time", "end_s", "offset"])
def test_keys_that_would_be_missed_are_refused(key: str):
    with pytest.raises(MossAudioError, match=f"line 3: expected the keys .* in the line, found '{key}'"):
        parse({"audio": "a.wav", "text": "hi", key: 1})


def test_a_text_alone_has_no_other_keys():
    """Else a clip under another name would become a text without audio."""
    with pytest.raises(MossAudioError, match="in a line without audio, found 'audio_path'"):
        parse({"audio_path": "a.wav", "text": "hi"})


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user", "message_type": "text", "content": " "}],
        [{"role": "user", "message_type": "text"}],
    ],
)
def test_a_blank_prompt_gets_the_default(prompt: list):
    audio, _, answer = RELEASED["conversation"]
    del (audio := dict(audio))["role"]
    question, reply = parse({"conversation": [audio, *prompt, answer]}).conversation
    assert question.role == "user" and isinstance(question.content[0], Clip) and question.content[1:] == ("",)
    assert with_prompt((question, reply), "What is said?")[0].content[1:] == ("What is said?",)
    assert with_prompt((question, reply), "") == (question, reply)


def test_a_prompt_that_is_there_stays():
    turns = parse(RELEASED).conversation
    assert with_prompt(turns, "What is said?") == turns


def test_a_blank_question_without_a_clip_is_refused():
    with pytest.raises(MossAudioError, match="expected a text or audio from the user, found a blank text alone"):
        parse({"conversation": [{"role": "user", "message_type": "text", "content": ""}, RELEASED["conversation"][2]]})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (json.dumps([RELEASED], indent=2), "an array: convert it with `jq -c '.[]' train.json > train.jsonl`"),
        (json.dumps([RELEASED]), "an array"),
        ("\ufeff" + json.dumps(RELEASED, indent=2), "an object over several lines: convert it with `jq -c '.' train"),
    ],
)
def test_a_json_document_is_refused_as_one(text: str, found: str, tmp_path: Path):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(MossAudioError) as error:
        Manifest(tmp_path / "train.json")
    assert str(error.value).startswith(f"{tmp_path / 'train.json'} must be JSON lines, one object in each, not {found}")
