"""Options that answers name: phrasings of models, and texts that name none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.evaluation.metrics.choices import read_choice, score_choices

SOUNDS = ("dog", "cat", "car", "car horn")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b). ", "B"),
        ("**B**", "B"),
        ("B. cat", "B"),
        ("B) a furry animal", "B"),
        ("(B) cat", "B"),
        ("B: cat", "B"),
        ("B\nIt meows.", "B"),
        ("C, because it hums.", "C"),
        ("cat", "B"),
        ("A cat.", "B"),
        ("Car  Horn.", "D"),
        ("I hear a car horn.", "D"),
        ("The answer is C", "C"),
        ("The answer is C because B is a cat.", "C"),
        ("the answer is b.", "B"),
        ("The answer is a cat.", "B"),
        ("The answer is a car horn", "D"),
        ("The correct answer is **C. car**, not B.", "C"),
        ("Answer: (D)", "D"),
        ("**Answer:** option D", "D"),
        ("It must be option C.", "C"),
        ("A. dog\nB. cat\nSo the answer is B.", "B"),
        ("$\\boxed{\\text{C}}$", "C"),
        ("<answer>D</answer>", "D"),
        ("<think>A? The answer is A.</think>\nC", "C"),
        ("A dog barks", "A"),
    ],
)
def test_choices_that_are_named(text, letter):
    assert read_choice(text, SOUNDS) == (letter, "answered")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("A or B", "ambiguous"),
        ("A, B", "ambiguous"),
        ("B. dog", "ambiguous"),
        ("The answer is A cat", "ambiguous"),  # a letter or an article
        ("A. dog\nB. cat\nC. car\nD. car horn", "ambiguous"),
        ("a car and a dog", "ambiguous"),
        ("The answer is A. No, the answer is B.", "ambiguous"),
        ("E", "unanswered"),
        ("The answer is E", "unanswered"),
        ("I can't tell.", "unanswered"),
        ("carpet", "unanswered"),
        ("", "unanswered"),
        ("<think>The answer is A", "unanswered"),
    ],
)
def test_choices_that_are_not(text, status):
    assert read_choice(text, SOUNDS).status == status


PHRASINGS = [
    # As the scorers of MMLU, MMLU-Pro and GPQA expect an answer, and as models vary it.
    ("The answer is (B).", "B"),
    ("Therefore, the answer is (B)", "B"),
    ("The correct answer is: B", "B"),
    ("Answer: B", "B"),
    ("ANSWER: B", "B"),
    ("Ans: B", "B"),
    ("answer is B) cat", "B"),
    ("The answer to this question is B.", "B"),
    ("The best answer is B", "B"),
    ("The answer is most likely B.", "B"),
    ("The answer should be option (B).", "B"),
    ("The answer is 'B'.", "B"),
    ("My answer would be B", "B"),
    ('{"answer": "B"}', "B"),
    ("The correct answer choice is B.", "B"),
    ("Final answer: B. The answer is A only at first sight.", "B"),
    ("#### B", "B"),
    ("The final answer is $\\boxed{B}$.", "B"),
    ("\\boxed{(B)}", "B"),
    ("<think>It is A.</think>The correct option is B.", "B"),
    # As the scorers of MMAU, MMAR, MMAU-Pro and MMSU meet them: a letter with or without its text, or the text alone.
    ("(B) cat", "B"),
    ("B. cat. It meows.", "B"),
    ("The sound is that of a cat.", "B"),
    ("<answer>(B) cat</answer>", "B"),
    ("The correct option is B.", "B"),
    ("The correct choice is (B).", "B"),
    ("The most appropriate choice would be B", "B"),
    ("Correct option: B", "B"),
    ("B is correct.", "B"),
    ("B is the correct answer.", "B"),
    ("Option B is the most likely answer.", "B"),
    ("(B) is right because it meows.", "B"),
    ("It is B", "B"),
    ("It's B.", "B"),
    ("It must be **B**.", "B"),
    ("I choose B.", "B"),
    ("I would go with option B, the cat.", "B"),
    ("I think B is it, so B.", "B"),
    ("A: wrong. B: right", "B"),
    ("A is incorrect, B is correct.", "B"),
    ("A and C are wrong. The remaining one is right: option B.", "B"),
    ("It is not A but B.", "B"),
    ("It could be A, but I believe it is B.", "B"),
    ("The answer isn't A. It's B.", "B"),
    # As the scorers of C-Eval and CMMLU expect an answer.
    ("答案是B", "B"),
    ("所以答案是B。", "B"),
    ("答案：B", "B"),
    ("答案为（B）", "B"),
    ("【答案】B", "B"),
    ("正确答案是：Ｂ", "B"),
    ("本题的正确选项是B。", "B"),
    ("答案应该选B", "B"),
    ("最终答案：B，不是A", "B"),
    ("故选B。", "B"),
    ("因此，应选择 B", "B"),
    ("我选B", "B"),
    ("选项B正确", "B"),
    ("B是正确的。", "B"),
    ("B选项符合题意", "B"),
    ("A错，B对。", "B"),
    ("应该是B", "B"),
    ("不是A，而是B。", "B"),
    ("$\\boxed{\\text{B}}$，因为有猫叫。", "B"),
    ("B、因为有猫叫", "B"),
    # No option, or more than one.
    ("The answer is not B.", None),
    ("B is not correct.", None),
    ("Option B is wrong.", None),
    ("The wrong option is B.", None),
    ("B is correct, and C is correct.", None),
    ("Both B and C are correct.", None),
    ("It could be B.", None),
    ("It is B or C.", None),
    ("It is in B flat.", None),
    ("It is A minor.", None),
    ("Plan B is what they talk about.", None),
    ("B是错误的", None),
    ("答案是A和B都不对", None),
    ("我不知道。", None),
    ("I am sure of it.", None),
]


@pytest.mark.parametrize(("text", "letter"), PHRASINGS)
def test_phrasings_that_public_scorers_meet(text, letter):
    assert read_choice(text, SOUNDS).letter == letter


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("It is A minor.", ("C major", "A minor"), "B"),
        ("B: wrong", ("right", "wrong"), "B"),
        ("A. True", ("True", "False"), "A"),
        ("B. right ear", ("left ear", "right ear"), "B"),
        ("答案是C大调", ("C大调", "D大调", "E大调"), "A"),
        ("A dog barks", ("dog", "cat"), "A"),
        ("I pick a cat", ("dog", "cat"), "B"),
        ("I think it is a cat.", (*"lmnopqrs", "cat"), "I"),
    ],
)
def test_words_of_the_rules_among_the_options(text, choices, letter):
    assert read_choice(text, choices).letter == letter


def test_letters_before_chords():
    chords = ("G", "A#", "D", "E")
    assert read_choice("D", chords).letter == "D"
    assert read_choice("C. D", chords).letter == "C"
    assert read_choice("A#", chords).letter == "B"
    assert read_choice("The answer is D", chords).letter == "D"
    assert read_choice("D. D and A", ("D in 8", "D in A", "D and 8", "D and A")).letter == "D"
    assert read_choice("D and A", ("D in 8", "D in A", "D and 8", "D and A")).letter == "D"


def test_an_empty_option_is_never_named_by_text():
    assert read_choice("", ("x", "")).status == "unanswered"
    assert read_choice("The answer is A", ("x", "")).letter == "A"


def test_accuracy_counts_every_question():
    predictions = ["A", "B", "A or B", "", "thirteen", "C"]
    choices = [SOUNDS, SOUNDS, SOUNDS, SOUNDS, ("thirteen", "two", "thirteen"), ("one", "two", "one")]
    score = score_choices(predictions, choices, ["A", "C", "A", "A", "C", "A"])
    assert (score.correct, score.total, score.unanswered, score.ambiguous) == (3, 6, 1, 1)
    assert score.accuracy == 0.5
    assert score_choices([], [], []).accuracy is None


@given(st.text("ABCDE.,:() answeriso\n<think>/"), st.lists(st.text("abAB ", max_size=3), min_size=2, max_size=5))
def test_every_answer_can_be_read(text, choices):
    letter, status = read_choice(text, choices)
    assert (letter is None) == (status != "answered")
    assert letter is None or letter in "ABCDE"[: len(choices)]
