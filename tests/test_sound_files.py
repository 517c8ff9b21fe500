"""Files as people have them: joined, cut short, damaged, never finished, through a pipe, or no sound at all."""

import io
import os
import struct
import threading
import tracemalloc

import numpy as np
import pytest
import soundfile

from moss_audio_jax.audio import load_audio, num_samples, resample
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sound import decode, files, spans

RATE = 16000


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def encoded(samples: np.ndarray, format: str, rate: int = RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **options)
    return file.getvalue()


def wav(samples: np.ndarray, *, size: int | None = None, rate: int = RATE) -> bytes:
    """16 bits. size: what the header says of the samples, in bytes."""
    data = (samples * 32767).astype("<i2").tobytes()
    size = len(data) if size is None else size
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, (2 * rate) % 2**32, 2, 16)
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + size & 0xFFFFFFFF, b"WAVE")
        + fmt
        + struct.pack("<4sI", b"data", size)
        + data
    )


def quiet_mp3(seconds: int = 60) -> bytes:
    """An mp3 of few bits, with a bit reservoir across frames."""
    time = np.arange(seconds * RATE)
    tone = (0.05 * np.sin(time * 0.02) + 0.001 * noise(len(time))) * np.abs(np.sin(time * 1e-5))
    return encoded(tone, "MP3", bitrate_mode="VARIABLE", compression_level=0.9)


def without_tag(mp3: bytes) -> bytes:
    """As it comes through a pipe: without the first frame, which says how many there are."""
    second = mp3.index(mp3[:2], 4)
    assert b"Xing" in mp3[:second]
    return mp3[second:]


@pytest.fixture(autouse=True)
def unsaid():
    """Warnings appear once a process."""
    files.warn_once.cache_clear()


# Joined


@pytest.mark.parametrize("format", ["MP3", "FLAC", "OGG"])
@pytest.mark.parametrize("rates", [(RATE, RATE), (RATE, 44100), (RATE, RATE, 8000)])
def test_joined_files_are_all_read(tmp_path, caplog, format, rates):
    files = [encoded(noise(rate * 3, seed), format, rate) for seed, rate in enumerate(rates)]
    alone = np.concatenate([load_audio(file) for file in files])
    path = tmp_path / "joined"
    path.write_bytes(b"".join(files))
    for source in (path, path.read_bytes()):
        whole = load_audio(source)
        assert len(whole) == num_samples(source) == len(rates) * 3 * RATE
        np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-7)
        # A cut in the second file, one across the border, and one that ends with the file.
        for start, end, file, inner in [(4.0, 5.0, 1, (1.0, 2.0)), (2.5, 3.0, 0, (2.5, None)), (None, 99, None, ())]:
            cut = load_audio(source, start=start, end=end)
            expected = whole if file is None else load_audio(files[file], start=inner[0], end=inner[1])
            np.testing.assert_allclose(cut, expected, rtol=0, atol=1e-7)
            assert num_samples(source, start=start, end=end) == len(expected)
        assert len(load_audio(source, start=2.0, end=4.5)) == 2.5 * RATE
    with pytest.raises(MossAudioError, match=f"within its {len(rates) * 3}.000 s"):
        load_audio(path, start=len(rates) * 3.0)
    assert not caplog.records


def test_mp3_without_a_length_is_all_read(caplog):
    whole, piped = quiet_mp3(20), without_tag(quiet_mp3(20))
    waves = load_audio(whole), load_audio(piped)
    assert len(waves[1]) == num_samples(piped) and len(waves[0]) < len(waves[1]) < len(waves[0]) + 4 * 1152
    delay = 1105  # of encoder and decoder, which the tag says
    np.testing.assert_allclose(waves[1][delay : delay + len(waves[0])], waves[0], rtol=0, atol=1e-7)
    picture = b"ID3\4\0\0\0\0\x7f\x7f" + bytes(127 * 129)
    for joined in (piped + piped, picture + piped + picture + piped, piped + b"TAG" + bytes(125) + piped):
        assert len(load_audio(joined)) == num_samples(joined) == 2 * len(waves[1])
    for joined in (whole + piped, piped + whole):
        assert len(load_audio(joined)) == num_samples(joined) == len(waves[0]) + len(waves[1])
    assert not caplog.records


