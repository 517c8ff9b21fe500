"""Short labelled recordings, for scenes: decoded and resampled once, in one file that all processes map.

    recordings = open_recordings("free-spoken-digit-dataset/recordings", "{label}_{voice}_*")
    recordings.labels[0], recordings.voices[0], recordings.wave(0)      # "0", "george", float32 [4768]

The file is in `recordings/` of the cache directory, under a hash of the names, sizes and times of change of the
recordings; it may be deleted at any time.
"""

import csv
import fnmatch
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from etils import epath
from tqdm import tqdm

from moss_audio_jax.audio import load_audio
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.recording_files import SUFFIXES
from moss_audio_jax.storage.paths import (
    Path,
    atomic_file,
    atomic_write,
    files_below,
    read_text,
    scratch_directory,
    to_path,
)
from moss_audio_jax.storage.user_cache import user_cache

_VERSION = 1
_THREADS = 8
_DECODED_AHEAD = 256  # recordings
_SECONDS_WITHOUT_A_BAR = 2
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "audio")
_LABEL_COLUMNS = ("label", "category", "class", "class_name")
_VOICE_COLUMNS = ("voice", "speaker", "speaker_id")


@dataclass(frozen=True, eq=False)
class Recordings:
    """Recordings in the order of their names.

    names: paths below the directory. labels, voices: of each; a voice is "" if nothing names it.
    samples: float32, all recordings one behind the other, at 16 kHz. lengths: int64, samples of each.
    sha256: of the samples.
    """

    names: list[str]
    labels: list[str]
    voices: list[str]
    samples: np.ndarray
    lengths: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.names)

    def wave(self, index: int) -> np.ndarray:
        """Returns a recording, float32 [samples]."""
        return np.array(self.samples[self._begins[index] : self._begins[index] + self.lengths[index]])

    def draw(self, rng: np.random.Generator) -> int:
        """Draws a label, then one of its recordings."""
        indices = self._by_label[rng.integers(len(self._by_label))]
        return int(indices[rng.integers(len(indices))])

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def _by_label(self) -> list[np.ndarray]:
        labels = np.array(self.labels)
        return [np.flatnonzero(labels == label) for label in sorted(set(self.labels))]


@lru_cache(maxsize=16)
def open_recordings(
    directory: str,
    label_from: str = "folder",
    *,
    names: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    trim_db: float = 0.0,
) -> Recordings:
    """Opens the recordings below a directory.

    label_from: folder, a pattern or a CSV file, see `SceneConfig`. names: LABEL=NAME.
    only, without: globs over the names of files to take, and to leave out.
    trim_db: cut both ends where they are this much below the peak; 0: nothing.
    Raises MossAudioError if there are none, or one has no label or can't be read.
    """
    files = _files(to_path(directory), only, without)
    find = _labeller(label_from)
    found = [find(directory, name) for name in files]
    renamed = dict(entry.split("=", 1) for entry in names)
    unknown = sorted(set(renamed) - {label for label, _ in found})
    if unknown:
        known = ", ".join(sorted({label for label, _ in found})[:12])
        raise MossAudioError(f"label_names has {unknown[0]!r}, which is no label of {directory}: it has {known}")
    labels, voices = [renamed.get(label, label) for label, _ in found], [voice for _, voice in found]
    return Recordings(list(files), labels, voices, *_decoded(files, trim_db))


# Names and labels


def _files(directory: Path, only: Sequence[str], without: Sequence[str]) -> dict[str, Path]:
    """Returns the audio files to take, by their path below the directory."""
    if not directory.is_dir():
        raise MossAudioError(f"{directory} must be a directory of recordings: correct its path")
    below = {path.relative_to(directory).as_posix(): path for path in files_below(directory)}
    audio = {name: path for name, path in below.items() if path.suffix.lower() in SUFFIXES}
    chosen = {
        name: path for name, path in audio.items() if (not only or _matches(name, only)) and not _matches(name, without)
    }
    if not chosen:
        left = f"none of its {len(audio)} is left by clips_only and clips_except" if audio else "there are none"
        raise MossAudioError(f"{directory} must have audio files, but {left}: correct these")
    return chosen


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) or name.startswith(glob.rstrip("/") + "/") for glob in globs)


Labeller = Callable[[str, str], tuple[str, str]]  # directory, name of a file -> label and voice


def _labeller(label_from: str) -> Labeller:
    if label_from == "folder":
        return _folder_label
    if label_from.lower().endswith(".csv"):
        return _table_labeller(label_from)
    return _pattern_labeller(label_from)


def _folder_label(directory: str, name: str) -> tuple[str, str]:
    folders = name.split("/")[:-1] or to_path(directory).parts[-1:]
    return folders[-1], ""


