"""Reads and writes parameters as an Orbax tree: `params/` of a checkpoint directory.

The tree is ours: equal layers are stacked, and the keys are those of `tree.dotted` paths. Each device's shard is read
straight onto it.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError, StorageError, shown
from moss_audio_jax.model import adapter_specs, parameter_specs
from moss_audio_jax.schema import SWITCH, Rule, check_keys
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, absolute, exists, is_inside, is_plain_name, url
from moss_audio_jax.storage.retries import is_transient, retried, summary
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights import checksums
from moss_audio_jax.weights.locate import RUN_CHECKPOINTS, Location
from moss_audio_jax.weights.names import SAFETENSORS_DTYPES

Result = TypeVar("Result")

VERIFIED_BYTES = 2 << 30  # of all devices: in memory twice if a verified load casts


def save(params: Path, parameters: dict[str, jax.Array]) -> None:
    """Writes parameters by path into a new directory."""
    found = checksums.of_arrays(parameters)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(params, unflatten(parameters))
    if jax.process_index() == 0:
        checksums.write(params, found)


def restore(
    location: Location, config: MossAudioConfig, abstract: dict[str, jax.ShapeDtypeStruct], *, verify: bool = False
) -> dict[str, jax.Array]:
    """Restores the parameters in `abstract` from an Orbax checkpoint, moving averages where the location has them.

    config: the checkpoint's own. abstract: path -> shape, dtype (stored values are cast) and sharding.
    verify: compare what is restored with its checksums, before it is cast.
    Raises MossAudioError if what is stored does not fit the configuration, or is damaged.
    """
    assert location.params is not None
    check_stored(location.params, config)
    read = _restore_verified if verify else restore_tree
    if location.averages is None:
        return read(absolute(location.params), abstract)
    averaged = stored_shapes(location.averages).keys() & abstract.keys()
    rest = {name: leaf for name, leaf in abstract.items() if name not in averaged}
    found = read(absolute(location.averages), {name: abstract[name] for name in averaged})
    return found | read(absolute(location.params), rest)


def _restore_verified(params: Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restores leaves in their stored dtypes, checks and casts them, a batch of VERIFIED_BYTES at a time."""
    expected = checksums.recorded_of(params)
    stored = {
        name: leaf.update(dtype=dtype)
        for name, (_, dtype) in stored_shapes(params).items()
        if (leaf := abstract.get(name))
    }
    found: dict[str, jax.Array] = {}
    for names in _batches(stored):
        arrays = restore_tree(params, {name: stored[name] for name in names})
        checksums.require(params, expected, checksums.of_arrays(arrays))
        found |= {name: cast(arrays.pop(name), abstract[name]) for name in names}
    return found


def _batches(leaves: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Yields names of leaves that have VERIFIED_BYTES together, or of one that is larger."""
    names, size = [], 0
    for name, leaf in leaves.items():
        more = leaf.size * leaf.dtype.itemsize
        if names and size + more > VERIFIED_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    if names:
        yield names


def cast(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array in the dtype of `leaf`, where that one is to lie."""
    if array.dtype == leaf.dtype:
        return array
    return jax.jit(lambda array: array.astype(leaf.dtype), out_shardings=leaf.sharding)(array)


def restore_tree(params: Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restores some leaves of an Orbax tree that has been checked."""
    if not abstract:
        return {}
    target = unflatten(abstract)
    # Without a limit Orbax holds the whole checkpoint twice; it refuses a limit below the largest leaf.
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(1.0, 1.01 * largest / 1e9))
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )

    def read() -> dict[str, Any]:
        with ocp.Checkpointer(handler) as checkpointer:
            return flatten(checkpointer.restore(params, args=arguments))

    try:
        return retried_alone(params, read)
    except MossAudioError:
        raise
    except Exception as error:
        # Orbax wraps TensorStore's error about a chunk in a plain Exception.
        damage = error.__cause__ if type(error) is Exception else error
        if not isinstance(damage, DAMAGE):
            raise
        raise MossAudioError(
            f"{params} can't be restored, its files are damaged ({summary(damage)}): convert or copy it again, or take "
            "another checkpoint of the run"
        ) from error


def retried_alone(path: AnyPath, work: Callable[[], Result]) -> Result:
    """Calls `work` through `retried`; with several processes only once.

    There every process must take part in each of Orbax's barriers, so one can't retry alone.
    """
    if jax.process_count() == 1:
        return retried(path, work)
    try:
        return work()
    except Exception as error:
        if not is_transient(error):
            raise
        raise StorageError(
            f"{path}: storage failed for a moment ({summary(error)}); run the same command again"
        ) from error


def _require_inside(params: Path) -> None:
    """Raises MossAudioError for a link in a tree that leads out of the checkpoint's directory, or the run's."""
    directory = absolute(params).parent
    root = directory.parent.parent if directory.parent.name == RUN_CHECKPOINTS else directory
    for parent, directories, files in os.walk(params):  # finds nothing on gs://, which has no links
        for path in (parent, *(os.path.join(parent, name) for name in directories + files)):
            if not is_inside(root, path):
                raise MossAudioError(
                    f"{path} must be inside of {root}, not a link to elsewhere: copy what it names there (`cp -rL`)"
                )


def stored_shapes(params: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Reads the shape and dtype of each leaf of an Orbax tree, by path; no tensor is read."""
    _require_inside(params)

    def read() -> Any:
        _check_tree(params)
        # Listed first: Orbax reports damage here by a traceback of its event loop.
        ts.KvStore.open({"driver": "ocdbt", "base": f"{url(params)}/"}).result().list().result()
        # Where files are damaged, a Checkpointer logs why and returns nothing; a handler raises it.
        return ocp.PyTreeCheckpointHandler().metadata(absolute(params))

    try:
        metadata = retried(params, read)
        return flatten(metadata.tree, lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype)))
    except MossAudioError:
        raise
    except FileNotFoundError as error:
        raise MossAudioError(f"{params} is no Orbax checkpoint, or an unfinished one: convert it again") from error
    except DAMAGE as error:
        raise _damaged(params, error) from error


