"""Labels become questions and answers, drawn with the example's generator."""

import dataclasses
import re

import numpy as np
import pytest

from moss_audio_jax.errors import MossAudioError
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.objectives import OBJECTIVES, PROMPTS, TIME_QUESTIONS, NothingToAsk, check_shares, render

CLIP = Clip("a.wav")
LABELLED = Example(
    "line 1",
    conversation=(Message("user", (CLIP, "Hm?")), Message("assistant", ("Yes.",))),
    clip=CLIP,
    text="hello there the weather is nice",
    caption="Someone speaks.",
    words=(TimedText("hello", 0, 0.312), TimedText("there", 0.35, 0.8)),
    segments=(TimedText("hello there", 0, 2.013), TimedText("the weather is nice", 2.013, 4.32)),
    events=(TimedText("tone", 2.7, 3.5), TimedText("noise", 3.7, 4.5), TimedText("tone", 4.2, 4.4)),
)


def ask(example: Example, objective: str, seed: int = 0) -> tuple[str, str]:
    rendered = render(example, np.random.default_rng(seed), {objective: 1})
    assert not isinstance(rendered, str)
    user, assistant = rendered
    assert user.role == "user" and user.content[0] is CLIP and assistant.role == "assistant"
    (_, question), (answer,) = user.content, assistant.content
    assert isinstance(question, str) and isinstance(answer, str)
    return question, answer


@pytest.mark.parametrize(
    ("objective", "answer"),
    [
        ("transcribe", "hello there the weather is nice"),
        ("transcribe_words", "[0.00]hello[0.31][0.35]there[0.80]"),
        ("transcribe_sentences", "[0.00]hello there[2.01][2.01]the weather is nice[4.32]"),
        ("caption", "Someone speaks."),
        ("events", "[2.7]tone[3.5][3.7]noise[4.5][4.2]tone[4.4]"),
    ],
)
def test_answers_and_prompts(objective: str, answer: str):
    asked = [ask(LABELLED, objective, seed) for seed in range(60)]
    assert {question for question, _ in asked} == set(PROMPTS[objective])
    assert {found for _, found in asked} == {answer}


def test_the_authors_prompt_is_among_ours():
    assert "Transcribe the audio." in PROMPTS["transcribe"]


def test_time_questions_have_true_answers():
    """Every question that is drawn is answered here again, from the labels and its wording."""
    events = (*LABELLED.events, TimedText("horn", 6.0, 7.5))
    example = dataclasses.replace(LABELLED, events=events)
    kinds = set()
    for seed in range(300):
        question, answer = ask(example, "time_qa", seed)
        kind, names = _understand(question)
        kinds.add(kind)
        named = [next(event for event in events if event.text == name) for name in names if kind != "what_at"]
        if kind == "what_at":
            time = float(names[0])
            assert answer == ", ".join(event.text for event in events if event.start <= time <= event.end) != ""
        elif kind == "first":
            assert answer == min(named, key=lambda event: event.start).text
        else:
            assert names[0] != "tone"  # there are two
            seconds = {"start": named[0].start, "end": named[0].end, "duration": named[0].end - named[0].start}
            assert answer == f"{seconds[kind]:.1f}"
    assert kinds == set(TIME_QUESTIONS)


def _understand(question: str) -> tuple[str, list[str]]:
    for kind, wordings in TIME_QUESTIONS.items():
        for wording in wordings:
            pattern = re.escape(wording).replace(r"\{0\}", "(.+?)").replace(r"\{1\}", "(.+?)")
            if match := re.fullmatch(pattern, question):
                return kind, [name.removeprefix("the ") for name in match.groups()]
    raise AssertionError(question)


def test_speech_is_quoted_in_time_questions():
    speech = dataclasses.replace(LABELLED, events=(), segments=())
    questions = [ask(speech, "time_qa", seed)[0] for seed in range(40)]
    assert any('"hello"' in question for question in questions)


def test_shares_decide_among_what_applies():
    def kinds(example: Example, shares: dict[str, float] | None) -> set[str]:
        answers = [render(example, np.random.default_rng(seed), shares) for seed in range(80)]
        return {answer if isinstance(answer, str) else str(answer[1].content[0]) for answer in answers}

    spoken = Example("line 2", clip=CLIP, text="hello", caption="Speech.")
    assert kinds(spoken, None) == {"hello", "Speech."}
    assert kinds(spoken, {"caption": 1, "events": 5, "transcribe": 0}) == {"Speech."}
    assert kinds(Example("line 3", text="plain"), None) == {"plain"}
    assert render(LABELLED, np.random.default_rng(0), {"conversation": 1}) == LABELLED.conversation
    with pytest.raises(
        NothingToAsk,
        match="line 2: expected what the objectives events ask about, found only 'audio', 'text', 'caption'; add",
    ):
        render(spoken, np.random.default_rng(0), {"events": 1})


def test_a_share_of_two_thirds_is_one():
    rng = np.random.default_rng(0)
    spoken = Example("line 2", clip=CLIP, text="hello", caption="Speech.")
    answers = [render(spoken, rng, {"caption": 2, "transcribe": 1})[1].content[0] for _ in range(900)]  # type: ignore[union-attr]
    assert 0.62 < answers.count("Speech.") / 900 < 0.71


def test_labels_are_asked_of_clips_without_a_conversation():
    shares = {"conversation": 1.0, "labels": 1.0}
    alone = dataclasses.replace(LABELLED, conversation=())

    def asked(example: Example, seed: int) -> object:
        return render(example, np.random.default_rng(seed), shares)

    assert all(asked(LABELLED, seed) == LABELLED.conversation for seed in range(20))
    questions = {asked(alone, seed)[0].content[1] for seed in range(300)}  # type: ignore[index]
    assert questions == {wording for wordings in PROMPTS.values() for wording in wordings}
    spoken = Example("line 2", clip=CLIP, text="hello")
    assert {asked(spoken, seed)[1].content for seed in range(20)} == {("hello",)}  # type: ignore[index]
    for nothing in (Example("line 3", text="plain"), dataclasses.replace(spoken, text="")):
        with pytest.raises(NothingToAsk):
            asked(nothing, 0)


def test_shares_are_checked():
    check_shares(dict.fromkeys(OBJECTIVES, 1.0))
    for shares in ({"transcribed": 1.0}, {"caption": 0.0}, {"caption": -1.0, "events": 2.0}):
        with pytest.raises(MossAudioError, match="expected"):
            check_shares(shares)
