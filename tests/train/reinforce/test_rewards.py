"""What each reward gives for right, near and wrong answers, and what a reward that fails does."""

from pathlib import Path

import pytest

from moss_audio_jax import MossAudioError
from train.data.manifest import Message, TimedText
from train.evaluation.questions import Question
from train.reinforce.config import RolloutConfig
from train.reinforce.rewards import BY_MEASURE, NAMED, Answered, RewardError, Rewards

CONFIG = RolloutConfig(max_new_tokens=100, overlong=20)


def question(reference: str, measure: str, **more) -> Question:
    return Question("item 3", "here", measure, (Message("user", ("Hm?",)),), reference, measure, **more)


def answered(text: str, tokens: int = 5, finished: bool = True) -> Answered:
    return Answered(text, tokens, finished)


LETTERS = question("B", "choice", choices=("a dog", "a cat"))
SECONDS, TEXT = question("2.7", "seconds"), question("the weather is nice", "text")
EVENTS = (TimedText("tone", 1.0, 2.0), TimedText("hum", 3.0, 4.0))
TIMELINE = question("[1.0]tone[2.0][3.0]hum[4.0]", "events", labels=EVENTS)
TIMED = question("[1.0]tone[2.0][3.0]hum[4.0]", "timed_text", labels=EVENTS)


def test_a_reward_of_other_questions_is_refused():
    Rewards(("correct", "equal", "format", "overlong"), CONFIG, 10).require_judges({"text": "a", "seconds": "b"})
    Rewards(("words",), CONFIG, 10).require_judges({"text": "a", "timed_text": "b"})
    message = "--rewards seconds judges questions by seconds, and item 3 is judged by events: give correct, which"
    with pytest.raises(MossAudioError, match=message):
        Rewards(("correct", "seconds"), CONFIG, 10).require_judges({"seconds": "a", "events": "item 3"})


@pytest.mark.parametrize(
    ("asked", "text", "expected"),
    [
        (LETTERS, "B", 1.0),
        (LETTERS, "<think>A or B?</think>It is a cat.", 1.0),
        (LETTERS, "A", 0.0),
        (question("Nothing.", "label"), "nothing", 1.0),
        (question("first", "reply"), "second", 0.0),
        (SECONDS, "At 2.9 s.", 1.0),
        (SECONDS, "<think>1 or 2</think>3.3", 0.5),
        (SECONDS, "4", 0.0),
        (SECONDS, "2.7 or 2.8", 0.0),
        (TEXT, "The weather is nice.", 1.0),
        (TEXT, "the weather was", 0.5),
        (TEXT, "no " * 9, 0.0),
        (TIMELINE, "[1.1]tone[2.0]", 2 / 3),
        (TIMELINE, "nothing", 0.0),
        (question("nothing", "events"), "nothing", 1.0),
        (question("nothing", "events"), "a noise", 0.0),
        (question("nothing", "events"), "[1.0]tone[2.0]", 0.0),
        (TIMED, "[1.0]tone[2.0][3.0]hum[4.0]", 1.0),
        (TIMED, "[1.5]tone[2.5][3.5]hum[4.5]", 0.75),
        (TIMED, "tone hum", 0.5),
    ],
)
def test_correct_is_graded_by_the_measure_of_the_question(asked: Question, text: str, expected: float):
    (found,) = Rewards(("correct",), CONFIG, 10)([asked], [answered(text)])["correct"]
    assert found == pytest.approx(expected)


def test_every_measure_that_judges_has_a_reward():
    from train.evaluation.measures import MEASURES

    assert BY_MEASURE.keys() == MEASURES.keys() - {"unjudged"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nit begins late\n</think>\n\n2.7", 1),
        ("2.7", 0),
        ("<think>never closed 2.7", 0),
        ("<think></think>2.7", 0),
        ("<think>a thought</think> ", 0),
        ("<think>a</think>2<think>b</think>3", 0),
        ("so <think>a</think>2.7", 0),
    ],
)
def test_format_wants_one_thought_and_an_answer(text: str, expected: float):
    assert NAMED["format"](SECONDS, answered(text)) == expected


def test_overlong_falls_in_the_last_tokens_and_the_sum_is_weighted():
    rewards = Rewards(("overlong=2", "seconds=0.5"), CONFIG, 10)
    answers = [answered("2.7", tokens, tokens < 100) for tokens in (5, 80, 90, 99, 100)]
    scores = rewards([SECONDS] * 5, answers)
    assert scores["overlong"] == pytest.approx([0, 0, -0.5, -0.95, -1])
    assert rewards.total(scores).tolist() == pytest.approx([0.5, 0.5, -0.5, -1.4, -1.5])


USERS = """
import time

def short(question, answer):
    return -len(answer.text)

def both(questions, answers):
    return [answer.tokens / len(answers) for answer in answers]

both.batched = True

def fails(question, answer):
    return {"2.7": 1.0}[answer.text]

def slow(question, answer):
    time.sleep(60)

def words(question, answer):
    return "good"

def few(questions, answers):
    return [1.0]

few.batched = True
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(USERS)
    return str(path)


def test_a_users_functions_are_called_by_answer_or_by_batch(users: str):
    rewards = Rewards((f"{users}:short=-1", f"{users}:both"), CONFIG, 10)
    scores = rewards([SECONDS] * 2, [answered("2.7"), answered("nothing")])
    assert scores == {f"{users}:short": [-3, -7], f"{users}:both": [2.5, 2.5]}
    assert rewards.total(scores).tolist() == [5.5, 9.5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", r"fails of 'item 3', answer 'two', raised KeyError: 'two'"),
        ("slow", r"slow of 'item 3', answer '2.7', is not there after 0.2 s for 2 answers: .*--reward-seconds"),
        ("words", r"must be a finite number, not 'good'"),
        ("few", r"a number for each of 2 answers, not 1"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_question(users: str, function: str, message: str):
    rewards = Rewards((f"{users}:{function}",), CONFIG, 0.2)
    with pytest.raises(RewardError, match=message):
        rewards([SECONDS] * 2, [answered("2.7"), answered("two")])


@pytest.mark.parametrize(
    ("specified", "message"),
    [
        ((), "must name one at least"),
        (("corect",), "must be some of correct, .*, or FILE.py:FUNCTION, not 'corect'"),
        (("correct=much",), "NAME or NAME=WEIGHT, such as correct=1, not 'correct=much'"),
        (("correct", "correct=2"), "name correct twice"),
        (("absent.py:short",), "there is no file absent.py"),
        (("{users}:long",), "has no function long"),
    ],
)
def test_what_is_no_reward_is_refused_at_the_start(users: str, specified: tuple[str, ...], message: str):
    with pytest.raises(MossAudioError, match=message):
        Rewards([text.format(users=users) for text in specified], CONFIG, 1)
