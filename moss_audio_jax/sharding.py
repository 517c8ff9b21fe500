"""Mesh axes, and the one table that maps a logical axis of a parameter or an activation to them.

A parameter declares logical axes ("embed", "mlp"); where those live is decided here and nowhere else.
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

# replica: whole copies, for slices; fsdp: data parallel, parameters cut; tensor: parallel within a layer.
MESH_AXES = ("replica", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "channels": None,
    "adapter": ("fsdp", "tensor"),  # the long side of an adapter of LoRA: its short side, the rank, is never cut
    # activations
    "batch": ("replica", "fsdp"),
    "sequence": None,
    "features": None,
    None: None,
}


def make_mesh(*, replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1 and takes the devices that are left.

    Of several TPU slices each holds whole replicas, so that between them gradients alone are exchanged.
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
            "whole copies may lie across the network between slices"
        )
    # An axis may take a part of one of the torus's, as tensor=2 does on 4x4x4.
    if slices == 1:
        laid_out = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        in_slice = (sizes["replica"] // slices, sizes["fsdp"], sizes["tensor"])
        laid_out = create_hybrid_device_mesh(in_slice, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(logical_axes: Sequence[str | None], mesh: Mesh | Any) -> PartitionSpec:
    """Logical axes to the mesh's axes; those the mesh lacks are left out."""

    def present(rule):
        axes = (rule,) if isinstance(rule, str) else rule or ()
        axes = tuple(axis for axis in axes if axis in mesh.axis_names)
        return axes[0] if len(axes) == 1 else axes or None

    return PartitionSpec(*(present(RULES[axis]) for axis in logical_axes))


def num_parts(logical_axis: str | None, mesh: Mesh | Any) -> int:
    """Into how many parts the mesh cuts a dimension of that logical axis."""
    (entry,) = partition_spec((logical_axis,), mesh)
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def named_sharding(
    name: str, shape: Sequence[int], logical_axes: Sequence[str | None], mesh: Mesh | Any
) -> NamedSharding:
    """The sharding of tensor `name` on `mesh`; a dimension that the mesh does not divide is an error naming both."""
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
    """Raises MossAudioError unless every device gets whole attention heads. heads: how many there are of each kind."""
    parts = num_parts("heads", mesh)
    cut = [f"{count} {kind.replace('_', ' ')}" for kind, count in heads.items() if count % parts]
    if cut:
        raise MossAudioError(
            f"tensor={parts} does not divide the model's {' and '.join(cut)}: choose a divisor of "
            f"{math.gcd(*heads.values())} for tensor, and fsdp for the other devices"
        )


def constrain(array: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins an activation to its place on the mesh that `jax.set_mesh` made current; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(logical_axes, mesh))


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes, which all programs here are written for; `jax.make_mesh` makes explicit ones."""
    if set(mesh.axis_types) <= {AxisType.Auto}:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def mesh_of(parameters: Any) -> Mesh | None:
    """The mesh, with automatic axes, that the arrays of a tree are sharded over, if there is one."""
    sharding = _sharding_of(parameters)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return automatic(sharding.mesh)
    return None


def on_mesh_of(parameters: Any, inputs: Any = None) -> contextlib.AbstractContextManager:
    """Makes the mesh that parameters are sharded over the current one, so that activations are placed on it too.

    For parameters on one device that is a mesh of that device alone. While they or the inputs are traced, by a caller's
    own `jax.jit`, the current mesh stays: there the caller sets it.
    """
    if in_a_trace() or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((parameters, inputs))):
        return contextlib.nullcontext()
    mesh, sharding = mesh_of(parameters), _sharding_of(parameters)
    if mesh is None and isinstance(sharding, SingleDeviceSharding):
        (device,) = sharding.device_set
        mesh = Mesh(np.array([[[device]]]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def in_a_trace() -> bool:
    """True while another program is traced: its new arrays are tracers, also beside arrays that it closes over."""
    return isinstance(jnp.zeros(()), Tracer)


def on_automatic_mesh(parameters: Tree) -> Tree:
    """The same arrays, in place, where their mesh has explicit axes described with automatic ones."""

    def described(leaf: Any) -> Any:
        sharding = _sharding_of(leaf)
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return leaf
        mesh = automatic(sharding.mesh)
        return leaf if mesh is sharding.mesh else jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(described, parameters)


def _sharding_of(tree: Any) -> Any:
    """That of the first array; None for one that is traced, or NumPy's."""
    leaf = next(iter(jax.tree.leaves(tree)), None)
    return None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array; each of several processes gets it, also what lies with the others."""
    whole = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if whole else multihost_utils.process_allgather(array, tiled=True))
