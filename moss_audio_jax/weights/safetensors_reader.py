"""Reads safetensors files: released MOSS-Audio, stock Qwen3, and through `peft` adapters.

Every header is compared with the table of `names` before a tensor is read, so a conversion or a load starts only if
all tensors are there. Tensors are read in rows, and PyTorch is not needed.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from moss_audio_jax.config import MossAudioConfig, read_language
from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.storage.foreign_files import foreign_content
from moss_audio_jax.storage.json_files import parse_json, read_json
from moss_audio_jax.storage.paths import AnyPath, file_in, is_plain_name, require_local
from moss_audio_jax.weights.locate import INDEX_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import (
    EMBEDDING,
    HEAD_TENSOR,
    IGNORED_TENSORS,
    SAFETENSORS_DTYPES,
    ReleasedLeaf,
    released_leaves,
)


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """Place of a tensor: its rows follow each other from byte `offset` of `file`."""

    file: str
    offset: int
    shape: tuple[int, ...]
    stored_dtype: str  # a key of SAFETENSORS_DTYPES, if it can be read

    @property
    def dtype(self) -> np.dtype:
        return SAFETENSORS_DTYPES[self.stored_dtype]


class SafetensorsCheckpoint:
    """The safetensors files of a directory, whose headers have been read and compared with `leaves`.

    tied: `leaves` has no head; the files may still hold one, if it equals the embedding.
    single_file: the file of all tensors, where no index names several.
    Raises MossAudioError with all problems: missing, surplus, doubled or wrongly shaped tensors; files that are
    truncated, unreadable or outside the directory.
    """

    def __init__(
        self, directory: AnyPath, leaves: dict[str, ReleasedLeaf], *, tied: bool, single_file: str = SINGLE_FILE
    ):
        self.directory = require_local(directory, "released weights are read piece by piece, from")
        self.leaves = leaves
        weight_map = _read_weight_map(self.directory) if single_file == SINGLE_FILE else {}
        self.tensors, problems = _read_headers(self.directory, weight_map, single_file)
        expected = {name: leaf.tensor_shape for leaf in self.leaves.values() for name in leaf.names}
        if wrapped := _wrapped_names(self.tensors.keys(), expected.keys()):
            raise MossAudioError(f"{self.directory}: {wrapped}")
        if weight_map or not problems:  # otherwise the only file is unreadable, and its tensors are unknown
            missing = expected.keys() - self.tensors.keys() - weight_map.keys()
            problems += [f"{name} is missing" for name in sorted(missing)]
        # Some tied checkpoints store the head as well.
        tied_head = self.tensors.pop(HEAD_TENSOR, None) if tied else None
        for name, tensor in self.tensors.items():
            problems += _tensor_problems(name, tensor, expected)
        if problems:
            # Names in foreign files may be of any length and hold control characters.
            listed = "; ".join(ascii(problem)[1:-1][:300] for problem in problems[:20])
            listed += "; ..." * (len(problems) > 20)
            raise MossAudioError(f"{self.directory} has {len(problems)} problem(s): {listed}")
        if tied_head:
            self._check_tied_head(tied_head)

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows [start, stop) of one tensor, all by default."""
        return self._read(self.tensors[name], start, stop)

    def assemble(self, path: str, dtype: Any) -> np.ndarray:
        """Reads the parameter at `path` of our tree, in our shape; holds one released tensor at a time beside it."""
        leaf = self.leaves[path]
        array = np.empty(leaf.shape, dtype)
        for index, name in enumerate(leaf.names):
            array[index if leaf.stacked else ...] = leaf.layout.from_released(self.read(name))
        return array

    def _read(self, tensor: TensorHeader, start: int, stop: int | None) -> np.ndarray:
        # The safetensors library maps the file, which would count as this program's memory.
        start, stop, _ = slice(start, stop).indices(tensor.shape[0])
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        path, size = self.directory / tensor.file, (stop - start) * row_bytes
        try:
            data = np.fromfile(path, np.uint8, size, offset=tensor.offset + start * row_bytes)
        except OSError as error:
            raise MossAudioError(f"{path} can't be read ({error}): fetch it again") from error
        if data.size != size:
            raise MossAudioError(f"{path} became shorter while it was read: fetch it again")
        return data.view(tensor.dtype).reshape(stop - start, *tensor.shape[1:])

    def _check_tied_head(self, head: TensorHeader) -> None:
        (name,) = self.leaves[EMBEDDING].names
        embedding = self.tensors[name]
        same = (head.shape, head.stored_dtype) == (embedding.shape, embedding.stored_dtype) and all(
            np.array_equal(
                self._read(head, start, start + 1024).view(np.uint8),
                self._read(embedding, start, start + 1024).view(np.uint8),
            )
            for start in range(0, head.shape[0], 1024)
        )
        if not same:
            raise MossAudioError(
                f"{self.directory / head.file} holds a {HEAD_TENSOR} that differs from {name}, though config.json says "
                "tie_word_embeddings: set that to false, or remove the tensor"
            )


