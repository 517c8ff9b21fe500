"""Reads parameters of which some kernels become int8 (`int8`): one float kernel is in memory at a time."""

from collections.abc import Callable

import jax

from moss_audio_jax.int8 import int8_kernels, quantize

Parameters = dict[str, jax.Array]
# Path -> shape, dtype and place of a parameter that is to be read or made.
Wanted = dict[str, jax.ShapeDtypeStruct]


def read_parameters(read: Callable[[Wanted], Parameters], wanted: Wanted) -> Parameters:
    """Reads parameters onto their devices.

    read: reads float parameters. A kernel whose scales are wanted too is read by itself in the dtype of its scales, and
    becomes int8 before the next one is read.
    """
    kernels = int8_kernels(wanted)
    whole = {path: leaf for path, leaf in wanted.items() if path not in kernels and path not in kernels.values()}
    parameters = read(whole) if whole else {}
    for names in kernels.items():
        kernel, scale = (wanted[name] for name in names)
        (wide,) = read({names[0]: kernel.update(dtype=scale.dtype)}).values()
        pair = jax.jit(quantize, out_shardings=(kernel.sharding, scale.sharding))(wide)
        parameters |= dict(zip(names, pair, strict=True))
    return parameters
