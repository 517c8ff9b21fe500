"""Orbax has what `orbax_hooks` needs, and leaves are written and read as Orbax itself does, and as they were before."""

import inspect
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from tqdm import tqdm

from convert.orbax_files import save_streamed
from convert.orbax_hooks import HOOKS, PROCESS, StreamedArray, StreamedArrayHandler, checkpointer
from moss_audio_jax.storage.paths import absolute, url
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights import orbax

_NUMBERS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
LEAVES = {
    "a.kernel": _NUMBERS.astype(ml_dtypes.bfloat16),
    "a.bias": np.zeros(5, np.float32),  # of the value that Orbax fills gaps with
    "b": _NUMBERS[0].astype(np.float16),
}
BROKEN = f"orbax-checkpoint {ocp.__version__} broke convert/orbax_hooks.py"
BEFORE = "orbax-0.12.8.zip"  # LEAVES, by `save_streamed` and by `save`, as they were with Orbax's own specs of leaves


def write(directory: Path) -> None:
    def pieces(array: np.ndarray):
        return lambda: ((slice(row, row + 1), array[row : row + 1]) for row in range(len(array)))

    arrays = {name: StreamedArray(array.shape, array.dtype, pieces(array)) for name, array in LEAVES.items()}
    save_streamed(directory / "streamed" / "params", arrays)
    orbax.save(absolute(directory / "saved" / "params"), {name: jnp.asarray(array) for name, array in LEAVES.items()})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    write(directory)
    return directory


@pytest.fixture(scope="module")
def before(tmp_path_factory, data_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("before")
    with zipfile.ZipFile(data_dir / BEFORE) as archive:
        archive.extractall(directory)
    return directory


def layout(params: Path) -> set[str]:
    """The files of a tree; names of data are random."""
    files = (path.relative_to(params).as_posix() for path in params.rglob("*") if path.is_file())
    return {re.sub(r"/[0-9a-f]{32}$", "/DATA", f"/{file}") for file in files}


def described(params: Path, name: str) -> dict[str, Any]:
    """What TensorStore reads of a leaf before its values, but for the chunks, which are ours to choose."""
    kvstore = {"driver": "ocdbt", "base": f"{url(params)}/", "path": f"{name}/"}
    found = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().spec().to_json()
    return {key: value for key, value in found["metadata"].items() if key != "chunks"} | found["kvstore"]["config"]


def test_orbax_has_the_hooks():
    parameters = inspect.signature(ocp.type_handlers.ParamInfo).parameters
    missing = [name for name in HOOKS if name not in parameters]
    missing += [] if hasattr(ocp.type_handlers.ParamInfo, "await_path_creation") else ["await_path_creation"]
    assert not missing, f"{BROKEN}: its ParamInfo has no {', '.join(missing)}; find what Orbax has instead"
    given = list(inspect.signature(ocp.type_handlers.NumpyHandler.serialize).parameters)[1:]
    assert given == ["values", "infos", "args"], f"{BROKEN}: handlers are given {', '.join(given)}"


@pytest.mark.parametrize("other", ["saved", "before"])
def test_leaves_are_written_as_orbax_writes_them(written: Path, before: Path, other: str):
    ours = written / "streamed" / "params"
    theirs = written / "saved" / "params" if other == "saved" else before / "streamed" / "params"
    extra = {"/_sharding", "/array_metadatas/process_0"} if other == "saved" else set()  # of jax.Array alone
    assert layout(ours) | extra == layout(theirs), f"{BROKEN}: its files, {PROCESS} among them, are others now"
    for name in LEAVES:
        found, expected = described(ours, name), described(theirs, name)
        found["uuid"] = expected["uuid"]
        assert found == expected, f"{BROKEN}: it describes {name} in another way now"
    if other == "before":
        assert (ours / "_METADATA").read_bytes() == (theirs / "_METADATA").read_bytes()


@pytest.mark.parametrize("by", ["streamed", "saved"])
@pytest.mark.parametrize("when", ["written", "before"])
def test_leaves_are_read_whoever_wrote_them(request, when: str, by: str):
    params = absolute(request.getfixturevalue(when) / by / "params")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = orbax.stored_shapes(params)
    assert stored == {name: (array.shape, array.dtype) for name, array in LEAVES.items()}
    restored = orbax.restore_tree(
        params, {name: jax.ShapeDtypeStruct(*about, sharding=device) for name, about in stored.items()}
    )
    arguments = unflatten({name: ocp.RestoreArgs(restore_type=StreamedArray) for name in LEAVES})
    with checkpointer(StreamedArrayHandler(threading.Event(), tqdm(disable=True))) as reader:
        stores = flatten(reader.restore(params, args=ocp.args.PyTreeRestore(restore_args=arguments)))
    for name, array in LEAVES.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)
        np.testing.assert_array_equal(stores[name].read().result(), array, err_msg=name)
