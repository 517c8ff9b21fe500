"""The measures against cases worked out by hand and against plain definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from train.data.manifest import TimedText
from train.data.objectives import timeline
from train.metrics import (
    ErrorRate,
    EventCounts,
    MatchScore,
    SecondsScore,
    TimestampScore,
    align,
    character_error_rate,
    edit_distance,
    normalize_text,
    parse_timeline,
    read_choice,
    read_seconds,
    score_choices,
    score_events,
    score_matches,
    score_seconds,
    score_timestamps,
    split_characters,
    split_words,
    without_times,
    word_error_rate,
)

# Text


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Hello,  there!", "hello there"),
        ("Don't — it\u2019s well-known.", "dont its well known"),
        ("'Tis the dogs' bowl", "tis the dogs bowl"),
        ("\uff21\uff22\uff23\u3000\uff11\uff12\uff13", "abc 123"),  # full width
        ("STRASSE straße", "strasse strasse"),
        ("cafe\u0301 CAFÉ", "café café"),
        ("a\u200bb\tc\n", "ab c"),  # a zero-width space is no space
        ("$5 + 3%", "5 3"),
        ("你好\uff0c世界。", "你好 世界"),
        ("?!", ""),
    ],
)
def test_normalization(text, normalized):
    assert normalize_text(text) == normalized


@given(st.text())
def test_normalization_is_settled(text):
    assert normalize_text(normalize_text(text)) == normalize_text(text)


def test_units():
    assert split_words("今天 go 東京タワー, OK?") == ["今", "天", "go", "東", "京", "タ", "ワ", "ー", "ok"]
    assert split_words("안녕 하세요") == ["안녕", "하세요"]  # Korean puts spaces between words
    assert split_characters("Go, on!") == ["g", "o", "o", "n"]


def test_word_error_rate_is_that_of_the_corpus():
    # 1 substitution of 4 words; 1 substitution and 1 deletion of 2; the mean of the rates would be 0.625
    score = word_error_rate(["A b, c d", "x"], ["a b c e", "y z"])
    assert score == ErrorRate(edits=3, length=6)
    assert score.rate == 0.5


def test_character_error_rate():
    assert character_error_rate(["kitten s"], ["sitting s"]) == ErrorRate(edits=3, length=8)
    assert character_error_rate(["今天天汽好"], ["今天天气很好"]) == ErrorRate(edits=2, length=6)
    assert word_error_rate(["今天天汽好"], ["今天天气很好"]) == ErrorRate(edits=2, length=6)


def test_rates_of_nothing():
    assert word_error_rate([], []).rate is None
    assert word_error_rate(["a b"], [""]) == ErrorRate(edits=2, length=0)
    assert word_error_rate(["", ""], ["a b", "c"]).rate == 1.0
    with pytest.raises(ValueError):
        word_error_rate(["a"], ["a", "b"])


# Edit distance

tokens = st.lists(st.sampled_from("abc"), max_size=12)


def plain_distance(left, right):
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


@given(tokens, tokens)
def test_edit_distance(left, right):
    assert edit_distance(left, right) == plain_distance(left, right)


@given(tokens, tokens)
def test_alignment_is_a_shortest_edit(left, right):
    pairs = align(left, right)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    substituted = sum(left[i] != right[j] for i, j in pairs)
    assert len(left) + len(right) - 2 * len(pairs) + substituted == plain_distance(left, right)


def test_alignment_pairs_the_latest():
    assert align(["a"], ["a", "b", "a"]) == [(0, 2)]
    assert align(["a", "b", "c"], ["a", "c"]) == [(0, 0), (2, 1)]
    assert align([], ["a"]) == []


# Timestamps


def items(*rows):
    return tuple(TimedText(text, start, end) for start, text, end in rows)


@pytest.mark.parametrize(
    ("text", "found", "malformed"),
    [
        (
            "[0.00]hello there[2.01][2.01]the weather[4.32]",
            [(0.0, "hello there", 2.01), (2.01, "the weather", 4.32)],
            0,
        ),
        ("[2.7]tone[3.5][3.7]noise[4.5]", [(2.7, "tone", 3.5), (3.7, "noise", 4.5)], 0),
        ("[0]a[1.0]b[2.]", [(0.0, "a", 1.0), (1.0, "b", 2.0)], 0),  # one time for an end and a start
        (" [0.5] a \n[1.0]\n[ 1.5 ]b[2.0] ", [(0.5, "a", 1.0), (1.5, "b", 2.0)], 0),
        ("[1.0]a[0.5]", [(1.0, "a", 0.5)], 0),
        ("<think>[9]x[9.5]</think>[1]a[2]", [(1.0, "a", 2.0)], 0),
        ("[1]a[2][3]b", [(1.0, "a", 2.0)], 2),  # cut off: a time and a text
        ("Sure! [1]a[2]", [(1.0, "a", 2.0)], 1),
        ("[1][2][3]a[4]", [(3.0, "a", 4.0)], 2),
        ("[1]a [laughs] b[2]", [(1.0, "a [laughs] b", 2.0)], 0),
        ("[1]a[2", [], 2),
        ("nothing", [], 1),
        ("", [], 0),
        ("[" + "9" * 400 + "]a[2]", [], 2),
    ],
)
def test_parse_timeline(text, found, malformed):
    assert parse_timeline(text) == (items(*found), malformed)


@given(st.text("[]0.1a </think>"))
def test_every_text_can_be_parsed(text):
    found, malformed = parse_timeline(text)
    assert malformed >= 0 and all(item.text.strip() for item in found)


labels = st.text("ab ", min_size=1).map(str.strip).filter(bool)
times = st.integers(0, 99999).map(lambda n: n / 100)


@given(st.lists(st.builds(TimedText, labels, times, times)))
def test_rendered_timelines_are_parsed_back(written):
    assert parse_timeline(timeline(written, decimals=2)) == (tuple(written), 0)


def aas(prediction, reference):
    return score_timestamps([items(*prediction)], [items(*reference)])


def test_aas_of_words():
    prediction = [(0.10, "Hello,", 0.50), (0.60, "world", 1.00)]
    reference = [(0.00, "hello", 0.50), (0.65, "world", 0.90)]
    score = aas(prediction, reference)
    assert score.aas_ms == pytest.approx((100 + 0 + 50 + 100) / 4)
    assert score == TimestampScore(score.aas_ms, matched_slots=4, missing_slots=0, surplus_slots=0)


def test_aas_reports_what_is_missing_and_surplus():
    prediction = [(0.0, "a", 1.0), (1.0, "x", 1.5), (5.1, "d", 6.0)]
    reference = [(0.0, "a", 1.0), (1.2, "b", 2.0), (3.0, "c", 4.0), (5.0, "d", 6.0)]
    score = aas(prediction, reference)  # of b and c, the wrong x is aligned with the nearer one
    assert score.aas_ms == pytest.approx((0 + 0 + 200 + 500 + 100 + 0) / 6)
    assert (score.matched_slots, score.missing_slots, score.surplus_slots) == (6, 2, 0)
    assert aas(prediction, []) == TimestampScore(None, 0, 0, 6)
    assert aas([], reference) == TimestampScore(None, 0, 8, 0)


def test_aas_aligns_equal_labels_by_their_times():
    """Of three tones the second is left out: whichever is dropped makes the edit no longer, but the times differ."""
    reference = [(1.0, "tone", 1.5), (3.0, "tone", 3.5), (6.0, "tone", 6.5)]
    score = aas([reference[0], reference[2]], reference)
    assert score == TimestampScore(0.0, matched_slots=4, missing_slots=2, surplus_slots=0)
    # A shorter edit is still preferred to nearer times.
    assert aas([(9.0, "hum", 9.5)], [(1.0, "hum", 1.5), (9.0, "tone", 9.5)]).aas_ms == pytest.approx(8000)


def test_aas_of_merged_and_split_sentences():
    two = [(0.0, "one two", 1.0), (1.5, "three four", 3.0)]
    merged = [(0.2, "one two three four", 3.4)]
    score = aas(merged, two)
    assert score.aas_ms == pytest.approx((200 + 400) / 2)
    assert (score.matched_slots, score.missing_slots, score.surplus_slots) == (2, 2, 0)
    split = aas(two, merged)
    assert (split.matched_slots, split.missing_slots, split.surplus_slots) == (2, 0, 2)


def test_aas_is_over_all_slots_of_the_corpus():
    clips = [items((0.0, "a", 1.0)), items((0.0, "b", 1.0), (2.0, "?!", 3.0))]
    shifted = [items((0.3, "a", 1.3)), items((0.0, "b", 1.0), (2.0, "?!", 3.0))]
    score = score_timestamps(shifted, clips)
    assert score == TimestampScore(score.aas_ms, 6, 0, 0)
    assert score.aas_ms == pytest.approx(100)


def test_text_without_its_times():
    assert split_words(without_times("[0.00]hello[ 2.01 ][3]there[ok]4[5")) == ["hello", "there", "ok", "4", "5"]


# Events


def test_event_f1():
    reference = items((1.0, "tone", 2.0), (3.0, "noise", 4.0), (5.0, "tone", 6.0))
    prediction = items((1.2, "Tone", 2.5), (3.21, "noise", 4.0), (5.0, "hum", 6.0), (4.9, "tone", 6.0))
    score = score_events([prediction], [reference])
    assert score.by_class == {
        "hum": EventCounts(0, 1, 0),
        "noise": EventCounts(0, 1, 1),
        "tone": EventCounts(2, 2, 2),
    }
    assert score.total == EventCounts(matched=2, predicted=4, reference=3)
    assert (score.total.precision, score.total.recall) == (2 / 4, 2 / 3)
    assert score.total.f1 == pytest.approx(4 / 7)
    assert score.onset_ms == pytest.approx(150)
    assert score.offset_ms == pytest.approx(250)


@pytest.mark.parametrize(("onset", "matched"), [(2.49, 0), (2.5, 1), (2.9, 1), (2.91, 0)])
def test_the_onset_tolerance_is_inclusive(onset, matched):
    assert score_events([items((onset, "a", 9.0))], [items((2.7, "a", 3.0))]).total.matched == matched


def test_an_event_is_matched_once():
    score = score_events([items((1.0, "a", 2.0), (1.1, "a", 2.0))], [items((1.05, "a", 2.0))])
    assert score.total == EventCounts(1, 2, 1)


def test_scenes_are_not_mixed_up():
    score = score_events([items((1.0, "a", 2.0)), ()], [(), items((1.0, "a", 2.0))])
    assert score.total == EventCounts(0, 1, 1)
    assert score_events([()], [()]).total.f1 is None
    assert score_events([()], [()]).onset_ms is None


onsets = st.lists(st.integers(0, 30).map(lambda n: n / 20), max_size=7)


@given(onsets, onsets)
def test_as_many_events_as_possible_are_matched(predicted, expected):
    score = score_events([items(*((t, "a", t) for t in predicted))], [items(*((t, "a", t) for t in expected))])
    allowed = np.abs(np.subtract.outer(np.array(predicted), np.array(expected))) <= 0.2 + 1e-6
    assert score.total.matched == allowed[linear_sum_assignment(~allowed)].sum()


# Seconds and labels


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2.7", 2.7),
        ("At [2.70] s.", 2.7),
        ("It lasts 2s", 2.0),
        ("3.", 3.0),
        ("2.7, that is 2.70 s", 2.7),
        ("<think>1.2? or 3?</think>4", 4.0),
        ("<answer>5</answer>, not 6", 5.0),
        ("2-3 s", None),
        ("1:05", None),
        ("1,000", None),
        ("1.2.3", None),
        ("track7", None),
        ("123456789", None),
        ("soon", None),
        ("<think>2.7", None),
    ],
)
def test_reading_seconds(text, seconds):
    assert read_seconds(text) == seconds


def test_errors_of_seconds():
    score = score_seconds(["2.7", "1 s", "never", "4.5"], [2.5, 1.0, 3.0, 4.0])
    assert score == SecondsScore(mean_error=pytest.approx(0.7 / 3), within=2, unreadable=1, total=4)
    assert score.share_within == 0.5
    assert score_seconds(["2.8"], [2.5], tolerance=0.3).within == 1
    assert score_seconds(["?"], [1.0]) == SecondsScore(mean_error=None, within=0, unreadable=1, total=1)
    assert score_seconds([], []).share_within is None


def test_matches_are_normalised():
    assert score_matches(["Tone, hum!", "tone", "first"], ["tone, hum", "hum", "First."]) == MatchScore(2, 3)
    assert score_matches(["a tone"], ["tone"]).accuracy == 0.0
    assert score_matches([], []).accuracy is None


# Multiple choice

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
