"""Paths of a disk of this machine, or of Google Cloud Storage as gs://bucket/directory.

`to_path` returns an `epath.Path`, which has pathlib's methods for both. This module handles the differences:

* An object appears when its upload is complete, and never grows. So files are written whole (`atomic_file`), and files
  that grow are composed from pieces (`GrowingFile`).
* gs:// has no empty directories and no links. Renaming a directory moves each object, so this project never relies on
  it: a directory is complete when the file that is written last is there.
* Libraries that need a file of a disk get a copy (`local_copy`, `local_directory`), or `require_local` raises.

Functions of this module retry while storage fails for a moment (`retries`).
"""

import functools
import glob
import io
import itertools
import os
import pathlib
import posixpath
import re
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, BinaryIO, cast

import fsspec
from etils import epath
from fsspec.config import conf

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.retries import retried

Path = epath.Path
AnyPath = str | os.PathLike[str]

UPLOAD_SECONDS = 60  # between uploads of a file that grows
# No cache: other hosts write into the directories that this one lists.
conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def to_path(path: AnyPath) -> Path:
    """Converts to a path; raises MossAudioError for an empty one, for other URLs, and for gs:// without gcsfs."""
    text = os.fspath(path)
    if not text:
        raise MossAudioError("a path must name a file or a directory, not be empty: give '.' for the current directory")
    scheme = re.match(r"([\w+.-]+)://", text)
    if re.match(r"gs:/(?!/)", text):
        raise MossAudioError(f"{text} lost a slash: give gs:// paths as text, which pathlib.Path does not keep")
    if scheme is not None and scheme[1] != "gs":
        raise MossAudioError(
            f"{text} must be a path of this machine or of gs://, not a URL of {scheme[0]}: download it, and give the "
            "path of the copy"
        )
    if scheme is not None and find_spec("gcsfs") is None:
        raise MossAudioError(f"{text} needs gcsfs, which is not installed: pip install 'moss-audio-jax[gcs]'")
    return epath.Path(text)


def is_remote(path: AnyPath) -> bool:
    return "://" in os.fspath(path)


def absolute(path: AnyPath) -> Path:
    """Returns an absolute path, as Orbax needs it. (`epath.Path.absolute` takes gs:// for a relative directory.)"""
    return to_path(path) if is_remote(path) else to_path(path).absolute()


def url(path: AnyPath) -> str:
    """Returns file:///... or gs://..., as TensorStore needs it."""
    return absolute(path).as_uri()


def join(directory: AnyPath, name: str) -> str:
    """Resolves a name in a file of `directory`: relative to that, absolute, or gs://; `..` is normalized."""
    joined = name if is_remote(name) else posixpath.join(os.fspath(directory), name)
    scheme, separator, place = joined.rpartition("://")
    return scheme + separator + posixpath.normpath(place) if separator else joined


