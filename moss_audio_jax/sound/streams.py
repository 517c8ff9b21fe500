"""Opens the streams of a sound file: the parts that libsndfile decodes one by one, each with its own rate."""

import re
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sound.files import OpenedFile, Span, Window, warn_once
from moss_audio_jax.sound.spans import SCANNERS, spans_of

LOWEST_RATE, HIGHEST_RATE = 100, 384_000  # Hz; the resampler's work and its result grow with the ratio of two rates
DENSEST = 768_000  # samples a second, of a file whose work is to be bounded: 4 channels at 192 kHz
LONGEST_HOURS = 10  # decoded at once: 2.3 GB at 16 kHz
DECODE_BLOCK = 1 << 18  # samples decoded at a time, so that a long file is never held in all its channels

_UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's SF_COUNT_MAX
_MP3_RUN_UP = 32 * 1152  # samples decoded before a cut: an mp3 frame takes bits from frames before it


def require_rate(rate: Any, name: str) -> int:
    """Returns the rate in Hz; raises MossAudioError unless it is a whole number within the limits above."""
    number = isinstance(rate, int | float | np.integer | np.floating)
    if not (number and LOWEST_RATE <= rate <= HIGHEST_RATE and rate == int(rate)):
        raise MossAudioError(
            f"{name}: the sample rate must be a whole number from {LOWEST_RATE:,} to {HIGHEST_RATE:,} Hz, not {rate}: "
            "correct it, or resample the file, for example with `ffmpeg -i INPUT -ar 16000 OUTPUT.wav`"
        )
    return int(rate)


class Stream(soundfile.SoundFile):
    """A span that libsndfile decodes.

    `seekable` is False: otherwise soundfile seeks to the current place after every read, after which mp3 decodes
    wrongly, and FLAC not at all near damage.
    """

    def __init__(self, file: OpenedFile, span: Span):
        super().__init__(cast(BinaryIO, Window(file, span)))
        self.source = file, span
        self.samples: int = self.frames if span.samples is None else span.samples
        self.counted = self.samples == _UNKNOWN_LENGTH  # by decoding, in `streams_of`

    def seekable(self) -> bool:
        return False

    def at(self, first: int) -> "Stream":
        """Opens the stream again at a sample.

        Decodes all samples before it in formats that can't seek, and a few frames in mp3.
        """
        stream = Stream(*self.source)
        run_up = first if not super().seekable() else min(first, _MP3_RUN_UP) if self.format == "MP3" else 0
        if first > run_up:
            soundfile.SoundFile.seek(stream, first - run_up)
        while run_up > 0:
            run_up -= len(stream.read(min(run_up, DECODE_BLOCK), dtype="float32")) or run_up
        return stream

    def promised(self) -> int:
        """Returns the samples that the header promises; the file may hold fewer."""
        cut = _SHORTER.search(self.extra_info) if self.format in ("WAV", "WAVEX", "AIFF", "AU") else None
        said, held = (int(cut[1]), int(cut[2])) if cut else (0, 0)
        return round(self.samples * said / held) if 0 < held < said < _NEVER_FINISHED else self.samples


# libsndfile's note about the size of the samples, in bytes.
_SHORTER = re.compile(r"(?:^| )(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_NEVER_FINISHED = 0x7FFF0000  # bytes: a writer through a pipe leaves about the largest value of the field


def block_size(stream: soundfile.SoundFile) -> int:
    """Returns the samples to decode at a time: fewer of a file with hundreds of channels, which few bytes can claim."""
    return max(1, DECODE_BLOCK * 8 // max(8, stream.channels))


def streams_of(file: OpenedFile, name: str, longest: float | None = None) -> list[Stream]:
    """Opens the file's streams, in order; raises MossAudioError if there is no sample.

    longest: seconds of each after which counting its samples may end; then a file of very many samples a second, which
        few bytes can claim, is refused too.
    """
    whole = Span(0, file.size)
    stream = Stream(file, whole)
    spans = (whole,)
    if stream.format in SCANNERS:
        spans = spans_of(file, stream.format)
    elif stream.format in ("WAV", "WAVEX"):
        spans = (_unfinished(file, name) or whole,)
    streams = [stream] if spans == (whole,) else [Stream(file, span) for span in spans]
    for each in streams:
        require_rate(each.samplerate, name)
        if longest is not None and each.samplerate * each.channels > DENSEST:
            raise MossAudioError(
                f"{name} must have at most {DENSEST:,} samples a second in all channels, not {each.channels} times "
                f"{each.samplerate:,}: resample it, or give fewer channels"
            )
        if each.samples == _UNKNOWN_LENGTH:
            each.samples = _counted(file, each.source[1], longest)
    streams = [each for each in streams if each.samples]
    if not streams:
        raise MossAudioError(
            f"{name} must hold samples, not 0 in {file.size} bytes: restore it, or rewrite it with `ffmpeg -i INPUT "
            "OUTPUT.wav` if it was never finished"
        )
    return streams


def _counted(file: OpenedFile, span: Span, longest: float | None) -> int:
    """Counts the samples of a stream without their number in its header, such as FLAC through a pipe, by decoding."""
    stream, count = Stream(file, span), 0
    most = (LONGEST_HOURS * 3600 if longest is None else longest) * stream.samplerate
    while count <= most and (block := len(stream.read(block_size(stream), dtype="int16", always_2d=True))):
        count += block
    return count


def _unfinished(file: OpenedFile, name: str) -> Span | None:
    """Returns the whole wav file with a mended size of its samples, if its recorder never wrote that; else None."""
    place = 12
    while len(chunk := file.at(place, 8)) == 8 and chunk[:4] != b"data":
        size = int.from_bytes(chunk[4:], "little")
        place += 8 + size + size % 2
    following = file.at(place + 8, 8)
    size = int.from_bytes(following[4:], "little")
    another = re.fullmatch(rb"[\w ]{4}", following[:4]) and place + 16 + size <= file.size
    if chunk[:4] != b"data" or any(chunk[4:]) or len(following) < 8 or another:
        return None
    warn_once(
        f"{name}: the header was never finished, as when a recorder crashes: all that follows it is read as samples"
    )
    return Span(0, file.size, patch=(place + 4, b"\xff\xff\xff\xff"))
