"""Times in long audio: windows cover a clip, their most probable answer is taken, and a repeated call resumes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import long_audio
from moss_audio_jax import load_model, load_processor
from moss_audio_jax.inference.requests import Reply
from train.evaluation.answers import answers_by_index
from train.evaluation.config import AnswerConfig
from train.evaluation.questions import Question

SECONDS = 90.0


@pytest.mark.parametrize(("surer", "right"), [("the window with the sound", 1.0), ("another", 0.0)])
def test_the_most_probable_window_gives_the_time(monkeypatch: pytest.MonkeyPatch, surer: str, right: float):
    items = long_audio.questions(SECONDS / 60, 3)
    starts = [item.labels[0].start for item in items]

    def replies(model: None, processor: None, asked: Sequence[Question]) -> list[Reply]:
        found = []
        for number, question in enumerate(asked):
            begin, start = question.clips[0].start or 0.0, starts[number // 3]
            assert begin == 30.0 * (number % 3) and question.clips[0].num_samples() == 30 * 16000
            holds = begin <= start < begin + 30
            text = f"{start - begin:.1f}" if holds else "29.0"
            sure = holds == (surer == "the window with the sound")
            found.append(Reply(text, (1, 2), "stop", logprobs=(-0.1, -0.1) if sure else (-0.1, -3.0)))
        return found

    monkeypatch.setattr(long_audio, "_replies", replies)
    found = long_audio.scores(None, None, items, windows=True)  # pyright: ignore[reportArgumentType]
    assert found["within_0.2"] == right
    assert (found["median_error"] <= 0.1) == bool(right)


def test_the_engine_answers_as_evaluation_does(straight: Path):
    model, processor = load_model(straight), load_processor(straight)
    items = [item for minutes in (0.05, 0.1) for item in long_audio.questions(minutes, 3)]
    answers = answers_by_index(model, processor, items, AnswerConfig(4, long_audio.MAX_NEW_TOKENS))
    replies = long_audio._replies(model, processor, items)
    assert [reply.text for reply in replies] == [answers[index].text for index in range(len(items))]
    assert all(len(reply.logprobs) == len(reply.ids) > 0 for reply in replies)


def test_a_repeated_call_makes_what_is_missing(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def measured(minutes: tuple[float, ...]) -> list[str]:
        long_audio.measure((straight,), out=tmp_path, minutes=minutes, clips=2)
        said = capsys.readouterr()
        assert " ".join(said.out.splitlines()[0].split()) == "run minutes way within 0.2 s within 1 s median error"
        return [line for line in said.err.splitlines() if "min, " in line]

    assert measured((0.05,)) == [f"{straight.name}: 0.05 min, {way}" for way in ("whole", "windows")]
    assert measured((0.05, 0.1)) == [f"{straight.name}: 0.1 min, {way}" for way in ("whole", "windows")]
    monkeypatch.delattr(long_audio, "load_model")
    assert measured((0.05, 0.1)) == []
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["minutes"], line["way"]) for line in lines] == [
        (minutes, way) for minutes in (0.05, 0.1) for way in ("whole", "windows")
    ]
    assert (tmp_path / "long_audio.png").read_bytes().startswith(b"\x89PNG")
