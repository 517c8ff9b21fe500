"""Segments as text for people and for other programs.

Subtitles and labels are sorted by their begin. Subtitles need a duration: a segment without an end, or one that does
not end after its begin, is shown for `POINT_SECONDS`.
"""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence

from moss_audio_jax.timelines.segment import Segment

POINT_SECONDS = 1.0  # how long subtitles show a point in time


def to_lines(segments: Iterable[Segment]) -> str:
    """Returns a line a segment, `[0.00-2.01] hello`, or `[5.20] siren` for a point in time."""
    return "".join(
        f"[{stamp(segment.begin)}{'' if segment.end is None else f'-{stamp(segment.end)}'}] {one_line(segment.text)}\n"
        for segment in segments
    )


def to_csv(segments: Iterable[Segment]) -> str:
    """Returns comma-separated values (RFC 4180) with the header `begin,end,text`; a point has an empty end."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["begin", "end", "text"])
    writer.writerows(
        [stamp(segment.begin), "" if segment.end is None else stamp(segment.end), segment.text] for segment in segments
    )
    return file.getvalue()


def to_tsv(segments: Iterable[Segment]) -> str:
    """Returns tab-separated values with the header `begin end text`; tabs and line breaks of a text become spaces."""
    rows = ["begin\tend\ttext"]
    for segment in segments:
        end = "" if segment.end is None else stamp(segment.end)
        rows.append(f"{stamp(segment.begin)}\t{end}\t{one_line(segment.text)}")
    return "".join(f"{row}\n" for row in rows)


def to_srt(segments: Iterable[Segment]) -> str:
    """Returns SubRip subtitles. SubRip escapes nothing, so an arrow `-->` in a text becomes `→`."""
    cues = _cues(segments, ",", lambda segment: one_line(segment.text).replace("-->", "→"))
    return "\n".join(f"{number}\n{cue}" for number, cue in enumerate(cues, start=1))


def to_vtt(segments: Iterable[Segment]) -> str:
    """Returns WebVTT subtitles, in which a speaker `[S01]` is a voice `<v S01>`."""
    return "\n".join(["WEBVTT\n", *_cues(segments, ".", _voiced)])


def to_audacity(segments: Iterable[Segment]) -> str:
    """Returns a label track for Audacity: `begin end text`, separated by tabs. Points have equal times.

    A segment that ends before it begins is labelled from the earlier time to the later one.
    """
    return "".join(
        f"{segment.span[0]:.6f}\t{segment.span[1]:.6f}\t{one_line(segment.text)}\n" for segment in _sorted(segments)
    )


def stamp(seconds: float) -> str:
    """Writes seconds with two decimals, and up to six if they are needed."""
    text = f"{seconds:.6f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals:0<2}"


def one_line(text: str) -> str:
    """Replaces line breaks, tabs and other runs of white space and control characters by a space."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())


def _sorted(segments: Iterable[Segment]) -> Sequence[Segment]:
    return sorted(segments, key=lambda segment: segment.begin)


def _cues(segments: Iterable[Segment], point: str, text: Callable[[Segment], str]) -> list[str]:
    cues = []
    for segment in _sorted(segments):
        begin = _milliseconds(segment.begin)
        end = begin if segment.end is None else _milliseconds(segment.end)
        if end <= begin:
            end = begin + _milliseconds(POINT_SECONDS)
        cues.append(f"{_clock(begin, point)} --> {_clock(end, point)}\n{text(segment)}\n")
    return cues


def _voiced(segment: Segment) -> str:
    voice = f"<v {segment.speaker}>" if segment.speaker else ""
    return voice + html.escape(one_line(segment.spoken), quote=False)


def _milliseconds(seconds: float) -> int:
    return round(1000 * max(seconds, 0.0))


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"