# Errors of Orbax and TensorStore for files with unexpected content.
DAMAGE = (
    *(ValueError, OSError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(NotImplementedError, RecursionError),  # an unknown kind of sharding; metadata that nests deeply
)


def _damaged(params: Path, error: BaseException) -> MossAudioError:
    return MossAudioError(f"{params} can't be read, its files are damaged ({summary(error)}): convert it again")


def _is_name(key: object) -> bool:
    """Returns True for a plain name, or several joined by slashes, as keys of a run's state are."""
    return isinstance(key, str) and all(map(is_plain_name, key.split("/")))


def _check_tree(params: Path) -> None:
    """Raises MossAudioError unless Orbax's description of a tree is valid and all keys are plain names.

    Orbax makes paths of the keys, so others could lead out of the directory.
    """
    file = params / "_METADATA"
    if not exists(file):
        raise MossAudioError(f"{params} is no Orbax checkpoint, or an unfinished one: convert it again")
    content = read_json(file)
    check_keys(content, {"use_ocdbt": Rule("true", lambda value: value is True), "use_zarr3": SWITCH}, str(file))
    tree = content.get("tree_metadata")
    if not isinstance(tree, dict) or not tree:
        raise MossAudioError(f"{file}: tree_metadata must name parameters, not be {shown(tree)}: convert it again")
    for name, leaf in tree.items():
        keys = leaf.get("key_metadata") if isinstance(leaf, dict) else None
        if not isinstance(keys, list) or not all(isinstance(key, dict) and _is_name(key.get("key")) for key in keys):
            raise MossAudioError(
                f"{file}: {shown(name)} must have plain names as keys, not {shown(keys)}: convert it again"
            )


def check_stored(params: Path, config: MossAudioConfig) -> None:
    """Compares an Orbax tree with its configuration; raises MossAudioError with all differences.

    With LoRA the tree holds the adapter alone.
    """
    stored = stored_shapes(params)
    specs = parameter_specs(config) if config.lora is None else adapter_specs(config)
    expected = {path: spec.shape for path, spec in specs.items()}
    problems = [f"{path} is missing" for path in expected.keys() - stored.keys()]
    problems += [f"{path} is not part of this model" for path in stored.keys() - expected.keys()]
    problems += [
        f"{path} has shape {stored[path][0]}, config.json makes it {shape}"
        for path, shape in expected.items()
        if path in stored and stored[path][0] != shape
    ]
    problems += [
        f"{path} is of type {dtype}, which is no floating-point type that this port reads"
        for path, (_, dtype) in stored.items()
        if dtype not in SAFETENSORS_DTYPES.values()
    ]
    if problems:
        raise MossAudioError(f"{params} does not fit its config.json: {'; '.join(sorted(problems)[:20])}")
