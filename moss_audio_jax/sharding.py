"""Mesh axes, and the one table from logical axes of parameters and activations to them.

A parameter declares logical axes ("embed", "mlp"); only `RULES` maps them to mesh axes.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from moss_audio_jax.errors import MossAudioError

Tree = TypeVar("Tree")

# replica: data parallel with whole copies, over slices; fsdp: data parallel with sharded parameters; tensor: parallel
# within a layer.
MESH_AXES = ("replica", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "channels": None,
    "adapter": ("fsdp", "tensor"),  # the long side of a LoRA matrix; its short side, the rank, is not sharded
    # activations
    "batch": ("replica", "fsdp"),
    "sequence": None,
    "features": None,
    None: None,
}


def make_mesh(*, replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """Makes a mesh over all devices; one of the sizes may be -1 and takes the remaining devices.

    Each of several TPU slices holds whole replicas, so that slices exchange only gradients.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    filled = [name for name, size in sizes.items() if size == -1]
    known = 1
    for size in sizes.values():
        known *= max(size, 1) if size != -1 else 1
    if len(filled) == 1 and len(devices) % known == 0:
        sizes[filled[0]] = len(devices) // known
        known *= sizes[filled[0]]
    if known != len(devices) or min(sizes.values()) < 1:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise MossAudioError(
            f"a mesh of {given} does not cover {len(devices)} devices: their product must be that number"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["replica"] % slices:
        raise MossAudioError(
            f"replica={sizes['replica']} does not fit {slices} TPU slices: it must be a multiple of them, since only "
            "whole copies may be placed across the network between slices"
        )
    # An axis may take a part of one of the torus's, as tensor=2 does on 4x4x4.
    if slices == 1:
        laid_out = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        in_slice = (sizes["replica"] // slices, sizes["fsdp"], sizes["tensor"])
        laid_out = create_hybrid_device_mesh(in_slice, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(logical_axes: Sequence[str | None], mesh: Mesh | Any) -> PartitionSpec:
    """Maps logical axes to the mesh's axes, without those that the mesh does not have."""

    def present(rule):
        axes = (rule,) if isinstance(rule, str) else rule or ()
        axes = tuple(axis for axis in axes if axis in mesh.axis_names)
        return axes[0] if len(axes) == 1 else axes or None

    return PartitionSpec(*(present(RULES[axis]) for axis in logical_axes))


def num_parts(logical_axis: str | None, mesh: Mesh | Any) -> int:
    """Number of parts that the mesh cuts a dimension of that logical axis into."""
    (entry,) = partition_spec((logical_axis,), mesh)
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def named_sharding(
    name: str, shape: Sequence[int], logical_axes: Sequence[str | None], mesh: Mesh | Any
) -> NamedSharding:
    """Returns the sharding of tensor `name`; raises MossAudioError for a dimension that the mesh does not divide."""
    spec = partition_spec(logical_axes, mesh)
    for size, axis, entry in zip(shape, logical_axes, spec, strict=True):
        parts = num_parts(axis, mesh)
        if size % parts:
            raise MossAudioError(
                f"{name}: its {axis!r} dimension of {size} can't be cut into {parts} parts (mesh axis {entry!r}): "
                f"choose a size for that axis that divides {size}"
            )
    return NamedSharding(mesh, spec)


def check_heads(mesh: Mesh | Any, **heads: int) -> None:
    """Raises MossAudioError unless every device gets whole attention heads. heads: number of each kind."""
    parts = num_parts("heads", mesh)
    cut = [f"{count} {kind.replace('_', ' ')}" for kind, count in heads.items() if count % parts]
    if cut:
        raise MossAudioError(
            f"tensor={parts} does not divide the model's {' and '.join(cut)}: choose a divisor of "
            f"{math.gcd(*heads.values())} for tensor, and fsdp for the other devices"
        )


def constrain(array: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Applies with_sharding_constraint on the current mesh (`jax.set_mesh`); no-op without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(logical_axes, mesh))


def automatic(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axes, which all programs here need; `jax.make_mesh` makes explicit ones."""
    if set(mesh.axis_types) <= {AxisType.Auto}:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def mesh_of(parameters: Any) -> Mesh | None:
    """Returns the mesh, with automatic axes, that the arrays of a tree are sharded over, or None."""
    sharding = _sharding_of(parameters)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return automatic(sharding.mesh)
    return None


def on_mesh_of(parameters: Any, inputs: Any = None) -> contextlib.AbstractContextManager:
    """Sets the mesh that parameters are sharded over as the current one, so that activations are sharded over it too.

    For parameters on one device it is a mesh of that device. In a caller's own `jax.jit`, where parameters or inputs
    are traced, the current mesh stays: the caller sets it.
    """
    if in_a_trace() or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((parameters, inputs))):
        return contextlib.nullcontext()
    mesh, sharding = mesh_of(parameters), _sharding_of(parameters)
    if mesh is None and isinstance(sharding, SingleDeviceSharding):
        (device,) = sharding.device_set
        mesh = Mesh(np.array([[[device]]]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def in_a_trace() -> bool:
    """Returns True while a program is traced, even if all arguments are arrays that it closes over."""
    return isinstance(jnp.zeros(()), Tracer)


def on_automatic_mesh(parameters: Tree) -> Tree:
    """Returns the same arrays, without a copy, with automatic axes in place of explicit ones in their shardings."""

    def described(leaf: Any) -> Any:
        sharding = _sharding_of(leaf)
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return leaf
        mesh = automatic(sharding.mesh)
        return leaf if mesh is sharding.mesh else jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(described, parameters)


def _sharding_of(tree: Any) -> Any:
    """Returns the sharding of the first array; None for a traced or NumPy array."""
    leaf = next(iter(jax.tree.leaves(tree)), None)
    return None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)


def device_kind() -> str:
    """Returns the kind of the devices that a program is traced for: the current mesh's, else the default device's.

    The mesh may be of a topology that this machine does not have, to compile ahead of time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is not None:
        return mesh.abstract_device.device_kind
    device = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return (jax.devices(device)[0] if isinstance(device, str) else device).device_kind


def on_cpu() -> bool:
    """Returns True if a program is traced for a CPU, where XLA needs another order of operations to be fast."""
    return device_kind() == "cpu"


def batch_is_sharded() -> bool:
    """Returns True if the current mesh cuts batches into several parts."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and num_parts("batch", mesh) > 1


def on_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array as NumPy, on every process; shards of other processes are gathered."""
    whole = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if whole else multihost_utils.process_allgather(array, tiled=True))
