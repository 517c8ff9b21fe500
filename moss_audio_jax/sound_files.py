"""Sound files as mono waves: all that a file holds, and a warning about what is missing.

libsndfile decodes, through soundfile. It stops where the first header of a file says, so what it would leave out is
found here: files joined one behind the other (mp3, FLAC, chained Ogg), mp3 without the number of its frames, recordings
whose header was never finished.
"""

import errno
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, is_remote, open_binary, reason
from moss_audio_jax.storage.retries import retried

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Source = AnyPath | bytes

LOWEST_RATE, HIGHEST_RATE = 100, 384_000  # Hz; the resampler's work and its result grow with the ratio of two rates
LONGEST_HOURS = 10  # decoded at once: 2.3 GB at 16 kHz

_DECODE_BLOCK = 1 << 18  # samples decoded at a time, so that a long file is never held in all its channels
_RESCUE_BLOCK = 1 << 11  # samples decoded at a time up to a place that can't be decoded
_SCAN_BLOCK = 1 << 20  # bytes
_UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's SF_COUNT_MAX
_LARGEST_PIPE = 1 << 32  # bytes
_MP3_RUN_UP = 32 * 1152  # samples decoded before a cut: an mp3 frame takes bits from frames before it
_SILENT_MIX = 0.01  # of the channels' peak: 40 dB below it


@dataclass(frozen=True)
class Piece:
    """Samples of a file that follow each other at one rate. wave: float32 [samples], the mean of the channels."""

    wave: np.ndarray
    rate: int


def read(source: Source, start: float | None, end: float | None, name: str) -> list[Piece]:
    """Decodes what lies between two times in seconds (None: the file's own), in pieces where its rate changes.

    What is missing of it, because the file was cut short or is damaged, is named in the log. Raises MossAudioError if
    the file can't be read or decoded, or the cut holds no sample or one that is not finite.
    """

    def work(file: "_File") -> list[Piece]:
        cuts = _cuts(file, start, end, name)
        hours = sum((cut.last - cut.first) / cut.stream.samplerate for cut in cuts) / 3600
        if hours > LONGEST_HOURS:
            raise MossAudioError(
                f"{name}: a clip must be at most {LONGEST_HOURS} hours long, not {hours:.1f}: cut it by start and end, "
                "or split the file"
            )
        mix = _Mix()
        waves = [_read_cut(cut, mix, name) for cut in cuts]
        if not sum(map(len, waves)):
            raise MossAudioError(
                f"{name}: expected samples between start={start} and end={end}, found none; "
                f"widen the cut, or restore the file if it was cut short."
            )
        if file.error is None:
            _warn_of_loss(name, cuts, [len(wave) for wave in waves])
        mix.warn_if_silent(name)
        return _merged([Piece(wave, cut.stream.samplerate) for cut, wave in zip(cuts, waves, strict=True)])

    return _of_file(source, name, work)


def lengths(source: Source, start: float | None, end: float | None, name: str) -> list[tuple[int, int]]:
    """The samples and rates of what `read` gives, as the headers promise: nothing is decoded if they say it."""

    def work(file: "_File") -> list[tuple[int, int]]:
        cuts = _cuts(file, start, end, name)
        _warn_of_loss(name, cuts, [cut.last - cut.first for cut in cuts])
        found: list[tuple[int, int]] = []
        for cut in cuts:
            samples, rate = cut.last - cut.first, cut.stream.samplerate
            if found and found[-1][1] == rate:
                samples += found.pop()[0]
            found.append((samples, rate))
        return found

    return _of_file(source, name, work)


def require_rate(rate: Any, name: str) -> int:
    """The rate itself, in Hz; raises MossAudioError if it is no whole number or beyond what sounds have."""
    number = isinstance(rate, int | float | np.integer | np.floating)
    if not (number and LOWEST_RATE <= rate <= HIGHEST_RATE and rate == int(rate)):
        raise MossAudioError(
            f"{name}: the sample rate must be a whole number from {LOWEST_RATE:,} to {HIGHEST_RATE:,} Hz, not {rate}: "
            "correct it, or resample the file, for example with `ffmpeg -i INPUT -ar 16000 OUTPUT.wav`"
        )
    return int(rate)


