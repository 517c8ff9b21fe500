"""Slices of TPUs by name: the names that Google Cloud rents them by, and their devices to compile for.

Google Cloud's names count TensorCores on v4 and v5p, chips on v5e and v6e: v5p-64 is the topology v5p:2x4x4.
"""

import math
import os
import re
from collections.abc import Iterable
from typing import Any

import jax

from moss_audio_jax.errors import MossAudioError
from train.planning.chips import chip_of

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


def _rented(prefix: str, kind: str, shapes: Iterable[str], counted: int) -> dict[str, str]:
    """Names such as v5p-64 -> topologies such as v5p:2x4x4. counted: units that the name counts per chip."""
    chips = {shape: math.prod(map(int, shape.split("x"))) for shape in shapes}
    return {f"{prefix}-{counted * count}": f"{kind}:{shape}" for shape, count in chips.items()}


# Google Cloud calls these names accelerator types; the shapes are those of its documentation.
ACCELERATOR_TYPES = {
    **_rented("v4", "v4", _CUBES[:10], 2),
    **_rented("v5litepod", "v5e", _FLAT, 1),
    **_rented("v5p", "v5p", (*_CUBES, "16x16x24"), 2),
    **_rented("v6e", "v6e", _FLAT, 1),
}
_SHAPED = re.compile(r"(?P<kind>\w+):(?P<shape>\d+(x\d+)*)")


def topology_of(name: str) -> str:
    """Returns the topology, such as `v5p:2x4x4`, of a topology or an accelerator type, such as `v5p-64`.

    Raises MossAudioError, with the nearest names, for any other name.
    """
    if _SHAPED.fullmatch(name):
        return name
    rented = re.sub(r"^v5e-", "v5litepod-", name)
    if rented in ACCELERATOR_TYPES:
        return ACCELERATOR_TYPES[rented]
    kind, _, count = rented.partition("-")
    near = [other for other in ACCELERATOR_TYPES if other.partition("-")[0] == kind]
    if near and count.isdecimal():
        near = sorted(near, key=lambda other: abs(math.log(int(other.partition("-")[2]) / max(int(count), 1))))[:2]
    near = near or ["v5litepod-8", "v5p-64", "v6e-8"]
    raise MossAudioError(
        f"--topology must name a TPU and its shape, such as v5e:2x4, v5p:4x4x4 or v6e:8x8, or be a name that Google "
        f"Cloud rents by, such as {', '.join(near)}, not {name!r}"
    )


def accelerator_type(topology: str) -> str | None:
    """Returns the name that a topology is rented by: `v5p-64` for `v5p:2x4x4`; None if it has none."""
    return next((kind for kind, shape in ACCELERATOR_TYPES.items() if shape == topology), None)


def shown_topology(topology: str) -> str:
    """Topology and its accelerator type, if it has one: `v5p:2x4x4 (v5p-64)`."""
    rented = accelerator_type(topology)
    return f"{topology} ({rented})" if rented else topology


def _wraps(topology: str) -> tuple[bool, bool, bool]:
    """Returns for each axis of a slice whether it is a ring, which decides between XLA's collectives."""
    kind, _, shape = topology.partition(":")
    chip, sizes = chip_of("TPU7x" if kind == "tpu7x" else f"TPU {kind}"), [int(size) for size in shape.split("x")]
    first, second, third = (*(chip.wraps(sizes) if chip else ()), False, False, False)[:3]
    return first, second, third


def compile_without_tpu() -> None:
    """Sets libtpu's environment, where the user has not, for a machine without a TPU. To be called before it loads."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks Google Cloud for the machine's type
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or libtpu warns that it is unset
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling needs no exclusive TPU


def topology_devices(topology: str, slices: int = 1, *, megacore: bool = True) -> list[Any]:
    """Returns the devices of a TPU such as `v5e:4x4` to compile for; no TPU is needed.

    topology: either name of `topology_of`.
    slices: number of such slices; their devices follow one another.
    megacore: make a v4 chip one device, as on a v4 pod and as `make_mesh` requires; False: one device per core.

    Raises MossAudioError for an unknown topology, or if libtpu is not installed.
    """
    topology = topology_of(topology)
    compile_without_tpu()
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MossAudioError(
            "compiling for a TPU needs libtpu, which is not installed here: pip install libtpu"
        ) from error
    from jax.experimental import topologies

    options: dict[str, Any] = {"wrap": _wraps(topology)} | ({} if slices == 1 else {"num_slices": slices})
    if topology.startswith("v4:") and megacore:
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        raise MossAudioError(
            f"--topology must name a TPU and its shape, such as v5e:2x4, v5p:4x4x4 or v6e:8x8, not {topology!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
