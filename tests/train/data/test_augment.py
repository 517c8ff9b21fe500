"""Effects of augmentation on waves, mels and times; that it is the same each time, and nothing where it is off."""

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile

from moss_audio_jax.audio import log_mel, resample, resampled_length
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.tokenizer import Tokenizer
from train.data.augment import Augmentation, VariedClip, masked
from train.data.budget import Budget, TooLong
from train.data.config import AugmentConfig, DataConfig
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.mixture import ExampleOrder
from train.data.pipeline import TrainingData
from train.data.samples import Sample, SampleMaker

RATE = 16000
EVERYTHING = AugmentConfig(
    speeds=(0.9, 1.0, 1.1), gain_db=(-6.0, 6.0), noise=("white", "pink"), frequency_masks=2, time_masks=1
)
WHOLE = Budget(1000, 8)


def sine(seconds: float, hertz: float = 440.0, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def example(clip: Clip | None = None, **options) -> Example:
    labels = (TimedText("tone", 0.5, 1.0), TimedText("hum", 1.5, 1.75))
    return Example("line 1", clip=clip or Clip(sine(2), name="a sine"), events=labels, **options)


def varied(config: AugmentConfig, seed: int = 0, **options) -> tuple[Example, VariedClip]:
    found = Augmentation(config).versions(example(**options), np.random.default_rng(seed))[0]
    assert isinstance(found.clip, VariedClip)
    return found, found.clip


def maker_of(tokenizer: Tokenizer, config: AugmentConfig) -> SampleMaker:
    return SampleMaker(tokenizer, MossAudioConfig.preset("tiny"), augmentation=Augmentation(config))


def assert_same_samples(found: Sample, expected: Sample) -> None:
    np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
    np.testing.assert_array_equal(found.audio_labels, expected.audio_labels)
    for name, array in vars(expected.inputs).items():
        np.testing.assert_array_equal(getattr(found.inputs, name), array, err_msg=name)


def power(wave: np.ndarray) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64)))


@pytest.mark.parametrize("kind", ["white", "pink", "short", "long"])
def test_noise_has_the_level_that_is_asked_for(kind: str, tmp_path: Path):
    recorded = np.random.default_rng(1).normal(0, 0.3, {"short": 3000}.get(kind, 5 * RATE))
    soundfile.write(tmp_path / "noise.wav", recorded, RATE)
    (tmp_path / "noise.jsonl").write_text('{"audio": "noise.wav", "caption": "noise"}')
    name = kind if kind in ("white", "pink") else str(tmp_path / "noise.jsonl")
    config = AugmentConfig(noise=(name,), noise_probability=1.0, snr_db=(3.0, 12.0))
    clean, levels = sine(2), []
    for seed in range(5):
        noise = varied(config, seed)[1].wave() - clean
        levels.append(10 * np.log10(power(clean) / power(noise)))
    assert 3 <= min(levels) < max(levels) <= 12.001
    exact = varied(dataclasses.replace(config, snr_db=(7.0, 7.0)))[1].wave() - clean
    assert 10 * np.log10(power(clean) / power(exact)) == pytest.approx(7, abs=0.01)
    spectrum = np.square(np.abs(np.fft.rfft(exact)))
    octaves = [spectrum[2 * hertz : 4 * hertz].sum() for hertz in (500, 1000, 2000)]  # bins of 0.5 Hz
    if kind == "pink":  # as much in each octave
        assert octaves[2] / octaves[0] == pytest.approx(1, abs=0.3)
    elif kind == "white":  # as much in each Hz
        assert octaves[2] / octaves[0] == pytest.approx(4, abs=0.8)


def test_silence_stays_silent_and_gain_is_in_decibels():
    noisy = AugmentConfig(noise=("white",), noise_probability=1.0)
    assert not varied(noisy, clip=Clip(np.zeros(RATE, np.float32)))[1].wave().any()
    louder = varied(AugmentConfig(gain_db=(6.0, 6.0)))[1].wave()
    assert 10 * np.log10(power(louder) / power(sine(2))) == pytest.approx(6, abs=1e-4)


