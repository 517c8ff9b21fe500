"""The parser: from the text of an answer to segments and the pieces that have no time. It drops no text.

`read_stamps` reads the form that MOSS-Audio's authors ask for, in which a time ends one text and begins the next:

    [0.00]hello there[2.01][2.01]the weather[4.32]

The evaluation reads this form alone, with times in seconds. `read` takes more that models write: clock times, ranges,
lists with a time on each line, and JSON.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moss_audio_jax.timelines.segment import Segment


class Reading(NamedTuple):
    """Segments and pieces without a time that could be read, both in the order of the text."""

    segments: tuple[Segment, ...]
    unread: tuple[str, ...]


_SECONDS = r"[0-9]{1,7}(?:\.[0-9]{0,9})?"
_CLOCK = r"(?:[0-9]{1,3}:)?[0-9]{1,3}:[0-5][0-9](?:[.,][0-9]{1,9})?"
_UNIT = r"\s*(?:seconds?|secs?|s|秒)"
_TIME = rf"(?:{_CLOCK}|{_SECONDS}(?:{_UNIT})?)"
_TO = r"\s*(?:-|–|—|~|～|to|至)\s*"

SECONDS_STAMP = re.compile(rf"\[\s*({_SECONDS})\s*\]")
_STAMP = re.compile(rf"\[\s*({_TIME})\s*\]")

_BULLET = r"^[^\S\n]*(?:[-*•]\s+|[0-9]{1,3}[.)]\s+)?\*{0,2}"
_AFTER = r"(?:\s*[:：])?\*{0,2}(?:\s*(?:[:：]|[-–—](?=\s)))?"
_FROM_TO = rf"(?P<begin>{_TIME}){_TO}(?P<end>{_TIME})"
_LINE_STAMP = re.compile(rf"{_BULLET}\[\s*(?P<begin>{_TIME})\s*\]{_AFTER}", re.MULTILINE)
_RANGES = (
    re.compile(rf"(?:{_BULLET})?\[\s*{_FROM_TO}\s*\]{_AFTER}", re.MULTILINE),
    re.compile(rf"{_BULLET}[(（]\s*{_FROM_TO}\s*[)）]{_AFTER}", re.MULTILINE),
)
_RANGE_AT_END = re.compile(rf"[(（]\s*{_FROM_TO}\s*[)）]\.?$", re.MULTILINE)
_NO_NUMBER = r"(?!\w|:[0-9])"
# Without brackets only at the beginning of a line, and if it can't be another number: 0:05-0:10, 5-10 s, 5-10:
_BARE = (
    re.compile(
        rf"{_BULLET}(?P<begin>{_TIME}){_TO}(?P<end>(?:{_CLOCK}|{_SECONDS}{_UNIT}){_NO_NUMBER}|{_SECONDS}(?=\s*[:：]))"
        rf"{_AFTER}",
        re.MULTILINE,
    ),
    re.compile(
        rf"{_BULLET}(?P<begin>{_CLOCK}|{_SECONDS}{_UNIT}){_NO_NUMBER}\*{{0,2}}\s*(?:[:：]|[-–—](?=\s))\*{{0,2}}",
        re.MULTILINE,
    ),
)


def read(text: str) -> Reading:
    """Reads an answer in any of the forms."""
    return _read_json(text) or _read_list(text) or read_stamps(text, _STAMP)


def read_stamps(text: str, stamp: re.Pattern[str] = SECONDS_STAMP) -> Reading:
    """Reads `[0.00]hello there[2.01][2.01]the weather[4.32]` or `[2.7]tone[3.5]`.

    A text between two times is a segment; one time may end a segment and begin the next. Times may run backwards. A
    text after a last time that ends nothing, as in `[5.2]siren`, is a point. All other texts and times are unread.
    """
    times = list(stamp.finditer(text))
    borders = [0, *(border for time in times for border in time.span()), len(text)]
    texts = [text[begin:end].strip() for begin, end in zip(borders[::2], borders[1::2], strict=True)]
    used = {side for index in range(1, len(times)) if texts[index] for side in (index - 1, index)}
    segments, unread = [], []
    for index, content in enumerate(texts):  # it stands between the times `index - 1` and `index`
        if content and 0 < index < len(times):
            segments.append(Segment(seconds_of(times[index - 1][1]), seconds_of(times[index][1]), content))
        elif content and index > 0 and index - 1 not in used:
            segments.append(Segment(seconds_of(times[-1][1]), None, content))
            used.add(index - 1)
            unread.remove(times[-1][0])
        elif content:
            unread.append(content)
        if index < len(times) and index not in used:
            unread.append(times[index][0])
    return Reading(tuple(segments), tuple(unread))


def seconds_of(time: str) -> float:
    """Converts `2.01`, `2.01 s`, `1:02.5` or `1:00:02`, as the patterns of this module match them, to seconds."""
    *larger, seconds = re.sub(rf"{_UNIT}$", "", time.strip()).replace(",", ".").split(":")
    return float(seconds) + sum(int(part) * 60**power for power, part in enumerate(reversed(larger), start=1))


# Lists


def _read_list(text: str) -> Reading | None:
    """Reads texts that each have a mark of their own, a range or one time; None if there is no such list."""
    marks = _marks(text)
    if not marks:
        return None
    if all(_ends_line(text, mark) for mark in marks):
        return _read_line_ends(text, marks)
    borders = [0, *(border for mark in marks for border in mark.span()), len(text)]
    texts = [text[begin:end] for begin, end in zip(borders[::2], borders[1::2], strict=True)]
    segments, unread = [], [texts[0].strip()]
    for mark, content in zip(marks, texts[1:], strict=True):
        content, *rest = re.split(r"\n\s*\n", content.strip(), maxsplit=1)
        if content:
            segments.append(_segment(mark, content))
        else:
            unread.append(mark[0].strip())
        unread += [piece.strip() for piece in rest]
    return Reading(tuple(segments), tuple(piece for piece in unread if piece))


def _read_line_ends(text: str, marks: Sequence[re.Match[str]]) -> Reading:
    """Reads lines whose marks stand behind their texts, such as `a dog [0.0-3.1]`."""
    segments, unread, position = [], [], 0
    for mark in marks:
        line = text.rfind("\n", 0, mark.start()) + 1
        unread.append(text[position:line].strip())
        segments.append(_segment(mark, _without_colon(text[line : mark.start()])))
        position = mark.end()
    unread.append(text[position:].strip())
    return Reading(tuple(segments), tuple(piece for piece in unread if piece))


def _without_colon(line: str) -> str:
    """Strips a line, and a colon at its end. (A pattern for that takes quadratic time for a run of spaces.)"""
    stripped = line.strip()
    return stripped[:-1].rstrip() if stripped.endswith((":", "：")) else stripped


def _segment(mark: re.Match[str], text: str) -> Segment:
    end = mark.groupdict().get("end")
    return Segment(seconds_of(mark["begin"]), None if end is None else seconds_of(end), text)


def _marks(text: str) -> list[re.Match[str]]:
    """Returns the marks of a list in order. A single time in brackets is one only if all begin lines of their own."""
    stamps = list(_STAMP.finditer(text))
    at_lines = list(_LINE_STAMP.finditer(text))
    if stamps and not (len(stamps) == len(at_lines) and all(_text_on_line(text, mark.end()) for mark in at_lines)):
        return []
    patterns = _RANGES if stamps else _RANGES + _BARE
    marks = [*at_lines, *(mark for pattern in patterns for mark in pattern.finditer(text))]
    marks = marks or list(_RANGE_AT_END.finditer(text))
    marks.sort(key=lambda mark: (mark.start(), -mark.end()))
    kept: list[re.Match[str]] = []
    for mark in marks:
        if not kept or mark.start() >= kept[-1].end():
            kept.append(mark)
    return kept


def _text_on_line(text: str, begin: int) -> str:
    end = text.find("\n", begin)
    return text[begin : len(text) if end < 0 else end].strip()


def _ends_line(text: str, mark: re.Match[str]) -> bool:
    """True if a mark stands behind its text: `a dog [0.0-3.1]`."""
    line = text.rfind("\n", 0, mark.start()) + 1
    return bool(re.search(r"[^\s:：]", text[line : mark.start()])) and not _text_on_line(text, mark.end())


# JSON


class _Object(list[tuple[str, Any]]):
    """The pairs of an object of JSON: a key that is given twice drops nothing."""


_FENCE = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)
_BEGINS = ("begin", "start", "start_time")
_ENDS = ("end", "end_time")
_TEXTS = ("text", "caption", "label", "event", "sound", "sentence", "word", "content")


def _read_json(text: str) -> Reading | None:
    """Reads `[{"start": 0.0, "end": 3.1, "caption": "a dog"}, ...]`, alone or in a fence; None if it is none."""
    fence = _FENCE.search(text)
    body, around = (fence[1], [text[: fence.start()], text[fence.end() :]]) if fence else (text, [])
    try:
        entries = json.loads(body, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, list) or isinstance(entries, _Object):
        return None
    found = [_entry(entry) for entry in entries]
    segments = tuple(segment for segment, _ in found if segment is not None)
    unread = [around[0].strip()] if around else []
    unread += [json.dumps(_plain(rest), ensure_ascii=False) for _, rest in found if rest]
    unread += [around[1].strip()] if around else []
    return Reading(segments, tuple(piece for piece in unread if piece)) if segments else None


def _entry(entry: Any) -> tuple[Segment | None, Any]:
    """Returns the segment of an entry, and what of it is not in the segment."""
    if not isinstance(entry, _Object):
        return None, [entry]
    rest = _Object(entry)
    begin = next(_taken(rest, _BEGINS), None)
    end = next(_taken(rest, _ENDS), None)
    content = next((value for value in _taken(rest, _TEXTS, str)), None)
    if begin is None or content is None or not content.strip():
        return None, entry
    return Segment(begin, end, content.strip()), rest


def _taken(pairs: _Object, keys: Sequence[str], kind: type = float) -> Iterator[Any]:
    """Yields the values of these keys that are times or texts, and removes them from the pairs."""
    for pair in list(pairs):
        value = _seconds(pair[1]) if kind is float else pair[1]
        if pair[0] in keys and isinstance(value, kind):
            pairs.remove(pair)
            yield value


def _seconds(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(_TIME, value.strip()):
        return seconds_of(value)
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if is_time else None


def _plain(value: Any) -> Any:
    """Returns the objects in a value as dictionaries, or as pairs if a key is there twice."""
    if isinstance(value, _Object) and len(dict(value)) == len(value):
        return {key: _plain(part) for key, part in value}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