def test_mp3_is_the_same_in_blocks_and_in_cuts():
    mp3 = quiet_mp3()
    whole = soundfile.read(io.BytesIO(mp3), dtype="float32")[0]
    np.testing.assert_allclose(load_audio(mp3), whole, rtol=0, atol=1e-7)  # 0.03 where soundfile seeks between blocks
    for start in (2.5, 7.50006, 31.7):
        cut = load_audio(mp3, start=start, end=start + 1)
        np.testing.assert_allclose(cut, whole[round(start * RATE) :][:RATE], rtol=0, atol=1e-7)


def test_files_with_tags_and_rubbish_around_them_are_whole(caplog):
    for format in ("MP3", "FLAC", "OGG", "WAV"):
        file, wave = encoded(noise(RATE), format), load_audio(encoded(noise(RATE), format))
        for odd in (file + b"TAG" + bytes(125), file + bytes(5000)):
            np.testing.assert_array_equal(load_audio(odd), wave)
            assert num_samples(odd) == RATE
    assert not caplog.records


def test_the_border_of_joined_files_is_found_across_blocks_of_the_scan(monkeypatch):
    flac = encoded(noise(RATE), "FLAC")
    for block in (len(flac) + 1, len(flac) + 2, 64):
        monkeypatch.setattr(spans, "_SCAN_BLOCK", block)
        assert num_samples(flac + flac) == 2 * RATE


# Cut short and damaged