@lru_cache(maxsize=4096)  # once a process: training reads a file in every epoch
def _warn(message: str) -> None:
    log.warning("%s", message)


# Files


@dataclass(frozen=True)
class _Span:
    """Bytes of a file that libsndfile reads as a file of their own.

    samples: how many there are if no header says it, as in an mp3 that was written through a pipe.
    patch: a place and the bytes that belong there, of a header that was never finished.
    """

    begin: int
    end: int
    samples: int | None = None
    patch: tuple[int, bytes] | None = None


class _File:
    """An open file; an error of reading it within libsndfile, which takes it for the file's end, is kept in `error`."""

    def __init__(self, file: BinaryIO, identity: tuple[str, int, int] | None):
        self.bytes = file
        self.size = file.seek(0, io.SEEK_END)
        self.identity = identity
        self.error: OSError | None = None

    def at(self, place: int, count: int) -> bytes:
        self.bytes.seek(place)
        return self.bytes.read(count)

    def readinto(self, place: int, buffer: Any) -> int:
        try:
            self.bytes.seek(place)
            return cast(io.BufferedIOBase, self.bytes).readinto(buffer)
        except OSError as error:
            self.error = self.error or error
            return 0


class _Window:
    """A span for libsndfile. It has no name, since soundfile refuses some extensions (.raw) without looking inside."""

    _ENDLESS = 1 << 40  # bytes: mpg123 takes the length from the file's size if no header says it, and stops there

    def __init__(self, file: _File, span: _Span):
        self._file, self._span, self._place = file, span, 0
        self._length = span.end - span.begin

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            # Only who asks for the size goes to the very end; tags before it are looked for where they are.
            size = self._ENDLESS if offset == 0 and self._span.samples is not None else self._length
            self._place = size + offset
        else:
            self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._length - self._place))
        place = self._span.begin + self._place
        count = self._file.readinto(place, memoryview(buffer)[:count])
        self._place += count
        if self._span.patch is not None:
            begin, content = self._span.patch
            for index in range(max(begin, place), min(begin + len(content), place + count)):
                memoryview(buffer).cast("B")[index - place] = content[index - begin]
        return count


class _Stream(soundfile.SoundFile):
    """A span as libsndfile decodes it.

    It denies that it can seek, since soundfile seeks after every read where it can: to the place where the file is, but
    mp3 decodes wrongly after a seek, and FLAC not at all beside damage.
    """

    def __init__(self, file: _File, span: _Span):
        super().__init__(cast(BinaryIO, _Window(file, span)))
        self.source = file, span
        self.samples: int = self.frames if span.samples is None else span.samples

    def seekable(self) -> bool:
        return False

    def at(self, first: int) -> "_Stream":
        """The same from a sample on; where the format can't seek, and for mp3's sake, what is before it is decoded."""
        stream = _Stream(*self.source)
        run_up = first if not super().seekable() else min(first, _MP3_RUN_UP) if self.format == "MP3" else 0
        if first > run_up:
            soundfile.SoundFile.seek(stream, first - run_up)
        while run_up > 0:
            run_up -= len(stream.read(min(run_up, _DECODE_BLOCK), dtype="float32")) or run_up
        return stream

    def promised(self) -> int:
        """Samples that the header says, of which the file may hold fewer."""
        cut = _SHORTER.search(self.extra_info) if self.format in ("WAV", "WAVEX", "AIFF", "AU") else None
        said, held = (int(cut[1]), int(cut[2])) if cut else (0, 0)
        return round(self.samples * said / held) if 0 < held < said < _NEVER_FINISHED else self.samples


