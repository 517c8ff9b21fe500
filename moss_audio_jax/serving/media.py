"""Where a clip comes from, and how much of it is read and decoded.

    base64, data: URI, file below a directory, https -> bytes -> wave at 16 kHz

Nothing is allocated because a header says so: decoding goes piece by piece, and ends at the limit.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Awaitable, Callable
from pathlib import PurePosixPath
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.audio_stream import stream_audio
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.serving.errors import ApiError
from moss_audio_jax.serving.fetching import fetch
from moss_audio_jax.serving.limits import Limits

FORMATS = ("wav", "mp3", "flac", "ogg", "opus")  # of `input_audio`; the bytes decide
_DATA_URI = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.ASCII | re.IGNORECASE)


class Media:
    """Reads clips. hosts: from which https is allowed. files: directory whose files may be named; None: no files."""

    def __init__(self, limits: Limits, hosts: frozenset[str] = frozenset(), files: str | None = None):
        self.limits, self._hosts = limits, hosts
        self._files = None if files is None else os.path.realpath(files)

    async def load(
        self, url: str, where: str, most: int, in_thread: Callable[[Callable[[], bytes]], Awaitable[bytes]]
    ) -> bytes:
        """Returns the content of a URL, of `most` bytes at most. where: its field, for errors."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return await in_thread(lambda: from_data_uri(url, where))
        if scheme == "file":
            return await in_thread(lambda: self._from_file(url, where, most))
        if scheme == "https":
            return await fetch(url, where, self._hosts, most, self.limits.body_seconds)
        raise _refused("must be a data: URI, or an https: or file: URL that this server allows", where)

    def wave(self, content: bytes, where: str, seconds: float) -> np.ndarray:
        """Decodes a clip of `seconds` at most: float32 [samples] at 16 kHz."""
        pieces, left = [], int(seconds * SAMPLE_RATE)
        for piece in pieces_of(content, where, seconds):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise too_long(where, seconds)
        return np.concatenate(pieces)

    def _from_file(self, url: str, where: str, most: int) -> bytes:
        if self._files is None:
            raise _refused("is a file: URL, and this server allows none", where)
        parts = urlsplit(url)
        path = os.fsdecode(unquote_to_bytes(parts.path))
        if parts.netloc not in ("", "localhost") or "\0" in path or not path.startswith(self._files + "/"):
            raise _refused("must be a file below the directory that this server allows", where)
        try:
            return _read_below(self._files, PurePosixPath(path[len(self._files) + 1 :]), most, where)
        except OSError as error:
            raise _refused("must be a file below the directory that this server allows", where) from error


def pieces_of(content: bytes, where: str, seconds: float):
    """Yields a clip's wave in pieces; ApiError if it can't be decoded, or if its header says more than `seconds`."""
    try:
        yield from stream_audio(content, name=where, longest=seconds)
    except MossAudioError as error:
        raise ApiError(str(error), param=where, code="invalid_audio") from error


def too_long(where: str, seconds: float) -> ApiError:
    message = f"{where} must have at most {seconds:g} s of audio, with what comes before it: give less"
    return ApiError(message, param=where, code="audio_too_long")


def from_base64(data: str, where: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{where} must be base64 ({error})", param=where, code="invalid_base64") from error


def from_data_uri(url: str, where: str) -> bytes:
    head = _DATA_URI.match(url[:200])
    if head is None:
        raise _refused("must be a data: URI such as data:audio/wav;base64,UklGR...", where)
    if head[2].lower().endswith(";base64"):
        return from_base64(url[head.end() :], where)
    return unquote_to_bytes(url[head.end() :])


def _read_below(root: str, path: PurePosixPath, most: int, where: str) -> bytes:
    """Reads a file below a directory, part by part, and follows no link: none can lead out, not even a new one."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(path.parts, start=1):
            if part == "..":
                raise _refused("must be a file below the directory that this server allows", where)
            last = number == len(path.parts)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_NONBLOCK if last else os.O_DIRECTORY)
            found = os.open(part, flags, dir_fd=directory)
            os.close(directory)
            directory = found
        if not stat.S_ISREG(os.fstat(directory).st_mode):
            raise _refused("must be a file, not a directory or a device", where)
        with os.fdopen(os.dup(directory), "rb") as file:
            content = file.read(most + 1)
    finally:
        os.close(directory)
    if len(content) > most:
        raise too_large(where, most)
    return content


def too_large(where: str, most: int) -> ApiError:
    return ApiError(f"{where} has more than the {most:,} bytes that are left for it", 413, param=where)


def _refused(message: str, where: str) -> ApiError:
    return ApiError(f"{where} {message}", param=where, code="invalid_url")
