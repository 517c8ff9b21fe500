"""Augmentation of training audio: speed, level, noise, and masks of the log-mel.

Speed is changed by resampling, as in Kaldi: pitch and timbre change with it, and times of labels are scaled before
answers are made from them. The text of a conversation may contain times, so its audio keeps its speed.

Masks are those of SpecAugment (Park et al., 2019) without time warping: blocks of mel bins and of frames, with a width
drawn from 0 to a maximum, are set to the mean of the clip. This is the zero of the normalized features in the paper and
in NeMo (`mask_value=0.0` after per-feature normalization). Whisper in transformers sets its log-mel, which is not
normalized, to 0, which is not the mean.

The augmentation of an example depends on its place in the order alone. It has its own random generator: questions do
not depend on whether augmentation is on.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.fft

from moss_audio_jax.audio import RELEASED_MEL, SAMPLE_RATE, resample, resampled_length
from moss_audio_jax.errors import MossAudioError
from train.data.config import SPEED_STEPS, AugmentConfig
from train.data.manifest import Clip, Example, TimedText

NOISE_SLOPES = {"white": 0.0, "pink": -0.5}  # exponents of frequency, in amplitude
LONGEST_SHARE = 0.2  # of a clip, of one time mask; the paper's p on Switchboard
MASKED_SECONDS = 10.0  # of a clip, for which it gets `time_masks`
_FRAMES_PER_SECOND = SAMPLE_RATE // RELEASED_MEL.mel_hop_length


class Augmentation:
    """Draws the augmentation of examples. Cheap to send to worker processes."""

    def __init__(self, config: AugmentConfig):
        """Opens the sources of noise. Raises MossAudioError if one can't be read."""
        from train.data.shards import open_examples

        self.config = config
        self._noises: dict[str, Sequence[Example]] = {}
        for name in config.noise:
            if name not in NOISE_SLOPES:
                try:
                    self._noises[name] = open_examples(name)
                except MossAudioError as error:
                    raise MossAudioError(f"augment.noise must be white, pink or of files: {error}") from error

    def content_options(self) -> dict[str, Any]:
        """Returns JSON of the options that samples depend on, which a resumed run compares; empty if all is off."""
        if not self.config.on:
            return {}
        sizes = {name: len(examples) for name, examples in self._noises.items()}
        return {"augment": json.loads(json.dumps(dataclasses.asdict(self.config) | {"noise_clips": sizes}))}

    def versions(self, example: Example, rng: np.random.Generator) -> tuple[Example, ...]:
        """Returns the augmented example; if it is slowed down, also a version at its own speed, in case it is too long.

        Without audio, or with augmentation off, returns the example itself. rng: is not advanced.
        """
        clips = _clips(example)
        if not (self.config.on and clips):
            return (example,)
        rng = rng.spawn(1)[0]
        speed = 1.0 if example.conversation else float(rng.choice(self.config.speeds or (1.0,)))
        noisy, masked = rng.random(2) < (self.config.noise_probability, self.config.mask_probability)
        varied = {id(clip): self._varied(clip, bool(noisy), bool(masked), rng) for clip in clips}
        return tuple(_at_speed(example, varied, each) for each in ((speed, 1.0) if speed < 1 else (speed,)))

    def _varied(self, clip: Clip, noisy: bool, masked: bool, rng: np.random.Generator) -> "VariedClip":
        config = self.config
        return VariedClip(
            **vars(clip),
            own=clip,
            gain_db=float(rng.uniform(*config.gain_db)),
            noise=self._noise(clip, rng) if noisy and config.noise else None,
            snr_db=float(rng.uniform(*config.snr_db)),
            masks=config if masked and config.masks else None,
            seed=int(rng.integers(2**63)),
        )

    def _noise(self, clip: Clip, rng: np.random.Generator) -> "str | Clip":
        name = self.config.noise[rng.integers(len(self.config.noise))]
        if name in NOISE_SLOPES:
            return name
        noise = self._noises[name][int(rng.integers(len(self._noises[name])))]
        if not (clips := _clips(noise)):
            raise MossAudioError(f"{clip.name}: its noise, {noise.name}, has no audio; leave that line out.")
        return clips[0]


