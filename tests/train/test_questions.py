"""Questions about examples, scenes and benchmarks, and their reference answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.errors import MossAudioError
from train.data.config import SceneConfig
from train.data.manifest import Clip, TimedText
from train.data.objectives import PROMPTS, TIME_QUESTIONS
from train.data.scene_tasks import TASKS
from train.data.scenes import make_task
from train.data.shard_writing import prepare
from train.evaluation.measures import MEASURES, measure
from train.evaluation.questions import ASKABLE, Question, benchmark_questions, manifest_questions, scene_questions

WORDS = [{"text": "hello", "start": 0.5, "end": 0.75}, {"text": "there", "start": 1.0, "end": 1.25}]
LABELLED = {
    "audio": "a.wav",
    "start": 0.25,
    "text": "Hello there.",
    "caption": "A greeting.",
    "words": WORDS,
    "segments": [{"text": "Hello there.", "start": 0.5, "end": 1.25}],
    "events": [{"text": "tone", "start": 0.519, "end": 0.75}],
}
CONVERSATION = {
    "conversation": [
        {"role": "system", "message_type": "text", "content": "Be brief."},
        {"role": "user", "message_type": "audio", "content": "a.wav"},
        {"role": "user", "message_type": "text", "content": "Who?"},
        {"role": "assistant", "message_type": "text", "content": "A man."},
        {"role": "user", "message_type": "text", "content": "Where?"},
        {"role": "assistant", "message_type": "text", "content": "At sea."},
        {"role": "assistant", "message_type": "text", "content": "I think."},
    ]
}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", np.full(32000, 0.1), 16000)
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, [LABELLED, CONVERSATION, {"text": "plain text"}])))
    return path


def seen(item: Question) -> tuple:
    """Fields of an item, without the decoded audio."""
    turns = [(turn.role, [p if isinstance(p, str) else "clip" for p in turn.content]) for turn in item.turns]
    waves = [clip.wave().tobytes() for clip in item.clips]
    return item.source, item.task, turns, waves, item.reference, item.measure, item.labels, item.groups


def test_every_objective_is_asked_once_in_its_first_wording(manifest):
    items = {item.task: item for item in manifest_questions(manifest)}
    (time_task,) = [task for task in items if task.startswith("time_qa")]
    assert list(items) == [*PROMPTS, time_task, "conversation"]
    for name, prompts in PROMPTS.items():
        assert items[name].text == prompts[0] and len(items[name].clips) == 1
        assert items[name].source == str(manifest)
    references = {name: (items[name].reference, items[name].measure) for name in PROMPTS}
    assert references == {
        "transcribe": ("Hello there.", "text"),
        "transcribe_words": ("[0.25]hello[0.50][0.75]there[1.00]", "timed_text"),
        "transcribe_sentences": ("[0.25]Hello there.[1.00]", "timed_text"),
        "caption": ("A greeting.", "unjudged"),
        "events": ("[0.3]tone[0.5]", "events"),
    }
    assert items["transcribe_words"].labels == (TimedText("hello", 0.25, 0.5), TimedText("there", 0.75, 1.0))
    assert items["events"].labels == (TimedText("tone", pytest.approx(0.269), 0.5),)  # unrounded


def test_a_conversation_is_asked_for_its_last_turn(manifest):
    (item,) = manifest_questions(manifest, ["conversation"])
    assert [turn.role for turn in item.turns] == ["system", "user", "assistant", "user"]
    assert (item.text, item.reference, item.measure) == ("Where?", "At sea.\nI think.", "reply")
    assert len(item.clips) == 1


THINKING = {
    "conversation": [
        {"role": "user", "message_type": "audio", "content": "a.wav"},
        {"role": "user", "message_type": "text", "content": "Who?"},
        {"role": "assistant", "message_type": "text", "content": "<think>\nDeep.\n</think>\n\nA man."},
        {"role": "user", "message_type": "text", "content": "Where?"},
        {"role": "assistant", "message_type": "text", "content": "<think>\nWaves.\n</think>\n\nAt sea."},
    ]
}


def test_thoughts_of_earlier_turns_are_shown_as_in_training(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.full(32000, 0.1), 16000)
    path = tmp_path / "thinking.jsonl"
    path.write_text(json.dumps(THINKING))
    for answers, earlier in (("last", "A man."), ("all", THINKING["conversation"][2]["content"])):
        (item,) = manifest_questions(path, answers=answers)
        assert item.turns[1].content == (earlier,)
        assert item.reference == "<think>\nWaves.\n</think>\n\nAt sea."


PERFECT = {"wer": 0.0, "cer": 0.0, "f1": 1.0, "accuracy": 1.0, "mean_error_s": 0.0, "share_within": 1.0, "malformed": 0}
PERFECT |= {"aas_ms": 0.0, "missing_slots": 0, "surplus_slots": 0, "unreadable": 0, "unanswered": 0, "ambiguous": 0}


def test_the_references_themselves_score_perfectly(tmp_path: Path):
    """Every measure, objective and task of scenes, with thoughts and without."""
    soundfile.write(tmp_path / "a.wav", np.full(32000, 0.1), 16000)
    times = {"words": WORDS, "segments": LABELLED["segments"]}
    labelled = {"audio": "a.wav", "text": "<think>Hm.</think>Hello there.", "caption": "<think>So.</think>A greeting."}
    labelled |= times | {"events": [{"text": "tone", "start": 0.5, "end": 0.8}]}
    lines = [labelled, CONVERSATION, THINKING] + [{"audio": "a.wav", "words": WORDS}] * 10
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    question = {"audio_path": "a.wav", "question": "What?", "modality": "x", "category": "x", "sub-category": "x"}
    questions = [{"id": n, "choices": ["dog", "cat"], "answer": answer} for n, answer in enumerate(("cat", "dog"))]
    (tmp_path / "mmar.json").write_text(json.dumps([question | fields for fields in questions]))
    asked = tuple(task for task in TASKS if task not in ("voice", "speaker"))  # which are of recordings
    scenes = SceneConfig(events=(2, 3), labels=("tone", "hum", "kick"), tasks=asked, questions=1)
    items = [
        *manifest_questions(tmp_path / "test.jsonl"),
        *scene_questions(60, scenes, seed=3),
        *benchmark_questions("mmar", tmp_path / "mmar.json", tmp_path),
    ]
    assert {item.measure for item in items} == set(MEASURES)
    assert {item.task for item in items} >= set(asked) | set(ASKABLE) - {"time_qa"}
    for source, tasks in measure(items, [item.reference for item in items]).items():
        for task, measured in tasks.items():
            # Answers about scenes have tenths or hundredths of a second, labels have samples.
            rounding = {"timeline": 50.0, "words": 5.0}.get(task)
            rounded = {"aas_ms": rounding} if source == "scenes" and rounding else {}
            for name in PERFECT.keys() & measured.keys():
                assert measured[name] == pytest.approx(PERFECT[name], abs=rounded.get(name, 1e-9)), (task, name)
            assert PERFECT.keys() & measured.keys() or task == "caption"


def test_questions_about_times_follow_the_seed(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(32000, 0.1), 16000)
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join([json.dumps({"audio": "a.wav", "words": WORDS})] * 40))
    items = manifest_questions(path, ["time_qa"], seed=1)
    assert [seen(item) for item in items] == [seen(item) for item in manifest_questions(path, ["time_qa"], seed=1)]
    assert [item.text for item in items] != [item.text for item in manifest_questions(path, ["time_qa"], seed=2)]
    assert {item.task for item in items} == {"time_qa_seconds", "time_qa_label"}
    for item in items:  # the measure is that of the kind of question
        seconds = [text.split("{0}")[0] for kind in ("start", "end", "duration") for text in TIME_QUESTIONS[kind]]
        is_number = item.reference.replace(".", "").isdecimal()
        assert (item.measure == "seconds") == is_number == item.text.startswith(tuple(seconds))
    assert len(manifest_questions(path, ["time_qa"], limit=3)) == 3


def test_shards_ask_what_their_manifest_asks(manifest, tmp_path):
    prepare(manifest, tmp_path / "shards", 2)
    items = manifest_questions(tmp_path / "shards")
    assert [seen(item)[1:] for item in items] == [seen(item)[1:] for item in manifest_questions(manifest)]


def test_scenes():
    tasks = ("timeline", "caption", "start", "duration", "what_at", "pitch", "loudness")
    config = SceneConfig(events=(2, 3), labels=("tone", "hum"), tasks=tasks, questions=2)
    items = scene_questions(40, config, seed=3)
    assert {item.task for item in items} == set(tasks)
    for index, item in enumerate(items):
        task = make_task(3, index, config)
        assert (item.task, item.text, item.reference) == (task.name, task.question, task.answer)
        assert len(item.turns) == 1 and item.labels == task.scene.events and item.measure in MEASURES
        np.testing.assert_array_equal(item.clips[0].wave(), task.scene.wave)
        if item.measure == "seconds":
            assert float(item.reference) >= 0


def test_benchmarks(tmp_path):
    entry = {"id": 7, "audio_path": "a.wav", "question": "What?", "choices": ["a dog", "a cat"], "answer": "a cat"}
    entries = [{**entry, "category": "x", "length_type": None}, {**entry, "choices": None, "category": "y"}]
    entries[1]["length_type"] = "short"
    path = tmp_path / "pro.json"
    path.write_text(json.dumps(entries))
    choice, opened = benchmark_questions("mmau_pro", path, tmp_path / "sounds")
    assert (choice.source, choice.task, choice.measure, choice.reference) == ("mmau_pro", "choice", "choice", "B")
    assert (choice.choices, choice.groups) == (("a dog", "a cat"), {"category": "x"})
    assert choice.text.startswith("What?\nA. a dog\nB. a cat\n")
    assert isinstance(choice.clips[0], Clip) and choice.clips[0].audio == str(tmp_path / "sounds" / "a.wav")
    assert (opened.task, opened.measure) == ("open", "unjudged")
    assert len(benchmark_questions("mmau_pro", path, limit=1)) == 1
    with pytest.raises(MossAudioError, match="'mmxx' is unknown"):
        benchmark_questions("mmxx", path)
