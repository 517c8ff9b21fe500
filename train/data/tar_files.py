"""Rows of WebDataset archives. Nothing is extracted to a disk, no link is followed, and pickles are never read.

Members beside each other that have a name in common up to its first dot are a row: `a/000.flac` and `a/000.txt`. The
columns are the rest of the names, and the keys of `json` members.
"""

import logging
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path
from moss_audio_jax.storage.retries import retried
from train.data.manifest import parse_json

log = logging.getLogger(__name__)

AUDIO = ("wav", "flac", "mp3", "ogg", "opus")
_PICKLED = ("pickle", "pkl", "pyd", "pth", "pt", "npy", "npz")  # may hold Python objects
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_LONGEST_TEXT = 1 << 24  # bytes of a text or a JSON member


class TarRows:
    """Rows of a tar file. Memory holds places of members and the names of rows, in arrays.

    columns: extensions, keys of the first JSON member, and `audio` for the first of a row's members that is a sound
        file.
    """

    keep_open = 1 << 30  # none stays open

    def __init__(self, path: Path):
        self.path = path
        self.columns: Sequence[str] = ()
        self._extensions: list[str] = []
        self._chosen: dict[str, str] = {}
        self._index()

    def __len__(self) -> int:
        return len(self._rows) - 1

    def select(self, names: Mapping[str, str]) -> None:
        self._chosen = dict(names)

    def place(self, index: int) -> str:
        return self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode("utf-8", "replace")

    def audio_directory(self) -> str:
        return str(self.path.parent)

    def row(self, index: int) -> dict[str, Any]:
        name = f"{self.path} {self.place(index)}"
        members = {
            self._extensions[extension]: (int(offset), int(size))
            for extension, offset, size in self._members[self._rows[index] : self._rows[index + 1]]
        }
        read: dict[str, Any] = {}
        wanted = set(self._chosen.values()) - {AUDIO_COLUMN} - set(members)
        if wanted and "json" in members:
            content = parse_json(self._text(*members["json"], name), f"{name}.json")
            read = {key: content.get(key) for key in wanted} if isinstance(content, dict) else {}
        for use, column in self._chosen.items():
            if use == "audio":
                extension = next(iter(_sounds(members)), column) if column == AUDIO_COLUMN else column
                if extension in members:
                    key = self.place(index).rpartition("/")[2]
                    read[column] = {"bytes": self._bytes(*members[extension]), "path": f"{key}.{extension}"}
                else:
                    read[column] = None
            elif column in members:
                text = self._text(*members[column], name)
                read[column] = parse_json(text, f"{name}.{column}") if column.endswith("json") else _decoded(text, name)
            else:
                read.setdefault(column, None)
        return read

    def close(self) -> None:
        pass

    def _bytes(self, offset: int, size: int) -> bytes:
        def read() -> bytes:
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(size)

        return retried(self.path, read)

    def _text(self, offset: int, size: int, name: str) -> bytes:
        if size > _LONGEST_TEXT:
            raise MossAudioError(f"{name}: expected a text of at most {_LONGEST_TEXT} bytes, found {size}; shorten it.")
        return self._bytes(offset, size)

    def _index(self) -> None:
        """Reads the headers of all members."""
        members, rows, key_ends = array("q"), array("q", [0]), array("q", [0])
        keys, extensions, left_out = bytearray(), {}, Counter[str]()
        last = None
        try:
            with tarfile.open(self.path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # else it keeps them all  # pyright: ignore[reportAttributeAccessIssue]
                    if (why := _left_out(member)) is not None:
                        left_out.update([why] if why else [])
                        continue
                    match = _NAME.fullmatch(member.name)
                    assert match is not None
                    if match[1] != last:
                        if last is not None:
                            rows.append(len(members) // 3)
                        last = match[1]
                        keys += last.encode("utf-8", "surrogateescape")
                        key_ends.append(len(keys))
                    extension = extensions.setdefault(match[2].lower(), len(extensions))
                    members.extend((extension, member.offset_data, member.size))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise MossAudioError(f"{self.path}: expected a tar file, found '{error}'; download it again.") from error
        if last is not None:
            rows.append(len(members) // 3)
        self._members = np.array(members, np.int64).reshape(-1, 3)
        self._rows, self._key_ends = np.array(rows, np.int64), np.array(key_ends, np.int64)
        self._keys, self._extensions = bytes(keys), list(extensions)
        if left_out:
            counts = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
            log.warning("%s: members that are not read: %s", self.path, counts)
        self.columns = self._columns()

    def _columns(self) -> list[str]:
        found = [AUDIO_COLUMN] if any(_sounds(self._extensions)) else []
        found += self._extensions
        if "json" in self._extensions:
            number = self._extensions.index("json")
            _, offset, size = next(member for member in self._members if member[0] == number)
            content = parse_json(self._text(int(offset), int(size), str(self.path)), f"{self.path}, its first json")
            found += list(content) if isinstance(content, dict) else []
        return list(dict.fromkeys(found))


AUDIO_COLUMN = "audio"


def _left_out(member: tarfile.TarInfo) -> str | None:
    """Returns why a member is not read, empty for one without a row; None if it is read."""
    match = _NAME.fullmatch(member.name)
    if member.isdir():
        return ""
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "of an unusual type"
    if match is None:
        return ""
    return "that may be pickled" if match[2].lower().rpartition(".")[2] in _PICKLED else None


def _sounds(extensions: Any) -> list[str]:
    return [extension for extension in extensions if extension.rpartition(".")[2] in AUDIO]


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeError as error:
        raise MossAudioError(f"{name}: expected text in UTF-8, found none ({error}); save it as UTF-8.") from error
