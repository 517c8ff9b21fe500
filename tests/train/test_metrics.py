"""The measures against cases worked out by hand and against plain definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from train.data.manifest import TimedText
from train.data.objectives import timeline
from train.evaluation.metrics.events import EventCounts, score_events
from train.evaluation.metrics.text import (
    ErrorRate,
    align,
    character_error_rate,
    edit_distance,
    normalize_text,
    split_characters,
    split_words,
    word_error_rate,
)
from train.evaluation.metrics.timelines import TimestampScore, parse_timeline, score_timestamps, without_times
from train.evaluation.metrics.values import MatchScore, SecondsScore, read_seconds, score_matches, score_seconds

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
    """The second of three tones is left out: whichever is dropped makes the edit no longer, but the times differ."""
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


def test_matches_are_normalized():
    assert score_matches(["Tone, hum!", "tone", "first"], ["tone, hum", "hum", "First."]) == MatchScore(2, 3)
    assert score_matches(["a tone"], ["tone"]).accuracy == 0.0
    assert score_matches([], []).accuracy is None