def is_plain_name(name: object) -> bool:
    """Returns True if a name from a file can't lead out of the directory that it is looked up in."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.+-]{0,199}", name, re.ASCII) is not None


def is_inside(directory: AnyPath, file: AnyPath) -> bool:
    """Returns True if a file is inside a directory, with `..` and links resolved.

    A Hugging Face cache keeps the files of `models--OWNER--NAME/snapshots/HASH` in `models--OWNER--NAME/blobs`: links
    from a snapshot to its own repository's blobs count as inside.
    """
    # gs:// has no links; there realpath resolves only `..`.
    inside, real = pathlib.Path(os.path.realpath(directory)), pathlib.Path(os.path.realpath(file))
    return real.is_relative_to(inside) or real.parent == _blobs(inside)


def _blobs(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of the files of a Hugging Face cache's snapshot; None outside of a snapshot."""
    for snapshot in (directory, *directory.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def file_in(directory: AnyPath, name: str) -> Path:
    """Returns the path of a directory's file, which may not exist; raises MossAudioError for a link to elsewhere."""
    path = to_path(directory) / name
    if not is_inside(directory, path):
        raise MossAudioError(
            f"{path} must be inside the directory, not a link to elsewhere: copy the file itself there (`cp -L`, or "
            "`hf download --local-dir`)"
        )
    return path


def require_empty(directory: AnyPath) -> None:
    """Raises MossAudioError unless a directory to write is new or empty: nothing is ever overwritten."""
    directory = to_path(directory)
    if directory.exists() and (not directory.is_dir() or children(directory)):
        raise MossAudioError(
            f"{directory} already exists and is not an empty directory: name a new one, or remove it first"
        )


def children(directory: AnyPath) -> list[Path]:
    """Lists a directory, sorted by name; empty if there is none."""
    directory = to_path(directory)
    if is_remote(directory):
        return retried(directory, lambda: sorted(directory.iterdir()) if directory.is_dir() else [])
    try:
        return retried(directory, lambda: sorted(directory.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise _unreadable(directory, error) from error


def files_below(directory: AnyPath) -> list[Path]:
    """Lists all files below a directory, sorted; without those whose name, or a directory of theirs, begins with a dot.

    Links to directories are not followed.
    """
    directory = to_path(directory)
    if is_remote(directory):
        root = str(directory).rstrip("/")
        names = retried(directory, lambda: _gcs(directory).find(root))
        found = [to_path(f"gs://{name}") for name in names]
    else:
        found = [Path(place, name) for place, _, names in os.walk(directory) for name in names]
        found = [path for path in found if os.path.isfile(path)]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts))


def matching(pattern: AnyPath) -> list[Path]:
    """Lists what matches a glob, sorted: `*` and `?` within a name, `**` across directories."""
    text = os.fspath(to_path(pattern))
    if is_remote(text):
        return sorted(to_path(f"gs://{name}") for name in retried(text, lambda: _gcs(to_path(text)).glob(text)))
    return sorted(Path(name) for name in retried(text, lambda: glob.glob(text, recursive=True)))


def exists(path: AnyPath) -> bool:
    """Returns True if a path exists. (`epath.Path.exists` is False after an error of the disk.)"""
    path = to_path(path)
    if is_remote(path):
        return retried(path, path.exists)
    try:
        retried(path, lambda: os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise _unreadable(path, error) from error
    return True


def _unreadable(path: Path, error: OSError) -> MossAudioError:
    return MossAudioError(f"{path} can't be read ({reason(error)}): ask its owner for access, or give another path")


def reason(error: OSError) -> str:
    """Returns the message of an error without the path; errors of gs:// have their own form."""
    return error.strerror or (os.strerror(2) if isinstance(error, FileNotFoundError) else str(error))


def read_bytes(path: AnyPath) -> bytes:
    return retried(path, to_path(path).read_bytes)


def read_text(path: AnyPath) -> str:
    return retried(path, lambda: to_path(path).read_text("utf-8"))


def read_lines(file: AnyPath, begin: int = 0) -> Iterator[bytes]:
    """Yields the lines of a file of this machine, from byte `begin` on."""

    def some() -> list[bytes]:
        with open(file, "rb") as opened:
            opened.seek(begin)
            return opened.readlines(_BYTES_OF_LINES)

    while lines := retried(file, some):
        yield from lines
        begin += sum(map(len, lines))


_BYTES_OF_LINES = 1 << 20  # read at a time


def open_binary(path: AnyPath) -> BinaryIO:
    """Opens a file to read; an object of gs:// is read into memory."""
    return io.BytesIO(to_path(path).read_bytes()) if is_remote(path) else cast(BinaryIO, open(path, "rb"))


@contextmanager
def atomic_file(path: AnyPath) -> Iterator[pathlib.Path]:
    """Yields a local file to write, which replaces `path` at the end; after an error `path` is unchanged."""
    path = to_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            yield (file := pathlib.Path(directory, path.name))
            retried(path, lambda: epath.Path(file).copy(path, overwrite=True))
        return
    # The process id: other processes may write the same file.
    file = pathlib.Path(path.with_name(f"{path.name}.{os.getpid()}.partial"))
    try:
        yield file
        retried(path, lambda: file.replace(path))
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk has none
        raise
    finally:
        file.unlink(missing_ok=True)


def atomic_write(path: AnyPath, content: str) -> None:
    def write() -> None:
        with atomic_file(path) as file:
            file.write_text(content, "utf-8")

    retried(path, write)


class GrowingFile:
    """A file that bytes are appended to, created if it doesn't exist.

    On a disk the bytes are in the file after `flush`. An object of gs:// can't grow, but the service composes objects:
    new bytes are uploaded as an object of their own and composed onto the end. A thread does so, at a `flush` if the
    last upload is UPLOAD_SECONDS ago; `commit` and `close` wait for it. A kill loses the bytes in between, so a run
    commits before each checkpoint. The next `flush`, `commit` or `close` raises errors of the thread.
    """

    def __init__(self, path: AnyPath):
        self._path = to_path(path)
        self._remote = is_remote(self._path)
        # Bytes of the file once all uploads are complete.
        self._size = retried(path, lambda: (_made_object if self._remote else _made_file)(self._path))
        self._new = bytearray()
        self._coming: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")  # starts at the first upload
        self._uploaded = time.monotonic()
        self._closed = False

    def write(self, content: bytes) -> None:
        self._new += content

    def flush(self) -> None:
        while self._coming and self._coming[0].done():
            self._coming.popleft().result()
        if not self._remote or time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self._hand_over()

    def _hand_over(self) -> None:
        self._uploaded = time.monotonic()
        if not self._new:
            return
        new, self._new = bytes(self._new), bytearray()
        begin, self._size = self._size, self._size + len(new)
        if self._remote:
            self._coming.append(self._thread.submit(_append_to_object, self._path, new, begin))
        else:
            _append_to_file(self._path, new, begin)

    def commit(self) -> None:
        """Writes all bytes to storage, where a kill can't lose them."""
        self._hand_over()
        while self._coming:
            self._coming.popleft().result()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self.commit()
            finally:
                self._coming.clear()
                self._thread.shutdown()


def _made_file(path: Path) -> int:
    """Creates a file if it doesn't exist; returns its size in bytes."""
    with open(path, "ab") as file:
        return file.seek(0, os.SEEK_END)


def _append_to_file(path: Path, new: bytes, begin: int) -> None:
    """Writes bytes at `begin`, the end of a file; an attempt overwrites what a failed one has written."""

    def append() -> None:
        with open(path, "r+b") as file:
            file.seek(begin)
            file.write(new)

    retried(path, append)


def _made_object(path: Path) -> int:
    if not path.exists():
        path.write_bytes(b"")
    return _size_and_generation(path)[0]


def _size_and_generation(path: Path) -> tuple[int, str]:
    found = _gcs(path).info(str(path))
    return int(found["size"]), found["generation"]


def _gcs(path: Path) -> Any:
    """Returns gcsfs, for operations that epath lacks."""
    return fsspec.core.url_to_fs(str(path))[0]


def _append_to_object(path: Path, new: bytes, begin: int) -> None:
    """Appends bytes to an object of `begin` bytes, exactly once, also if the service's answers get lost."""
    # The same name in all attempts. Without the file's own name, by which TensorBoard would find the piece.
    piece = path.with_name(f"{zlib.crc32(path.name.encode()):08x}-{begin}.piece")
    retried(piece, lambda: piece.write_bytes(new))

    def append() -> None:
        size, generation = _size_and_generation(path)
        if size == begin:
            _compose(path, piece, generation)
            size, _ = _size_and_generation(path)
        if size != begin + len(new):
            raise MossAudioError(
                f"{path} must have {begin + len(new)} bytes after an upload, not {size}: end what else writes there, "
                "and run the same command again"
            )

    retried(path, append)
    retried(piece, lambda: piece.unlink(missing_ok=True))


def _compose(path: Path, piece: Path, generation: str) -> None:
    """Appends one object to another, if that still has the given generation."""
    gcs = _gcs(path)
    bucket, name, _ = gcs.split_path(str(path))
    _, piece_name, _ = gcs.split_path(str(piece))
    # gcsfs raises FileExistsError for another generation, for example after a success whose answer was lost.
    with suppress(FileExistsError):
        gcs.call(
            "POST",
            "b/{}/o/{}/compose",
            bucket,
            name,
            ifGenerationMatch=generation,
            json={"sourceObjects": [{"name": name}, {"name": piece_name}]},
        )


def require_writable(path: AnyPath) -> None:
    """Raises MossAudioError unless a file, and its directory, exists or can be created; creates neither."""
    path = to_path(path)
    made = _missing(path.parent)
    try:
        there = exists(path)
        retried(path, lambda: path.parent.mkdir(parents=True, exist_ok=True))
        GrowingFile(path).close()
        if not there:
            retried(path, lambda: path.unlink(missing_ok=True))
    except OSError as error:
        raise MossAudioError(f"{path} must be a file that can be written ({reason(error)}): choose another") from error
    finally:
        _remove_empty(made)


@contextmanager
def nothing_left(directory: AnyPath, names: Collection[str] | None = None) -> Iterator[Callable[[], None]]:
    """Removes what the body has written into a directory, and the directories created for it, if it raises an error.

    names: of all files that may be written; None if no one else writes there. Files from before stay.
    Yields a function; after it is called, an error removes nothing.
    """
    directory = to_path(directory)
    made, before, removes = _missing(directory), {child.name for child in children(directory)}, True

    def keep() -> None:
        nonlocal removes
        removes = False

    try:
        yield keep
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(directory)
        if removes:
            with suppress(OSError):  # the first error matters more
                for child in children(directory):
                    if child.name not in before and (names is None or child.name in names):
                        child.rmtree() if child.is_dir() else child.unlink()
            _remove_empty(made)
        raise


def _missing(directory: Path) -> list[Path]:
    """Returns a directory and its parents that don't exist, the innermost first; on gs:// none."""
    if is_remote(directory):
        return []
    return list(itertools.takewhile(lambda path: not os.path.lexists(path), (directory, *directory.parents)))


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # never created, or not empty
            directory.rmdir()


def require_local(path: AnyPath, what: str) -> pathlib.Path:
    """Returns a path of this machine; raises MossAudioError for gs://. what: the beginning of its reason."""
    if is_remote(to_path(path)):
        raise MossAudioError(
            f"{path}: {what} a disk of this machine, not of gs://: copy the directory with `gcloud storage cp -r`"
        )
    return pathlib.Path(path)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Creates a temporary directory, which is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="moss-audio-")


def remove_local_copies() -> None:
    """Removes the copies, for a process that ends by `os._exit`, which skips Python's clean-up."""
    if _scratch.cache_info().currsize:
        _scratch().cleanup()


def scratch_directory() -> pathlib.Path:
    """Creates a directory that is removed when this process ends."""
    return pathlib.Path(tempfile.mkdtemp(dir=_scratch().name))


def local_copy(path: AnyPath) -> pathlib.Path:
    """Returns a file itself, or a copy of an object on a disk, which is removed when this process ends."""
    path = to_path(path)
    if not is_remote(path):
        return pathlib.Path(path)
    copy = scratch_directory() / path.name
    retried(path, lambda: path.copy(copy, overwrite=True))
    return copy


def local_directory(path: AnyPath) -> pathlib.Path:
    """Returns a directory itself or, for gs://, a temporary one, whose files `upload` copies there."""
    return scratch_directory() if is_remote(to_path(path)) else pathlib.Path(path)


def upload(directory: pathlib.Path, path: AnyPath) -> None:
    """Copies all files of a `local_directory` to gs://; does nothing for other paths."""
    if is_remote(path):
        for file in directory.rglob("*"):
            if file.is_file():
                target = to_path(path) / file.relative_to(directory)
                retried(target, functools.partial(epath.Path(file).copy, target, overwrite=True))
