"""Finds the streams of mp3, FLAC and Ogg files that were joined one behind the other, as spans of bytes.

libsndfile stops at the end of the first stream, so the file is scanned for the beginnings of the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from moss_audio_jax.sound.files import OpenedFile, Span
from moss_audio_jax.storage.paths import open_binary

_SCAN_BLOCK = 1 << 20  # bytes


def spans_of(file: OpenedFile, format_: str) -> tuple[Span, ...]:
    if file.identity is None:
        return tuple(SCANNERS[format_](file))
    return _spans_of_path(*file.identity, format_)


@lru_cache(maxsize=4096)  # clips may be many cuts of one file
def _spans_of_path(path: str, size: int, modified: int, format_: str) -> tuple[Span, ...]:
    with open_binary(path) as file:
        return tuple(SCANNERS[format_](OpenedFile(file, None)))


def _flac_spans(file: OpenedFile) -> Iterator[Span]:
    yield from _between([at for at in _find(file, b"fLaC") if file.at(at + 4, 4)[-3:] == b"\0\0\x22"], file.size)


_OGG_PAGE = 27 + 255 + 255 * 255  # bytes, at most
_OGG_LAST = 4  # the flag of a stream's last page


def ends_with_last_page(file: OpenedFile, span: Span) -> bool:
    """Returns True if an Ogg stream is complete: its last page has the flag of a last page."""
    begin = max(span.begin, span.end - _OGG_PAGE)
    tail = file.at(begin, span.end - begin)
    page = tail.rfind(b"OggS\0")
    return page >= 0 and bool(tail[page + 5] & _OGG_LAST)


def _ogg_spans(file: OpenedFile) -> Iterator[Span]:
    """Yields the links of a chain. Each begins with the first page of a stream, or of several that are multiplexed."""
    begins, next_page = [], -1
    for page in _find(file, b"OggS\0\2"):
        if page != next_page:
            begins.append(page)
        segments = file.at(page + 26, 1)
        next_page = page + 27 + sum(segments) + sum(file.at(page + 27, sum(segments)))
    yield from _between(begins, file.size)


def _between(begins: list[int], size: int) -> Iterator[Span]:
    for begin, end in zip([0, *begins[1:]], [*begins[1:], size], strict=True):
        yield Span(begin, end)


def _find(file: OpenedFile, marker: bytes) -> Iterator[int]:
    """Yields every place of a marker, in order."""
    place, tail = 0, b""
    while block := file.at(place, _SCAN_BLOCK):
        text, begin = tail + block, place - len(tail)
        at = text.find(marker)
        while at >= 0:
            yield begin + at
            at = text.find(marker, at + 1)
        place += len(block)
        tail = text[len(text) - len(marker) + 1 :]


# mp3: frames, each with a header of four bytes. The first frame may be a tag with their number.

_MP3_HEAD = 56  # bytes of a frame that are read
_MP3_KBPS = {  # index: four bits of the header
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG-1
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2, MPEG-2.5
}
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclass(frozen=True)
class _Frame:
    """A frame of layer III. tag: (frames, bytes) of the stream, in its first frame; (0, 0) if it does not say."""

    bytes: int
    samples: int
    rate: int
    tag: tuple[int, int] | None


def _mp3_spans(file: OpenedFile) -> Iterator[Span]:
    """Yields the streams: each begins with a tag, at the first frame, or at the first frame after other bytes."""
    spans: list[Span] = []
    place = _next_frame(file, 0)
    while place is not None:
        frame = _frame(file.at(place, _MP3_HEAD))
        assert frame is not None
        frames, length = frame.tag or (0, 0)
        end, samples = (min(place + length, file.size), None) if frames and length else _run(file, place)
        samples = None if frames else samples
        spans.append(Span(place, end, samples))
        place = _next_frame(file, end)
    if len(spans) <= 1:  # one stream, with the tags around it
        spans = [Span(0, file.size, spans[0].samples if spans else None)]
    yield from spans


def _run(file: OpenedFile, place: int) -> tuple[int, int]:
    """Returns the end of a run of frames, and their number of samples."""
    samples = 0
    frame = _frame(file.at(place, _MP3_HEAD))
    while frame is not None and place + frame.bytes <= file.size:
        place, samples, rate = place + frame.bytes, samples + frame.samples, frame.rate
        frame = _frame(file.at(place, _MP3_HEAD))
        if frame is not None and (frame.rate != rate or frame.tag is not None):
            break
    return place, samples


def _next_frame(file: OpenedFile, place: int) -> int | None:
    """Returns the place of the next frame that others follow, so that no chance match counts; None if there is none."""
    while (head := file.at(place, 10))[:3] == b"ID3" and len(head) == 10:
        size = 0
        for seven_bits in head[6:]:
            size = size << 7 | seven_bits & 127
        place += 10 + size
    while block := file.at(place, _SCAN_BLOCK):
        at = block.find(b"\xff")
        while at >= 0:
            if _frames_follow(file, place + at):
                return place + at
            at = block.find(b"\xff", at + 1)
        place += len(block)
    return None


def _frames_follow(file: OpenedFile, place: int, count: int = 3) -> bool:
    first = frame = _frame(file.at(place, _MP3_HEAD))
    while frame is not None and first is not None and frame.rate == first.rate and count > 1:
        place, count = place + frame.bytes, count - 1
        frame = _frame(file.at(place, _MP3_HEAD))
    return frame is not None


def _frame(head: bytes) -> _Frame | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version not in _MP3_RATES or bitrate in (0, 15) or rate == 3:
        return None
    mpeg_1, hertz = version == 3, _MP3_RATES[version][rate]
    samples = 1152 if mpeg_1 else 576
    length = samples // 8 * _MP3_KBPS[mpeg_1][bitrate] * 1000 // hertz + (head[2] >> 1 & 1)
    return _Frame(length, samples, hertz, _tag(head, mpeg_1))


def _tag(head: bytes, mpeg_1: bool) -> tuple[int, int] | None:
    mono = head[3] >> 6 == 3
    at = 4 + {(True, True): 17, (True, False): 32, (False, True): 9, (False, False): 17}[mpeg_1, mono]
    if head[at : at + 4] not in (b"Xing", b"Info") or any(head[4:at]):
        return (0, 0) if head[36:40] == b"VBRI" else None
    flags = head[at + 7] if len(head) > at + 7 else 0
    if flags & 3 != 3:
        return 0, 0
    return int.from_bytes(head[at + 8 : at + 12]), int.from_bytes(head[at + 12 : at + 16])


SCANNERS: dict[str, Callable[[OpenedFile], Iterator[Span]]] = {
    "MP3": _mp3_spans,
    "FLAC": _flac_spans,
    "OGG": _ogg_spans,
}