# What libsndfile notes of the size of the samples, in bytes.
_SHORTER = re.compile(r"(?:^| )(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_NEVER_FINISHED = 0x7FFF0000  # bytes: who writes through a pipe leaves about as many as the field can say


def _of_file(source: Source, name: str, work: Callable[[_File], Result]) -> Result:
    """What `work` finds in the file, opened; what goes wrong with it is a MossAudioError that begins with `name`."""

    def attempt() -> Result:
        with io.BytesIO(source) if isinstance(source, bytes) else open_binary(source) as opened:
            file = _file(opened, source, name)
            try:
                return work(file)
            except soundfile.LibsndfileError as error:
                raise file.error or _no_sound(file, name, error) from error
            finally:
                if file.error is not None:
                    raise file.error

    if not isinstance(source, bytes) and "\0" in os.fspath(source):
        raise MossAudioError(f"{name!r} must be a path, not text with a null character: give an audio file as bytes")
    try:
        return retried(name, attempt)
    except OSError as error:
        raise MossAudioError(_cannot_open(name, error)) from error


def _file(opened: BinaryIO, source: Source, name: str) -> _File:
    if not opened.seekable():  # a pipe
        content = opened.read(_LARGEST_PIPE + 1)
        if len(content) > _LARGEST_PIPE:
            raise MossAudioError(f"{name}: a pipe must hold at most {_LARGEST_PIPE >> 30} GiB: save it as a file")
        opened, source = io.BytesIO(content), content
    if isinstance(source, bytes) or is_remote(source):
        identity = None
    else:
        status = os.fstat(opened.fileno())
        identity = os.fspath(source), status.st_size, status.st_mtime_ns
    file = _File(opened, identity)
    if not file.size:
        raise MossAudioError(f"{name}: expected audio, found 0 bytes; restore it or leave it out.")
    return file


def _cannot_open(name: str, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{name} must be an audio file, not a directory: name the files in it"
    if isinstance(error, PermissionError):
        return f"{name} must be a file that you may read ({reason(error)}): change its permissions, `chmod u+r`"
    if error.errno == errno.ENAMETOOLONG:
        return f"{name[:60]}... must be the path of an audio file, not {len(name)} characters: give a path"
    return f"{name}: expected a readable audio file, found '{reason(error)}'; check the path."


# What is found under the name of a sound: its first bytes, what it is, what helps.
_CONVERT = "convert it, for example with `ffmpeg -i INPUT OUTPUT.wav`"
_NO_SOUNDS = (
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file it stands for with `git lfs pull`"),
    (rb"\s*<(?i:!doctype html|html|head|body)", "a web page", "download the file again, logged in if it must be"),
    (rb"\s*<\?xml", "an XML document", "download the file again"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf", "an archive", "unpack it"),
    (rb"....ftyp", "MP4 or M4A", _CONVERT),
    (rb"\x1aE\xdf\xa3", "WebM or Matroska", _CONVERT),
    (rb"0&\xb2u", "WMA", _CONVERT),
    (rb"#!AMR", "AMR", _CONVERT),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "AAC", _CONVERT),
    (rb"\0{64}", "zeros", "copy or download it again"),
)


def _no_sound(file: _File, name: str, error: soundfile.LibsndfileError) -> MossAudioError:
    head = file.at(0, 200)
    for pattern, what, help_ in _NO_SOUNDS:
        if re.match(pattern, head, re.DOTALL):
            return MossAudioError(f"{name} must be wav, flac, ogg or mp3, not {what}: {help_}")
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c.isspace() for c in text):
        shown = json.dumps(" ".join(text.split())[:60], ensure_ascii=False)
        return MossAudioError(
            f"{name} must be wav, flac, ogg or mp3, not text that begins with {shown}: restore it, or download it again"
        )
    return MossAudioError(
        f"{name}: expected wav, flac, ogg or mp3, found data that libsndfile cannot decode "
        f"(error {error.code}: {error.error_string.rstrip('.')}); {_CONVERT}."
    )


# Cuts


@dataclass(frozen=True)
class _Cut:
    """Samples of a stream, from `first` up to before `last`.

    missing: how many more its header promises behind them than the file holds; None if nothing says how many.
    """

    stream: _Stream
    first: int
    last: int
    missing: int | None = 0


def _cuts(file: _File, start: float | None, end: float | None, name: str) -> list[_Cut]:
    """What lies between two times, by the samples of each of the file's streams, at their own rates."""
    streams = _streams(file, name)
    seconds = sum(stream.samples / stream.samplerate for stream in streams)
    begin = 0.0 if start is None else start
    stop = seconds if end is None else min(end, seconds)
    if not 0 <= begin < stop:  # NaN lands here too
        raise MossAudioError(
            f"{name}: expected 0 <= start < end within its {seconds:.3f} s, "
            f"found start={start} and end={end}; correct the times or leave it out."
        )
    cuts, passed = [], 0.0
    for stream in streams:
        length = stream.samples / stream.samplerate
        first, last = (round(min(max(time - passed, 0.0), length) * stream.samplerate) for time in (begin, stop))
        if first < last or len(streams) == 1:
            missing = _missing(file, stream) if last == stream.samples else 0
            cuts.append(_Cut(stream, first, last, missing))
        passed += length
    return cuts


def _missing(file: _File, stream: _Stream) -> int | None:
    if stream.format != "OGG":
        return stream.promised() - stream.samples
    _, span = stream.source
    tail = file.at(begin := max(span.begin, span.end - _OGG_PAGE), span.end - begin)
    page = tail.rfind(b"OggS\0")
    return 0 if page >= 0 and tail[page + 5] & _OGG_LAST else None


def _read_cut(cut: _Cut, mix: "_Mix", name: str) -> np.ndarray:
    """The mean of the channels of a cut, up to a place that can't be decoded: float32 [samples]."""
    wave = bytearray()  # grows in place, so a header that promises too much costs no memory
    stream, count = cut.stream.at(cut.first) if cut.first else cut.stream, cut.last - cut.first
    try:
        _read_mono(stream, count, _DECODE_BLOCK, wave, mix, name)
    except soundfile.LibsndfileError as error:
        decoded = len(wave) // 4
        try:
            again = cut.stream.at(cut.first + decoded)
            _read_mono(again, count - decoded, _RESCUE_BLOCK, wave, mix, name)
        except soundfile.LibsndfileError:
            if not wave:
                raise error from None
    return np.frombuffer(wave, np.float32)


def _read_mono(stream: _Stream, count: int, size: int, wave: bytearray, mix: "_Mix", name: str) -> None:
    """Appends the mean of the channels of the next `count` samples, or of all there are, to a wave of float32."""
    while count > 0:
        block = stream.read(min(count, size), dtype="float32", always_2d=True)
        if not len(block):
            break
        channels, low, high = block.shape[1], float(block.min()), float(block.max())
        if not np.isfinite(low + high):
            second = (len(wave) / 4 + len(block)) / stream.samplerate
            raise MossAudioError(
                f"{name}: expected finite samples, found NaN or infinity before second {second:.1f} of what was read; "
                "repair it or leave it out."
            )
        mono = np.divide(sum(block.T), channels, dtype=np.float32)  # far faster than mean(axis=1)
        if channels > 1:
            mix.add(max(high, -low), mono)
        wave += mono.data
        count -= len(block)


@dataclass
class _Mix:
    """The highest magnitude of the channels of a clip, and the highest value of their mean."""

    channels: float = 0.0
    mean: float = 0.0

    def add(self, channels: float, mono: np.ndarray) -> None:
        self.channels = max(self.channels, channels)
        self.mean = max(self.mean, float(mono.max()))

    def warn_if_silent(self, name: str) -> None:
        if self.mean < _SILENT_MIX * self.channels:
            _warn(
                f"{name}: the mean of its channels is silent (peak {self.mean:.1g}) while they are not (peak "
                f"{self.channels:.1g}), as where one is the other's opposite: the model hears the mean, so give one of "
                "them, for example by `ffmpeg -i INPUT -af pan=mono|c0=c0 OUTPUT.wav`"
            )


def _warn_of_loss(name: str, cuts: list[_Cut], found: list[int]) -> None:
    """Says in the log how much of what the headers promise was found, if that is not all."""
    rates = [cut.stream.samplerate for cut in cuts]
    # The frames of an mp3 without a header are counted, and the decoder may drop a few of them.
    slack = [0 if cut.stream.source[1].samples is None else 4 * 1152 for cut in cuts]
    lost = [max(0, cut.last - cut.first - n - free) for cut, n, free in zip(cuts, found, slack, strict=True)]
    seconds = sum(n / rate for n, rate in zip(found, rates, strict=True))
    missing = sum((n + (cut.missing or 0)) / rate for n, cut, rate in zip(lost, cuts, rates, strict=True))
    if missing > 0:
        _warn(
            f"{name}: {seconds:.2f} of {seconds + missing:.2f} s can be read, the file is damaged or cut short: fetch "
            "or write it again"
        )
    elif any(cut.missing is None for cut in cuts):
        _warn(f"{name}: the file ends before its last page, after {seconds:.2f} s: if it was cut short, fetch it again")


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Pieces of the same rate as one: a resampler goes on across the border."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].rate == piece.rate:
            piece = Piece(np.concatenate([merged.pop().wave, piece.wave]), piece.rate)
        merged.append(piece)
    return merged


# Streams


def _streams(file: _File, name: str) -> list[_Stream]:
    """The file's streams, opened, in order."""
    whole = _Span(0, file.size)
    stream = _Stream(file, whole)
    spans = (whole,)
    if stream.format in _SPANS:
        spans = _spans(file, stream.format)
    elif stream.format in ("WAV", "WAVEX"):
        spans = (_unfinished(file, name) or whole,)
    streams = [stream] if spans == (whole,) else [_Stream(file, span) for span in spans]
    for each in streams:
        require_rate(each.samplerate, name)
        if each.samples == _UNKNOWN_LENGTH:
            each.samples = _counted(file, each.source[1])
    streams = [each for each in streams if each.samples]
    if not streams:
        raise MossAudioError(
            f"{name}: expected audio, found 0 samples in {file.size} bytes; restore it, or rewrite it with "
            "`ffmpeg -i INPUT OUTPUT.wav` if it was never finished."
        )
    return streams


def _counted(file: _File, span: _Span) -> int:
    """Samples of a stream whose header doesn't say it, such as FLAC through a pipe: it is decoded."""
    stream, count = _Stream(file, span), 0
    most = LONGEST_HOURS * 3600 * stream.samplerate
    while count <= most and (block := len(stream.read(_DECODE_BLOCK, dtype="int16", always_2d=True))):
        count += block
    return count


def _unfinished(file: _File, name: str) -> _Span | None:
    """The whole file with the size of its samples mended, if a recorder ended before it wrote that; None if it did."""
    place = 12
    while len(chunk := file.at(place, 8)) == 8 and chunk[:4] != b"data":
        size = int.from_bytes(chunk[4:], "little")
        place += 8 + size + size % 2
    following = file.at(place + 8, 8)
    size = int.from_bytes(following[4:], "little")
    another = re.fullmatch(rb"[\w ]{4}", following[:4]) and place + 16 + size <= file.size
    if chunk[:4] != b"data" or any(chunk[4:]) or len(following) < 8 or another:
        return None
    _warn(f"{name}: the header was never finished, as where a recorder crashed: all that follows it is read as samples")
    return _Span(0, file.size, patch=(place + 4, b"\xff\xff\xff\xff"))


def _spans(file: _File, format_: str) -> tuple[_Span, ...]:
    if file.identity is None:
        return tuple(_SPANS[format_](file))
    return _spans_of_path(*file.identity, format_)


@lru_cache(maxsize=4096)  # clips may be many cuts of one file
def _spans_of_path(path: str, size: int, modified: int, format_: str) -> tuple[_Span, ...]:
    with open_binary(path) as file:
        return tuple(_SPANS[format_](_File(file, None)))


def _flac_spans(file: _File) -> Iterator[_Span]:
    yield from _between([at for at in _find(file, b"fLaC") if file.at(at + 4, 4)[-3:] == b"\0\0\x22"], file.size)


_OGG_PAGE = 27 + 255 + 255 * 255  # bytes, at most
_OGG_LAST = 4  # the flag of a stream's last page


def _ogg_spans(file: _File) -> Iterator[_Span]:
    """A chain's links begin with a page of a beginning stream; more of them follow it where streams are multiplexed."""
    begins, next_page = [], -1
    for page in _find(file, b"OggS\0\2"):
        if page != next_page:
            begins.append(page)
        segments = file.at(page + 26, 1)
        next_page = page + 27 + sum(segments) + sum(file.at(page + 27, sum(segments)))
    yield from _between(begins, file.size)


def _between(begins: list[int], size: int) -> Iterator[_Span]:
    for begin, end in zip([0, *begins[1:]], [*begins[1:], size], strict=True):
        yield _Span(begin, end)


def _find(file: _File, marker: bytes) -> Iterator[int]:
    """Every place of a marker, in order."""
    place, tail = 0, b""
    while block := file.at(place, _SCAN_BLOCK):
        text, begin = tail + block, place - len(tail)
        at = text.find(marker)
        while at >= 0:
            yield begin + at
            at = text.find(marker, at + 1)
        place += len(block)
        tail = text[len(text) - len(marker) + 1 :]


# mp3: a row of frames, each with a header of four bytes. The first may be a tag that says how many there are.

_MP3_HEAD = 56  # bytes of a frame that are looked at
_MP3_KBPS = {  # by the header's four bits
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG-1
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2, MPEG-2.5
}
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclass(frozen=True)
class _Frame:
    """A frame of layer III. tag: it says how many frames, and in how many bytes, are in the stream that it begins."""

    bytes: int
    samples: int
    rate: int
    tag: tuple[int, int] | None


def _mp3_spans(file: _File) -> Iterator[_Span]:
    """A stream begins with a tag, at the first frame, and at the first frame after what is none."""
    spans: list[_Span] = []
    place = _next_frame(file, 0)
    while place is not None:
        frame = _frame(file.at(place, _MP3_HEAD))
        assert frame is not None
        frames, length = frame.tag or (0, 0)
        end, samples = (min(place + length, file.size), None) if frames and length else _run(file, place)
        samples = None if frames else samples
        spans.append(_Span(place, end, samples))
        place = _next_frame(file, end)
    if len(spans) <= 1:  # tags around it included
        spans = [_Span(0, file.size, spans[0].samples if spans else None)]
    yield from spans


def _run(file: _File, place: int) -> tuple[int, int]:
    """The end of the frames that follow each other, and how many samples they have."""
    samples = 0
    frame = _frame(file.at(place, _MP3_HEAD))
    while frame is not None and place + frame.bytes <= file.size:
        place, samples, rate = place + frame.bytes, samples + frame.samples, frame.rate
        frame = _frame(file.at(place, _MP3_HEAD))
        if frame is not None and (frame.rate != rate or frame.tag is not None):
            break
    return place, samples


def _next_frame(file: _File, place: int) -> int | None:
    """Where the next frame begins that others follow, as no chance would have it; None if there is none."""
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


def _frames_follow(file: _File, place: int, count: int = 3) -> bool:
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


_SPANS: dict[str, Callable[[_File], Iterator[_Span]]] = {
    "MP3": _mp3_spans,
    "FLAC": _flac_spans,
    "OGG": _ogg_spans,
}
