"""Readers of the four benchmarks on entries written by hand in the released layouts."""

import json
from pathlib import Path

import pytest

from moss_audio_jax.errors import MossAudioError
from train.evaluation.question_files import FILE_FORMATS, read_benchmark

MMAU = {
    "id": "11111111-2222-3333-4444-555555555555",
    "audio_id": "./test-mini-audios/11111111-2222-3333-4444-555555555555.wav",
    "question": "What is pouring?",
    "choices": ["Water", "Sand", "Gravel", "Rice"],
    "answer": "Sand",
    "dataset": "AudioSet",
    "task": "sound",
    "split": "test-mini",
    "category": ["Reasoning"],
    "sub-category": "Acoustic Source Inference",
    "difficulty": "hard",
}
MMAU_PRO = {
    "id": "p-1",
    "audio_path": ["data/one.wav", "data/two.wav"],
    "question": "In which clip is the speaker older?",
    "answer": "The second",
    "choices": ["The first", "The second", "Neither"],
    "length_type": "short",
    "perceptual_skills": ["Age"],
    "reasoning_skills": [],
    "category": "multi",
    "transcription": None,
    "task_classification": "mcq",
    "task_identifier": None,
    "kwargs": None,
    "sub-cat": None,
}
MMAR = {
    "id": "abcDEF_00-00-01_00-00-09",
    "audio_path": "./audio/abcDEF_00-00-01_00-00-09.wav",
    "question": "How many people speak",
    "choices": ["2", "4", "", "3"],
    "answer": "3",
    "modality": "mix-sound-speech",
    "category": "Signal Layer",
    "sub-category": "Counting",
    "language": None,
    "source": "youtube",
    "url": "https://example.org",
    "timestamp": "00:00:01,00:00:09",
    "rubric": [{"name": "n", "choices": [0, 1]}],
}
MMSU = {
    "id": 7,
    "task_name": "stress_perception",
    "audio_path": "audio/stress_7.wav",
    "question": "Which word is stressed?",
    "choice_a": "record",
    "choice_b": "music",
    "choice_c": "loud",
    "choice_d": None,
    "answer_gt": "loud",
    "category": "Perception",
    "sub-category": "Linguistics",
    "sub-sub-category": "Phonology",
    "linguistics_sub_discipline": "Prosody",
}
ENTRIES = {"mmau": MMAU, "mmau_pro": MMAU_PRO, "mmar": MMAR, "mmsu": MMSU}


@pytest.fixture
def read(tmp_path):
    def write_and_read(name, *entries, **options):
        path = tmp_path / "questions.json"
        path.write_text(json.dumps(entries), "utf-8")
        return read_benchmark(name, path, **options)

    return write_and_read


def test_mmau(read, tmp_path):
    (question,) = read("mmau", MMAU)
    assert question.id == "11111111-2222-3333-4444-555555555555"
    assert question.audio == (tmp_path / "test-mini-audios/11111111-2222-3333-4444-555555555555.wav",)
    assert question.question == "What is pouring?"
    assert question.choices == ("Water", "Sand", "Gravel", "Rice")
    assert question.answer == "B"
    assert question.groups == {
        "task": "sound",
        "category": "Reasoning",
        "sub-category": "Acoustic Source Inference",
        "difficulty": "hard",
    }


def test_mmau_pro(read):
    question, opened, instructed = read(
        "mmau_pro",
        MMAU_PRO,
        {**MMAU_PRO, "choices": None, "answer": "An old song.", "category": "open"},
        {**MMAU_PRO, "choices": [], "answer": None, "audio_path": "data/one.wav", "length_type": None},
        audio_dir="/sounds",
    )
    assert question.audio == (Path("/sounds/data/one.wav"), Path("/sounds/data/two.wav"))
    assert question.answer == "B"
    assert question.groups == {"category": "multi", "length_type": "short"}
    assert (opened.choices, opened.answer, opened.groups["category"]) == ((), None, "open")
    assert (instructed.choices, instructed.answer, instructed.groups) == ((), None, {"category": "multi"})
    assert instructed.audio == (Path("/sounds/data/one.wav"),)


def test_mmar(read):
    (question,) = read("mmar", MMAR)
    assert question.choices == ("2", "4", "", "3")
    assert question.answer == "D"
    assert question.groups == {"modality": "mix-sound-speech", "category": "Signal Layer", "sub-category": "Counting"}


