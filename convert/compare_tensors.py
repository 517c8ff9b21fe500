"""Compares two checkpoints on disk: configuration, tokenizer and every tensor, bit by bit, without PyTorch."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.blocks import row_blocks
from convert.tensor_source import DTYPE_KEYS, Checkpoint, by_released_name, with_rope_theta
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path
from moss_audio_jax.weights.locate import locate

STATISTICS_BLOCK = 1 << 20  # elements: differences are computed in float64


@dataclasses.dataclass(frozen=True)
class TensorComparison:
    """One tensor of both checkpoints.

    equal: the target's bits are those of the source converted to the target's type. max_abs_error and
    max_relative_error are the differences to the source, 0 where the types are the same and the bits equal. finite:
    neither side holds NaN or infinity.
    """

    name: str
    source_dtype: str
    target_dtype: str
    equal: bool
    max_abs_error: float
    max_relative_error: float
    finite: bool


def companion_differences(source: AnyPath, target: AnyPath) -> list[str]:
    """Lists the differences between configuration and tokenizer files.

    In config.json the type of the weights may differ, and the place of the rotary base (transformers 4 and 5).
    """
    files = [{file.name: file for file in locate(directory).companion_files()} for directory in (source, target)]
    problems = []
    for name in sorted(files[0].keys() | files[1].keys()):
        holders = [side[name] for side in files if name in side]
        if len(holders) == 1:
            problems.append(f"{name} is in {holders[0].parent} only")
        elif _content(holders[0]) != _content(holders[1]):
            problems.append(f"{name} differs")
    return problems


def _content(file: Path) -> Any:
    """Returns the content to compare: the values of JSON, without their formatting, and the bytes of other files."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = read_json(file)
    if file.name == "config.json":
        content = {key: value for key, value in with_rope_theta(content).items() if key not in DTYPE_KEYS}
    return json.dumps(content, sort_keys=True)


def tensor_set_differences(source: Checkpoint, target: Checkpoint) -> list[str]:
    """Lists tensors that only one side has, or that differ in shape."""
    sides = by_released_name(source.leaves), by_released_name(target.leaves)
    problems = []
    for name in sides[0] | sides[1]:
        if name not in sides[1]:
            problems.append(f"{name} is in {source.directory} only")
        elif name not in sides[0]:
            problems.append(f"{name} is in {target.directory} only")
        elif (shapes := [side[name].tensor_shape for side in sides])[0] != shapes[1]:
            problems.append(f"{name} has shape {shapes[0]} in {source.directory}, {shapes[1]} in {target.directory}")
    return problems


def compare_tensors(source: Checkpoint, target: Checkpoint) -> Iterator[TensorComparison]:
    """Compares every tensor that both sides have in the same shape, in blocks of rows."""
    theirs = by_released_name(target.leaves)
    common = {
        name: leaf
        for name, leaf in by_released_name(source.leaves).items()
        if name in theirs and theirs[name].tensor_shape == leaf.tensor_shape
    }
    for name, leaf in tqdm(common.items(), unit="tensor", disable=None):
        dtypes = source.dtype(name), target.dtype(name)
        equal, max_abs, max_relative, finite = True, 0.0, 0.0, True
        for start, stop in row_blocks(leaf, max(dtype.itemsize for dtype in dtypes)):
            expected, found = source.read(name, start, stop), target.read(name, start, stop)
            same = same_bits(expected, found)
            equal &= same
            finite &= bool(np.isfinite(found).all()) and (same or bool(np.isfinite(expected).all()))
            if not same or dtypes[0] != dtypes[1]:
                block_abs, block_relative = largest_errors(expected, found)
                max_abs, max_relative = max(max_abs, block_abs), max(max_relative, block_relative)
        yield TensorComparison(name, str(dtypes[0]), str(dtypes[1]), equal, max_abs, max_relative, finite)


def same_bits(expected: np.ndarray, found: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(expected.astype(found.dtype, copy=False))
    return np.array_equal(converted.view(np.uint8), np.ascontiguousarray(found).view(np.uint8))


def largest_errors(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Returns the largest absolute difference, and the largest relative one where `expected` is not 0."""
    max_abs = max_relative = 0.0
    expected, found = expected.reshape(-1), found.reshape(-1)
    for start in range(0, expected.size, STATISTICS_BLOCK):
        x = expected[start : start + STATISTICS_BLOCK].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = np.abs(found[start : start + STATISTICS_BLOCK].astype(np.float64) - x)
            relative = np.where(x == 0, 0.0, difference / np.abs(x))
        # fmax ignores NaN; NaN with different bits are reported as a difference anyway.
        max_abs = max(max_abs, float(np.fmax.reduce(difference, initial=0.0)))
        max_relative = max(max_relative, float(np.fmax.reduce(relative, initial=0.0)))
    return max_abs, max_relative
