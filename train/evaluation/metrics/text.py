"""Text: final answers, normalization, edit distance, alignment; WER and CER.

NumPy only. A row of the edit-distance table is a few vector operations: 10,000 x 10,000 characters take a fraction of
a second.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_CLOSED_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def final_answer(text: str) -> str:
    """Returns the text after the last `</think>`, or in it the content of the last `<answer>` element, if any.

    Empty if a `<think>` is never closed.
    """
    _, closed, after = text.rpartition("</think>")
    answer = after if closed or "<think>" not in text else ""
    tagged = _CLOSED_TAG.findall(answer)
    return tagged[-1] if tagged else answer


_APOSTROPHE = re.compile(r"(?<=\w)['\u2019\u02bc](?=\w)")
_UNSPACED = re.compile(  # scripts without spaces: Han, kana, bopomofo
    "([\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


class _Punctuation(dict[int, str]):
    """Table for `str.translate`: punctuation, symbols, controls -> a space; invisible format characters -> nothing."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        self[code] = "" if category == "Cf" else " " if category[0] in "PSZC" else chr(code)
        return self[code]


_PUNCTUATION = _Punctuation()


def normalize_text(text: str) -> str:
    """Normalizes text, to compare words, characters and event labels.

    NFKC; lower case (Unicode case folding); an apostrophe inside a word is removed (don't = dont); all other
    punctuation and symbols become spaces (well-known = well known); runs of white space become one space. Numbers
    and abbreviations stay as written.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_APOSTROPHE.sub("", folded).translate(_PUNCTUATION).split())


def split_words(text: str) -> list[str]:
    """Splits into normalized words; each Han, kana or bopomofo character is a word ("mixed error rate")."""
    return _UNSPACED.sub(r" \1 ", normalize_text(text)).split()


def split_characters(text: str) -> list[str]:
    """Splits into normalized characters without white space."""
    return list(normalize_text(text).replace(" ", ""))


@dataclass(frozen=True)
class ErrorRate:
    """Edits (substitutions, deletions, insertions) and total length of all references, in words or characters."""

    edits: int
    length: int

    @property
    def rate(self) -> float | None:
        return self.edits / self.length if self.length else None


def word_error_rate(predictions: Iterable[str], references: Iterable[str]) -> ErrorRate:
    """Computes the WER of a test set, over `split_words`."""
    return _error_rate(map(split_words, predictions), map(split_words, references))


def character_error_rate(predictions: Iterable[str], references: Iterable[str]) -> ErrorRate:
    """Computes the CER of a test set, over `split_characters`."""
    return _error_rate(map(split_characters, predictions), map(split_characters, references))


def _error_rate(predictions: Iterable[Sequence[str]], references: Iterable[Sequence[str]]) -> ErrorRate:
    edits = length = 0
    for prediction, reference in zip(predictions, references, strict=True):
        edits += edit_distance(prediction, reference)
        length += len(reference)
    return ErrorRate(edits, length)


# Edit distance

Tokens = Sequence[str]


def edit_distance(left: Tokens, right: Tokens) -> int:
    """Computes the Levenshtein distance of two token sequences."""
    shorter, longer = sorted((left, right), key=len)
    last_row = deque(_edit_rows(shorter, longer), maxlen=1)[0]
    return int(last_row[-1])


def align(left: Tokens, right: Tokens, gaps: Callable[[int], np.ndarray] | None = None) -> list[tuple[int, int]]:
    """Aligns two token sequences: index pairs (i, j), in order, that a shortest edit keeps or substitutes.

    gaps: gaps(i) is float [len(right)], the distance (0 or more) of left token i to each right token. Among equally
        short edits the one with the smallest sum of gaps is taken; remaining ties pair tokens as late as possible.
    """
    if gaps is not None:
        most = max((gaps(i).max(initial=0.0) for i in range(len(left))), default=0.0)
        scale = 0.5 / (1.0 + most * min(len(left), len(right)))  # all gaps of an edit together cost less than one edit
        distances = [scale * gaps(i) for i in range(len(left))]
    else:
        distances = [np.zeros(len(right), np.int32)] * len(left)
    table = np.stack(list(_edit_rows(left, right, distances)))  # [len(left) + 1, len(right) + 1]
    # Trace back from the end; a diagonal step is preferred.
    i, j = len(left), len(right)
    pairs = []
    while i and j:
        paired = table[i - 1, j - 1] + (left[i - 1] != right[j - 1]) + distances[i - 1][j - 1]
        if paired <= min(table[i - 1, j], table[i, j - 1]) + 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif table[i - 1, j] <= table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _edit_rows(left: Tokens, right: Tokens, distances: Sequence[np.ndarray] | None = None) -> Iterator[np.ndarray]:
    """Yields rows i = 0..len(left) of the table D[i, j]: the edit distance of left[:i] and right[:j].

    distances: extra cost of pairing left token i with each right token, [len(right)] for each i.
    A row is one scan: a chain of insertions, D[i, j] = min over k <= j of (best[k] + j - k), is a running minimum of
    best[k] - k.
    """
    ids: dict[str, int] = {}
    left_ids, right_ids = (np.array([ids.setdefault(t, len(ids)) for t in side], np.int32) for side in (left, right))
    columns = np.arange(len(right) + 1, dtype=np.int32)
    row = columns
    yield row
    for i, token in enumerate(left_ids, start=1):
        paired = row[:-1] + (right_ids != token)
        if distances is not None:
            paired = paired + distances[i - 1]
        best = np.concatenate([np.full(1, i, paired.dtype), np.minimum(row[1:] + 1, paired)])
        row = np.minimum.accumulate(best - columns) + columns
        yield row
