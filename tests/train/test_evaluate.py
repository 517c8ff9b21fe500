"""Answers do not depend on their batch, measures have the values worked out by hand, and the command reports both."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx

from moss_audio_jax import MossAudioError, choose, load_model, load_processor
from moss_audio_jax.commands.options import MeshConfig
from moss_audio_jax.generation import generate
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.tree import dotted
from moss_audio_jax.weights.checkpoint import save_model
from moss_audio_jax.weights.parameters import build_model
from tests.conftest import SMALL_MODEL, compilations
from tests.train.training_runs import ENVIRONMENT
from train.config import ModelSource
from train.data.config import SceneConfig
from train.data.manifest import Clip, Message, TimedText
from train.evaluation.answers import Answer, answer_questions, answers_by_index, ask
from train.evaluation.config import AnswerConfig, EvaluationConfig
from train.evaluation.evaluate import Evaluation, clip_title, evaluate, indices_of_all_labels, read_questions
from train.evaluation.measures import measure, measures_table
from train.evaluation.questions import Question
from train.initialization import first_parameters


@pytest.fixture(scope="module", autouse=True)
def compiling_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """test.jsonl: labelled clips of 2 to 3.8 s; broken.jsonl: one that can't be decoded; model/: a checkpoint."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(5):
        soundfile.write(directory / f"{number}.wav", rng.normal(0, 0.1, int((2 + 0.45 * number) * 16000)), 16000)
        events = [{"text": "tone", "start": 0.1, "end": 0.4}]
        lines.append({"audio": f"{number}.wav", "text": f"number {number}", "events": events})
    (directory / "broken.wav").write_bytes(b"RIFF no sound")
    (directory / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (directory / "broken.jsonl").write_text(json.dumps({"audio": "broken.wav", "text": "what"}))
    mesh = make_mesh(devices=jax.devices()[:1])
    save_model(build_model(SMALL_MODEL, first_parameters(ModelSource(), SMALL_MODEL, mesh=mesh)), directory / "model")
    write_small_tokenizer(directory / "model")
    return directory


@pytest.fixture(scope="module")
def model(corpus: Path):
    return load_model(corpus / "model")


@pytest.fixture(scope="module")
def processor(corpus: Path):
    return load_processor(corpus / "model")


def item(measure: str = "text", reference: str = "", *content: str | Clip, **fields) -> Question:
    fields = {"name": "an item", "source": "here", "task": measure} | fields
    return Question(turns=(Message("user", content or ("?",)),), reference=reference, measure=measure, **fields)


# Answers


def noise(seconds: float) -> Clip:
    wave = np.random.default_rng(round(seconds * 100)).normal(0, 0.1, int(seconds * 16000))
    return Clip(wave.astype(np.float32))


FILLING = "Listen to this with care. "  # so that few buckets of lengths have to be compiled


@pytest.fixture(scope="module")
def mixed(corpus: Path) -> list[Question]:
    """Clips of several lengths and kinds, two clips in one question, and a conversation."""
    turns = (Message("system", ("S",)), Message("user", (noise(3.5),)), Message("assistant", (FILLING,)))
    return [
        item("text", "", noise(2), FILLING * 2),
        item("text", "", noise(6.5), "Which?"),
        item("text", "", noise(0.3), noise(1), FILLING * 2),
        dataclasses.replace(item("text", ""), turns=(*turns, Message("user", ("And?",)))),
        item("text", "", Clip((corpus / "1.wav").read_bytes(), 0.5, 2.25), FILLING * 2),
    ]


def test_answers_are_those_of_each_question_alone(model, processor, mixed):
    together = ask(model, processor, mixed, batch_size=3, max_new_tokens=12)
    assert together == [ask(model, processor, [one], max_new_tokens=12)[0] for one in mixed]
    assert len(set(together)) > 3  # so that an exchange would show
    inputs = processor([FILLING * 2], [[mixed[0].clips[0].wave()]])  # the prompt that `generate` reads
    assert together[0] == processor.decode(generate(model, inputs, max_new_tokens=12)[0])
    assert ask(model, processor, []) == []


def test_a_bucket_of_lengths_is_compiled_once(model, processor):
    def items(*seconds: float) -> list[Question]:
        return [item("text", "", noise(s), "Which?") for s in seconds]

    ask(model, processor, items(6, 6.5, 2), batch_size=3, max_new_tokens=12)
    with compilations() as compiled:
        ask(model, processor, items(6.1, 6.5, 6.2, 6.4, 6.3), batch_size=3, max_new_tokens=9)
    assert compiled == []


def test_answers_that_were_cut_off_are_told_from_finished_ones(model, processor, mixed):
    inputs = processor([FILLING * 2], [[mixed[0].clips[0].wave()]])
    ids = generate(model, inputs, max_new_tokens=12)[0].tolist()
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    parameters = {dotted(path): leaf[...] for path, leaf in flat}
    stopping = build_model(dataclasses.replace(SMALL_MODEL, eos_ids=(ids[-1],)), parameters)
    end = ids.index(ids[-1])
    assert end > 0
    for limit, finished in ((end, False), (end + 1, True), (12, True)):
        (answer,) = answer_questions(stopping, processor, mixed[:1], AnswerConfig(max_new_tokens=limit))
        assert answer == (processor.decode(ids[: min(limit, end + 1)]), finished)


def test_sampled_answers_repeat_with_their_seed(model, processor, mixed):
    config = AnswerConfig(max_new_tokens=12, sampling=Sampling(temperature=1.0))
    first, again, other = (answer_questions(model, processor, mixed[:1], config, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    together, alone = (
        answer_questions(model, processor, mixed, dataclasses.replace(config, batch_size=size)) for size in (3, 1)
    )
    assert together == alone


def test_an_engine_gives_the_same_answers(model, processor, mixed):
    """Also where a prompt is longer than those before it, so that a larger engine is made."""
    longest_last = [*mixed, item("text", "", noise(1), "ä" * 250)]  # estimated as shorter than 6.5 s of sound
    config = AnswerConfig(batch_size=2, max_new_tokens=12, sampling=Sampling(temperature=1.0))
    found = answers_by_index(model, processor, longest_last, config, seed=4)
    assert [found[i] for i in range(6)] == answer_questions(model, processor, longest_last, config, seed=4)
    some = answers_by_index(model, processor, longest_last, config, seed=4, stop=lambda: True)
    assert len(some) == 1 and some.items() <= found.items()
    assert answers_by_index(model, processor, [], config) == {}


def test_the_likeliest_letter_may_answer_a_multiple_choice(model, processor, mixed):
    """The other questions are answered as ever, also with their seeds."""
    options = ("a dog", "a cat", "an owl")
    items = [item("choice", "B", noise(1), "Which?", choices=options), mixed[0], item("choice", "A", choices=options)]
    config = AnswerConfig(max_new_tokens=12, sampling=Sampling(temperature=1.0), choices="likeliest")
    found = answers_by_index(model, processor, items, config, seed=2)
    for index in (0, 2):
        clips = [clip.wave() for clip in items[index].clips]
        expected = choose(model, processor, items[index].text, ["A", "B", "C"], clips).option
        assert found[index] == Answer(expected, True)
    assert found[1] == answer_questions(model, processor, items, config, seed=2)[1]


def test_clips_that_cannot_be_heard_are_named(model, processor, corpus):
    empty = item("text", "", Clip(np.zeros(10, np.float32), name="clip 7 of a test"), "?")
    with pytest.raises(MossAudioError, match=r"^clip 7 of a test: .*at least 160 samples"):
        ask(model, processor, [empty])
    with pytest.raises(MossAudioError, match=r"broken\.jsonl line 1: broken\.wav must be wav, flac"):
        ask(model, processor, read_questions(EvaluationConfig(data=(corpus / "broken.jsonl",))))
    with pytest.raises(MossAudioError, match=r"^an item: .*holds the audio span"):
        ask(model, processor, [item("text", "", "a <|audio_bos|><|AUDIO|><|audio_eos|>")])


def test_a_mesh_gives_the_same_answers(corpus, model, processor):
    config = EvaluationConfig(
        data=(corpus / "test.jsonl",),
        objectives=("transcribe",),
        limit=3,
        answers=AnswerConfig(batch_size=3, max_new_tokens=12),
        mesh=MeshConfig(fsdp=4, tensor=2),
    )
    items = read_questions(config)
    evaluation = evaluate(corpus / "model", items, config)
    assert evaluation.results["devices"] == 8
    answers = [answer.text for answer in evaluation.answers]
    assert answers == ask(model, processor, items, batch_size=1, max_new_tokens=12)


# Measures


def times(*labels: tuple[str, float, float]) -> tuple[TimedText, ...]:
    return tuple(TimedText(*label) for label in labels)


def test_text():
    items = [item("text", "Hello there, world."), item("text", "good day")]
    perfect = measure(items, ["hello there world", "<think>Good?</think>Good day!"])["here"]["text"]
    assert perfect["items"] == 2 and perfect["wer"] == perfect["cer"] == 0.0
    assert measure(items, ["hello where", "good day to"]) == {
        "here": {
            "text": {
                "items": 2,
                "wer": 3 / 5,  # there -> where, without world, to
                "word_edits": 3,
                "words": 5,
                "cer": 8 / 22,
                "character_edits": 8,
                "characters": 22,
            }
        }
    }


TIMED = times(("hello", 0.1, 0.5), ("there", 0.6, 1.0))


def test_timed_text():
    items = [item("timed_text", labels=TIMED), item("timed_text", labels=TIMED)]
    # First `there` has no times; then the slots are 100, 300, 300 and 0 ms off, `oh` is too much, `now` has no times.
    measured = measure(items, ["[0.10]hello[0.50] there", "[0.20]hello[0.80][0.9]there[1][1]oh[1.1] now"])
    measured = measured["here"]["timed_text"]
    assert measured["aas_ms"] == pytest.approx(700 / 6)
    assert [measured[f"{name}_slots"] for name in ("matched", "missing", "surplus")] == [6, 2, 2]
    assert (measured["malformed"], measured["wer"], measured["words"]) == (2, 2 / 4, 4)


def test_events():
    labels = times(("tone", 1.0, 2.0), ("hum", 3.0, 3.5))
    items = [item("events", labels=labels)] * 2
    perfect = measure(items, ["[1.0]tone[2.0][3.0]hum[3.5]"] * 2)["here"]["events"]
    assert (perfect["f1"], perfect["onset_ms"], perfect["aas_ms"], perfect["malformed"]) == (1.0, 0.0, 0.0, 0)

    # Tone 200 ms late, which is still right; hum 400 ms late, which is not; then nothing but a stray text.
    wrong = measure(items, ["[1.2]tone[2.3][3.4]Hum.[3.5]", "a tone"])["here"]["events"]
    assert [wrong[f"{name}_events"] for name in ("matched", "predicted", "reference")] == [1, 2, 4]
    assert (wrong["f1"], wrong["precision"], wrong["recall"]) == (1 / 3, 1 / 2, 1 / 4)
    assert (wrong["onset_ms"], wrong["offset_ms"]) == (pytest.approx(200), pytest.approx(300))
    assert wrong["aas_ms"] == pytest.approx((200 + 300 + 400 + 0) / 4)  # of all that correspond, however late
    assert [wrong[f"{name}_slots"] for name in ("matched", "missing", "surplus")] == [4, 4, 0]
    assert wrong["malformed"] == 1 and wrong["by_class"]["hum"]["f1"] == 0.0


def test_seconds_labels_and_replies():
    items = [item("seconds", "2.5"), item("seconds", "1.0"), item("label", "tone, hum"), item("reply", "At sea.")]
    measured = measure(items, ["2.7 s", "early", "Tone, hum.", "at sea then"])["here"]
    seconds = {"mean_error_s": pytest.approx(0.2), "share_within": 0.5, "within": 1, "unreadable": 1}
    assert measured["seconds"] == {"items": 2, **seconds}
    assert measured["label"] == {"items": 1, "accuracy": 1.0, "correct": 1}
    assert (measured["reply"]["accuracy"], measured["reply"]["wer"]) == (0.0, 1 / 2)


def test_choices():
    options = ("a dog", "a cat")
    items = [item("choice", letter, choices=options, groups={"task": task}) for letter, task in ("Ax", "Bx", "By")]
    measured = measure(items, ["A", "a dog", "who knows"])["here"]["choice"]
    assert {key: measured[key] for key in ("items", "accuracy", "correct", "unanswered", "ambiguous")} == {
        "items": 3,
        "accuracy": 1 / 3,
        "correct": 1,
        "unanswered": 1,
        "ambiguous": 0,
    }
    assert {name: group["accuracy"] for name, group in measured["by_group"]["task"].items()} == {"x": 0.5, "y": 0.0}


def test_sources_and_tasks_are_measured_apart():
    items = [item("text", "a"), item("text", "a", source="there"), item("unjudged", "a"), item("text", "b")]
    measured = measure(items, ["a", "x", "y", "x"])
    assert [(source, list(tasks)) for source, tasks in measured.items()] == [
        ("here", ["text", "unjudged"]),
        ("there", ["text"]),
    ]
    assert (measured["here"]["text"]["wer"], measured["there"]["text"]["wer"]) == (0.5, 1.0)
    assert measured["here"]["unjudged"] == {"items": 1}
    lines = measures_table(measured).splitlines()
    assert lines[1].split() == ["here", "text", "2", "WER", "50.0%,", "CER", "50.0%"]
    assert "not judged" in lines[2]
    with pytest.raises(ValueError):
        measure(items, ["a"])


# The command


def invoke(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train", "evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def test_the_command_reports_what_the_model_answers(corpus, tmp_path):
    question = {"id": 1, "audio_path": "1.wav", "question": "What?", "choices": ["a", "b"], "answer": "b"}
    question |= {"modality": "sound", "category": "x", "sub-category": None}
    (corpus / "mmar.jsonl").write_text(json.dumps(question))
    options = ("--max-new-tokens", 12, "--batch-size", 4, "--seed", 5)
    sources = ("--data", corpus / "test.jsonl", "--scenes", 4, "--scenes.tasks", "timeline", "start")
    sources += ("--scenes.seconds", 3.5, 3.5)
    files = ("--json", tmp_path / "new" / "results.json", "--predictions", tmp_path / "predictions.jsonl")
    result = invoke(corpus / "model", *sources, "--benchmark", f"mmar={corpus / 'mmar.jsonl'}", *options, *files)
    assert result.returncode == 0, result.stderr

    scenes = SceneConfig(tasks=("timeline", "start"), seconds=(3.5, 3.5))
    config = EvaluationConfig(
        data=(corpus / "test.jsonl",), scenes=4, scene=scenes, benchmark=(f"mmar={corpus / 'mmar.jsonl'}",), seed=5
    )
    items = read_questions(config)
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()]
    for found, expected in zip(predictions, items, strict=True):
        keys = ("name", "source", "task", "reference")
        assert {key: found[key] for key in keys} == {key: getattr(expected, key) for key in keys}
        assert found["question"] == expected.text
    answers = [line["prediction"] for line in predictions]
    assert len(set(answers)) > 3
    results = json.loads((tmp_path / "new" / "results.json").read_text("utf-8"))
    assert results["measures"] == json.loads(json.dumps(measure(items, answers)))
    assert results["items"] == len(items) == 5 * 3 + 4 + 1
    assert results["unfinished"] == sum(not line["finished"] for line in predictions)
    assert results["config"]["answers"]["max_new_tokens"] == 12 and results["dtype"] == "float32"
    assert measures_table(results["measures"]) in result.stdout


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_keeps_what_was_answered(corpus, tmp_path):
    files = ("--json", tmp_path / "results.json", "--predictions", tmp_path / "predictions.jsonl")
    asked = ("--scenes", 2000, "--scenes.seconds", 2, 2, "--max-new-tokens", 2, "--batch-size", 2)
    command = [sys.executable, "-m", "train", "evaluate", str(corpus / "model"), *map(str, (*asked, *files))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        shown = b""
        while not re.search(rb"\D[2-9]\d*/2000", shown):  # how many are answered
            shown += (character := process.stderr.read(1))
            assert character, shown
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    results = json.loads((tmp_path / "results.json").read_text())
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert 2 <= len(predictions) == results["items"] < results["items_in_all"] == 2000
    assert results["partial"] and all(line["partial"] for line in predictions)
    assert f"this is of {len(predictions)} of 2000 questions".encode() in errors
    assert measures_table(results["measures"]) in out.decode()


def test_the_command_names_a_mistake_before_it_loads_the_model(corpus, tmp_path):
    result = invoke("no-model", "--data", corpus / "test.jsonl", "--json", corpus / "test.jsonl" / "results.json")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "results.json must be a file that can be written" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nothing to ask: give --data"),
        ({"objectives": ("plain_text",)}, "objectives must be some of transcribe, .*'plain_text'"),
        ({"benchmark": ("mmau",)}, "benchmark must be NAME=FILE"),
        ({"benchmark": ("mmxx=a.json",)}, "'mmxx' is unknown"),
        ({"data": (Path("absent.jsonl"),)}, r"absent\.jsonl: expected a readable manifest"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"answers": {"batch_size": 0}}, "batch_size must be 1 or more, not 0"),
        ({"answers": {"max_new_tokens": 0}}, "max_new_tokens must be 1 or more, not 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(MossAudioError, match=message):
        if "answers" in options:
            options = {"answers": AnswerConfig(**options["answers"])}
        read_questions(EvaluationConfig(**options))


def test_events_are_plotted(corpus, tmp_path):
    pytest.importorskip("matplotlib")
    items = read_questions(EvaluationConfig(data=(corpus / "test.jsonl",)))
    evaluation = Evaluation(items, [Answer("[0.1]tone[0.5]", True)] * len(items), {})
    evaluation.save_plot(tmp_path / "events.png")
    assert (tmp_path / "events.png").read_bytes().startswith(b"\x89PNG")


def test_the_clips_of_a_picture_hold_as_many_labels_as_possible():
    def item(index: int, *labels: str) -> Question:
        found = tuple(TimedText(label, 0, 1) for label in labels)
        clip = Clip("data/a.wav") if index == 3 else Clip(np.zeros(160, np.float32))
        return Question(f"x/m.jsonl line {index}", "", "events", (Message("user", (clip, "?")),), "", "events", found)

    items = [item(0, "a"), item(1, "a"), item(2, "b", "a"), item(3, "d", "c"), item(4, "e")]
    assert indices_of_all_labels(items, 3) == [2, 3, 4]
    assert indices_of_all_labels(items, 4) == [0, 2, 3, 4]
    assert indices_of_all_labels(items[:2], 4) == [0, 1]
    assert [clip_title(item) for item in items[2:4]] == ["m.jsonl line 2", "a.wav (m.jsonl line 3)"]
