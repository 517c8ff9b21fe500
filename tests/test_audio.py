"""Decoding, resampling and log-mel: recorded outputs, direct evaluations of the formulas, bad input."""

import io
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.audio import (
    MelConfig,
    _resampled_length,
    load_audio,
    log_mel,
    num_audio_tokens,
    resample,
    round_bfloat16,
)
from moss_audio_jax.errors import MossAudioError

FRONTEND = dict(np.load(Path(__file__).parent / "data" / "frontend.npz"))
CLIPS = [key.removeprefix("wav:") for key in FRONTEND if key.startswith("wav:")]
LOSSLESS = ["wav", "flac"]
FORMATS = [*LOSSLESS, "ogg", "mp3"]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def tones(rate: int, seconds: float) -> np.ndarray:
    """Two channels, 440 and 1000 Hz: [samples, 2]."""
    time = np.arange(int(rate * seconds))[:, None] / rate
    return 0.4 * np.sin(2 * np.pi * np.array([440.0, 1000.0]) * time)


def encoded(samples: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


# The formulas once more, written out plainly.


def direct_log_mel(wave: np.ndarray) -> np.ndarray:
    """Frame by frame: explicit reflection, a DFT matrix, one triangle after the other, all in float64."""
    period = 2 * (len(wave) - 1)
    angles = 2 * np.pi * np.outer(np.arange(201), np.arange(400)) / 400
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)

    def mel_to_hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * math.log(8) / math.log(6.4)
    corners = [mel_to_hertz(top * i / 129) for i in range(130)]
    bank = np.zeros((128, 201))
    for m, (low, mid, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for k in range(201):
            hertz = k * 40.0
            height = (hertz - low) / (mid - low) if hertz < mid else (high - hertz) / (high - mid)
            bank[m, k] = max(0.0, height) * 2 / (high - low)

    columns = []
    for frame in range(len(wave) // 160):
        at = (np.arange(400) + frame * 160 - 200) % period
        windowed = wave[np.minimum(at, period - at)].astype(np.float64) * hann
        power = (np.cos(angles) @ windowed) ** 2 + (np.sin(angles) @ windowed) ** 2
        columns.append(np.log10(np.maximum(bank @ power, 1e-10)))
    mel = np.stack(columns, axis=1)
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def direct_resample(wave: np.ndarray, orig_rate: int, new_rate: int, time_dtype: type) -> np.ndarray:
    """Every output as a float64 sum over all inputs, their distances in time rounded to `time_dtype`."""
    orig, new = orig_rate // math.gcd(orig_rate, new_rate), new_rate // math.gcd(orig_rate, new_rate)
    cutoff = time_dtype(min(orig, new) * 0.99)
    output = []
    for j in range(math.ceil(new * len(wave) / orig)):
        cycle, phase = divmod(j, new)
        inputs = (np.arange(len(wave)) - cycle * orig).astype(time_dtype)
        t = (inputs / time_dtype(orig) - time_dtype(phase) / time_dtype(new)) * cutoff
        t = t.astype(np.float64)
        weights = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2, 0.0) * (cutoff / orig)
        output.append(np.dot(weights, wave.astype(np.float64)))
    return np.array(output)


# Log-mel


@pytest.mark.parametrize("clip", CLIPS)
def test_log_mel_equals_the_recorded_one(clip: str) -> None:
    mel, recorded = log_mel(FRONTEND[f"wav:{clip}"]), FRONTEND[f"mel:{clip}"]
    assert mel.dtype == np.float32 and mel.shape == recorded.shape
    np.testing.assert_allclose(mel, recorded, rtol=0, atol=1e-5)
    differing = np.count_nonzero(mel != recorded)
    differing_rounded = np.count_nonzero(round_bfloat16(mel) != round_bfloat16(recorded))
    print(f"{clip}: {differing} of {mel.size} values differ, {differing_rounded} after rounding to bfloat16")
    # Both 0 where this was written; another FFT's float64 may move a value across a rounding boundary.
    assert differing <= mel.size // 1000 and differing_rounded <= 2


@pytest.mark.parametrize("samples", [160, 161, 199, 200, 201, 319, 320, 401, 20479, 20480, 20641])
def test_log_mel_of_awkward_lengths(samples: int) -> None:
    wave = noise(samples)
    mel = log_mel(wave)
    assert mel.shape == (128, samples // 160)
    np.testing.assert_allclose(mel, direct_log_mel(wave), rtol=0, atol=1e-6)


def test_log_mel_follows_its_config_and_leaves_the_wave_alone() -> None:
    wave = noise(16000)
    before = wave.copy()
    assert log_mel(wave, MelConfig(mel_dim=80, mel_hop_length=80)).shape == (80, 200)
    np.testing.assert_array_equal(wave, before)
    np.testing.assert_array_equal(log_mel(wave.astype(np.float64)), log_mel(wave))


def test_log_mel_of_ten_minutes_takes_little_memory() -> None:
    wave = noise(600 * 16000)
    tracemalloc.start()
    mel = log_mel(wave)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * (wave.nbytes + mel.nbytes)  # the padded wave, the mel, and a few blocks


@pytest.mark.parametrize(
    "wave, found",
    [
        (np.zeros(159, np.float32), "not 159"),
        (np.zeros(0, np.float32), "not 0"),
        (np.zeros((2, 16000), np.float32), r"not float32 \[2, 16000\]"),
        (np.zeros(16000, np.int16), "not int16"),
        (np.full(16000, np.nan, np.float32), "not NaN"),
        (np.full(16000, np.inf, np.float32), "not NaN or infinity"),
    ],
)
def test_log_mel_refuses(wave: np.ndarray, found: str) -> None:
    with pytest.raises(MossAudioError, match=found):
        log_mel(wave)


def test_log_mel_refuses_samples_that_make_it_infinite() -> None:
    with pytest.raises(MossAudioError, match=r"about -1 to 1, not up to 1.0e\+37"):
        log_mel(np.full(16000, 1e37, np.float32))


def test_log_mel_refuses_one_bad_sample() -> None:
    wave = noise(16000)
    wave[8000] = np.nan
    with pytest.raises(MossAudioError, match="NaN or infinity"):
        log_mel(wave)


def test_round_bfloat16_goes_to_the_nearest_and_ties_to_even() -> None:
    step = 2.0**-7  # between bfloat16 values from 1 to 2
    values = np.array([1 + 0.5 * step, 1 + 1.5 * step, 1 + 0.51 * step, -1 - 0.49 * step], np.float32)
    rounded = round_bfloat16(values)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, np.array([1, 1 + 2 * step, 1 + step, -1], np.float32))


def test_num_audio_tokens_is_an_eighth_rounded_up() -> None:
    assert [num_audio_tokens(frames) for frames in range(2000)] == [math.ceil(n / 8) for n in range(2000)]


# Resampling

RATES = [
    (8000, 16000),
    (11025, 16000),
    (22050, 16000),
    (44100, 16000),
    (48000, 16000),
    (16000, 44100),
    (22254, 16000),
]


@pytest.mark.parametrize("orig, new", RATES)
@pytest.mark.parametrize("samples", [1, 2, 17, 1000])
def test_resample_equals_the_formula(orig: int, new: int, samples: int) -> None:
    wave = noise(samples)
    resampled = resample(wave, orig, new)
    assert resampled.dtype == np.float32 and len(resampled) == math.ceil(samples * new / orig)
    # With times rounded to float32 like torchaudio's, then without, as far apart as that rounding moves t.
    np.testing.assert_allclose(resampled, direct_resample(wave, orig, new, np.float32), rtol=0, atol=2e-7)
    error_of_t = np.finfo(np.float32).eps * min(orig, new) / math.gcd(orig, new)
    exact = direct_resample(wave, orig, new, np.float64)
    np.testing.assert_allclose(resampled, exact, rtol=0, atol=2e-7 + error_of_t * np.abs(wave).max())


@pytest.mark.parametrize(
    "samples, orig, new, length",
    [
        (441000, 441, 160, 160000),
        (441001, 441, 160, 160001),
        (163983516, 441, 160, 59495152),  # the exact ceiling is 2 more
        (301313086, 441, 160, 109319944),  # 3 less
        (226719802, 3, 1, 75573264),  # 4 more
        (226092957, 1, 2, 452185916),  # 2 less, and all there is: float32 gives 4 more
    ],
)
def test_resampled_length_is_torchaudios(samples: int, orig: int, new: int, length: int) -> None:
    """Recorded from PyTorch by running torchaudio's pad, conv1d and slice on shapes alone."""
    assert _resampled_length(samples, orig, new) == length


def test_resample_of_nearly_coprime_rates_takes_little_memory() -> None:
    wave = noise(10 * 44099)
    tracemalloc.start()
    resample(wave, 44099, 16000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # a dense kernel would take 2.8 GB


def test_resample_leaves_equal_rates_and_empty_waves() -> None:
    wave = noise(100)
    np.testing.assert_array_equal(resample(wave, 16000, 16000), wave)
    assert len(resample(wave[:0], 44100, 16000)) == 0


@pytest.mark.parametrize("orig, new", [(0, 16000), (16000, -1)])
def test_resample_refuses_rates(orig: int, new: int) -> None:
    with pytest.raises(MossAudioError, match=f"{orig} and {new} Hz"):
        resample(noise(100), orig, new)


def test_load_audio_and_mel_of_the_recorded_mp3(goldens_dir: Path) -> None:
    recorded = np.load(goldens_dir / "e2e_test_en.npz")
    wave, mel = load_audio(goldens_dir.parent / "audio" / "test_en.mp3"), recorded["mel_bf16_as_f32"][0]
    assert wave.dtype == np.float32 and wave.shape == recorded["waveform_16k"].shape
    print(f"largest difference of the waveform: {np.abs(wave - recorded['waveform_16k']).max():.1e}")
    np.testing.assert_allclose(wave, recorded["waveform_16k"], rtol=0, atol=1.2e-7)
    assert np.count_nonzero(round_bfloat16(log_mel(recorded["waveform_16k"])) != mel) <= 2  # 0 measured
    differing = np.count_nonzero(round_bfloat16(log_mel(wave)) != mel)
    print(f"{differing} of {mel.size} mel values differ after rounding to bfloat16")
    assert differing <= 25  # 18 measured: the order of the resampler's float32 sums


# Decoding


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate", [16000, 44100])
def test_load_audio_decodes_mixes_and_resamples(tmp_path: Path, suffix: str, rate: int) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tones(rate, 1.5), rate)
    wave = load_audio(path)
    assert wave.dtype == np.float32 and len(wave) == 24000
    inner = slice(200, -200)  # the resampler sees silence beyond both ends
    error = wave[inner] - tones(16000, 1.5).mean(axis=1)[inner]
    assert np.sqrt(np.mean(error**2)) < (1e-4 if suffix in LOSSLESS else 0.02)  # a sample of delay makes 0.06
    np.testing.assert_array_equal(load_audio(path.read_bytes()), wave)
    np.testing.assert_array_equal(load_audio(str(path)), wave)


@pytest.mark.parametrize("suffix", FORMATS)
def test_load_audio_cuts_to_the_sample(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.stack([noise(160000), noise(160000, seed=1)], axis=1), 16000)
    whole = load_audio(path)
    for start, end, samples in [
        (3.3337, 7.1, slice(53339, 113600)),
        (None, 0.5, slice(0, 8000)),
        (9.5, 99.0, slice(152000, 160000)),
    ]:
        cut = load_audio(path, start=start, end=end)
        # After a seek the mp3 decoder itself comes out a last bit (3e-8) off.
        np.testing.assert_allclose(cut, whole[samples], rtol=0, atol=6e-8 if suffix == "mp3" else 0)


def test_load_audio_resamples_a_cut_as_a_file_of_its_own() -> None:
    samples = tones(44100, 2.0)
    cut = encoded(samples[44100 // 2 : 44100], 44100, format="WAV", subtype="FLOAT")
    whole = encoded(samples, 44100, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(whole, start=0.5, end=1.0), load_audio(cut))


def test_load_audio_cuts_a_format_that_cannot_seek() -> None:
    adpcm = encoded(noise(32000), 16000, format="AU", subtype="G721_32")
    assert not soundfile.SoundFile(io.BytesIO(adpcm)).seekable()
    np.testing.assert_array_equal(load_audio(adpcm, start=0.5, end=1.5), load_audio(adpcm)[8000:24000])


def test_load_audio_reads_many_blocks_alike() -> None:
    samples = noise(700_000)
    np.testing.assert_array_equal(load_audio(encoded(samples, 16000, format="WAV", subtype="FLOAT")), samples)


def test_load_audio_reads_a_truncated_file_as_far_as_it_goes() -> None:
    whole = encoded(noise(160000), 16000, format="MP3")
    half = load_audio(whole[: len(whole) // 2])
    assert 70000 < len(half) < 90000
    np.testing.assert_array_equal(half[:60000], load_audio(whole)[:60000])


def with_sample(value: float) -> bytes:
    wave = noise(16000)
    wave[500] = value
    return encoded(wave, 16000, format="WAV", subtype="FLOAT")


@pytest.mark.parametrize(
    "file_name, content, cut, found",
    [
        ("empty.wav", b"", {}, "0 bytes"),
        ("no_samples.wav", encoded(np.zeros(0), 16000, format="WAV"), {}, "not 0 in"),
        ("headerless.raw", noise(1600).tobytes(), {}, "Format not recognised.*ffmpeg"),
        ("torn.flac", encoded(noise(160000), 16000, format="FLAC")[:100], {}, "cannot decode.*ffmpeg"),
        ("nan.wav", with_sample(np.nan), {}, "NaN or infinity"),
        ("inf.wav", with_sample(-np.inf), {}, "NaN or infinity"),
        ("late.wav", with_sample(0), {"start": 1.0}, r"within its 1.000 s, not start=1.0 and end=None"),
        ("later.wav", with_sample(0), {"start": 2.0, "end": 3.0}, "start=2.0 and end=3.0"),
        ("swapped.wav", with_sample(0), {"start": 0.8, "end": 0.2}, "start=0.8 and end=0.2"),
        ("negative.wav", with_sample(0), {"start": -0.5}, "start=-0.5"),
        ("not_a_time.wav", with_sample(0), {"end": math.nan}, "end=nan"),
        ("narrow.wav", with_sample(0), {"start": 0.5, "end": 0.500001}, "hold samples between .* not none"),
    ],
)
def test_load_audio_refuses(tmp_path: Path, file_name: str, content: bytes, cut: dict, found: str) -> None:
    path = tmp_path / file_name
    path.write_bytes(content)
    with pytest.raises(MossAudioError, match=f"{file_name}.* must .*{found}") as from_path:
        load_audio(path, **cut)
    with pytest.raises(MossAudioError, match=f"^shard 7, {file_name}.* must .*{found}") as from_bytes:
        load_audio(content, name=f"shard 7, {file_name}", **cut)
    assert "\n" not in f"{from_path.value}{from_bytes.value}"


def test_load_audio_refuses_what_it_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(MossAudioError, match=r"missing\.wav must .*No such file.*check the path"):
        load_audio(tmp_path / "missing.wav")
    with pytest.raises(MossAudioError, match=r"not a directory: name the files in it"):
        load_audio(tmp_path)
    with pytest.raises(MossAudioError, match="null character"):
        load_audio("a\0b")
    with pytest.raises(MossAudioError, match="5000 characters: give a path"):
        load_audio("a" * 5000)
