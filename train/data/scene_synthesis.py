"""Waves of sound scenes: a plan of timed sounds -> samples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft

from moss_audio_jax.audio import SAMPLE_RATE
from train.data.manifest import TimedText
from train.data.recordings import Recordings

BACKGROUNDS = ("white", "pink", "brown")


@dataclass(frozen=True)
class Event(TimedText):
    """A sound. `text` is its label; `start` and `end` are exact to the sample.

    level_db: peak, in dB of full scale.
    pitch_hz: at the start and at the end; None for sounds without pitch.
    recording: index of the recording that is played; None for a synthetic sound. voice: the recording's, or "".
    """

    level_db: float
    pitch_hz: tuple[float, float] | None = None
    recording: int | None = None
    voice: str = ""


@dataclass(frozen=True, eq=False)
class ScenePlan:
    """Contents of a scene: events in order of their start, and background noise.

    background: a colour of noise, or a directory of recordings.
    reverberation: seconds in which that of the events falls by 60 dB; 0 for none.
    """

    samples: int
    events: tuple[Event, ...]
    background: str
    background_db: float
    reverberation: float = 0.0

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene(ScenePlan):
    """A scene with its wave: float32 [samples], mono at 16 kHz, within [-1, 1]."""

    wave: np.ndarray


def synthesize(
    plan: ScenePlan,
    rng: np.random.Generator,
    recordings: Recordings | None = None,
    backgrounds: Recordings | None = None,
) -> Scene:
    """Makes the wave of a plan: background noise, and each event at its time, scaled to its peak level.

    recordings: those of the events. backgrounds: those of the plan's directory.
    """
    if backgrounds is None:
        noise = _colored_noise(plan.samples, _SLOPES[plan.background], rng)
    else:
        noise = _recorded_noise(plan.samples, backgrounds, rng)
    wave = noise * _gain(plan.background_db)
    events = np.zeros(plan.samples, np.float32) if plan.reverberation else wave
    for event in plan.events:
        first, last = round(event.start * SAMPLE_RATE), round(event.end * SAMPLE_RATE)
        if event.recording is None:
            sound = SOUNDS[event.text](event, last - first, rng)
        else:
            assert recordings is not None
            sound = _of_length(recordings.wave(event.recording), last - first)
        events[first:last] += sound * (_gain(event.level_db) / np.abs(sound).max())
    if plan.reverberation:
        wave += events + _reverberation(events, plan.reverberation, rng)
    loudest = np.abs(wave).max()
    if loudest > 1:  # overlapping events; scaled together, which keeps comparisons of loudness true
        wave /= loudest
    return Scene(**vars(plan), wave=wave)


def _of_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """Plays a wave faster or slower, so that it has this length."""
    if len(wave) == samples:
        return wave
    return np.interp(np.linspace(0, len(wave) - 1, samples), np.arange(len(wave)), wave).astype(np.float32)


_DIRECT_TO_REVERBERANT_DB = (0.0, 12.0)


def _reverberation(dry: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the reverberation of a wave: its convolution with noise that falls by 60 dB in this time."""
    noise = rng.standard_normal(round(seconds * SAMPLE_RATE), np.float32)
    response = noise * 10 ** (-3 / seconds * _seconds(len(noise)))
    response *= _gain(-rng.uniform(*_DIRECT_TO_REVERBERANT_DB)) / np.linalg.norm(response)
    response = np.concatenate([np.zeros(1, np.float32), response])  # the direct sound comes first
    size = int(np.asarray(scipy.fft.next_fast_len(len(dry) + len(response), real=True)))
    spectrum = np.asarray(scipy.fft.rfft(dry, size)) * np.asarray(scipy.fft.rfft(response, size))
    return np.asarray(scipy.fft.irfft(spectrum, size))[: len(dry)]