@dataclass(frozen=True, eq=False)
class VariedClip(Clip):
    """A clip with the augmentation drawn for it; decoding is deterministic.

    own: the original clip. speed: speed factor. gain_db: change of level. noise: a colour, a clip, or None.
    snr_db: level over the noise. masks: options of the masks of its mel, or None. seed: of noise and masks.
    """

    own: Clip = field(kw_only=True)
    speed: float = 1.0
    gain_db: float = 0.0
    noise: str | Clip | None = None
    snr_db: float = 0.0
    masks: AugmentConfig | None = None
    seed: int = 0

    def wave(self) -> np.ndarray:
        wave = resample(self.own.wave(), *self._rates)
        if self.noise is not None:
            rng = np.random.default_rng([self.seed, 0])
            if isinstance(self.noise, str):
                noise = _colored(len(wave), self.noise, rng)
            else:
                noise = _piece(self.noise.wave(), len(wave), rng)
            wave = wave + noise * _scale(wave, noise, self.snr_db)
        return wave * np.float32(10 ** (self.gain_db / 20)) if self.gain_db else wave

    def num_samples(self) -> int:
        return resampled_length(self.own.num_samples(), *self._rates)

    def masked(self, mel: np.ndarray) -> np.ndarray:
        """Masks the log-mel [bins, frames] of `wave`."""
        return mel if self.masks is None else masked(mel, self.masks, np.random.default_rng([self.seed, 1]))

    @property
    def _rates(self) -> tuple[int, int]:
        return round(self.speed * SPEED_STEPS), SPEED_STEPS


def masked(mel: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns a copy of a log-mel [bins, frames] with blocks of bins and of frames set to its mean."""
    bins, frames = mel.shape
    longest = min(round(config.time_width * _FRAMES_PER_SECOND), int(frames * LONGEST_SHARE))
    time_masks = config.time_masks * math.ceil(frames / (MASKED_SECONDS * _FRAMES_PER_SECOND))
    result, mean = mel.copy(), mel.mean()
    for _ in range(config.frequency_masks):
        result[_block(bins, min(config.frequency_width, bins), rng)] = mean
    for _ in range(time_masks):
        result[:, _block(frames, longest, rng)] = mean
    return result


def _block(length: int, widest: int, rng: np.random.Generator) -> slice:
    """Draws a slice of a width from 0 to `widest`, anywhere within `length`."""
    width = int(rng.integers(widest + 1))
    first = int(rng.integers(length - width + 1))
    return slice(first, first + width)


def _scale(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.float32:
    """Factor of a noise that gives the signal-to-noise ratio `snr_db`; 0 if one of them is silent."""
    power, noise_power = (float(np.mean(np.square(part, dtype=np.float64))) for part in (wave, noise))
    return np.float32(math.sqrt(power / noise_power * 10 ** (-snr_db / 10)) if noise_power else 0)


def _colored(samples: int, color: str, rng: np.random.Generator) -> np.ndarray:
    """Noise float32 [samples] with amplitude proportional to a power of frequency, at any level."""
    slope = NOISE_SLOPES[color]
    if not slope:
        return rng.standard_normal(samples, np.float32)
    length = 1 << (samples - 1).bit_length()  # a fast FFT size
    spectrum = rng.standard_normal((length // 2 + 1, 2), np.float32).view(np.complex64)[:, 0]
    spectrum *= np.maximum(np.arange(len(spectrum), dtype=np.float32), 1) ** np.float32(slope)
    return np.asarray(scipy.fft.irfft(spectrum, length))[:samples]


def _piece(noise: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Random piece [samples] of a noise; a shorter noise is repeated."""
    first = int(rng.integers(len(noise) - samples + 1 if len(noise) >= samples else len(noise)))
    return np.take(noise, np.arange(first, first + samples), mode="wrap")


def _clips(example: Example) -> list[Clip]:
    """Distinct clips of an example; the labelled clip is usually in the conversation too."""
    pieces = [example.clip, *(piece for turn in example.conversation for piece in turn.content)]
    return list({id(piece): piece for piece in pieces if isinstance(piece, Clip)}.values())


def in_own_time(example: Example, seconds: float) -> tuple[Example, float]:
    """Converts labels of an augmented example, and a time in it, to times of the original audio."""
    speed = example.clip.speed if isinstance(example.clip, VariedClip) else 1.0
    return _labels_at(example, 1 / speed), seconds * speed


def _at_speed(example: Example, varied: Mapping[int, VariedClip], speed: float) -> Example:
    """Replaces clips by `varied` (by id of the original) at a speed, and scales the times of labels."""

    def clip(piece: Any) -> Any:
        return replace(varied[id(piece)], speed=speed) if isinstance(piece, Clip) else piece

    conversation = tuple(replace(turn, content=tuple(map(clip, turn.content))) for turn in example.conversation)
    return replace(_labels_at(example, speed), conversation=conversation, clip=clip(example.clip))


def _labels_at(example: Example, speed: float) -> Example:
    def scaled(labels: Sequence[TimedText]) -> tuple[TimedText, ...]:
        return tuple(replace(label, start=label.start / speed, end=label.end / speed) for label in labels)

    if speed == 1:
        return example
    words, segments, events = map(scaled, (example.words, example.segments, example.events))
    return replace(example, words=words, segments=segments, events=events)
