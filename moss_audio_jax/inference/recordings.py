"""Recordings of any length: decoded in a stream, cut into windows, answered as they come, joined on one clock.

    with moss.Engine(model, processor, slots=8, max_length=8192) as engine:
        def ask(window):
            return engine.submit(moss.Request("Transcribe the audio.", [window.wave]))
        transcript = transcribe_recording("meeting.flac", ask)
    print(transcript.text, transcript.timeline.to_srt())

Memory: two windows of samples (19 MB each for 300 s) while the file is decoded, and `in_flight` windows that wait for
their answers, each with its samples and its padded prompt (16 to 25 MB). A longer recording adds no more than its text.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from moss_audio_jax.audio_stream import stream_audio
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.seams import join_pieces, join_segments, join_texts
from moss_audio_jax.inference.windows import Cutting, Place, Window, cut
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.timelines.segment import Segment
from moss_audio_jax.timelines.timeline import Timeline

Key = TypeVar("Key")

_GLANCE = 0.2  # seconds between two looks at whether to stop
_THOUGHT_END = "</think>"


class Replied(Protocol):
    """What an engine replies."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...


class Answering(Protocol):
    """An answer that is coming, such as `engine.Handle` or a `concurrent.futures.Future` of a reply."""

    def result(self, timeout: float | None = None) -> Replied: ...


Ask = Callable[[Window], Answering]


@dataclass(frozen=True)
class WindowAnswer:
    """The answer to one window, as the model gave it, with times on the window's own clock."""

    place: Place
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Transcript:
    """The answers to a recording, joined.

    text: without times and thoughts. timeline: on the recording's clock; of answers without times, a segment a window.
    timed: whether the answers had times.
    """

    seconds: float
    text: str
    timeline: Timeline
    timed: bool
    windows: tuple[WindowAnswer, ...]


def transcribe_recording(
    source: AnyPath | bytes, ask: Ask, *, cutting: Cutting | None = None, in_flight: int = 8, name: str | None = None
) -> Transcript:
    """Answers a recording window by window, and joins the answers.

    ask: begins the answer to a window; it is called for each, in order, with at most `in_flight` waiting for results.
    Raises MossAudioError if the recording can't be read, and what `ask` and its results raise.
    """
    joiner = Joiner()
    windows = (("", window) for window in cut(stream_audio(source, name=name), cutting or Cutting()))
    for _, place, reply in answered(windows, ask, in_flight):
        if isinstance(reply, MossAudioError):
            raise reply
        joiner.add(place, reply)
    return joiner.transcript()


def answered(
    windows: Iterable[tuple[Key, Window]], ask: Ask, in_flight: int, glance: Callable[[], None] = lambda: None
) -> Iterator[tuple[Key, Place, Replied | MossAudioError]]:
    """Yields (key, place, reply) of windows, in their order, with at most `in_flight` waiting for their replies.

    glance: called several times a second while this waits; what it raises ends the iteration.
    A MossAudioError of one window is yielded in place of its reply.
    """
    waiting: deque[tuple[Key, Place, Answering | MossAudioError]] = deque()

    def first() -> tuple[Key, Place, Replied | MossAudioError]:
        key, place, answer = waiting.popleft()
        return key, place, _result(answer, glance)  # which is freed before the next window is read

    for key, window in windows:
        glance()
        waiting.append((key, window.place, _begun(ask, window)))
        del window  # its samples
        while len(waiting) >= in_flight:
            yield first()
    while waiting:
        yield first()


def _begun(ask: Ask, window: Window) -> Answering | MossAudioError:
    try:
        return ask(window)
    except MossAudioError as error:
        return error


def _result(answer: Answering | MossAudioError, glance: Callable[[], None]) -> Replied | MossAudioError:
    while not isinstance(answer, MossAudioError):
        glance()
        try:
            return answer.result(_GLANCE)
        except MossAudioError as error:
            return error
        except TimeoutError:
            continue
    return answer


class Joiner:
    """Joins the answers to the windows of one recording, which come in their order."""

    def __init__(self) -> None:
        self._windows: list[WindowAnswer] = []
        self._segments: list[Segment] = []  # with times of the answers
        self._texts: list[str] = []  # of each window, without thoughts, and what is said twice said once
        self._unread: list[str] = []
        self._problems: list[str] = []

    def add(self, place: Place, reply: Replied) -> None:
        self._windows.append(WindowAnswer(place, reply.text, reply.finish_reason))
        timeline = Timeline.parse(reply.text, place.end - place.begin).shifted(place.begin)
        self._segments = join_segments(self._segments, timeline.segments, place.begin, place.begin + place.overlap)
        self._unread += timeline.unread
        where = f"window {len(self._windows)}, which begins at {place.begin:.2f} s: " if place.begin else ""
        self._problems += [where + problem for problem in timeline.problems]
        text = reply.text.rpartition(_THOUGHT_END)[2].strip()
        if place.overlap and self._texts:
            self._texts[-1], text = join_texts(self._texts[-1], text, place.overlap)
        self._texts.append(text)

    @property
    def settled(self) -> str:
        """The text so far, as far as no further window changes it; nothing if the answers have times."""
        text = ""
        for piece in [] if self._segments else self._texts[:-1]:
            text = join_pieces(text, piece)
        return text

    def transcript(self) -> Transcript:
        seconds = self._windows[-1].place.end
        segments, pieces, unread = tuple(self._segments), self._texts, tuple(self._unread)
        if segments:
            unread_texts = [piece for piece in unread if not piece.endswith(_THOUGHT_END)]
            pieces = [*(segment.text for segment in segments), *unread_texts]
        else:
            segments = tuple(self._window_segments())
            unread = tuple(piece for piece in unread if piece.endswith(_THOUGHT_END))
        text = ""
        for piece in pieces:
            text = join_pieces(text, piece)
        timeline = Timeline(segments, unread, tuple(self._problems), seconds)
        return Transcript(seconds, text, timeline, bool(self._segments), tuple(self._windows))

    def _window_segments(self) -> Iterator[Segment]:
        places = [window.place for window in self._windows]
        begins = [place.begin + place.overlap / 2 for place in places]
        for begin, end, text in zip(begins, [*begins[1:], places[-1].end], self._texts, strict=True):
            if text:
                yield Segment(begin, end, text)