def _pattern_labeller(pattern: str) -> Labeller:
    pieces = re.split(r"(\{\w*\}|\*)", pattern)
    groups = {"{label}": "(?P<label>[^/]+?)", "{voice}": "(?P<voice>[^/]+?)", "*": "[^/]*"}
    unknown = [piece for piece in pieces if piece.startswith("{") and piece not in groups]
    if unknown or pieces.count("{label}") != 1 or pieces.count("{voice}") > 1:
        raise MossAudioError(
            "label_from must be folder, a CSV file, or a pattern with {label} once, and {voice} once or not, not "
            f"{pattern!r}"
        )
    expression = re.compile("".join(groups.get(piece) or re.escape(piece) for piece in pieces))

    def find(directory: str, name: str) -> tuple[str, str]:
        stem = pathlib.PurePosixPath(name).with_suffix("").as_posix()
        match = expression.fullmatch(stem if "/" in pattern else stem.rpartition("/")[2])
        if match is None:
            raise MossAudioError(
                f"{directory}: the name {name} does not match label_from {pattern!r}: correct the pattern, or leave "
                "the file out by clips_except"
            )
        return match["label"], match.groupdict().get("voice") or ""

    return find


def _table_labeller(path: str) -> Labeller:
    rows = list(csv.DictReader(read_text(path).splitlines()))
    columns = rows[0].keys() if rows else ()

    def column(names: Sequence[str], needed: bool = True) -> str | None:
        found = next((name for name in names if name in columns), None)
        if found is None and needed:
            known = ", ".join(columns) or "none"
            raise MossAudioError(f"{path} must have lines with a column {' or '.join(names)}, not {known}: name one so")
        return found

    file, label, voice = column(_FILE_COLUMNS), column(_LABEL_COLUMNS), column(_VOICE_COLUMNS, needed=False)
    labels = {row[file]: (row[label], row[voice] if voice else "") for row in rows}

    def find(directory: str, name: str) -> tuple[str, str]:
        found = labels.get(name) or labels.get(name.rpartition("/")[2])
        if found is None or not found[0]:
            raise MossAudioError(
                f"{path} has no label for {name} of {directory}: add a line, or leave the file out by clips_except"
            )
        return found

    return find


# Samples


def _decoded(files: Mapping[str, Path], trim_db: float) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns all samples, mapped from the cache, the length of each recording, and the samples' SHA-256.

    Decodes the recordings if the cache has none.
    """
    facts = [(str(path), *_size_and_change(path)) for path in files.values()]
    key = hashlib.sha256(json.dumps([_VERSION, trim_db, facts]).encode()).hexdigest()[:32]
    kept = user_cache() / "recordings" / key
    try:
        return _read(kept)
    except (OSError, ValueError):  # there is none, or it was cut short
        pass
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        _write(kept, files, trim_db)
    except OSError:  # no place for it
        kept = scratch_directory() / key
        _write(kept, files, trim_db)
    return _read(kept)


def _size_and_change(path: Path) -> tuple[int, float]:
    stat = epath.Path(path).stat()
    return stat.length, stat.mtime


def _read(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray, str]:
    facts = json.loads(file.with_suffix(".json").read_text())
    lengths = np.array(facts["lengths"])
    return np.memmap(file.with_suffix(".f32"), np.float32, "r", shape=(int(lengths.sum()),)), lengths, facts["sha256"]


def _write(file: pathlib.Path, files: Mapping[str, Path], trim_db: float) -> None:
    """Decodes the recordings by threads; their lengths, which `_read` needs first, are written last."""
    paths, lengths, digest = list(files.values()), [], hashlib.sha256()
    with (
        atomic_file(file.with_suffix(".f32")) as partial,
        open(partial, "wb") as samples,
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(desc="decoding recordings", total=len(files), disable=None, delay=_SECONDS_WITHOUT_A_BAR) as bar,
    ):
        for first in range(0, len(paths), _DECODED_AHEAD):
            for wave in pool.map(lambda path: _trimmed(path, trim_db), paths[first : first + _DECODED_AHEAD]):
                samples.write(wave.tobytes())
                digest.update(wave.tobytes())
                lengths.append(len(wave))
                bar.update()
    atomic_write(file.with_suffix(".json"), json.dumps({"lengths": lengths, "sha256": digest.hexdigest()}))


def _trimmed(path: Path, trim_db: float) -> np.ndarray:
    wave = load_audio(path)
    size = np.abs(wave)
    if not size.max():
        raise MossAudioError(f"{path} is silent: leave it out by clips_except")
    loud = np.flatnonzero(size >= size.max() * 10 ** (-trim_db / 20)) if trim_db else np.arange(len(wave))
    return wave[loud[0] : loud[-1] + 1]
