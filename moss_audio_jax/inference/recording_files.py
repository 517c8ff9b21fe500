"""Finds recordings in files, folders, globs and lists, and names their outputs so that no two have the same name."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import (
    AnyPath,
    Path,
    absolute,
    exists,
    files_below,
    is_remote,
    join,
    matching,
    read_text,
    reason,
    to_path,
)

# Files of a folder that are recordings; the last row can't be read, and is named so that no one misses them.
SUFFIXES = frozenset(
    (
        *(".wav", ".wave", ".w64", ".rf64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
        *(".flac", ".ogg", ".oga", ".opus", ".mp3"),
        *(".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm", ".mka"),
    )
)


@dataclass(frozen=True)
class RecordingFile:
    """A recording to transcribe. name: of its outputs, without their suffix, relative to their directory."""

    path: Path
    name: str


@dataclass(frozen=True)
class Found:
    """Recordings, each once, in the given order; and files in folders whose suffix is none of a recording."""

    recordings: tuple[RecordingFile, ...]
    others: tuple[Path, ...] = ()


def find_recordings(paths: Iterable[AnyPath], lists: Iterable[AnyPath] = ()) -> Found:
    """Finds recordings.

    paths: files; folders, with all below them; globs; `@FILE`, a list. A file may be absent: reading it will say so.
    lists: text files with a path on each line, relative to the list. Empty lines and those that begin with # are left
        out.

    Raises MossAudioError for a list that can't be read, and if a folder or glob has no recording.
    """
    files: dict[str, tuple[Path, int]] = {}  # by absolute path: the path, and how many of its parts are in the name
    others: dict[str, Path] = {}
    for path, root in _all_files(paths, lists):
        key = os.fspath(absolute(posixpath.normpath(path) if not is_remote(path) else path))
        if root is not None and path.suffix.lower() not in SUFFIXES:
            others.setdefault(key, path)
        else:
            depth = 1 if root is None else len(path.relative_to(root).parts)
            files.setdefault(key, (path, depth))
    if not files:
        raise MossAudioError("there is no recording to transcribe: name files, folders with some, or a list of them")
    names = _names([(_parts(key), depth) for key, (_, depth) in files.items()])
    recordings = tuple(RecordingFile(path, name) for (path, _), name in zip(files.values(), names, strict=True))
    return Found(recordings, tuple(others[key] for key in others if key not in files))


def _all_files(paths: Iterable[AnyPath], lists: Iterable[AnyPath]) -> Iterator[tuple[Path, Path | None]]:
    """Yields each file, and the folder it was found in if it was not named itself."""
    for path in map(to_path, paths):
        if exists(path):
            yield from _files_of(path)
        elif path.name.startswith("@") or os.fspath(path).startswith("@"):
            yield from _listed(os.fspath(path).replace("@", "", 1))
        elif re.search(r"[*?[]", os.fspath(path)):
            found = matching(path)
            if not found:
                raise MossAudioError(f"{path} matches no file: correct the pattern, or name the files")
            fixed = _fixed_part(path)
            for match in found:
                yield from ((file, fixed) for file in (files_below(match) if match.is_dir() else [match]))
        else:
            yield path, None
    for path in lists:
        yield from _listed(path)


def _fixed_part(pattern: Path) -> Path:
    """Returns the directory before the first part of a glob that is not fixed."""
    for parent in reversed(pattern.parents):
        if re.search(r"[*?[]", parent.name):
            return parent.parent
    return pattern.parent


def _files_of(path: Path) -> Iterator[tuple[Path, Path | None]]:
    if not path.is_dir():
        yield path, None
        return
    found = files_below(path)
    if not any(file.suffix.lower() in SUFFIXES for file in found):
        raise MossAudioError(
            f"{path} has no file that is named like a recording (.wav, .flac, .ogg, .mp3, ...) in it or below it: name "
            "another folder, or the files themselves"
        )
    yield from ((file, path) for file in found)


def _listed(path: AnyPath) -> Iterator[tuple[Path, Path | None]]:
    path = to_path(path)
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise MossAudioError(f"the list {path} can't be read ({reason(error)}): check its path") from error
    except UnicodeDecodeError as error:
        raise MossAudioError(f"{path} must be a list, a text with a path on each line, but is no UTF-8") from error
    for line in lines:
        if line.strip() and not line.startswith("#"):
            file = to_path(join(path.parent, line.strip()))
            yield from _files_of(file) if exists(file) else [(file, None)]


def _parts(path: str) -> tuple[str, ...]:
    scheme, separator, rest = path.rpartition("://")
    return tuple(part for part in ((scheme,) if separator else ()) + tuple(rest.split("/")) if part)


def _names(files: Sequence[tuple[tuple[str, ...], int]]) -> list[str]:
    """Names files by their last parts, without suffix; with it, and with more parts, where names would be equal.

    files: the parts of each path, and how many of them its name has at least. Names are compared in lower case, for
    disks that don't tell them apart.
    """
    levels = [0] * len(files)
    while True:
        names = [_name(parts, depth, level) for (parts, depth), level in zip(files, levels, strict=True)]
        counts = Counter(name.lower() for name in names)
        clashing = [index for index, name in enumerate(names) if counts[name.lower()] > 1]
        longer = [index for index in clashing if files[index][1] + levels[index] <= len(files[index][0])]
        if not longer:
            return names
        for index in longer:
            levels[index] += 1


def _name(parts: tuple[str, ...], depth: int, level: int) -> str:
    kept = parts[max(0, len(parts) - depth - max(0, level - 1)) :]
    if level:
        return "/".join(kept)
    stem = posixpath.splitext(kept[-1])[0]
    return "/".join((*kept[:-1], stem))
