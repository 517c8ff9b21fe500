"""Joins the answers to windows of a recording that overlap: what both say is kept once, and nothing else is lost.

Segments of the overlap are paired in two steps:

1. The same text at the same time is one segment, from the earlier begin to the later end: the first window holds only
   the beginning of what its end cuts through, and the second only the rest.
2. What is left, and lies at the same time in both, are two versions of the same: a sentence that a window holds in
   part, a word that its end cut through. Their words are aligned, and the second version follows
   a word that both have. Without such a word, the version of the window whose edge is farther away is taken.

All other segments are kept. Texts without times are aligned word by word: the end of one with the beginning of the
next.
"""

import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moss_audio_jax.timelines.segment import Segment

SLACK = 0.3  # seconds that two windows may disagree about a time
_TOUCHING = 0.1  # seconds between a quiet cut and sound that continues across it
_WORD_SLACK = 2.0  # seconds between the same word in two sentences, whose words are spread evenly
_SHARED_WORDS = 0.34  # of the shorter version's words: at least these are in both
_WORDS_PER_SECOND = 6  # at most, to bound the alignment of texts without times


def join_segments(before: Sequence[Segment], after: Sequence[Segment], begin: float, end: float) -> list[Segment]:
    """Joins the segments of a recording so far with those of its next window, all on one clock, in order.

    begin, end: of the overlap; equal after a quiet place. There the segments stand one behind the other, and one that
    touches the place from both sides with the same text is one.
    """
    slack = SLACK if end > begin else _TOUCHING
    early, mine = _split(before, lambda segment: segment.span[1] > begin - slack)
    theirs, late = _split(after, lambda segment: segment.span[0] >= end + slack)
    pairs = _same(mine, theirs, begin, end, slack)
    kept = [_union(mine[i], theirs[j]) for i, j in pairs]
    lone = [segment for i, segment in enumerate(mine) if i not in {i for i, _ in pairs}]
    alone = [segment for j, segment in enumerate(theirs) if j not in {j for _, j in pairs}]
    for first, second in _versions(lone, alone, begin, end) if end > begin else [(lone, alone)]:
        kept += _joined(first, second, begin, end) if first and second and end > begin else first + second
    return [*early, *sorted(kept, key=lambda segment: segment.span), *late]