def assemble(source: SafetensorsCheckpoint, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the parameters in `abstract` onto their devices, one after the other: the host holds one at a time."""
    return {path: _place(source, path, leaf) for path, leaf in abstract.items()}


def _place(source: SafetensorsCheckpoint, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    host = source.assemble(path, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: host[index])


class ReleasedCheckpoint(SafetensorsCheckpoint):
    """A released MOSS-Audio directory."""

    def __init__(self, directory: AnyPath):
        self.config = MossAudioConfig.from_hf(directory)
        super().__init__(directory, released_leaves(self.config), tied=self.config.tie_word_embeddings)


class Qwen3Checkpoint(SafetensorsCheckpoint):
    """A stock Qwen3 directory in Hugging Face's layout: the language model and, unless it is tied, its head.

    `leaves` has our paths, so `assemble` takes them.
    """

    def __init__(self, directory: AnyPath):
        path = file_in(directory, "config.json")
        content = read_json(path)
        try:
            self.config = read_language(content, "config.json")
        except MossAudioError as error:
            raise MossAudioError(f"{path}: this Qwen3 configuration can't be used: {error}") from error
        self.tied = content.get("tie_word_embeddings", False) is True
        whole = MossAudioConfig(
            language_config=self.config, deepstack_num_inject_layers=0, tie_word_embeddings=self.tied
        )
        leaves = {
            path: dataclasses.replace(leaf, names=tuple(map(_qwen3_name, leaf.names)))
            for path, leaf in released_leaves(whole).items()
            if path.startswith(("language_model.", "lm_head."))
        }
        super().__init__(directory, leaves, tied=self.tied)


def _qwen3_name(released_name: str) -> str:
    return re.sub(r"^language_model\.", "model.", released_name)


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Reads the index: tensor name -> file; empty if there is a single file and no index."""
    path = file_in(directory, INDEX_FILE)
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MossAudioError(f"{path} has no weight_map: fetch the file again")
    if (directory / SINGLE_FILE).exists() and SINGLE_FILE not in weight_map.values():
        raise MossAudioError(
            f"{directory} holds {SINGLE_FILE} and an {INDEX_FILE} that names other files: remove the one that is stale"
        )
    return {name: file if isinstance(file, str) else shown(file) for name, file in weight_map.items()}


def _read_headers(
    directory: Path, weight_map: dict[str, str], single_file: str
) -> tuple[dict[str, TensorHeader], list[str]]:
    """Reads all headers: tensor name -> header without IGNORED_TENSORS, and the problems of files and index."""
    tensors: dict[str, TensorHeader] = {}
    problems: list[str] = []
    unread = set()
    for file in sorted(set(weight_map.values())) or [single_file]:
        try:
            _check_file(directory, file)
            headers = _read_header(directory, file)
        except MossAudioError as error:
            problems.append(str(error))
            unread.add(file)
            continue
        problems += [f"{name} is in both {tensors[name].file} and {file}" for name in headers if name in tensors]
        tensors |= headers
    for name, file in weight_map.items():
        if file not in unread and (name not in tensors or tensors[name].file != file):
            problems.append(f"{INDEX_FILE} puts {name} into {file}, which does not hold it")
    if weight_map:
        surplus = sorted(tensors.keys() - weight_map.keys())
        problems += [f"{name} in {tensors[name].file} is not in {INDEX_FILE}" for name in surplus]
    return {name: header for name, header in tensors.items() if name not in IGNORED_TENSORS}, problems


def _check_file(directory: Path, file: str) -> None:
    path = directory / file
    if not is_plain_name(file):
        raise MossAudioError(f"{INDEX_FILE} names {shown(file)}: only plain file names inside the directory are read")
    if not path.exists():
        raise MossAudioError(f"{file} is missing")
    file_in(directory, file)
    if not path.is_file():
        raise MossAudioError(f"{file} is not a file")


def _read_header(directory: Path, file: str) -> dict[str, TensorHeader]:
    try:
        with (directory / file).open("rb") as handle:
            with safe_open(directory / file, framework="numpy"):
                pass  # checks the whole header and the file's length
            length = int.from_bytes(handle.read(8), "little")
            header = parse_json(handle.read(length))
    except PermissionError as error:
        raise MossAudioError(f"{file} can't be read ({error.strerror}): ask its owner for access") from error
    except (SafetensorError, OSError, ValueError) as error:
        what = foreign_content(directory / file)
        raise MossAudioError(
            f"{file} is {what}" if what else f"{file} is damaged or no safetensors file ({error}): fetch it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: TensorHeader(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


# Part of a tensor's name -> the wrapper of PyTorch that adds it, and the way to save the model without it.
_WRAPPERS = {
    "module.": ("DataParallel", "save `model.module`"),
    "_orig_mod.": ("torch.compile", "save `model._orig_mod`"),
    "_fsdp_wrapped_module.": ("FSDP", "save its full state dict"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "save the model without it"),
    "base_layer.": ("PEFT, for layers whose adapter is not merged,", "save `model.merge_and_unload()`"),
    "base_model.model.": ("PEFT", "save `model.merge_and_unload()`, or the adapter alone"),
}


def _wrapped_names(names: Set[str], expected: Set[str]) -> str:
    """Says which wrapper changed how many tensor names, and what to do; empty if none did."""
    counts: Counter[str] = Counter()
    for name in names - expected:
        found = [part for part in _WRAPPERS if f".{part}" in f".{name}"]
        bare = f".{name}"
        for part in found:
            bare = bare.replace(f".{part}", ".")
        if bare[1:] in expected:
            counts.update(found)
        elif prefix := next((name[:dot] for dot in _dots(name) if name[dot:] in expected), ""):
            counts[prefix] += 1
    if not counts:
        return ""
    found = [f"{count} of {len(names)} tensors have {part!r} in their names" for part, count in counts.most_common(3)]
    whose, cure = _WRAPPERS.get(counts.most_common(1)[0][0], ("another model around this one", "save this model alone"))
    return f"{', and '.join(found)}, as {whose} puts there: {cure}, or rename the tensors"


def _dots(name: str) -> Iterator[int]:
    """Indices at which the parts of a name begin, without the first."""
    return (match.end() for match in re.finditer(r"\.", name))


def _tensor_problems(name: str, tensor: TensorHeader, expected: dict[str, tuple[int, ...]]) -> list[str]:
    if name not in expected:
        return [f"{name} in {tensor.file} is not part of this model"]
    problems = []
    if tensor.shape != expected[name]:
        problems.append(f"{name} in {tensor.file} has shape {tensor.shape}, config.json makes it {expected[name]}")
    if tensor.stored_dtype not in SAFETENSORS_DTYPES:
        types = ", ".join(SAFETENSORS_DTYPES)
        problems.append(f"{name} in {tensor.file} is of type {tensor.stored_dtype}, and this port reads {types}")
    return problems
