"""Cuts of a long text. Its ids are its bytes here."""

import pytest

from train.data.budget import split_text


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("abcdefghijklmno\npq. rs tu", "abcdefghijklmno\n"),  # the only line, before a sentence and a word
        ("abcdefghijklmno.pq. rs tu", "abcdefghijklmno.pq. "),  # a sentence, before a word; a point alone is none
        ("abcdefghijklm op qrstuvwxyz", "abcdefghijklm op "),  # a word
        ("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrst"),
        ("ab\ncd. efghijklmnopqrstuvwxyz", "ab\ncd. efghijklmnopq"),  # borders long before are no matter
        ("abcdefghijklm東。京京京", "abcdefghijklm東。"),
        ("abcdefghijklmnopqr😀😀😀", "abcdefghijklmnopqr"),
    ],
)
def test_the_best_border_near_the_end_is_taken(text: str, first: str):
    ids = list(text.encode())
    pieces = split_text(ids, 20, bytes)
    assert bytes(ids[pieces[0]]).decode() == first
    assert pieces[1].start == pieces[0].stop - 1 and pieces[-1].stop == len(ids)


def test_a_text_within_the_limit_is_whole():
    assert split_text([1, 2, 3], 3, bytes) == [slice(0, 3)]
    assert split_text([1, 2, 3], 2, bytes) == [slice(0, 2), slice(1, 3)]