def join_texts(before: str, after: str, seconds: float) -> tuple[str, str]:
    """Cuts two texts without times: what the end of the first and the beginning of the second share is said once.

    seconds: of the overlap; 0 changes nothing.
    """
    most = math.ceil(seconds * _WORDS_PER_SECOND)
    left, right = _tokens(before), _tokens(after)
    offset = max(0, len(left) - most)
    pairs = _aligned(left[offset:], right[:most], lambda i, j: True)
    if not pairs:
        return before, after
    i, j = pairs[len(pairs) // 2]
    rest = right[j + 1 :]
    return before[: left[offset + i].end], after[rest[0].begin :] if rest else ""


def join_pieces(first: str, second: str) -> str:
    """Joins two texts with a space, unless Han or kana characters meet."""
    if not first or not second:
        return first or second
    together = _UNSPACED.fullmatch(first[-1]) and _UNSPACED.fullmatch(second[0])
    return f"{first}{'' if together else ' '}{second}"


def _split(segments: Iterable[Segment], later: Callable[[Segment], bool]) -> tuple[list[Segment], list[Segment]]:
    found: tuple[list[Segment], list[Segment]] = [], []
    for segment in segments:
        found[later(segment)].append(segment)
    return found


# The same text at the same time


def _same(
    mine: Sequence[Segment], theirs: Sequence[Segment], begin: float, end: float, slack: float
) -> list[tuple[int, int]]:
    """Pairs segments of equal texts: as many as possible, in order for each text, with the smallest differences."""
    places: defaultdict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, segments in enumerate((mine, theirs)):
        for index in sorted(range(len(segments)), key=lambda index, segments=segments: segments[index].span):
            places[_normal(segments[index].text)][side].append(index)
    pairs = []
    for left, right in places.values():
        sides = (mine, left), (theirs, right)
        inside = [[_clipped(segments[k], begin, end) for k in side] for segments, side in sides]

        def cost(i: int, j: int, inside=inside) -> float:
            (first, last), (other_first, other_last) = inside[0][i], inside[1][j]
            if max(first, other_first) - min(last, other_last) > slack:
                return math.inf
            return abs(first - other_first) + abs(last - other_last)

        pairs += [(left[i], right[j]) for i, j in _most_pairs(len(left), len(right), cost)]
    return pairs


def _clipped(segment: Segment, begin: float, end: float) -> tuple[float, float]:
    first, last = segment.span
    return min(max(first, begin), end), max(min(last, end), begin)


def _most_pairs(left: int, right: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Returns the most pairs (i, j), both rising, and of those the ones of the least cost."""
    best: list[list[tuple[int, float]]] = [[(0, 0.0)] * (right + 1) for _ in range(left + 1)]  # (-pairs, cost)
    for i, j in itertools.product(range(left), range(right)):
        price, (pairs, total) = cost(i, j), best[i][j]
        paired = [(pairs - 1, total + price)] if price < math.inf else []
        best[i + 1][j + 1] = min([best[i][j + 1], best[i + 1][j], *paired])
    found, i, j = [], left, right
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]


def _union(first: Segment, second: Segment, text: str | None = None) -> Segment:
    ends = [segment.end for segment in (first, second) if segment.end is not None]
    begin = min(first.span[0], second.span[0])
    return Segment(begin, max(ends) if ends else None, first.text if text is None else text)


# Two versions of the same


def _versions(
    lone: Sequence[Segment], alone: Sequence[Segment], begin: float, end: float
) -> list[tuple[list[Segment], list[Segment]]]:
    """Groups the segments of two windows that lie at the same time, directly or through others."""
    groups: list[tuple[list[Segment], list[Segment]]] = [([segment], []) for segment in lone]
    for segment in alone:
        touched = [group for group in groups if any(_at_once(mine, segment, begin, end) for mine in group[0])]
        groups = [group for group in groups if group not in touched]
        mine = [one for group in touched for one in group[0]]
        groups.append((mine, [*(one for group in touched for one in group[1]), segment]))
    return groups


def _at_once(mine: Segment, theirs: Segment, begin: float, end: float) -> bool:
    (first, last), (other_first, other_last) = _clipped(mine, begin, end), _clipped(theirs, begin, end)
    shared = min(last, other_last) - max(first, other_first)
    shorter = min(last - first, other_last - other_first)
    return shared >= 0.3 * shorter if shorter > 0 else shared > -SLACK


def _joined(first: list[Segment], second: list[Segment], begin: float, end: float) -> list[Segment]:
    """Joins two versions, each in order of time."""
    first, second = (sorted(side, key=lambda segment: segment.span) for side in (first, second))
    left = [word for word in _words(first) if word.time > begin - _WORD_SLACK]
    right = [word for word in _words(second) if word.time < end + _WORD_SLACK]
    pairs = _aligned(
        [word.token for word in left],
        [word.token for word in right],
        lambda i, j: abs(left[i].time - right[j].time) <= _WORD_SLACK,
    )
    if len(pairs) > _SHARED_WORDS * min(len(left), len(right)):
        i, j = pairs[len(pairs) // 2]
        mine, theirs = left[i], right[j]
        one, other = first[mine.segment], second[theirs.segment]
        following = other.text[theirs.token.end :]
        text = one.text[: mine.token.end] + (following if re.search(r"\w", following) else "")
        return [*first[: mine.segment], _union(one, other, text), *second[theirs.segment + 1 :]]
    sticks_out = any(segment.span[0] < begin - SLACK for segment in first)
    also = any(segment.span[1] > end + SLACK for segment in second)
    if sticks_out == also:
        middle = np.mean([sum(_clipped(segment, begin, end)) / 2 for segment in (*first, *second)])
        return first + second if also else first if middle < (begin + end) / 2 else second
    return first if sticks_out else second


# Words

_UNSPACED = re.compile(  # scripts without spaces: Han, kana, bopomofo
    "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WORD = re.compile(rf"{_UNSPACED.pattern}|(?:(?!{_UNSPACED.pattern})\S)+")


class _Token(NamedTuple):
    """A word or character, as it is compared, and its place in the text."""

    text: str
    begin: int
    end: int


class _TimedWord(NamedTuple):
    token: _Token
    time: float
    segment: int


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]", "", folded).split()) or folded.strip()


def _tokens(text: str) -> list[_Token]:
    """Splits a text into words; punctuation that stands alone is no word."""
    found = [_Token(_normal(word[0]), *word.span()) for word in _WORD.finditer(text)]
    return [token for token in found if re.search(r"\w", token.text)]


def _words(segments: Sequence[Segment]) -> list[_TimedWord]:
    """Returns the words of segments, spread evenly over their times."""
    words = []
    for index, segment in enumerate(segments):
        tokens, (first, last) = _tokens(segment.text), segment.span
        for number, token in enumerate(tokens):
            words.append(_TimedWord(token, first + (last - first) * (number + 0.5) / len(tokens), index))
    return words


# An error costs as much as a match gains: otherwise words of a small vocabulary, such as digits, align by chance.
_MATCH, _ERROR, _FRAGMENT = 2, -2, -1


def _aligned(
    left: Sequence[_Token], right: Sequence[_Token], may_pair: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    """Aligns the end of one text with the beginning of another; returns the pairs of equal words, in order.

    What stands before the shared part in `left` and after it in `right` is free. Everything else costs: a word that
    only one has, or two that differ. The last word of `left` and the first of `right`, which may be fragments, cost
    less.
    """
    if not left or not right:
        return []
    equal = np.array([[one.text == other.text for other in right] for one in left])
    for i, j in zip(*np.nonzero(equal), strict=True):
        equal[i, j] = may_pair(int(i), int(j))
    steps = np.where(equal, _MATCH, _ERROR)
    score = np.zeros((len(left) + 1, len(right) + 1), np.int64)
    score[0, 1:] = _FRAGMENT + _ERROR * np.arange(len(right))
    for i in range(1, len(left) + 1):
        for j in range(1, len(right) + 1):
            insertion = score[i, j - 1] + (_FRAGMENT if j == 1 else _ERROR)
            score[i, j] = max(score[i - 1, j - 1] + steps[i - 1, j - 1], score[i - 1, j] + _ERROR, insertion)
    i, j = len(left), int(np.argmax(score[-1]))
    if score[-2].max() + _FRAGMENT > score[i, j]:
        i, j = len(left) - 1, int(np.argmax(score[-2]))
    if score[i, j] <= 0:
        return []
    pairs = []
    while i and j:
        if score[i, j] == score[i - 1, j - 1] + steps[i - 1, j - 1]:
            i, j = i - 1, j - 1
            pairs += [(i, j)] * bool(equal[i, j])
        elif score[i, j] == score[i - 1, j] + _ERROR:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]
