"""TPU generations: compute, memory and interconnect of one chip.

Sources: Google Cloud's TPU documentation (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x). It gives the
interconnect (ICI) as bandwidth over all links in both directions; here it is per link and direction. For v4 it gives
none: that figure, and the rule of wraparound links, are from "How to Scale Your Model" (jax-ml/scaling-book, "TPUs").
The network between slices (DCN) is documented per chip for v5p, v6e and TPU7x (50, 100 and 100 Gbit/s) and per pod for
v5e (6.4 Tbit/s for 256 chips); for v4 it is the book's 25 GB/s per host of 4 chips. Usable HBM is measured: it is the
limit of XLA's compiler for each chip (libtpu 0.0.52).

A chip is not always one device. The two TensorCores of a v5p, and usually of a v4 ("megacore"), are one device; those
of a TPU7x are two. `Device.num_cores` is the number of cores of a device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip with all its cores. Sizes are bytes, rates are per second.

    peak_flops: in bfloat16. hbm_bytes: as documented. usable_hbm_bytes: for a program and its arguments.
    ici_links: links to other chips. ici_link_bandwidth: of one link in one direction.
    dcn_bandwidth: to other slices; the chip's share of its host's bandwidth.
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
        """Returns for each axis of a slice whether it is a ring (has wraparound links).

        In two dimensions axes of 16 chips are rings; in three all axes are, if every size is a multiple of 4.
        """
        if self.ici_links == 4:
            return tuple(size == 16 for size in shape)
        return (all(size % 4 == 0 for size in shape),) * len(shape)


V4 = Chip("TPU v4", 2, 275e12, 32 * GIB, int(30.75 * GIB), 1200e9, 6, 45e9, 6.25e9)
V5E = Chip("TPU v5e", 1, 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 4, 50e9, 3.125e9)
# The compiler allows more than the documented 95 GiB.
V5P = Chip("TPU v5p", 2, 459e12, 95 * GIB, int(95.73 * GIB), 2765e9, 6, 100e9, 6.25e9)
V6E = Chip("TPU v6e", 1, 918e12, 32 * GIB, int(31.24 * GIB), 1638e9, 4, 100e9, 12.5e9)
V7X = Chip("TPU7x", 2, 2307e12, 192 * GIB, int(2 * 94.74 * GIB), 7380e9, 6, 100e9, 12.5e9)

# By `jax.Device.device_kind`: libtpu's spelling, and the other one that JAX accepts.
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
    """Returns the chip that a device of this kind is, or is a part of; None if unknown."""
    return CHIPS.get(device_kind)


def peak_flops(devices: Iterable[Any]) -> float | None:
    """Sums bfloat16 FLOP/s over `jax.Device`s; None if one of them is unknown."""
    total = 0.0
    for device in devices:
        chip = chip_of(device.device_kind)
        if chip is None:
            return None
        total += chip.peak_flops * device.num_cores / chip.cores
    return total
