"""Reads sound files of any length piece by piece, as waves at 16 kHz: `audio.load_audio` in bounded memory."""

import math
import os
from collections.abc import Iterator

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, resample, resampled_length
from moss_audio_jax.sound import decode
from moss_audio_jax.storage.paths import AnyPath

_REACH = 8  # samples of the lower rate on either side that may weigh in one of the result; the filter has six


class Resampler:
    """`audio.resample` of a wave that comes in pieces: the pieces of the result join to that of the whole."""

    def __init__(self, orig_rate: int, new_rate: int):
        divisor = math.gcd(orig_rate, new_rate)
        self._rates = orig_rate, new_rate
        self._orig, self._new = orig_rate // divisor, new_rate // divisor  # samples of a cycle
        self._margin = -(-_REACH * orig_rate // min(orig_rate, new_rate) // self._orig)  # cycles
        self._held = np.zeros(0, np.float32)  # begins with `_context` cycles that are done
        self._context = 0
        self._read = self._written = 0

    def feed(self, wave: np.ndarray) -> np.ndarray:
        """Returns the next samples of the result, float32, as many as `wave` decides; may be none."""
        self._read += len(wave)
        if self._orig == self._new:
            return wave
        self._held = np.concatenate([self._held, wave])
        whole = len(self._held) // self._orig  # cycles
        ready = whole - self._margin
        if ready <= self._context:
            return np.zeros(0, np.float32)
        found = resample(self._held[: whole * self._orig], *self._rates)
        found = found[self._context * self._new : ready * self._new]
        kept = min(self._margin, ready)
        self._held, self._context = self._held[(ready - kept) * self._orig :], kept
        self._written += len(found)
        return found

    def flush(self) -> np.ndarray:
        """Returns the rest of the result, after the last piece."""
        if self._orig == self._new:
            return np.zeros(0, np.float32)
        count = resampled_length(self._read, *self._rates) - self._written
        found = resample(self._held, *self._rates)[self._context * self._new :][: max(count, 0)]
        self._held, self._written = np.zeros(0, np.float32), self._written + len(found)
        return found


def stream_audio(
    source: AnyPath | bytes,
    *,
    sample_rate: int = SAMPLE_RATE,
    name: str | None = None,
    longest: float | None = None,
) -> Iterator[np.ndarray]:
    """Yields the wave that `load_audio` returns for a whole file, in pieces of a few seconds, float32 [samples].

    Arguments and errors are those of `load_audio`, but a file may have any length. An object of gs:// is fetched whole.
    longest: seconds; a file whose headers promise more is refused, before its samples are decoded.
    """
    name = name or ("audio bytes" if isinstance(source, bytes) else os.fspath(source))
    resampler, rate = Resampler(sample_rate, sample_rate), sample_rate
    for section in decode.blocks(source, name, longest):
        if section.rate != rate:
            yield resampler.flush()
            resampler, rate = Resampler(section.rate, sample_rate), section.rate
        yield resampler.feed(section.wave)
    yield resampler.flush()