def _recorded_noise(samples: int, recordings: Recordings, rng: np.random.Generator) -> np.ndarray:
    """Part of a recording, float32 [samples] with a root mean square of 1; a short one is repeated."""
    wave = recordings.wave(int(rng.integers(len(recordings))))
    first = int(rng.integers(max(len(wave) - samples, 0) + 1))
    noise = np.resize(wave[first : first + samples], samples)
    return noise / max(float(np.sqrt(np.mean(np.square(noise)))), 1e-6)


def _gain(decibels: float) -> np.float32:
    return np.float32(10 ** (decibels / 20))


_SLOPES = {"white": 0.0, "pink": -0.5, "brown": -1.0}  # exponents of frequency, in amplitude
_LOWEST_NOISE_HZ = 20.0


def _colored_noise(samples: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Noise float32 [samples] with amplitude proportional to frequency ** slope and a root mean square of 1."""
    if slope:
        period = int(
            np.asarray(scipy.fft.next_fast_len(samples, real=True))
        )  # a large prime factor is ten times slower
        spectrum = rng.standard_normal((period // 2 + 1, 2), np.float32).view(np.complex64)[:, 0]
        noise = np.asarray(scipy.fft.irfft(spectrum * _spectral_shape(period, slope), period))[:samples]
    else:
        noise = rng.standard_normal(samples, np.float32)
    return noise / np.sqrt(np.mean(np.square(noise)))


@lru_cache(maxsize=64)
def _spectral_shape(samples: int, slope: float) -> np.ndarray:
    hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    return (np.maximum(hertz, _LOWEST_NOISE_HZ) ** slope * (hertz >= _LOWEST_NOISE_HZ)).astype(np.float32)


_RAMP = 0.005  # seconds of fade-in and fade-out: no clicks, and onsets exact to a few ms


def _ramped(sound: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, 1, round(_RAMP * SAMPLE_RATE), dtype=np.float32)
    sound[: len(ramp)] *= ramp
    sound[-len(ramp) :] *= ramp[::-1]
    return sound


def _seconds(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.float32) / SAMPLE_RATE


def _tone(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Sine that glides from the first pitch to the second on a logarithmic scale."""
    assert event.pitch_hz is not None
    first, last = event.pitch_hz
    hertz = np.float32(first) * np.exp(np.linspace(0, np.log(last / first), samples, dtype=np.float32))
    cycles = np.cumsum(hertz, dtype=np.float64) / SAMPLE_RATE + rng.random()
    return _ramped(np.sin(2 * np.pi * (cycles % 1).astype(np.float32)))


_HARMONICS = 12


def _hum(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Sum of harmonics k with amplitudes 1 / k and random phases."""
    assert event.pitch_hz is not None
    k = np.arange(1, _HARMONICS + 1, dtype=np.float32)[:, None]
    phases = rng.uniform(0, 2 * np.pi, k.shape).astype(np.float32)
    waves = np.sin(np.float32(2 * np.pi * event.pitch_hz[0]) * k * _seconds(samples) + phases)
    return _ramped((waves / k).sum(0))


def _noise(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    return _ramped(rng.standard_normal(samples, np.float32))


_CLICK = 0.02  # seconds
_CLICK_DECAY = 0.004
_CLICKS_PER_SECOND = (6.0, 14.0)


def _clicks(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Decaying bursts of noise, equally loud and evenly spaced from the start of the event to its end."""
    click = _seconds(round(_CLICK * SAMPLE_RATE))
    count = max(2, round(rng.uniform(*_CLICKS_PER_SECOND) * samples / SAMPLE_RATE))
    bursts = rng.standard_normal((count, len(click)), np.float32) * np.exp(-click / _CLICK_DECAY)
    bursts /= np.abs(bursts).max(axis=1, keepdims=True)
    starts = np.linspace(0, samples - len(click), count).astype(int)
    sound = np.zeros(samples, np.float32)
    sound[starts[:, None] + np.arange(len(click))] = bursts
    return sound


_KEY_ROWS = np.array([697, 770, 852, 941], np.float32)  # Hz, ITU-T Q.23
_KEY_COLUMNS = np.array([1209, 1336, 1477, 1633], np.float32)
_KEYS_PER_SECOND = 6
_KEY_PAUSE = 0.05  # seconds


def _dial(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Random DTMF keys, evenly spaced from the start of the event to its end."""
    seconds = _seconds(samples)
    count = max(1, round(_KEYS_PER_SECOND * samples / SAMPLE_RATE))
    period = (samples / SAMPLE_RATE + _KEY_PAUSE) / count
    key = np.minimum(seconds / period, count - 1).astype(int)
    since = seconds - (key * period).astype(np.float32)
    gate = np.clip(np.minimum(since, np.float32(period - _KEY_PAUSE) - since) / _RAMP, 0, 1)
    row, column = rng.choice(_KEY_ROWS, count)[key], rng.choice(_KEY_COLUMNS, count)[key]
    return gate * (np.sin(2 * np.pi * row * since) + np.sin(2 * np.pi * column * since))


_SIREN_HZ = (500.0, 1200.0)  # of the lowest pitch
_SIREN_RATIO = (1.6, 2.4)
_SIREN_TURNS_PER_SECOND = (2.0, 5.0)


def _siren(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Sine whose pitch goes up and down on a logarithmic scale."""
    lowest, octaves = log_uniform(_SIREN_HZ, rng), np.log2(rng.uniform(*_SIREN_RATIO))
    turns = rng.uniform(*_SIREN_TURNS_PER_SECOND) * _seconds(samples) + rng.random()
    cycles = np.cumsum(lowest * 2 ** (octaves * (0.5 - 0.5 * np.cos(2 * np.pi * turns)))) / SAMPLE_RATE
    return _ramped(np.sin(2 * np.pi * (cycles % 1).astype(np.float32)))


# Drums: (lowest and highest final pitch in Hz, seconds in which the tone falls by 60 dB), and the same of the noise.
_KICK = (45.0, 65.0), 0.5
_TOM = (90.0, 140.0), 0.5
_SNARE = (160.0, 220.0), 0.2
_SNARE_NOISE = 0.35
_CLAP_NOISE = 0.3
_HAT_NOISE = 0.15
_STRIKE = 0.03  # seconds in which the first pitch of a drum, twice the last, falls
_CLAPS = (0.0, 0.012, 0.024)  # seconds


def _drum(pitch: tuple[float, float], fall: float) -> Callable[[Event, int, np.random.Generator], np.ndarray]:
    def drum(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Decaying sine whose pitch falls by an octave after the strike."""
        seconds = _seconds(samples)
        hertz = log_uniform(pitch, rng) * (1 + np.exp(-seconds / _STRIKE))
        return _ramped(np.sin(2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE) * 10 ** (-3 * seconds / fall))

    return drum


def _rattle(samples: int, fall: float, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(samples, np.float32) * 10 ** (-3 * _seconds(samples) / fall)


def _snare(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A drum and the noise of its wires."""
    noise = _rattle(samples, _SNARE_NOISE, rng)
    return _ramped(_drum(*_SNARE)(event, samples, rng) + noise / np.abs(noise).max())


def _clap(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Bursts of noise in close succession; the last one decays."""
    sound = np.zeros(samples, np.float32)
    for first in (round(seconds * SAMPLE_RATE) for seconds in _CLAPS):
        sound[first:] = _rattle(samples - first, _CLAP_NOISE, rng)
        sound[first:] *= np.minimum(1, np.arange(1, samples - first + 1, dtype=np.float32) / (_RAMP * SAMPLE_RATE))
    return _ramped(sound)


def _hat(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """High noise that decays soon: the second difference of white noise."""
    return _ramped(np.diff(_rattle(samples + 2, _HAT_NOISE, rng), 2))


SOUNDS: dict[str, Callable[[Event, int, np.random.Generator], np.ndarray]] = {
    "tone": _tone,
    "chirp": _tone,
    "click": _clicks,
    "noise": _noise,
    "dial": _dial,
    "hum": _hum,
    "siren": _siren,
    "kick": _drum(*_KICK),
    "tom": _drum(*_TOM),
    "snare": _snare,
    "clap": _clap,
    "hat": _hat,
}


def log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))
