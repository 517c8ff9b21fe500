"""One layer for paths: a disk of this machine, or Google Cloud Storage as gs://bucket/directory.

`to_path` gives an `epath.Path`, whose methods are pathlib's for both. What differs is kept here:

* An object appears when its upload is complete, and never grows: so files are written whole (`written_whole`), and one
  that lines are added to is uploaded anew now and then (`GrowingFile`).
* There are no directories apart from what lies in them, and no links. Moving one moves each of its objects, so nothing
  of ours relies on that: what makes a directory whole is the file that is written last.
* Libraries that know files of a disk alone get one (`local_copy`, `local_directory`), or a refusal (`require_local`).
"""

import functools
import io
import os
import pathlib
import posixpath
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import BinaryIO, cast

from etils import epath
from fsspec.config import conf

from moss_audio_jax.errors import MossAudioError

Path = epath.Path
AnyPath = str | os.PathLike[str]

UPLOAD_SECONDS = 60  # between uploads of a file that grows
# Other hosts write into the directories that this one lists.
conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def to_path(path: AnyPath) -> Path:
    """A path of either kind; raises MossAudioError for a URL of another kind, and where gs:// can't be used."""
    text = os.fspath(path)
    scheme = re.match(r"(\w+)://", text)
    if re.match(r"gs:/(?!/)", text):
        raise MossAudioError(f"{text} lost a slash: give gs:// paths as text, which pathlib.Path does not keep")
    if scheme is not None and scheme[1] != "gs":
        raise MossAudioError(f"{text}: expected a path of this machine or of gs://, found one of {scheme[0]}")
    if scheme is not None and find_spec("gcsfs") is None:
        raise MossAudioError(f"{text} needs gcsfs, which is not installed: pip install 'moss-audio-jax[gcs]'")
    return epath.Path(text)


def is_remote(path: AnyPath) -> bool:
    return "://" in os.fspath(path)


def absolute(path: AnyPath) -> Path:
    """As Orbax needs it. (`epath.Path.absolute` takes gs:// for a directory.)"""
    return to_path(path) if is_remote(path) else to_path(path).absolute()


def url(path: AnyPath) -> str:
    """As TensorStore needs it: file:///... or gs://..."""
    return absolute(path).as_uri()


def join(directory: AnyPath, name: str) -> str:
    """What `name` means in a file of `directory`: relative to that, absolute, or gs://; `..` is followed."""
    joined = name if is_remote(name) else posixpath.join(os.fspath(directory), name)
    scheme, separator, place = joined.rpartition("://")
    return scheme + separator + posixpath.normpath(place) if separator else joined


def is_inside(directory: AnyPath, file: AnyPath) -> bool:
    """Whether a file is where its name says, neither by `..` nor by a link elsewhere."""
    # Of gs:// paths, which have no links, realpath resolves `..` alone.
    return pathlib.Path(os.path.realpath(file)).is_relative_to(os.path.realpath(directory))


def children(directory: AnyPath) -> list[Path]:
    """What is in a directory, by name; nothing if there is none."""
    directory = to_path(directory)
    return sorted(directory.iterdir()) if directory.is_dir() else []


def reason(error: OSError) -> str:
    """What an error says apart from the path, which those of gs:// say in their own way."""
    return error.strerror or (os.strerror(2) if isinstance(error, FileNotFoundError) else str(error))


def open_binary(path: AnyPath) -> BinaryIO:
    """To read: a file without a buffer, or an object's bytes in memory."""
    return io.BytesIO(to_path(path).read_bytes()) if is_remote(path) else cast(BinaryIO, open(path, "rb", buffering=0))


@contextmanager
def written_whole(path: AnyPath) -> Iterator[pathlib.Path]:
    """A file of this machine to write into, which becomes `path` at the end; until then `path` stays as it is."""
    path = to_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            yield (file := pathlib.Path(directory, path.name))
            epath.Path(file).copy(path, overwrite=True)
        return
    # Of this process alone, for others may write the same file.
    file = pathlib.Path(path.with_name(f"{path.name}.{os.getpid()}.partial"))
    try:
        yield file
        file.replace(path)
    finally:
        file.unlink(missing_ok=True)


def write_whole(path: AnyPath, content: str) -> None:
    with written_whole(path) as file:
        file.write_text(content, "utf-8")


class GrowingFile:
    """A file that bytes are added to, begun if it isn't there.

    On a disk they are there after `flush`. An object takes no more bytes once it is written, so its bytes are held in
    memory and uploaded anew, all of them: by `flush` if the last time is UPLOAD_SECONDS ago, always by `commit` and
    `close`. A kill loses those in between, and so a run commits its lines before each checkpoint. An object for each
    upload would spare traffic (of metrics.jsonl some 40 MB a minute after 100,000 steps), but every reader would have
    to put them together.
    """

    def __init__(self, path: AnyPath):
        self._path = to_path(path)
        self._file: BinaryIO = io.BytesIO() if is_remote(path) else open(path, "ab")  # noqa: SIM115 - closed by `close`
        if isinstance(self._file, io.BytesIO) and self._path.exists():
            self._file.write(self._path.read_bytes())
        self._uploaded = time.monotonic()

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def flush(self) -> None:
        self._file.flush()
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Puts all that was written where a kill can't reach it."""
        self._file.flush()
        if isinstance(self._file, io.BytesIO):
            self._path.write_bytes(self._file.getvalue())
        self._uploaded = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            self.commit()
            self._file.close()


def require_writable(path: AnyPath) -> None:
    """Makes a file's directory and the file, if they are not there; raises MossAudioError if that can't be done."""
    try:
        to_path(path).parent.mkdir(parents=True, exist_ok=True)
        GrowingFile(path).close()
    except OSError as error:
        raise MossAudioError(
            f"{path}: expected a file that can be written, found '{reason(error)}'; choose another."
        ) from error


def require_local(path: AnyPath, what: str) -> pathlib.Path:
    """A path of this machine; `what` is only used there, and an error for gs:// says so."""
    if is_remote(to_path(path)):
        raise MossAudioError(
            f"{path}: {what} a disk of this machine, not of gs://: copy the directory with `gcloud storage cp -r`"
        )
    return pathlib.Path(path)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="moss-audio-")


def remove_local_copies() -> None:
    """For a process that ends without Python's own end, which removes them."""
    if _scratch.cache_info().currsize:
        _scratch().cleanup()


def local_copy(path: AnyPath) -> pathlib.Path:
    """The file itself, or what an object holds now, on a disk until this process ends."""
    path = to_path(path)
    if not is_remote(path):
        return pathlib.Path(path)
    copy = pathlib.Path(tempfile.mkdtemp(dir=_scratch().name), path.name)
    path.copy(copy)
    return copy


def local_directory(path: AnyPath) -> pathlib.Path:
    """A directory itself, or another one until this process ends, whose files `upload` takes there."""
    return pathlib.Path(tempfile.mkdtemp(dir=_scratch().name)) if is_remote(to_path(path)) else pathlib.Path(path)


def upload(directory: pathlib.Path, path: AnyPath) -> None:
    """Copies all files of a `local_directory` to where it belongs."""
    if is_remote(path):
        for file in directory.rglob("*"):
            if file.is_file():
                epath.Path(file).copy(to_path(path) / file.relative_to(directory), overwrite=True)
