"""Opens sound files: paths, bytes, pipes and objects of gs://; says what a file is if it is no sound."""

import errno
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar, cast

import soundfile

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, is_remote, open_binary, reason
from moss_audio_jax.storage.retries import retried

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Source = AnyPath | bytes

_LARGEST_PIPE = 1 << 32  # bytes


@lru_cache(maxsize=4096)
def warn_once(message: str) -> None:
    """Logs a message once per process: training reads a file in every epoch."""
    log.warning("%s", message)


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file that libsndfile reads as a file of their own.

    samples: their number if no header has it, as in an mp3 that was written through a pipe.
    patch: (place, bytes) to put into a header that was never finished.
    """

    begin: int
    end: int
    samples: int | None = None
    patch: tuple[int, bytes] | None = None


class OpenedFile:
    """An open file.

    identity: (path, bytes, time of change) of a file on a disk; None for others.
    error: the first error of reading within libsndfile, which takes an error for the file's end.
    """

    def __init__(self, file: BinaryIO, identity: tuple[str, int, int] | None):
        self.bytes = file
        self.size = file.seek(0, io.SEEK_END)
        self.identity = identity
        self.error: OSError | None = None

    def at(self, place: int, count: int) -> bytes:
        self.bytes.seek(place)
        return self.bytes.read(count)

    def readinto(self, place: int, buffer: Any) -> int:
        try:
            self.bytes.seek(place)
            return cast(io.BufferedIOBase, self.bytes).readinto(buffer)
        except OSError as error:
            self.error = self.error or error
            return 0


class Window:
    """A span as a file object for libsndfile.

    It has no name: soundfile refuses some extensions (.raw) without reading the file.
    """

    _ENDLESS = 1 << 40  # bytes: without a length in a header mpg123 stops at the file's size

    def __init__(self, file: OpenedFile, span: Span):
        self._file, self._span, self._place = file, span, 0
        self._length = span.end - span.begin

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            # mpg123 seeks to the very end to get the size, and before the end to find tags, which must be found there.
            size = self._ENDLESS if offset == 0 and self._span.samples is not None else self._length
            self._place = size + offset
        else:
            self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._length - self._place))
        place = self._span.begin + self._place
        count = self._file.readinto(place, memoryview(buffer)[:count])
        self._place += count
        if self._span.patch is not None:
            begin, content = self._span.patch
            for index in range(max(begin, place), min(begin + len(content), place + count)):
                memoryview(buffer).cast("B")[index - place] = content[index - begin]
        return count


def with_opened(source: Source, name: str, work: Callable[[OpenedFile], Result]) -> Result:
    """Opens a file and returns `work(file)`; every error of the file is a MossAudioError that begins with `name`.

    `work` is called again if the storage fails for a moment.
    """

    def attempt() -> Result:
        with _reading(source, name) as file:
            return work(file)

    with _named_errors(source, name):
        return retried(name, attempt)


@contextmanager
def opened(source: Source, name: str) -> Iterator[OpenedFile]:
    """Opens a file, to read it in pieces; errors are those of `with_opened`, but nothing is tried again."""
    with _named_errors(source, name), _reading(source, name) as file:
        yield file


@contextmanager
def _reading(source: Source, name: str) -> Iterator[OpenedFile]:
    with io.BytesIO(source) if isinstance(source, bytes) else open_binary(source) as opened:
        file = _file(opened, source, name)
        try:
            yield file
        except soundfile.LibsndfileError as error:
            raise file.error or _no_sound(file, name, error) from error
        finally:
            if file.error is not None:
                raise file.error


@contextmanager
def _named_errors(source: Source, name: str) -> Iterator[None]:
    if not isinstance(source, bytes) and "\0" in os.fspath(source):
        raise MossAudioError(f"{name!r} must be a path, not text with a null character: give an audio file as bytes")
    try:
        yield
    except OSError as error:
        raise MossAudioError(_cannot_open(name, error)) from error


def _file(opened: BinaryIO, source: Source, name: str) -> OpenedFile:
    if not opened.seekable():  # a pipe
        content = opened.read(_LARGEST_PIPE + 1)
        if len(content) > _LARGEST_PIPE:
            raise MossAudioError(f"{name}: a pipe must hold at most {_LARGEST_PIPE >> 30} GiB: save it as a file")
        opened, source = io.BytesIO(content), content
    if isinstance(source, bytes) or is_remote(source):
        identity = None
    else:
        status = os.fstat(opened.fileno())
        identity = os.fspath(source), status.st_size, status.st_mtime_ns
    file = OpenedFile(opened, identity)
    if not file.size:
        raise MossAudioError(f"{name} must be an audio file, not 0 bytes: restore it, or leave it out")
    return file


def _cannot_open(name: str, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{name} must be an audio file, not a directory: name the files in it"
    if isinstance(error, PermissionError):
        return f"{name} must be a file that you may read ({reason(error)}): change its permissions, `chmod u+r`"
    if error.errno == errno.ENAMETOOLONG:
        return f"{name[:60]}... must be the path of an audio file, not {len(name)} characters: give a path"
    return f"{name} must be a readable audio file ({reason(error)}): check the path"


# Files that are no sound: first bytes, what the file is, what to do.
_CONVERT = "convert it, for example with `ffmpeg -i INPUT OUTPUT.wav`"
_NO_SOUNDS = (
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file it stands for with `git lfs pull`"),
    (rb"\s*<(?i:!doctype html|html|head|body)", "a web page", "download the file again, logged in if it must be"),
    (rb"\s*<\?xml", "an XML document", "download the file again"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf", "an archive", "unpack it"),
    (rb"....ftyp", "MP4 or M4A", _CONVERT),
    (rb"\x1aE\xdf\xa3", "WebM or Matroska", _CONVERT),
    (rb"0&\xb2u", "WMA", _CONVERT),
    (rb"#!AMR", "AMR", _CONVERT),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "AAC", _CONVERT),
    (rb"\0{64}", "zeros", "copy or download it again"),
)


def _no_sound(file: OpenedFile, name: str, error: soundfile.LibsndfileError) -> MossAudioError:
    head = file.at(0, 200)
    for pattern, what, help_ in _NO_SOUNDS:
        if re.match(pattern, head, re.DOTALL):
            return MossAudioError(f"{name} must be wav, flac, ogg or mp3, not {what}: {help_}")
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c.isspace() for c in text):
        shown = json.dumps(" ".join(text.split())[:60], ensure_ascii=False)
        return MossAudioError(
            f"{name} must be wav, flac, ogg or mp3, not text that begins with {shown}: restore it, or download it again"
        )
    return MossAudioError(
        f"{name} must be wav, flac, ogg or mp3, not data that libsndfile cannot decode "
        f"(error {error.code}: {error.error_string.rstrip('.')}): {_CONVERT}"
    )