@pytest.mark.parametrize("format", ["WAV", "AIFF", "MP3", "FLAC"])
def test_a_file_cut_short_is_read_with_a_warning_that_says_how_much(tmp_path, caplog, format):
    path, file = tmp_path / "torn.snd", encoded(noise(10 * RATE), format)
    path.write_bytes(file[: len(file) * 2 // 3])
    wave = load_audio(path)
    assert 6.2 * RATE < len(wave) < 6.8 * RATE
    np.testing.assert_allclose(wave[: 6 * RATE], load_audio(file)[: 6 * RATE], rtol=0, atol=1e-7)
    assert caplog.messages == [
        f"{path}: {len(wave) / RATE:.2f} of 10.00 s can be read, the file is damaged or cut short: "
        "fetch or write it again"
    ]
    load_audio(path)
    assert len(caplog.messages) == 1  # not in every epoch
    load_audio(path, start=1.0, end=5.0)
    assert len(caplog.messages) == 1  # the cut is whole
    files.warn_once.cache_clear()
    assert num_samples(path) >= len(wave)
    assert len(caplog.messages) == (2 if format in ("WAV", "AIFF") else 1)  # whose header and size say it


def test_ogg_cut_short_is_read_with_a_warning(tmp_path, caplog):
    path, file = tmp_path / "torn.ogg", encoded(noise(10 * RATE), "OGG")
    path.write_bytes(file[: len(file) * 2 // 3])
    wave = load_audio(path)
    assert caplog.messages == [
        f"{path}: the file ends before its last page, after {len(wave) / RATE:.2f} s: "
        "if it was cut short, fetch it again"
    ]


@pytest.mark.parametrize("format, most", [("MP3", 9.99), ("FLAC", 6.0)])
def test_a_damaged_middle_is_named(tmp_path, caplog, format, most):
    path, file = tmp_path / "damaged", bytearray(encoded(noise(10 * RATE), format))
    middle = len(file) // 2
    file[middle : middle + 300] = np.random.default_rng(0).bytes(300)
    path.write_bytes(file)
    seconds = len(load_audio(path)) / RATE
    assert 4.0 < seconds < most and f"{path}: {seconds:.2f} of 10.00 s can be read" in caplog.text


def test_what_lies_before_bytes_that_no_decoder_passes_is_read(caplog):
    file = bytearray(encoded(noise(10 * RATE), "MP3"))
    file[len(file) // 2 : len(file) * 3 // 4] = bytes(len(file) // 4)
    assert 4.5 * RATE < len(load_audio(bytes(file))) < 5.1 * RATE
    assert "of 10.00 s can be read" in caplog.text


# Headers


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_a_recording_that_was_never_closed_is_read(caplog, size):
    whole = wav(noise(RATE))
    wave = load_audio(wav(noise(RATE), size=size), name="crashed.wav")
    np.testing.assert_array_equal(wave, load_audio(whole))
    assert [message.split(",")[0] for message in caplog.messages] == (
        ["crashed.wav: the header was never finished"] if size == 0 else []
    )
    assert num_samples(wav(noise(RATE), size=size)) == RATE


def test_a_wav_without_samples_is_not_taken_for_a_crashed_one():
    empty = wav(noise(0)) + b"LIST" + struct.pack("<I", 40) + bytes(40)
    with pytest.raises(MossAudioError, match="must hold samples, not 0 in"):
        load_audio(empty)


def test_flac_through_a_pipe_is_counted():
    flac = bytearray(encoded(noise(RATE), "FLAC"))
    flac[21] &= 0xF0  # STREAMINFO starts at byte 8; its last 36 bits before the checksum count the samples
    flac[22:26] = bytes(4)
    np.testing.assert_array_equal(load_audio(bytes(flac)), load_audio(encoded(noise(RATE), "FLAC")))
    assert num_samples(bytes(flac)) == RATE
    assert len(load_audio(bytes(flac), start=0.25, end=0.5)) == RATE // 4


@pytest.mark.parametrize("rate", [1, 99, 384_001, 9_999_991, 2**31 - 1])
def test_rates_that_no_sound_has_are_refused_at_once(rate):
    tracemalloc.start()
    for function in (load_audio, num_samples):
        with pytest.raises(MossAudioError, match=rf"clip.wav: the sample rate .* 100 to 384,000 Hz, not {rate}: "):
            function(wav(noise(2000), rate=rate), name="clip.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_the_highest_rate_is_resampled_in_little_memory():
    tracemalloc.start()
    assert len(load_audio(wav(noise(2000), rate=383_987))) == len(resample(noise(2000), 383_987, RATE)) == 84
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


def test_more_hours_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "LONGEST_HOURS", 1 / 3600)
    assert len(load_audio(wav(noise(2 * RATE)), end=0.5)) == RATE // 2
    with pytest.raises(MossAudioError, match=r"long.wav: a clip must be at most .* by start and end"):
        load_audio(wav(noise(2 * RATE)), name="long.wav")


# Channels


def test_channels_that_cancel_are_named(caplog):
    wave = noise(RATE)
    load_audio(encoded(np.stack([wave, -wave], axis=1), "WAV"), name="stereo.wav")
    assert caplog.messages[0].startswith("stereo.wav: the mean of its channels is silent (peak 0) while they are not")
    caplog.clear()
    for quiet in (np.stack([wave, 0 * wave], axis=1), np.zeros((RATE, 2)), np.stack([wave, -0.9 * wave], axis=1)):
        load_audio(encoded(quiet, "WAV"))
    assert not caplog.records


# What is no sound


@pytest.mark.parametrize(
    "content, found",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer: .*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page: download"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document: download"),
        (b'{"error": "rate limited"}', r'text that begins with "{\\"error\\": \\"rate limited\\"}": restore'),
        ("Zugriff verweigert: Schlüssel fehlt\n".encode() * 9, "text that begins with .*Schlüssel"),
        (b"PK\3\4" + bytes(90), "an archive: unpack"),
        (b"\0\0\0\x20ftypM4A " + bytes(90), "MP4 or M4A: convert it.*ffmpeg"),
        (bytes(4000), "zeros: copy or download"),
    ],
)
def test_what_stands_under_the_name_of_a_clip_is_named(tmp_path, content, found):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    for function in (load_audio, num_samples):
        with pytest.raises(MossAudioError, match=rf"^{path} must be wav, flac, ogg or mp3, not {found}") as error:
            function(path)
        assert "\n" not in str(error.value)


def test_a_pipe_is_read_to_its_end(tmp_path):
    pipe, content = tmp_path / "pipe", encoded(noise(RATE), "MP3")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    np.testing.assert_array_equal(load_audio(pipe), load_audio(content))
    writer.join()


def test_a_file_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(files, "open_binary", denied)
    with pytest.raises(MossAudioError, match=r"^a.wav must be a file that you may read \(Permission denied\): .*chmod"):
        load_audio("a.wav")
