"""Checksums of stored parameters, since Orbax and TensorStore restore a flipped byte without an error.

A checksum is of values, not of files: neither the mesh, nor the chunks, nor the order of reading changes it. It is a
text of dtype, shape and two sums modulo 2^32, such as `bfloat16[36,2560,9728] 1f0c9d3a77b3e5c2`. The sums are over all
elements, whose bits are first mixed with their place. For each place the mixing is a bijection of the bits, so that one
changed element is always found; several changes, or elements that changed places, escape once in 2^64.

    checkpoints/<step>/checksums/metadata    of a training run's checkpoint: params, state, ema
    checksums.json                           of any other directory: params

Both hold {"version": 1, "items": {"params": {path: checksum}}}. A change of the sums needs another version.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import Path, atomic_write, exists, file_in, is_plain_name

VERSION = 1
CHECKSUMS = "checksums"  # the item of a run's checkpoint; Orbax names its file `metadata`
CHECKSUMS_FILE = "checksums.json"
TILE = 1 << 15  # elements that NumPy mixes at a time, so that they stay in a core's cache
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # an element of 8 bytes is two words

_TEXT = re.compile(r"\w+\[[\d,]*\] [0-9a-f]{16}", re.ASCII)

Checksums = dict[str, str]  # by path
Words = Any  # uint32 of NumPy or of JAX, which have the same operators


class ChecksumError(MossAudioError):
    """Stored values are not those that were written, or the record of their checksums is damaged."""


def _scrambled(x: Words) -> Words:
    """Mixes the bits of words: a bijection (C. Wellons' lowbias32)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


# [lane, axis]: what a step along an axis adds to an element's key. Indices of one axis are below 2^32, where those of a
# flattened stack are not. An array has at most 15 axes; the last column is where the keys begin.
_STEPS = _scrambled(np.arange(1, 33, dtype=np.uint32)).reshape(2, 16) | np.uint32(1)


def _lanes(words: Words, keys: Sequence[Words]) -> tuple[Words, Words]:
    """Mixes words with the keys of their places, twice."""
    first = _scrambled(words ^ keys[0])
    second = first ^ keys[1]
    second = (second ^ (second >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return first, second ^ (second >> np.uint32(16))


def _text(shape: tuple[int, ...], dtype: np.dtype, sums: np.ndarray) -> str:
    return f"{dtype}[{','.join(map(str, shape))}] {int(sums[0]):08x}{int(sums[1]):08x}"


# Arrays on devices


def of_arrays(arrays: Mapping[str, jax.Array]) -> Checksums:
    """Returns the checksums of arrays, each computed where it lies; the host gets eight bytes of each.

    With several processes all of them must call this, with the same names: it runs collective programs, in their order.
    """
    sums = {}
    for name in sorted(arrays):
        sharding = arrays[name].sharding
        everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
        sums[name] = jax.jit(_sums, out_shardings=everywhere)(arrays[name])
        if jax.default_backend() == "cpu":  # where collectives that run at the same time can wait for each other
            sums[name].block_until_ready()
    found = jax.device_get(sums)
    return {name: _text(array.shape, array.dtype, found[name]) for name, array in arrays.items()}


def _sums(array: jax.Array) -> jax.Array:
    """[...] -> [2]. One loop over the array, which makes no temporary of its size."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    places = [jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in range(words.ndim)]
    keys = [
        sum((place * step for place, step in zip(places, steps, strict=False)), start=steps[-1]) for steps in _STEPS
    ]
    zero = np.uint32(0)
    sums = jax.lax.reduce(
        _lanes(words, keys), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(words.ndim))
    )
    return jnp.stack(sums)


# Pieces in memory


class Sum:
    """The checksum of an array that is read or written in pieces, in any order."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype
        self._sums, self._elements = np.zeros(2, np.uint32), 0

    def add(self, region: Any, piece: np.ndarray) -> None:
        """Adds a piece. region: its index into the array, of integers and slices without steps."""
        parts = region if isinstance(region, tuple) else () if region is ... else (region,)
        starts = [
            part if isinstance(part, int) else part.indices(n)[0] for part, n in zip(parts, self.shape, strict=False)
        ]
        single = tuple(axis for axis, part in enumerate(parts) if isinstance(part, int))
        if piece.size:
            self._sums += _sums_of_piece(np.expand_dims(piece, single), starts)
        self._elements += piece.size

    def text(self) -> str:
        assert self._elements == math.prod(self.shape), f"{self._elements} elements of {self.shape}"
        return _text(self.shape, self.dtype, self._sums)


def _sums_of_piece(piece: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """[...] -> [2]. starts: of the piece along the first axes of the whole array; 0 along the others."""
    if piece.dtype.itemsize == 8:
        piece = np.ascontiguousarray(piece)[..., None]
    words = piece.view(_WORDS[piece.dtype.itemsize])
    if words.ndim == 0:
        words = words[None]
    starts = [*starts, *[0] * (words.ndim - len(starts))]
    order = sorted(range(words.ndim), key=lambda axis: -words.strides[axis])  # as it lies in memory
    places = [np.arange(starts[axis], starts[axis] + words.shape[axis], dtype=np.uint32) for axis in order]
    keys = []
    for steps in _STEPS:
        *outer, last = (place * steps[axis] for place, axis in zip(places, order, strict=True))
        keys.append((functools.reduce(np.add.outer, outer, steps[-1:]).reshape(-1, 1), last))
    rows = words.transpose(order).reshape(-1, len(places[-1]))
    at_once = max(1, TILE // len(places[-1]))
    sums = np.zeros(2, np.uint32)
    for first in range(0, len(rows), at_once):
        some = slice(first, first + at_once)
        lanes = _lanes(rows[some].astype(np.uint32), [of_row[some] + last for of_row, last in keys])
        sums += np.array([lane.sum(dtype=np.uint32) for lane in lanes])
    return sums


# Records


def record(items: Mapping[str, Checksums]) -> dict[str, Any]:
    """Returns the JSON of the checksums of a checkpoint's trees by their names."""
    return {"version": VERSION, "items": dict(items)}


def write(params: Path, found: Checksums) -> None:
    """Writes checksums beside an Orbax tree."""
    text = json.dumps(record({params.name: found}), indent=1, sort_keys=True)
    atomic_write(params.parent / CHECKSUMS_FILE, text + "\n")


def recorded(checkpoint: Path) -> dict[str, Checksums] | None:
    """Reads the checksums of a checkpoint's trees by their names; None if it was written without them.

    Raises ChecksumError for a damaged record.
    """
    for name in (CHECKSUMS_FILE, f"{CHECKSUMS}/metadata"):
        if exists(checkpoint / name):
            file = file_in(checkpoint, name)
            return of_record(read_json(file), str(file))
    return None


def recorded_of(tree: Path) -> Checksums:
    """Reads the checksums of an Orbax tree; raises MossAudioError if its checkpoint has none."""
    items = recorded(tree.parent)
    if items is None:
        raise none_in(tree.parent)
    return items.get(tree.name, {})


def none_in(directory: Path) -> MossAudioError:
    """Returns the error for a checkpoint that is to be verified alone."""
    return MossAudioError(
        f"{directory} has no checksums, which only Orbax checkpoints have, and not those of older versions: load it "
        f"without --verify, or compare it with its original, `moss-audio-convert verify ORIGINAL {directory}`"
    )


def of_record(content: Any, where: str) -> dict[str, Checksums]:
    """Returns the checksums in a record's JSON. Raises ChecksumError, or MossAudioError for a later version."""
    version, items = (content.get(key) for key in ("version", "items")) if isinstance(content, dict) else (None, None)
    if type(version) is int and version > VERSION:
        raise MossAudioError(
            f"{where} has checksums of version {version}, where this program knows {VERSION}: update it, or load the "
            "checkpoint without checking it"
        )
    if version != VERSION or not isinstance(items, dict) or not all(map(_is_item, items.items())):
        raise ChecksumError(
            f"{where} must hold version {VERSION} and checksums of trees by path, not {shown(content)}: it is damaged, "
            "copy it again, or remove it to load the checkpoint unchecked"
        )
    return items


def _is_item(item: tuple[str, Any]) -> bool:
    name, sums = item
    if not is_plain_name(name) or not isinstance(sums, dict):  # the name is that of a directory
        return False
    return all(isinstance(text, str) and _TEXT.fullmatch(text) for text in sums.values())


def differences(expected: Checksums, found: Checksums) -> list[str]:
    """Describes the arrays that are not as they were written. found: may be of some of them."""
    return [
        f"{name} is {text} and was written {f'as {expected[name]}' if name in expected else 'without a checksum'}"
        for name, text in found.items()
        if expected.get(name) != text
    ]


def damage(tree: Path, expected: Checksums, found: Checksums) -> str:
    """Names the tree and the first arrays that are not as they were written; empty if all are."""
    wrong = differences(expected, found)
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{tree} is damaged, {'; '.join(wrong[:3])}{more}" if wrong else ""


def require(tree: Path, expected: Checksums, found: Checksums) -> None:
    """Raises ChecksumError, which names the tree and the first arrays, if some are not as they were written."""
    if wrong := damage(tree, expected, found):
        raise ChecksumError(f"{wrong}: copy or convert it again, or take another checkpoint of the run")