def test_mmsu(read):
    question, two = read("mmsu", MMSU, {**{k: v for k, v in MMSU.items() if k[-2:] not in ("_c", "_d")}, "id": "8"})
    assert question.id == "7"
    assert question.choices == ("record", "music", "loud")
    assert question.answer == "C"
    assert question.groups == {
        "task_name": "stress_perception",
        "category": "Perception",
        "sub-category": "Linguistics",
        "sub-sub-category": "Phonology",
    }
    assert two.choices == ("record", "music")
    assert two.answer is None  # "loud" is none of the options


def test_prompt(read):
    (question,) = read("mmsu", MMSU)
    assert question.prompt().split("\n")[:4] == ["Which word is stressed?", "A. record", "B. music", "C. loud"]
    (opened,) = read("mmau_pro", {**MMAU_PRO, "choices": []})
    assert opened.prompt() == MMAU_PRO["question"]


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["four", "nine", "nine"], "nine", "B"),  # given twice, as in MMAU
        ([" Yes", "No "], "No", "B"),
        (["yes", "no"], "NO", "B"),
        (["a", "A"], "A", "B"),  # exactly before loosely
        (["yes", "no"], "perhaps", None),
    ],
)
def test_answers_are_found_by_their_text(read, choices, answer, letter):
    (question,) = read("mmau", {**MMAU, "choices": choices, "answer": answer})
    assert question.answer == letter


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_json_lines_are_read_like_a_list(name, tmp_path):
    entries = [{**ENTRIES[name], "question": "One\u2028two?"}, ENTRIES[name]]
    (tmp_path / "list.json").write_text(json.dumps(entries), "utf-8")
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / "lines.jsonl").write_text(lines + "\n\n", "utf-8")
    assert read_benchmark(name, tmp_path / "list.json") == read_benchmark(name, tmp_path / "lines.jsonl")


NEEDED = {
    "mmau": {"id", "audio_id", "question", "choices", "answer", "task", "category", "sub-category", "difficulty"},
    "mmau_pro": {"id", "audio_path", "question", "choices", "answer", "category", "length_type"},
    "mmar": {"id", "audio_path", "question", "choices", "answer", "modality", "category", "sub-category"},
    "mmsu": set(MMSU) - {"choice_c", "choice_d", "linguistics_sub_discipline"},
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NEEDED for field in sorted(ENTRIES[name])])
def test_missing_fields(read, name, field):
    incomplete = {key: value for key, value in ENTRIES[name].items() if key != field}
    if field in NEEDED[name]:
        with pytest.raises(MossAudioError, match=rf"questions\.json: entry 2: expected the field '{field}'"):
            read(name, ENTRIES[name], incomplete)
    else:
        assert len(read(name, ENTRIES[name], incomplete)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 3}, "expected text for 'question', found 3"),
        ({"question": " "}, "expected text for 'question'"),
        ({"id": None}, "expected text for 'id', found null"),
        ({"answer": None}, "expected text for 'answer', found null"),
        ({"choices": "Yes"}, 'expected a list of texts as options, found "Yes"'),
        ({"choices": ["Yes", 2]}, "expected a list of texts as options"),
        ({"choices": ["Yes"]}, "expected 2 to 26 options, found 1"),
        ({"choices": [str(n) for n in range(27)]}, "found 27"),
        ({"audio_id": []}, "expected text for 'audio_id'"),
        ({"audio_id": "/etc/passwd"}, "inside the audio directory for 'audio_id', found '/etc/passwd'"),
        ({"audio_id": "a/../../b.wav"}, "inside the audio directory"),
        ({"category": 5}, "expected text for 'category', found 5"),
    ],
)
def test_bad_fields(read, change, message):
    with pytest.raises(MossAudioError) as error:
        read("mmau", {**MMAU, **change})
    assert "questions.json: entry 1: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"[]", "found an empty file"),
        (b"{", "expected a JSON list or one JSON object a line"),
        (b"[1, 2]", "entry 1: expected a JSON object, found 1"),
        (b"\xff\xfe", "expected a readable JSON file"),
        (None, "expected a readable JSON file"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "q.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MossAudioError, match=message) as error:
        read_benchmark("mmar", path)
    assert str(error.value).startswith(str(path))


def test_an_unknown_benchmark(tmp_path):
    with pytest.raises(MossAudioError, match="choose one of mmau, mmau_pro, mmar, mmsu"):
        read_benchmark("mmlu", tmp_path / "q.json")
