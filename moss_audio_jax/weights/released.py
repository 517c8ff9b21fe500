"""The released PyTorch layout on disk: safetensors files, and the one table between their tensor names and our tree.

Our names follow the released ones, so the table is short: equal layers are stacked, a leaf is renamed, and an array
changes its layout. Every change is invertible. PyTorch itself is not needed. Stock Qwen3 weights, from which a language
model may start, are read by the same table.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from moss_audio_jax.config import MossAudioConfig, read_language
from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.model import adapter_specs, parameter_specs
from moss_audio_jax.storage.json_files import parse_json, read_json
from moss_audio_jax.storage.paths import AnyPath, file_in, is_plain_name, require_local
from moss_audio_jax.weights.recognition import foreign_content

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# MOSS-Music stores the encoder's sinusoids, which are recomputed in float32 here.
IGNORED_TENSORS = frozenset({"audio_encoder.embed_positions.inv_timescales"})
# PEFT wraps the model twice before it names its tensors.
PEFT_PREFIX = "base_model.model."
HEAD_TENSOR = "lm_head.weight"  # a tensor; it has this name in every layout
EMBEDDING = "language_model.embed_tokens.embedding"  # our path


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """How one released tensor becomes one of our arrays, and back.

    Both changes also work on a block of the released tensor's rows (its first axis), which are `rows_axis` of our
    array: that is how a conversion streams.
    """

    from_released: Callable[[np.ndarray], np.ndarray]
    to_released: Callable[[np.ndarray], np.ndarray]
    rows_axis: int


SAME = ArrayLayout(lambda x: x, lambda x: x, rows_axis=0)
# [out, in] -> [in, out]
LINEAR = ArrayLayout(lambda x: x.T, lambda x: x.T, rows_axis=-1)
# [out, in, frequency, time] -> [time, frequency, in, out]
CONV = ArrayLayout(lambda x: x.transpose(3, 2, 1, 0), lambda x: x.transpose(3, 2, 1, 0), rows_axis=-1)


def stem_layout(channels: int) -> ArrayLayout:
    """[out, channel * frequency] -> [frequency * channel, out]: the order in which each side flattens the conv stem."""

    def from_released(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], channels, -1).transpose(2, 1, 0).reshape(-1, x.shape[0])

    def to_released(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, channels, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1)

    return ArrayLayout(from_released, to_released, rows_axis=-1)


# What lies stacked in our tree is numbered in the released names.
STACKS = ("audio_encoder.layers", "deepstack_audio_merger_list", "language_model.layers")

# pattern of our path -> the leaf's released name, and the change of layout. The first match counts.
TABLE: tuple[tuple[str, str, Callable[[int], ArrayLayout]], ...] = (
    (r"audio_encoder\.conv\d\.kernel", "weight", lambda channels: CONV),
    (r"audio_encoder\.stem_proj\.kernel", "weight", stem_layout),
    (r"audio_encoder\.stem_proj\.lora_a", "lora_A.weight", stem_layout),
    (r".*\.lora_a", "lora_A.weight", lambda channels: LINEAR),
    (r".*\.lora_b", "lora_B.weight", lambda channels: LINEAR),
    (r".*\.kernel", "weight", lambda channels: LINEAR),
    (r".*\.(scale|embedding)", "weight", lambda channels: SAME),
    (r".*\.bias", "bias", lambda channels: SAME),
)


@dataclasses.dataclass(frozen=True)
class ReleasedLeaf:
    """Where one of our arrays comes from: one released tensor, or one for each layer of a stack.

    shape: ours, the layers included. tensor_shape: each released tensor's.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    tensor_shape: tuple[int, ...]
    layout: ArrayLayout
    stacked: bool

    @property
    def rows_axis(self) -> int:
        """The axis of our array that holds the rows of the released tensors."""
        return self.stacked + self.layout.rows_axis % len(self.tensor_shape)

    def region(self, index: int, start: int, stop: int) -> tuple[int | slice, ...]:
        """Where rows [start, stop) of `names[index]` lie in our array."""
        region: list[int | slice] = [slice(None)] * len(self.shape)
        region[self.rows_axis] = slice(start, stop)
        if self.stacked:
            region[0] = index
        return tuple(region)


def released_leaves(config: MossAudioConfig) -> dict[str, ReleasedLeaf]:
    """Our path -> where it comes from, for every parameter of a model but LoRA's; no released tensor is used twice."""
    return _leaves(config, parameter_specs(dataclasses.replace(config, lora=None)))


def adapter_leaves(config: MossAudioConfig) -> dict[str, ReleasedLeaf]:
    """The same for what an adapter of LoRA holds, by the names that PEFT gives its tensors."""
    leaves = _leaves(config, adapter_specs(config))
    return {
        path: dataclasses.replace(leaf, names=tuple(PEFT_PREFIX + name for name in leaf.names))
        for path, leaf in leaves.items()
    }


