"""Turns an audio file into the log-mel frames that the encoder reads: decode, mix to mono, resample, log-mel.

Uses NumPy, SciPy and soundfile only. Two steps match the released MOSS-Audio processor to float32 rounding: the
resampler (torchaudio's, with its defaults) and the log-mel (of Whisper's feature extractor).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
import scipy.sparse
from numpy.lib.stride_tricks import sliding_window_view

from moss_audio_jax.config import downsampled_length
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sound import decode
from moss_audio_jax.storage.paths import AnyPath


@dataclass(frozen=True)
class MelConfig:
    """Settings of the log-mel, named as in `mel_config` of the released processor_config.json."""

    mel_sr: int = 16000  # samples per second
    mel_dim: int = 128  # mel bins
    mel_n_fft: int = 400  # samples in a window
    mel_hop_length: int = 160  # samples between frames


RELEASED_MEL = MelConfig()
SAMPLE_RATE = RELEASED_MEL.mel_sr


# Decoding


def load_audio(
    source: AnyPath | bytes,
    *,
    sample_rate: int = SAMPLE_RATE,
    start: float | None = None,
    end: float | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Decodes wav, flac, ogg, mp3 or another format of libsndfile; averages the channels, then resamples.

    Files that were joined one behind the other are read to the end. A file that was cut short or is damaged is read as
    far as possible, and the log says how many of its seconds that is.

    Args:
      source: a path (a whole object of gs:// is fetched; a pipe is read to its end), or the bytes of an encoded file.
      sample_rate: of the result, in Hz.
      start, end: of a cut, in seconds, rounded to the nearest sample of the file. Little before the cut is decoded if
        the format can seek. An `end` beyond the file means its end. The cut is resampled like a file of its own.
      name: of the audio, in errors and the log; by default the path.

    Returns:
      float32 [samples], full scale at 1.

    Raises:
      MossAudioError: the source cannot be read or decoded; its sample rate is outside 100 Hz to 384 kHz; it has more
        than ten hours; or the cut holds no sample, or one that is not finite.
    """
    sections = decode.read(source, start, end, name or _name(source))
    waves = [resample(section.wave, section.rate, sample_rate) for section in sections]
    return waves[0] if len(waves) == 1 else np.concatenate(waves)


def num_samples(
    source: AnyPath | bytes,
    *,
    sample_rate: int = SAMPLE_RATE,
    start: float | None = None,
    end: float | None = None,
    name: str | None = None,
) -> int:
    """Returns the number of samples that `load_audio` gives, from the file's headers; decodes only without them.

    A file that was cut short has fewer. Arguments and errors are those of `load_audio`; only decoding finds samples
    that are missing or not finite.
    """
    sections = decode.lengths(source, start, end, name or _name(source))
    return sum(resampled_length(samples, rate, sample_rate) for samples, rate in sections)


def _name(source: AnyPath | bytes) -> str:
    return "audio bytes" if isinstance(source, bytes) else os.fspath(source)


# Resampling

_ZERO_CROSSINGS = 6  # of the sinc on either side; torchaudio's lowpass_filter_width
_ROLLOFF = 0.99  # cutoff as a fraction of the lower Nyquist frequency


def resample(wave: np.ndarray, orig_rate: int, new_rate: int) -> np.ndarray:
    """`torchaudio.functional.resample` with its defaults: windowed sinc, zeros beyond both ends.

    Memory grows with the result alone, and time with the filter's non-zero taps, for any two rates.

    Args:
      wave: float32 [samples].
      orig_rate, new_rate: in Hz, positive.

    Returns:
      float32 [samples * new_rate / orig_rate, rounded up to the precision of a float32].
    """
    if min(orig_rate, new_rate) <= 0:
        raise MossAudioError(f"sample rates must be positive, not {orig_rate} and {new_rate} Hz: correct them")
    if orig_rate == new_rate or not len(wave):
        return wave
    divisor = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // divisor, new_rate // divisor
    import scipy.signal  # takes as long to import as JAX

    taps, delay = _sinc_filter(orig, new)
    length = _resampled_length(len(wave), orig, new)
    resampled = scipy.signal.upfirdn(taps, wave, up=new, down=orig)[delay : delay + length]
    missing = length - len(resampled)  # rounding may ask for samples past the filter's reach
    return np.pad(resampled, (0, missing)) if missing else resampled


