"""From an audio file to the log-mel frames the encoder reads: decode, mix to mono, resample, log-mel.

NumPy, SciPy and soundfile only. Two steps follow the released MOSS-Audio processor to float32 rounding: the
resampler (torchaudio's, with its defaults) and the log-mel (that of Whisper's feature extractor).
"""

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar, cast

import ml_dtypes
import numpy as np
import scipy.signal
import scipy.sparse
import soundfile
from numpy.lib.stride_tricks import sliding_window_view

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.paths import AnyPath, open_binary, reason
from moss_audio_jax.retries import retried

Result = TypeVar("Result")


@dataclass(frozen=True)
class MelConfig:
    """The log-mel's settings, named as in `mel_config` of the released processor_config.json."""

    mel_sr: int = 16000  # samples per second
    mel_dim: int = 128  # mel bins
    mel_n_fft: int = 400  # samples in a window
    mel_hop_length: int = 160  # samples between frames


RELEASED_MEL = MelConfig()
SAMPLE_RATE = RELEASED_MEL.mel_sr


# Decoding

_DECODE_BLOCK = 1 << 18  # samples decoded at a time, so that a long file is never held in all its channels
_UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's SF_COUNT_MAX


def load_audio(
    source: AnyPath | bytes,
    *,
    sample_rate: int = SAMPLE_RATE,
    start: float | None = None,
    end: float | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Decodes wav, flac, ogg, mp3 or whatever else libsndfile reads; averages the channels, then resamples.

    A file that was cut short is read as far as it goes.

    Args:
      source: a path (of gs:// the whole object is fetched), or the bytes of an encoded file.
      sample_rate: of the result, in Hz.
      start, end: cut, in seconds, to the nearest sample of the file; where the format can seek, nothing
        before the cut is decoded. An `end` beyond the file means its end. The cut is resampled as if it were
        a file of its own.
      name: what errors call the audio; by default the path.

    Returns:
      float32 [samples], full scale at 1.

    Raises:
      MossAudioError: the source cannot be read or decoded, the cut holds no sample or one that is not finite.
    """
    name = name or _name(source)
    wave, file_rate = _of_sound(source, name, lambda sound: (_read_cut(sound, start, end, name), sound.samplerate))
    return resample(wave, file_rate, sample_rate)


def num_samples(
    source: AnyPath | bytes,
    *,
    sample_rate: int = SAMPLE_RATE,
    start: float | None = None,
    end: float | None = None,
    name: str | None = None,
) -> int:
    """How many samples `load_audio` gives, as the file's header promises: nothing is decoded.

    A file that was cut short has fewer. Arguments and errors are those of `load_audio`, but for samples that are found
    missing or not finite when they are decoded.
    """
    name = name or _name(source)
    (first, last), rate = _of_sound(source, name, lambda sound: (_cut(sound, start, end, name), sound.samplerate))
    return resampled_length(last - first, rate, sample_rate)


def _name(source: AnyPath | bytes) -> str:
    return "audio bytes" if isinstance(source, bytes) else os.fspath(source)


def _of_sound(source: AnyPath | bytes, name: str, read: Callable[[soundfile.SoundFile], Result]) -> Result:
    """What `read` finds in the file, opened; what goes wrong with it is a MossAudioError that begins with `name`."""

    def attempt() -> Result:
        with io.BytesIO(source) if isinstance(source, bytes) else open_binary(source) as file:
            if not file.read(1):
                raise MossAudioError(f"{name}: expected audio, found 0 bytes; restore it or leave it out.")
            file.seek(0)
            watched = _Watched(file)
            try:
                with soundfile.SoundFile(cast(BinaryIO, watched)) as sound:
                    return read(sound)
            finally:
                watched.raise_error()

    try:
        return retried(name, attempt)
    except OSError as error:
        raise MossAudioError(
            f"{name}: expected a readable audio file, found '{reason(error)}'; check the path."
        ) from error
    except soundfile.LibsndfileError as error:
        raise MossAudioError(
            f"{name}: expected wav, flac, ogg or mp3, found data that libsndfile cannot decode "
            f"(error {error.code}: {error.error_string.rstrip('.')}); "
            f"convert it, for example with `ffmpeg -i INPUT OUTPUT.wav`."
        ) from error


class _Watched:
    """A file for libsndfile, to which bytes that can't be read are the end of the file: what was wrong is kept here.

    It has no name, since soundfile refuses some extensions (.raw) without looking inside.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell

    def readinto(self, buffer: Any) -> int:
        try:
            return cast(io.BufferedIOBase, self._file).readinto(buffer)
        except OSError as error:
            self._error = self._error or error
            return 0

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _cut(sound: soundfile.SoundFile, start: float | None, end: float | None, name: str) -> tuple[int, int]:
    """The first sample between two times and the one after the last, at the file's own rate."""
    if not sound.frames:
        raise MossAudioError(f"{name}: expected audio, found 0 samples; restore it or leave it out.")
    if sound.frames == _UNKNOWN_LENGTH:
        raise MossAudioError(
            f"{name}: expected the number of samples in the header, found none (written through a pipe?); "
            f"rewrite it, for example with `ffmpeg -i INPUT OUTPUT.flac`."
        )
    seconds = sound.frames / sound.samplerate
    begin = 0.0 if start is None else start
    stop = seconds if end is None else min(end, seconds)
    if not 0 <= begin < stop:  # NaN lands here too
        raise MossAudioError(
            f"{name}: expected 0 <= start < end within its {seconds:.3f} s, "
            f"found start={start} and end={end}; correct the times or leave it out."
        )
    return round(begin * sound.samplerate), round(stop * sound.samplerate)


def _read_cut(sound: soundfile.SoundFile, start: float | None, end: float | None, name: str) -> np.ndarray:
    """The mean of the channels between two times: float32 [samples] at the file's own rate."""
    first, last = _cut(sound, start, end, name)
    if sound.seekable():
        sound.seek(first)
    else:
        _read_mono(sound, first, name)
    wave = _read_mono(sound, last - first, name)
    if not len(wave):
        raise MossAudioError(
            f"{name}: expected samples between start={start} and end={end}, found none; "
            f"widen the cut, or restore the file if it was cut short."
        )
    return wave


def _read_mono(sound: soundfile.SoundFile, count: int, name: str) -> np.ndarray:
    """Reads on, for `count` samples or to the end of the data; averages the channels: float32 [samples]."""
    mono = bytearray()  # grows in place, so a header that promises too much costs no memory
    while count > 0:
        block = sound.read(min(count, _DECODE_BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            break
        if not np.isfinite(block).all():
            raise MossAudioError(
                f"{name}: expected finite samples, found NaN or infinity before second "
                f"{sound.tell() / sound.samplerate:.1f}; repair it or leave it out."
            )
        mono += np.divide(sum(block.T), sound.channels, dtype=np.float32).data  # far faster than mean(axis=1)
        count -= len(block)
    return np.frombuffer(mono, dtype=np.float32)


# Resampling

_ZERO_CROSSINGS = 6  # of the sinc on either side; torchaudio's lowpass_filter_width
_ROLLOFF = 0.99  # cutoff as a fraction of the lower Nyquist frequency


def resample(wave: np.ndarray, orig_rate: int, new_rate: int) -> np.ndarray:
    """`torchaudio.functional.resample` with its defaults: windowed sinc, zeros beyond both ends.

    Takes memory for the result alone, and time for the filter's non-zero taps alone, whatever the two rates.

    Args:
      wave: float32 [samples].
      orig_rate, new_rate: in Hz, positive.

    Returns:
      float32 [samples * new_rate / orig_rate, rounded up to the precision of a float32].
    """
    if min(orig_rate, new_rate) <= 0:
        raise MossAudioError(f"expected positive sample rates, found {orig_rate} and {new_rate} Hz; correct them.")
    if orig_rate == new_rate or not len(wave):
        return wave
    divisor = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // divisor, new_rate // divisor
    taps, delay = _sinc_filter(orig, new)
    length = _resampled_length(len(wave), orig, new)
    resampled = scipy.signal.upfirdn(taps, wave, up=new, down=orig)[delay : delay + length]
    missing = length - len(resampled)  # rounding may ask for samples past the filter's reach
    return np.pad(resampled, (0, missing)) if missing else resampled


def resampled_length(samples: int, orig_rate: int, new_rate: int) -> int:
    """How many samples `resample` makes of so many."""
    divisor = math.gcd(orig_rate, new_rate)
    return samples if orig_rate == new_rate else _resampled_length(samples, orig_rate // divisor, new_rate // divisor)


def _resampled_length(samples: int, orig: int, new: int) -> int:
    """torchaudio's length: a ceiling taken after rounding to float32, within the whole cycles it computed."""
    return min(math.ceil(np.float32(new * samples / orig)), (samples // orig + 1) * new)


@lru_cache(maxsize=16)
def _sinc_filter(orig: int, new: int) -> tuple[np.ndarray, int]:
    """torchaudio's Hann-windowed sinc for two coprime rates, as one filter at the rate `orig * new`.

    Output j lies at time j/new and takes input i, at time i/orig, with the weight
        cutoff/orig * sinc(t) * cos(pi/2 * t/zero_crossings)^2,   t = cutoff * (i/orig - j/new),
    where |t| < zero_crossings. It depends on i*new - j*orig alone, which no two weights of a cycle share.

    Returns:
      float32 [2*delay*orig + 1] taps, and the delay they cause, in output samples.
    """
    cutoff = min(orig, new) * _ROLLOFF
    reach = math.ceil(_ZERO_CROSSINGS * orig / cutoff)  # inputs on either side of an output
    j = np.arange(new)[:, None]
    i = j * orig // new + np.arange(-reach, reach + 1)
    # In float32 and in this order, like torchaudio: rounding t moves weights, by 3e-5 from 11025 to 16000 Hz.
    t = i.astype(np.float32) / orig - j.astype(np.float32) / new
    t = np.clip(t * cutoff, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(t * math.pi / _ZERO_CROSSINGS / 2) ** 2
    delay = math.ceil((reach + 1) * new / orig)
    taps = np.zeros(2 * delay * orig + 1, np.float32)
    taps[delay * orig - (i * new - j * orig)] = np.sinc(t) * (window * (cutoff / orig))
    return taps, delay


# Log-mel

_MEL_MAX_HZ = 8000.0  # Whisper's, whatever the sample rate
_MEL_FLOOR = 1e-10
_FRAME_BLOCK = 128  # frames transformed at a time: they fit in cache, and an hour of audio needs no more memory


def log_mel(wave: np.ndarray, config: MelConfig = RELEASED_MEL) -> np.ndarray:
    """Whisper's log-mel of a whole clip, without padding it to 30 s.

    As in transformers' WhisperFeatureExtractor: reflect padding, periodic Hann window, float64 FFT, power,
    Slaney mel bank, log10, last frame dropped, clamped to the maximum of the whole clip minus 8, (x + 4) / 4.

    Args:
      wave: float [samples] at `config.mel_sr`, full scale at 1.

    Returns:
      float32 [mel_dim, samples // mel_hop_length].

    Raises:
      MossAudioError: not one channel of finite floats, or shorter than one frame.
    """
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise MossAudioError(
            f"expected a wave of floats in [-1, 1] and shape [samples], "
            f"found {wave.dtype} {list(wave.shape)}; average its channels and scale it."
        )
    num_frames = mel_frames(len(wave), config)
    wave = wave.astype(np.float32, copy=False)
    if not np.isfinite(wave).all():
        raise MossAudioError("expected a wave of finite samples, found NaN or infinity; repair it or leave it out.")
    padded = np.pad(wave, config.mel_n_fft // 2, mode="reflect")
    frames = sliding_window_view(padded, config.mel_n_fft)[:: config.mel_hop_length][:-1]
    window = np.hanning(config.mel_n_fft + 1)[:-1]
    mel_bank = _slaney_mel_bank(config)
    mel = np.empty((config.mel_dim, num_frames), np.float32)
    for begin in range(0, num_frames, _FRAME_BLOCK):
        block = slice(begin, begin + _FRAME_BLOCK)
        # Kept as complex64 but squared in float64, like the reference: it decides the last bit of the result.
        spectrum = np.fft.rfft(frames[block] * window).astype(np.complex64)
        power = np.square(spectrum.real, dtype=np.float64) + np.square(spectrum.imag, dtype=np.float64)
        mel[:, block] = np.log10(np.maximum(mel_bank @ power.T, _MEL_FLOOR))
    np.maximum(mel, mel.max() - 8.0, out=mel)
    mel += 4.0
    mel /= 4.0
    return mel


def mel_frames(samples: int, config: MelConfig = RELEASED_MEL) -> int:
    """Frames of the log-mel of so many samples; raises MossAudioError if that is none."""
    if samples < config.mel_hop_length:
        raise MossAudioError(
            f"expected at least {config.mel_hop_length} samples at {config.mel_sr} Hz, one mel frame, "
            f"found {samples}; lengthen the clip or leave it out."
        )
    return samples // config.mel_hop_length


@lru_cache(maxsize=4)
def _slaney_mel_bank(config: MelConfig) -> scipy.sparse.csr_array:
    """Triangles of equal area, even on Slaney's mel scale up to 8 kHz: float64 [mel_dim, n_fft//2 + 1].

    The scale is linear up to 1 kHz (15 mel), then logarithmic (27 mel for a factor of 6.4). A frequency lies
    in two triangles at most, hence sparse: less work than a dense product, and no BLAS threads that would
    fight over the cores with the other workers of a data pipeline.
    """
    mels_per_log = 27.0 / np.log(6.4)
    highest = 15.0 + np.log(_MEL_MAX_HZ / 1000.0) * mels_per_log
    mels = np.linspace(0.0, highest, config.mel_dim + 2)
    corners = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) / mels_per_log))
    lower, centre, upper = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    hertz = np.linspace(0.0, config.mel_sr // 2, config.mel_n_fft // 2 + 1)
    rising, falling = (hertz - lower) / (centre - lower), (upper - hertz) / (upper - centre)
    bank = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (upper - lower))
    return scipy.sparse.csr_array(bank)


def round_bfloat16(mel: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16 (ties to even); returns those values as float32, in the same shape.

    The MOSS-Audio processor rounds every mel so, whatever dtype the model computes in.
    """
    return mel.astype(ml_dtypes.bfloat16).astype(np.float32)


def num_audio_tokens(frames: int) -> int:
    """Audio tokens of a clip: each of the encoder's three convolutions halves its mel frames, rounding up."""
    for _ in range(3):
        frames = (frames - 1) // 2 + 1
    return frames