def _leaves(config: MossAudioConfig, specs: dict[str, nnx.Variable]) -> dict[str, ReleasedLeaf]:
    channels = config.audio_config.downsample_hidden_size
    leaves = {path: _released_leaf(path, spec.shape, channels) for path, spec in specs.items()}
    uses = Counter(name for leaf in leaves.values() for name in leaf.names)
    doubled = [name for name, count in uses.items() if count > 1]
    assert not doubled, f"TABLE takes {doubled} for more than one parameter"
    return leaves


def _released_leaf(path: str, shape: tuple[int, ...], channels: int) -> ReleasedLeaf:
    rows = [(leaf, make(channels)) for pattern, leaf, make in TABLE if re.fullmatch(pattern, path)]
    assert rows, f"TABLE has no row for {path}"
    leaf, layout = rows[0]
    stack = next((stack for stack in STACKS if path.startswith(stack + ".")), None)
    parent = path.rpartition(".")[0]
    if stack is None:
        names, one = (f"{parent}.{leaf}",), shape
    else:
        inside = parent[len(stack) + 1 :]
        names, one = tuple(f"{stack}.{i}.{inside}.{leaf}" for i in range(shape[0])), shape[1:]
    # Only its shape counts: this array of bytes holds no data.
    tensor_shape = layout.to_released(np.broadcast_to(np.int8(0), one)).shape
    return ReleasedLeaf(path, shape, names, tensor_shape, layout, stacked=stack is not None)


SAFETENSORS_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """A tensor's place: row after row, from byte `offset` of `file` on."""

    file: str
    offset: int
    shape: tuple[int, ...]
    stored_dtype: str  # safetensors' name for it

    @property
    def dtype(self) -> np.dtype:
        return SAFETENSORS_DTYPES[self.stored_dtype]


class SafetensorsCheckpoint:
    """The safetensors files of a directory, every header read and compared with `leaves` before anything is used.

    tied: there is no head in `leaves`; files may hold one all the same, if it equals the embedding.
    single_file: which file holds all tensors, where no index names several.
    Raises MossAudioError with all problems found: missing, surplus, doubled or wrongly shaped tensors, files that are
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
        if weight_map or not problems:  # else the only file is unreadable, and nothing is known of its tensors
            missing = expected.keys() - self.tensors.keys() - weight_map.keys()
            problems += [f"{name} is missing" for name in sorted(missing)]
        # Some tied checkpoints store the head none the less.
        tied_head = self.tensors.pop(HEAD_TENSOR, None) if tied else None
        for name, tensor in self.tensors.items():
            problems += _tensor_problems(name, tensor, expected)
        if problems:
            # Names in foreign files may be of any length and hold control characters.
            shown = "; ".join(ascii(problem)[1:-1][:300] for problem in problems[:20])
            shown += "; ..." * (len(problems) > 20)
            raise MossAudioError(f"{self.directory} has {len(problems)} problem(s): {shown}")
        if tied_head:
            self._check_tied_head(tied_head)

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of one tensor, all by default."""
        return self._read(self.tensors[name], start, stop)

    def assemble(self, path: str, dtype: Any) -> np.ndarray:
        """The parameter at `path` of our tree, out of released tensors that are read one at a time."""
        leaf = self.leaves[path]
        array = np.empty(leaf.shape, dtype)
        for index, name in enumerate(leaf.names):
            array[index if leaf.stacked else ...] = leaf.layout.from_released(self.read(name))
        return array

    def _read(self, tensor: TensorHeader, start: int, stop: int | None) -> np.ndarray:
        # Not through safetensors, whose mapped file would count as this program's memory.
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


class ReleasedCheckpoint(SafetensorsCheckpoint):
    """A released MOSS-Audio directory."""

    def __init__(self, directory: AnyPath):
        self.config = MossAudioConfig.from_hf(directory)
        super().__init__(directory, released_leaves(self.config), tied=self.config.tie_word_embeddings)


class Qwen3Checkpoint(SafetensorsCheckpoint):
    """A stock Qwen3 directory as Hugging Face lays it out: the language model and, unless it is tied, its head.

    `leaves` has our paths, and so `assemble` takes them.
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
    """Tensor name -> file, as the index has it; empty if there is a single file and no index."""
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
    """Tensor name -> header over all files, IGNORED_TENSORS left out, and what is wrong with files and index."""
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
                pass  # checks the whole header, and that the file is as long as it says
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


# What PyTorch's wrappers put into the names of tensors, whose it is, and what saves the model without it.
_WRAPPERS = {
    "module.": ("DataParallel", "save `model.module`"),
    "_orig_mod.": ("torch.compile", "save `model._orig_mod`"),
    "_fsdp_wrapped_module.": ("FSDP", "save its full state dict"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "save the model without it"),
    "base_layer.": ("PEFT, for layers whose adapter is not merged,", "save `model.merge_and_unload()`"),
    "base_model.model.": ("PEFT", "save `model.merge_and_unload()`, or the adapter alone"),
}


def _wrapped_names(names: Set[str], expected: Set[str]) -> str:
    """What was put into tensors' names, how many have it and what helps; empty if nothing was."""
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
    """Where the parts of a name begin, but for the first."""
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
