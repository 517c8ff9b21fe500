"""Timelines: an answer's segments, the rest of its text, and which of its times can't be right."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.timelines import formats
from moss_audio_jax.timelines.reading import Reading, read
from moss_audio_jax.timelines.segment import Segment

PAST_END = 0.1  # seconds that a time may lie past the end: models round, and one of their audio tokens is 0.08 s
_THOUGHT_BEGIN, _THOUGHT_END = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Segments of a recording.

    segments: in the order of the text.
    unread: pieces of the text that hold no time that could be read, a Thinking model's thought among them. Every text
        is in a segment or here.
    problems: a sentence for each time that can't be right: it runs backwards, or lies past the end.
    seconds: length of the recording; None if it is not known.
    """

    segments: tuple[Segment, ...]
    unread: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str, seconds: float | None = None) -> Self:
        """Reads an answer.

        text: times around texts (`[0.00]hello[2.01]`), a time or a range for each text (`[0:05-0:09] a siren`), or a
            list of JSON. Times are seconds, m:ss or h:mm:ss; docs/timelines.md has all forms.
        seconds: length of the recording, to find times past its end.
        """
        thought, closed, answer = text.rpartition(_THOUGHT_END)
        if not closed and _THOUGHT_BEGIN in text:  # cut off before there was an answer
            thought, answer = text, ""
        reading = read(answer) if answer.strip() else Reading((), ())
        before = (thought + closed).strip()
        return cls(
            reading.segments,
            ((before,) if before else ()) + reading.unread,
            tuple(_problems(reading.segments, seconds)),
            seconds,
        )

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Makes a timeline of the object that `to_json` returns; raises MossAudioError for another."""
        try:
            segments = tuple(_segment(entry) for entry in value["segments"])
            unread, problems = (tuple(map(str, value.get(name, ()))) for name in ("unread", "problems"))
            seconds = _optional(value.get("seconds"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MossAudioError(
                f"a timeline in JSON must be as Timeline.to_json writes it, not {shown(value)}: correct it"
            ) from error
        return cls(segments, unread, problems, seconds)

    def shifted(self, by: float) -> Self:
        """Returns the timeline on a clock that shows `by` seconds where this one shows 0."""
        segments = tuple(
            Segment(segment.begin + by, None if segment.end is None else segment.end + by, segment.text)
            for segment in self.segments
        )
        seconds = None if self.seconds is None else self.seconds + by
        before = set(_problems(self.segments, self.seconds))
        others = (problem for problem in self.problems if problem not in before)
        return dataclasses.replace(
            self, segments=segments, seconds=seconds, problems=(*_problems(segments, seconds), *others)
        )

    def to_json(self) -> dict[str, Any]:
        """Returns an object for `json.dumps`; docs/timelines.md has its schema."""
        return {
            "seconds": _rounded(self.seconds),
            "segments": [
                {
                    "begin": _rounded(segment.begin),
                    "end": _rounded(segment.end),
                    "text": segment.text,
                    "speaker": segment.speaker,
                }
                for segment in self.segments
            ],
            "unread": list(self.unread),
            "problems": list(self.problems),
        }

    def to_txt(self) -> str:
        """Returns a line a segment, `[0.00-2.01] hello`, or `[5.20] siren` for a point.

        What was not read comes behind them, but a thought comes first.
        """
        thoughts = [piece for piece in self.unread if piece.endswith(_THOUGHT_END)]
        others = [piece for piece in self.unread if piece not in thoughts]
        lines = formats.to_lines(self.segments)
        return "\n\n".join([*thoughts, *[lines.rstrip("\n")] * bool(lines), *others, ""]).removesuffix("\n")

    def to_csv(self) -> str:
        return formats.to_csv(self.segments)

    def to_tsv(self) -> str:
        return formats.to_tsv(self.segments)

    def to_srt(self) -> str:
        return formats.to_srt(self.segments)

    def to_vtt(self) -> str:
        return formats.to_vtt(self.segments)

    def to_audacity(self) -> str:
        return formats.to_audacity(self.segments)


def joined(*timelines: Timeline) -> Timeline:
    """Joins timelines on one clock, in the given order: the parts of a recording, each `shifted` to its begin."""
    lengths = [timeline.seconds for timeline in timelines if timeline.seconds is not None]
    return Timeline(
        tuple(itertools.chain.from_iterable(timeline.segments for timeline in timelines)),
        tuple(itertools.chain.from_iterable(timeline.unread for timeline in timelines)),
        tuple(itertools.chain.from_iterable(timeline.problems for timeline in timelines)),
        max(lengths, default=None),
    )


def _problems(segments: Sequence[Segment], seconds: float | None) -> Iterator[str]:
    for number, segment in enumerate(segments, start=1):
        text = formats.one_line(segment.text)
        name = f"segment {number} ({text if len(text) <= 40 else f'{text[:37]}...'})"
        first, last = segment.span
        if segment.is_backwards:
            yield f"{name} ends before it begins: {formats.stamp(last)} s to {formats.stamp(first)} s"
        if number > 1 and segment.begin < segments[number - 2].begin:
            before = formats.stamp(segments[number - 2].begin)
            yield f"{name} begins at {formats.stamp(segment.begin)} s, before the segment ahead of it, at {before} s"
        if seconds is not None and last > seconds + PAST_END:
            yield f"{name} has the time {formats.stamp(last)} s, past the end at {formats.stamp(seconds)} s"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(float(seconds), 6)


def _segment(entry: Mapping[str, Any]) -> Segment:
    text = entry["text"]
    if not isinstance(text, str):
        raise TypeError("a text")
    begin = _optional(entry["begin"])
    if begin is None:
        raise ValueError("a begin")
    return Segment(begin, _optional(entry.get("end")), text)


def _optional(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("seconds")
    return float(value)
