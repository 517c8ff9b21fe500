"""The released PyTorch layout on disk: safetensors files, and the one table between their tensor names and our tree.

Our names follow the released ones, so the table is short: equal layers are stacked, a leaf is renamed, and an array
changes its layout. Every change is invertible. PyTorch itself is not needed.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes  # its import also registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from moss_audio_jax.config import MossAudioConfig, read_json
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.model import parameter_specs

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# MOSS-Music stores the encoder's sinusoids, which are recomputed in float32 here.
IGNORED_TENSORS = frozenset({"audio_encoder.embed_positions.inv_timescales"})


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one released tensor becomes one of our arrays, and back."""

    name: str
    from_released: Callable[[np.ndarray], np.ndarray]
    to_released: Callable[[np.ndarray], np.ndarray]


SAME = Layout("same", lambda x: x, lambda x: x)
LINEAR = Layout("[out, in] -> [in, out]", lambda x: x.T, lambda x: x.T)
CONV = Layout(
    "[out, in, frequency, time] -> [time, frequency, in, out]",
    lambda x: x.transpose(3, 2, 1, 0),
    lambda x: x.transpose(3, 2, 1, 0),
)


def stem_layout(channels: int) -> Layout:
    """The reference flattens the conv stem's output as channel x frequency, we as frequency x channel."""

    def from_released(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], channels, -1).transpose(2, 1, 0).reshape(-1, x.shape[0])

    def to_released(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, channels, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1)

    return Layout("[out, channel*frequency] -> [frequency*channel, out]", from_released, to_released)


# What lies stacked in our tree is numbered in the released names.
STACKS = ("audio_encoder.layers", "deepstack_audio_merger_list", "language_model.layers")

# pattern of our path -> the leaf's released name, and the change of layout. The first match counts.
TABLE: tuple[tuple[str, str, Callable[[int], Layout]], ...] = (
    (r"audio_encoder\.conv\d\.kernel", "weight", lambda channels: CONV),
    (r"audio_encoder\.stem_proj\.kernel", "weight", stem_layout),
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
    layout: Layout
    stacked: bool

    def assemble(self, read: Callable[[str], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Our array out of the released tensors, read one at a time."""
        array = np.empty(self.shape, dtype)
        for index, name in enumerate(self.names):
            array[index if self.stacked else ...] = self.layout.from_released(read(name))
        return array

    def tensors(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The released tensors of our array, by name."""
        for index, name in enumerate(self.names):
            yield name, self.layout.to_released(array[index] if self.stacked else array)


def released_leaves(config: MossAudioConfig) -> dict[str, ReleasedLeaf]:
    """Our path -> where it comes from, for every parameter of a model."""
    channels = config.audio_config.downsample_hidden_size
    specs = parameter_specs(config)
    return {path: _released_leaf(path, spec.shape, channels) for path, spec in specs.items()}


def _released_leaf(path: str, shape: tuple[int, ...], channels: int) -> ReleasedLeaf:
    leaf, layout = next(
        (leaf, make(channels)) for pattern, leaf, make in TABLE if re.fullmatch(pattern, path)
    )
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


class ReleasedCheckpoint:
    """A released directory, every header of it read and compared with its configuration before anything is used.

    Raises MossAudioError with all problems found: missing, surplus, doubled or wrongly shaped tensors, files that are
    truncated, unreadable or outside the directory.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.config = MossAudioConfig.from_hf(self.directory)
        self.leaves = released_leaves(self.config)
        self.tensors = _read_headers(self.directory)
        self._check_against_config()

    def read(self, name: str) -> np.ndarray:
        """One tensor. Its file is opened for it alone: an open one would keep all that was read of it in memory."""
        with safe_open(self.directory / self.tensors[name].file, framework="numpy") as file:
            return file.get_tensor(name)

    def assemble(self, path: str, dtype: np.dtype | None = None) -> np.ndarray:
        """The parameter at `path` of our tree, in the dtype it was stored in if none is given."""
        leaf = self.leaves[path]
        return leaf.assemble(self.read, np.dtype(dtype or self.tensors[leaf.names[0]].dtype))

    def _check_against_config(self) -> None:
        expected = {name: leaf.tensor_shape for leaf in self.leaves.values() for name in leaf.names}
        problems = [f"{name} is missing" for name in expected if name not in self.tensors]
        for name, tensor in self.tensors.items():
            if name not in expected:
                problems.append(f"{name} in {tensor.file} is not part of this model")
            elif tensor.shape != expected[name]:
                problems.append(
                    f"{name} in {tensor.file} has shape {tensor.shape}, config.json makes it {expected[name]}"
                )
            elif tensor.dtype is None:
                problems.append(f"{name} in {tensor.file} is not of a floating-point type this port reads")
        _raise_problems(self.directory, problems)


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype | None  # None: a type that is not read


SAFETENSORS_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def _read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Tensor name -> header, over all files of a checkpoint; IGNORED_TENSORS are left out."""
    index_path = directory / INDEX_FILE
    weight_map = read_json(index_path).get("weight_map") if index_path.exists() else None
    if index_path.exists() and not (isinstance(weight_map, dict) and weight_map):
        raise MossAudioError(f"{index_path} has no weight_map: fetch the file again")
    files = sorted(set(map(str, weight_map.values()))) if weight_map else [SINGLE_FILE]
    problems = [problem for file in files if (problem := _file_problem(directory, file))]
    _raise_problems(directory, problems)

    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _read_header(directory, file).items():
            if name in tensors:
                problems.append(f"{name} is in both {tensors[name].file} and {file}")
            tensors[name] = header
    if weight_map:
        problems += [
            f"{INDEX_FILE} puts {name} into {file}, which does not hold it"
            for name, file in weight_map.items()
            if name not in tensors or tensors[name].file != file
        ]
        problems += [
            f"{name} in {tensors[name].file} is not in {INDEX_FILE}"
            for name in tensors.keys() - weight_map.keys()
        ]
    _raise_problems(directory, problems)
    return {name: header for name, header in tensors.items() if name not in IGNORED_TENSORS}


def _file_problem(directory: Path, file: str) -> str | None:
    path = directory / file
    if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
        return f"{INDEX_FILE} names {file!r}: only plain file names inside the directory are read"
    if not path.exists():
        return f"{file} is missing"
    if not path.resolve().is_relative_to(directory.resolve()):
        return f"{file} is a link to outside the directory: copy the file itself here (cp -L)"
    return None if path.is_file() else f"{file} is not a file"


def _read_header(directory: Path, file: str) -> dict[str, TensorHeader]:
    try:
        with safe_open(directory / file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}
            return {
                name: TensorHeader(file, tuple(one.get_shape()), SAFETENSORS_DTYPES.get(one.get_dtype()))
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise MossAudioError(
            f"{directory / file} is damaged or no safetensors file ({error}): fetch it again"
        ) from error


def _raise_problems(directory: Path, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
        raise MossAudioError(f"{directory} has {len(problems)} problem(s): {shown}")
