"""Errors that are tried again, and the outcome."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import soundfile
from gcsfs.retry import HttpError
from google.api_core.exceptions import Forbidden, ServiceUnavailable

from moss_audio_jax import MossAudioError
from moss_audio_jax.audio import load_audio, num_samples
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.errors import StorageError
from moss_audio_jax.sound import files
from moss_audio_jax.storage import retries
from moss_audio_jax.storage.retries import is_transient, retried


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "file")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSIENT = [
    os_error(errno.EIO),
    os_error(errno.ESTALE),
    os_error(errno.ETIMEDOUT),
    os_error(errno.ECONNRESET),
    TimeoutError(),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("not completed"),
    HttpError({"code": 408, "message": "too slow"}),
    HttpError({"code": "429", "message": "too fast"}),
    HttpError({"code": 503, "message": "away"}),
    HttpError({"code": 599}),
    ServiceUnavailable("away"),
    ValueError("UNAVAILABLE: Error opening 'zarr' driver: HTTP response code: 503"),
    ValueError("ABORTED: all 32 retry attempts failed"),
    RuntimeError("DEADLINE_EXCEEDED"),
    RuntimeError("read() failed: Input/output error; reading a.arrayrecord"),
    RuntimeError("recv failure: Connection reset by peer"),
    caused(ValueError("can't read"), os_error(errno.EIO)),
    ExceptionGroup("several", [KeyError("a"), os_error(errno.EIO)]),
]
LASTING = [
    FileNotFoundError(errno.ENOENT, "No such file", "503"),
    PermissionError(errno.EACCES, "Permission denied"),
    os_error(errno.ENOSPC),
    os_error(errno.EMFILE),
    HttpError({"code": 400, "message": "bad"}),
    Forbidden("no"),
    ValueError("DATA_LOSS: Error decoding"),
    ValueError("the option is unavailable, the run was aborted"),
    soundfile.LibsndfileError(2),
    KeyError("params"),
    MemoryError(),
    StorageError("tried in vain"),
    caused(MossAudioError("bad file"), os_error(errno.EIO)),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_be_gone_the_next_time(error: Exception):
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_stays(error: Exception):
    assert not is_transient(error)


def failing(times: int, error: Exception) -> Callable[[], str]:
    errors = [error] * times

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    return work


def test_attempts_are_logged_and_pause_ever_longer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    pauses: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", pauses.append)
    with caplog.at_level(logging.WARNING):
        assert retried("gs://b/x", failing(5, os_error(errno.EIO))) == "done"
    assert len(caplog.messages) == 5 and "gs://b/x: [Errno 5] Input/output error" in caplog.messages[0]
    assert "attempt 1 of 6" in caplog.messages[0]
    for pause, mean in zip(pauses, (1, 2, 4, 8, 16), strict=True):
        assert 0.5 * mean <= pause <= 1.5 * mean
    with pytest.raises(StorageError, match=r"gs://b/x: storage failed in each of 6 attempts \(\[Errno 5\]"):
        retried("gs://b/x", failing(6, os_error(errno.EIO)))
    with pytest.raises(PermissionError):
        retried("x", failing(1, PermissionError()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MOSS_AUDIO_STORAGE_ATTEMPTS", "0", "must be a number of attempts, 1 or more, not '0'"),
        ("MOSS_AUDIO_STORAGE_ATTEMPTS", "many", "must be a number of attempts, 1 or more, not 'many'"),
        ("MOSS_AUDIO_STORAGE_BACKOFF", "-1", "must be seconds, 0 or more, not '-1'"),
        ("MOSS_AUDIO_STORAGE_BACKOFF", "nan", "must be seconds, 0 or more, not 'nan'"),
    ],
)
def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(MossAudioError, match=f"{name} {message}"):
        retried("x", failing(0, ValueError()))


@pytest.mark.parametrize("error", [StorageError("gs://b/x: tried in vain"), HttpError({"code": 503, "message": "x"})])
def test_commands_end_with_the_code_to_try_again(error: Exception, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        run_cli(failing(1, error))
    assert end.value.code == 75
    assert capsys.readouterr().err.startswith("error: ")


class Flaky:
    """A file whose reads fail, those in `failing` by number over all openings."""

    def __init__(self, failing: set[int]):
        self.reads, self.failing, self.openings = 0, failing, 0

    def open(self, path: str) -> "FlakyFile":
        self.openings += 1
        return FlakyFile(path, self)


class FlakyFile:
    def __init__(self, path: str, flaky: Flaky):
        self._file, self._flaky = open(path, "rb"), flaky  # noqa: SIM115 - closed by __exit__
        self.seek, self.tell, self.read = self._file.seek, self._file.tell, self._file.read
        self.seekable, self.fileno = self._file.seekable, self._file.fileno

    def __enter__(self) -> "FlakyFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def readinto(self, buffer: memoryview) -> int:
        self._flaky.reads += 1
        if self._flaky.reads in self._flaky.failing:
            raise os_error(errno.EIO)
        return self._file.readinto(buffer)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_audio_is_read_again_wherever_a_read_fails(
    ending: str, tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """libsndfile takes a failed read for the end of the file, or for no audio at all where it is in the header."""
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 40_000), 16000)
    expected, samples = load_audio(path), num_samples(path)
    whole = Flaky(set())
    monkeypatch.setattr(files, "open_binary", whole.open)
    load_audio(path)
    for number in {1, 2, 3, whole.reads // 2, whole.reads - 1, whole.reads}:
        flaky = Flaky({number})
        monkeypatch.setattr(files, "open_binary", flaky.open)
        np.testing.assert_array_equal(load_audio(path), expected)
        assert flaky.openings == 2
    assert "can be read" not in caplog.text  # nothing is missing
    monkeypatch.setattr(files, "open_binary", Flaky({1}).open)
    assert num_samples(path) == samples
    monkeypatch.setattr(files, "open_binary", Flaky(set(range(10_000))).open)
    with pytest.raises(StorageError, match=rf"a\.{ending}: storage failed in each of 6 attempts"):
        load_audio(path)