def test_how_often_noise_and_masks_come_is_as_asked():
    config = AugmentConfig(noise=("white",), noise_probability=0.25, time_masks=1, mask_probability=0.75)
    clips = [varied(config, seed)[1] for seed in range(400)]
    assert sum(clip.noise is not None for clip in clips) == pytest.approx(100, abs=30)
    assert sum(clip.masks is not None for clip in clips) == pytest.approx(300, abs=30)


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 1.37, 2.0])
def test_speed_changes_length_pitch_and_times(speed: float):
    found, clip = varied(AugmentConfig(speeds=(speed,)))
    wave = clip.wave()
    assert len(wave) == clip.num_samples() and abs(len(wave) - 2 * RATE / speed) <= 1
    assert np.argmax(np.abs(np.fft.rfft(wave))) * RATE / len(wave) == pytest.approx(440 * speed, abs=1)
    times = [(label.start, label.end) for label in found.events]
    np.testing.assert_allclose(times, [(0.5 / speed, 1 / speed), (1.5 / speed, 1.75 / speed)])


def test_sounds_are_where_their_labels_say(tokenizer: Tokenizer):
    """A burst is as far into the clip as the answer says, at any speed."""
    wave = np.zeros(2 * RATE, np.float32)
    wave[RATE // 2 : RATE] = sine(0.5)
    maker = maker_of(tokenizer, AugmentConfig(speeds=(0.5, 1.0, 1.6)))
    answers = set()
    for seed in range(12):
        burst = dataclasses.replace(example(Clip(wave, name="a burst")), events=(TimedText("tone", 0.5, 1.0),))
        sample = maker.fitting(burst, np.random.default_rng(seed), {"events": 1.0}, WHOLE, truncate=False)[0]
        answer = tokenizer.decode(sample.inputs.tokens[0, : sample.num_tokens][sample.loss_mask])
        answers.add(answer)
        start, end = (float(time) for time in re.findall(r"[\d.]+", answer))
        mel = np.concatenate(list(sample.inputs.audio_chunks[0].astype(np.float32)))
        loud = np.flatnonzero(mel.max(axis=1) > mel.max() - 0.5)
        assert abs(loud[0] / 100 - start) < 0.08 and abs(loud[-1] / 100 - end) < 0.08
        said = "".join(tokenizer.decode([int(heard)]) for heard in sample.audio_labels[sample.audio_labels >= 0])
        assert set(said) - set("0123456789.[]t") == set()
    assert answers == {"[1.0]tone[2.0]", "[0.5]tone[1.0]", "[0.3]tone[0.6]"}


def test_a_conversation_keeps_its_speed_and_has_one_clip():
    clip = Clip(sine(2), name="a sine")
    turns = (Message("user", (clip, "When?")), Message("assistant", ("At 0.5 s.",)))
    found, varied_clip = varied(dataclasses.replace(EVERYTHING, speeds=(0.5,)), clip=clip, conversation=turns)
    assert varied_clip.speed == 1 and found.events == example().events
    inside = found.conversation[0].content[0]
    assert isinstance(inside, VariedClip)
    np.testing.assert_array_equal(inside.wave(), varied_clip.wave())
    assert not np.array_equal(inside.wave(), clip.wave()) and found.conversation[1] == turns[1]


def test_masks_are_blocks_of_the_mean_of_at_most_their_width():
    mel = log_mel(np.random.default_rng(0).normal(0, 0.1, 25 * RATE))
    config = AugmentConfig(frequency_masks=1, frequency_width=20, time_masks=1, time_width=0.5)
    widths, counts, before = [], [], mel.copy()
    for seed in range(60):
        result = masked(mel, config, np.random.default_rng(seed))
        hidden = result != mel
        assert (result[hidden] == mel.mean()).all()
        rows, columns = (np.flatnonzero(hidden.all(axis)) for axis in (1, 0))
        np.testing.assert_array_equal(hidden, hidden.all(1)[:, None] | hidden.all(0)[None])
        assert not len(rows) or np.ptp(rows) == len(rows) - 1  # one block
        widths.append(len(rows))
        counts.append(len(columns))
    assert max(widths) == 20 and min(widths) == 0
    assert 100 < max(counts) <= 150 and np.mean(counts) == pytest.approx(75, abs=10)  # 3 of up to 50, for 25 s
    np.testing.assert_array_equal(mel, before)
    short = log_mel(np.random.default_rng(0).normal(0, 0.1, RATE))  # 100 frames: at most a fifth
    lost = [(masked(short, config, np.random.default_rng(seed)) != short).all(0).sum() for seed in range(60)]
    assert max(lost) == 20


def test_masks_reach_the_sample_and_padding_does_not(tokenizer: Tokenizer):
    config = AugmentConfig(time_masks=3, time_width=0.3)
    maker, rng = maker_of(tokenizer, config), np.random.default_rng(4)
    sample = maker.fitting(example(), rng, {"events": 1.0}, WHOLE, truncate=False)[0]
    plain = maker_of(tokenizer, AugmentConfig()).sample("line 1", conversation_of(example()))
    different = (sample.inputs.audio_chunks != plain.inputs.audio_chunks).any(axis=(0, 1, 3))
    assert 10 < different.sum() <= 90 and not different[200:].any()


def conversation_of(of: Example) -> tuple[Message, ...]:
    assert of.clip is not None
    return Message("user", (of.clip, "What?")), Message("assistant", ("A tone.",))


def test_the_same_place_in_the_order_varies_alike_and_is_asked_the_same(order: ExampleOrder, tokenizer: Tokenizer):
    """Whatever was made before it: it follows from the example's own generator."""
    maker, other = maker_of(tokenizer, EVERYTHING), maker_of(tokenizer, EVERYTHING)
    plain = maker_of(tokenizer, AugmentConfig())
    changed = 0

    def made(maker: SampleMaker, number: int) -> Sample:
        drawn = order[number]
        objectives = {"transcribe": 1.0, "caption": 1.0, "plain_text": 1.0}
        return maker.fitting(drawn.example, drawn.rng, objectives, WHOLE, truncate=False)[0]

    forwards = [made(maker, number) for number in range(20)]
    backwards = [made(other, number) for number in reversed(range(20))][::-1]
    for number, (one, two) in enumerate(zip(forwards, backwards, strict=True)):
        assert_same_samples(one, two)
        unvaried = made(plain, number)
        changed += not np.array_equal(one.inputs.audio_chunks, unvaried.inputs.audio_chunks)
        learned = [sample.inputs.tokens[0, : sample.num_tokens][sample.loss_mask] for sample in (one, unvaried)]
        np.testing.assert_array_equal(*learned)
    assert changed == sum(order[number].example.clip is not None for number in range(20)) > 5


def test_nothing_varies_by_default_or_in_evaluation(order: ExampleOrder, maker: SampleMaker, tokenizer: Tokenizer):
    assert not AugmentConfig().on and Augmentation(AugmentConfig()).content_options() == {}
    same, rng = example(), np.random.default_rng(0)
    assert Augmentation(AugmentConfig()).versions(same, rng)[0] is same
    assert rng.integers(2**60) == np.random.default_rng(0).integers(2**60)
    turns = conversation_of(same)
    augmented = maker_of(tokenizer, EVERYTHING)
    assert_same_samples(augmented.sample("a", turns), maker.sample("a", turns))
    extents = [of.extent("a", turns) for of in (augmented, maker)]
    assert len(extents[0].loss_mask) == len(extents[1].loss_mask)


def test_audio_is_not_slowed_down_beyond_its_budget(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Its own length fits a chunk of 4 s, a slower one does not: that is known before anything is decoded."""
    maker, plain = maker_of(tokenizer, AugmentConfig(speeds=(0.9,))), maker_of(tokenizer, AugmentConfig())
    decoded: list[float] = []
    wave = VariedClip.wave
    monkeypatch.setattr(VariedClip, "wave", lambda clip: decoded.append(clip.speed) or wave(clip))

    def made(maker: SampleMaker, budget: Budget, truncate: bool) -> Sample:
        rng = np.random.default_rng(0)
        return maker.fitting(example(Clip(sine(4), name="4 s")), rng, {"events": 1.0}, budget, truncate=truncate)[0]

    for truncate in (False, True):
        assert_same_samples(made(maker, Budget(1000, 1), truncate), made(plain, Budget(1000, 1), truncate))
    assert decoded == [1.0, 1.0]
    assert made(maker, Budget(1000, 2), False).audio_seconds == pytest.approx(4 / 0.9, abs=0.02)
    tokens = made(plain, Budget(1000, 1), False).num_tokens  # which leave no room for the tokens of a slower clip
    assert_same_samples(made(maker, Budget(tokens, 2), True), made(plain, Budget(1000, 2), True))
    with pytest.raises(TooLong):
        made(maker, Budget(tokens - 1, 2), False)


def test_labels_at_the_end_are_judged_by_the_times_of_the_file(tokenizer: Tokenizer):
    maker, rng = maker_of(tokenizer, AugmentConfig(speeds=(0.5,))), np.random.default_rng(0)
    for end, fits in ((2.08, True), (2.2, False)):
        late = dataclasses.replace(example(), events=(TimedText("tone", 1.5, end),))
        if fits:
            [sample] = maker.fitting(late, rng, {"events": 1.0}, WHOLE, truncate=False)
            assert sample.audio_seconds == 4
        else:
            with pytest.raises(MossAudioError, match=r"which ends at 2\.00 s, found 'tone' from 1\.5 to 2\.2 s"):
                maker.fitting(late, rng, {"events": 1.0}, WHOLE, truncate=False)


def test_a_run_goes_on_with_the_same_batches_and_no_other_augmentation(order: ExampleOrder, tokenizer: Tokenizer):
    config = DataConfig(batch_size=2, tokens=160, chunks=2, open_bins=2)

    def data(augment: AugmentConfig) -> TrainingData:
        in_a_worker = pickle.loads(pickle.dumps(maker_of(tokenizer, augment)))
        return TrainingData(order, in_a_worker, config)

    straight, stopped = data(EVERYTHING), data(EVERYTHING)
    batches = [next(straight) for _ in range(4)]
    for _ in range(2):
        next(stopped)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = data(EVERYTHING)
    resumed.set_state(state)
    for batch in batches[2:]:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)
    with pytest.raises(MossAudioError, match="expected augment="):
        data(AugmentConfig()).set_state(state)
    assert "augment" not in data(AugmentConfig()).get_state()["depends_on"]


def test_mistakes_are_named(tmp_path: Path):
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"speeds": (0.3,)}, r"augment\.speeds must be hundredths from 0\.5 to 2, such as 0\.95, not 0\.3"),
        ({"speeds": (0.999,)}, r"augment\.speeds .* not 0\.999"),
        ({"gain_db": (6.0, -6.0)}, r"augment\.gain-db must be a lower and an upper bound in dB, not \(6\.0, -6\.0\)"),
        ({"noise_probability": 2.0}, r"augment\.noise-probability must be from 0 to 1, not 2\.0"),
        ({"time_masks": -1}, r"augment\.time-masks must be 0 or more, not -1"),
    ]
    for options, message in mistakes:
        with pytest.raises(MossAudioError, match=message):
            AugmentConfig(**options)
    with pytest.raises(MossAudioError, match=r"augment\.noise must be white, pink or of files: brown: expected a read"):
        Augmentation(AugmentConfig(noise=("brown",)))
    (tmp_path / "noise.jsonl").write_text('{"audio": "absent.wav", "caption": "noise"}')
    clip = varied(AugmentConfig(noise=(str(tmp_path / "noise.jsonl"),), noise_probability=1.0))[1]
    with pytest.raises(MossAudioError, match=r"noise\.jsonl line 1: absent\.wav must be a readable audio file"):
        clip.wave()
    (tmp_path / "texts.jsonl").write_text('{"text": "no audio"}')
    with pytest.raises(MossAudioError, match=r"its noise, .*texts\.jsonl line 1, has no audio"):
        varied(AugmentConfig(noise=(str(tmp_path / "texts.jsonl"),), noise_probability=1.0))


def test_the_length_of_what_is_resampled_is_known():
    for samples in (1, 159, 1600, 31999):
        for speed in (50, 90, 97, 110, 200):
            assert len(resample(np.zeros(samples, np.float32), speed, 100)) == resampled_length(samples, speed, 100)
