"""Decodes sound files to mono waves: all samples that a file holds, with a warning about those that are missing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sound.files import OpenedFile, Source, opened, warn_once, with_opened
from moss_audio_jax.sound.spans import ends_with_last_page
from moss_audio_jax.sound.streams import LONGEST_HOURS, Stream, block_size, streams_of

_RESCUE_BLOCK = 1 << 11  # samples decoded at a time up to a place that can't be decoded
_SILENT_MIX = 0.01  # of the channels' peak: 40 dB below it


@dataclass(frozen=True)
class Section:
    """Samples of one rate. wave: float32 [samples], the mean of the channels. rate: in Hz."""

    wave: np.ndarray
    rate: int


def read(source: Source, start: float | None, end: float | None, name: str) -> list[Section]:
    """Decodes the samples between two times in seconds; a file whose rate changes gives several sections.

    start, end: None takes the file's own. name: of the file, in errors and the log.
    Logs how much is missing if the file was cut short or is damaged. Raises MossAudioError if the file can't be read or
    decoded, or if the cut holds no sample or one that is not finite.
    """

    def work(file: OpenedFile) -> list[Section]:
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
                f"{name} must hold samples between start={start} and end={end}, not none: widen the cut, or restore "
                "the file if it was cut short"
            )
        if file.error is None:
            _warn_of_loss(name, cuts, [len(wave) for wave in waves])
        mix.warn_if_silent(name)
        return _merged([Section(wave, cut.stream.samplerate) for cut, wave in zip(cuts, waves, strict=True)])

    return with_opened(source, name, work)


def blocks(source: Source, name: str, longest: float | None = None) -> Iterator[Section]:
    """Yields the samples of a whole file piece by piece: at most a few seconds are in memory. The rate may change.

    Warnings and errors are those of `read`, as far as the file was read; any length can be read.
    longest: seconds; a longer file is refused, before it is decoded or at that place if its header does not say.
    """
    with opened(source, name) as file:
        cuts, mix, found = _cuts(file, None, None, name, longest), _Mix(), []
        seconds = sum(cut.last / cut.stream.samplerate for cut in cuts)
        if longest is not None and seconds > longest:
            raise MossAudioError(
                f"{name} must have at most {longest:g} s of audio, not {seconds:.1f}: give a part of it"
            )
        if any(cut.stream.counted and cut.last > LONGEST_HOURS * 3600 * cut.stream.samplerate for cut in cuts):
            raise MossAudioError(
                f"{name}: its header must say how long it is, as it has more than {LONGEST_HOURS} hours: rewrite it, "
                "for example with `ffmpeg -i INPUT OUTPUT.flac`"
            )
        for cut in cuts:
            found.append(0)
            for wave in _mono_blocks(cut, mix, name):
                found[-1] += len(wave)
                yield Section(wave, cut.stream.samplerate)
        if not sum(found):
            raise MossAudioError(f"{name} must hold samples, not none: restore the file if it was cut short")
        if file.error is None:
            _warn_of_loss(name, cuts, found)
        mix.warn_if_silent(name)


def lengths(source: Source, start: float | None, end: float | None, name: str) -> list[tuple[int, int]]:
    """Returns (samples, rate) of the sections that `read` gives, from the headers; decodes only without them."""

    def work(file: OpenedFile) -> list[tuple[int, int]]:
        cuts = _cuts(file, start, end, name)
        _warn_of_loss(name, cuts, [cut.last - cut.first for cut in cuts])
        found: list[tuple[int, int]] = []
        for cut in cuts:
            samples, rate = cut.last - cut.first, cut.stream.samplerate
            if found and found[-1][1] == rate:
                samples += found.pop()[0]
            found.append((samples, rate))
        return found

    return with_opened(source, name, work)


@dataclass(frozen=True)
class _Cut:
    """Samples [first, last) of a stream.

    missing: samples after them that the header promises and the file lacks; None if their number is unknown.
    """

    stream: Stream
    first: int
    last: int
    missing: int | None = 0


def _cuts(
    file: OpenedFile, start: float | None, end: float | None, name: str, longest: float | None = None
) -> list[_Cut]:
    """Cuts the file's streams between two times: samples of each, at its own rate."""
    streams = streams_of(file, name, longest)
    seconds = sum(stream.samples / stream.samplerate for stream in streams)
    begin = 0.0 if start is None else start
    stop = seconds if end is None else min(end, seconds)
    if not 0 <= begin < stop:  # also true for NaN
        raise MossAudioError(
            f"{name}: start and end must be 0 <= start < end within its {seconds:.3f} s, not start={start} and "
            f"end={end}: correct the times, or leave the clip out"
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


def _missing(file: OpenedFile, stream: Stream) -> int | None:
    """Returns the number of samples that a stream lacks at its end; None if it lacks an unknown number."""
    if stream.format != "OGG":
        return stream.promised() - stream.samples
    _, span = stream.source
    return 0 if ends_with_last_page(file, span) else None


def _read_cut(cut: _Cut, mix: "_Mix", name: str) -> np.ndarray:
    """Decodes a cut, up to a place that can't be decoded: the mean of its channels, float32 [samples]."""
    wave = bytearray()  # grows in place, so a header that promises too much costs no memory
    for block in _mono_blocks(cut, mix, name):
        wave += block.data
    return np.frombuffer(wave, np.float32)


def _mono_blocks(cut: _Cut, mix: "_Mix", name: str) -> Iterator[np.ndarray]:
    """Yields the mean of the channels of a cut, float32 [samples], up to a place that can't be decoded."""
    stream = cut.stream.at(cut.first) if cut.first else cut.stream
    decoded, count, size = 0, cut.last - cut.first, block_size(stream)
    failure: soundfile.LibsndfileError | None = None
    while decoded < count:
        try:
            if failure is not None and size != _RESCUE_BLOCK:
                stream, size = cut.stream.at(cut.first + decoded), _RESCUE_BLOCK
            block = stream.read(min(count - decoded, size), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            if failure is None:
                failure = error
                continue
            if not decoded:
                raise failure from None
            return
        if not len(block):
            return
        decoded += len(block)
        channels, low, high = block.shape[1], float(block.min()), float(block.max())
        if not np.isfinite(low + high):
            raise MossAudioError(
                f"{name} must have finite samples, not NaN or infinity before second "
                f"{decoded / stream.samplerate:.1f} of the cut: repair it, or leave it out"
            )
        mono = np.divide(sum(block.T), channels, dtype=np.float32)  # far faster than mean(axis=1)
        if channels > 1:
            mix.add(max(high, -low), mono)
        yield mono


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
            warn_once(
                f"{name}: the mean of its channels is silent (peak {self.mean:.1g}) while they are not (peak "
                f"{self.channels:.1g}), as if one were the other's opposite: the model gets the mean, so give one of "
                "them, for example by `ffmpeg -i INPUT -af pan=mono|c0=c0 OUTPUT.wav`"
            )


def _warn_of_loss(name: str, cuts: list[_Cut], found: list[int]) -> None:
    """Logs how much of a file can be read, if that is less than its headers promise. found: samples of each cut."""
    rates = [cut.stream.samplerate for cut in cuts]
    # Without a header an mp3's frames are counted, and the decoder may drop a few of them.
    slack = [0 if cut.stream.source[1].samples is None else 4 * 1152 for cut in cuts]
    lost = [max(0, cut.last - cut.first - n - free) for cut, n, free in zip(cuts, found, slack, strict=True)]
    seconds = sum(n / rate for n, rate in zip(found, rates, strict=True))
    missing = sum((n + (cut.missing or 0)) / rate for n, cut, rate in zip(lost, cuts, rates, strict=True))
    if missing > 0:
        warn_once(
            f"{name}: {seconds:.2f} of {seconds + missing:.2f} s can be read, the file is damaged or cut short: fetch "
            "or write it again"
        )
    elif any(cut.missing is None for cut in cuts):
        warn_once(
            f"{name}: the file ends before its last page, after {seconds:.2f} s: if it was cut short, fetch it again"
        )


def _merged(sections: list[Section]) -> list[Section]:
    """Joins neighbouring sections of the same rate, so that they are resampled as one."""
    merged: list[Section] = []
    for section in sections:
        if merged and merged[-1].rate == section.rate:
            section = Section(np.concatenate([merged.pop().wave, section.wave]), section.rate)
        merged.append(section)
    return merged
