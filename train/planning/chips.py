"""The TPU generations that JAX runs on: compute, memory and interconnect of one chip.

Sources: the pages of Google Cloud's TPU documentation (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x). They
give a chip's interconnect (ICI) as the bandwidth of all its links in both directions; here it is divided by both. For
the v4 they give none, and the figure is that of the book "How to Scale Your Model" (jax-ml/scaling-book, "TPUs"), as is
the rule of wraparound links. The network between slices (DCN) is documented by chip for the v5p, v6e and TPU7x (50,
100 and 100 Gbit/s) and by pod for the v5e (6.4 Tbit/s of 256 chips); for the v4 it is the book's 25 GB/s a host of 4.
What a program may use of the HBM is measured: it is what XLA's compiler for each chip (libtpu 0.0.52) has to give.

Google Cloud rents slices by names of another kind, such as v5p-64 for 2x4x4: they count TensorCores on v4 and v5p,
chips on v5e and v6e.

A chip is not always one device. JAX makes one of the two TensorCores of a v5p, and of a v4 as it is mostly started
("megacore"), but two devices of those of a TPU7x. `Device.num_cores` says how many cores a device has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip with all its cores; rates are a second's.

    peak_flops: in bfloat16. hbm_bytes: as documented; usable_hbm_bytes: for a program and its arguments.
    hbm_bandwidth: bytes. ici_links: to other chips; ici_link_bandwidth: bytes through one of them in one direction.
    dcn_bandwidth: bytes that it sends to other slices, its share of what its host sends.
    """

    name: str
    cores: int
    peak_flops: float
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bandwidth: float
    ici_links: int
    ici_link_bandwidth: float
    dcn_bandwidth: float

    def wraps(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Which axes of a slice of this shape are closed to rings: those of a whole pod's 16 chips in two dimensions,
        all of whole cubes of 4x4x4 in three."""
        if self.ici_links == 4:
            return tuple(size == 16 for size in shape)
        return (all(size % 4 == 0 for size in shape),) * len(shape)


V4 = Chip("TPU v4", 2, 275e12, 32 * GIB, int(30.75 * GIB), 1200e9, 6, 45e9, 6.25e9)
V5E = Chip("TPU v5e", 1, 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 4, 50e9, 3.125e9)
# The compiler finds more than the 95 GiB of the documentation.
V5P = Chip("TPU v5p", 2, 459e12, 95 * GIB, int(95.73 * GIB), 2765e9, 6, 100e9, 6.25e9)
V6E = Chip("TPU v6e", 1, 918e12, 32 * GIB, int(31.24 * GIB), 1638e9, 4, 100e9, 12.5e9)
V7X = Chip("TPU7x", 2, 2307e12, 192 * GIB, int(2 * 94.74 * GIB), 7380e9, 6, 100e9, 12.5e9)

# By `jax.Device.device_kind`: the spelling of libtpu, and another one that JAX accepts.
CHIPS = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": V7X,
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device of this kind is, or is a part of; None if it is not in the table."""
    return CHIPS.get(device_kind)


def peak_flops(devices: Iterable[Any]) -> float | None:
    """bfloat16 FLOP/s of all these `jax.Device`s together; None if one of them is not in the table."""
    total = 0.0
    for device in devices:
        chip = chip_of(device.device_kind)
        if chip is None:
            return None
        total += chip.peak_flops * device.num_cores / chip.cores
    return total