def resampled_length(samples: int, orig_rate: int, new_rate: int) -> int:
    """Returns the number of samples that `resample` gives for `samples`."""
    divisor = math.gcd(orig_rate, new_rate)
    return samples if orig_rate == new_rate else _resampled_length(samples, orig_rate // divisor, new_rate // divisor)


def _resampled_length(samples: int, orig: int, new: int) -> int:
    """Computes torchaudio's length: a ceiling after rounding to float32, within the whole cycles it computes."""
    return min(math.ceil(np.float32(new * samples / orig)), (samples // orig + 1) * new)


@lru_cache(maxsize=16)
def _sinc_filter(orig: int, new: int) -> tuple[np.ndarray, int]:
    """Computes torchaudio's Hann-windowed sinc for two coprime rates, as one filter at the rate `orig * new`.

    Output j lies at time j/new and takes input i, at time i/orig, with the weight
        cutoff/orig * sinc(t) * cos(pi/2 * t/zero_crossings)^2,   t = cutoff * (i/orig - j/new),
    where |t| < zero_crossings. It depends on i*new - j*orig alone, which is different for all weights of a cycle.

    Returns:
      taps, float32 [2*delay*orig + 1], and their delay in output samples.
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
_FRAME_BLOCK = 128  # frames transformed at a time: they fit in the cache, and bound the memory for long audio


def log_mel(wave: np.ndarray, config: MelConfig = RELEASED_MEL) -> np.ndarray:
    """Computes Whisper's log-mel of a whole clip, without padding it to 30 s.

    Follows transformers' WhisperFeatureExtractor: reflect padding, periodic Hann window, float64 FFT, power,
    Slaney mel bank, log10, last frame dropped, clamped to the maximum of the whole clip minus 8, (x + 4) / 4.

    Args:
      wave: float [samples] at `config.mel_sr`, full scale at 1.

    Returns:
      float32 [mel_dim, samples // mel_hop_length].

    Raises:
      MossAudioError: the wave is not one channel of finite floats, is shorter than one frame, or overflows the mel.
    """
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise MossAudioError(
            f"the wave must be floats in [-1, 1] of shape [samples], not {wave.dtype} {list(wave.shape)}: average its "
            "channels and scale it"
        )
    num_frames = mel_frames(len(wave), config)
    wave = wave.astype(np.float32, copy=False)
    if not np.isfinite(wave).all():
        raise MossAudioError("the wave must have finite samples, not NaN or infinity: repair it, or leave it out")
    padded = np.pad(wave, config.mel_n_fft // 2, mode="reflect")
    frames = sliding_window_view(padded, config.mel_n_fft)[:: config.mel_hop_length][:-1]
    window = np.hanning(config.mel_n_fft + 1)[:-1]
    mel_bank = _slaney_mel_bank(config)
    mel = np.empty((config.mel_dim, num_frames), np.float32)
    for begin in range(0, num_frames, _FRAME_BLOCK):
        block = slice(begin, begin + _FRAME_BLOCK)
        # Stored as complex64 but squared in float64, like the reference: this decides the last bit of the result.
        with np.errstate(over="ignore"):  # an overflow is refused below
            spectrum = np.fft.rfft(frames[block] * window).astype(np.complex64)
        power = np.square(spectrum.real, dtype=np.float64) + np.square(spectrum.imag, dtype=np.float64)
        mel[:, block] = np.log10(np.maximum(mel_bank @ power.T, _MEL_FLOOR))
    peak = mel.max()
    if not np.isfinite(peak):
        raise MossAudioError(
            f"the samples must be about -1 to 1, not up to {np.abs(wave).max():.1e}, whose mel is not finite: "
            "scale or restore the wave"
        )
    np.maximum(mel, peak - 8.0, out=mel)
    mel += 4.0
    mel /= 4.0
    return mel


def mel_frames(samples: int, config: MelConfig = RELEASED_MEL) -> int:
    """Returns the number of frames that `log_mel` gives for `samples`; raises MossAudioError if that is 0."""
    if samples < config.mel_hop_length:
        raise MossAudioError(
            f"the wave must have at least {config.mel_hop_length} samples at {config.mel_sr} Hz, one mel frame, not "
            f"{samples}: lengthen the clip, or leave it out"
        )
    return samples // config.mel_hop_length


@lru_cache(maxsize=4)
def _slaney_mel_bank(config: MelConfig) -> scipy.sparse.csr_array:
    """Computes triangles of equal area, even on Slaney's mel scale up to 8 kHz: float64 [mel_dim, n_fft//2 + 1].

    The scale is linear up to 1 kHz (15 mel), then logarithmic (27 mel for a factor of 6.4). The matrix is sparse, as a
    frequency is in at most two triangles: less work than a dense product, and no BLAS threads that would compete for
    cores with the other workers of a data pipeline.
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


def model_mel(wave: np.ndarray, name: str, augment: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Computes the mel that the model reads: `log_mel` rounded to bfloat16, float32 [mel bins, frames].

    The released processor rounds every mel, whatever dtype the model computes in.
    name: of the clip; errors begin with it. augment: changes the mel before it is rounded.
    """
    try:
        mel = log_mel(wave)
    except MossAudioError as error:
        raise MossAudioError(f"{name}: {error}") from error
    return round_bfloat16(mel if augment is None else augment(mel))


def round_bfloat16(mel: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16 (ties to even); returns those values as float32, in the same shape."""
    return mel.astype(ml_dtypes.bfloat16).astype(np.float32)


def num_audio_tokens(frames: int) -> int:
    """Computes the number of audio tokens of a clip from its mel frames."""
    return downsampled_length(frames)
