"""Rows of a global batch that each process reads, from the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sharding import RULES


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of the share of rows that this process reads, and the number of shares, all of one size.

    Processes whose devices hold the same rows (tensor parallelism across processes) read the same share. If the mesh
    orders devices differently from processes, a share is in other rows than with one process; sums are the same.

    Raises MossAudioError if the mesh gives processes different numbers of rows.
    """
    rows = _rows_of_processes(mesh)
    shares = sorted(set(rows.values()))
    all_rows = {row for share in shares for row in share}
    if len({len(share) for share in shares}) != 1 or sum(map(len, shares)) != len(all_rows):
        raise MossAudioError(
            f"a mesh of {dict(mesh.shape)} deals the rows of a batch unevenly to {len(rows)} processes: choose a "
            "mesh.tensor that divides a process's devices, or that they divide"
        )
    return shares.index(rows[jax.process_index()]), len(shares)


def _rows_of_processes(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Returns for each process the sorted positions of its devices along the data-parallel axes."""
    batch = [mesh.axis_names.index(axis) for axis in RULES["batch"] or () if axis in mesh.axis_names]
    # [data-parallel positions, other devices of a position]
    by_place = np.moveaxis(mesh.devices, batch, range(len(batch)))
    by_place = by_place.reshape(int(np.prod(by_place.shape[: len(batch)])), -1)
    places: dict[int, set[int]] = {}
    for place, devices in enumerate(by_place):
        for device in devices:
            places.setdefault(device.process_index, set()).add(place)
    return {process: tuple(sorted(found)) for process, found in places.items()}


def processes_with_this_share(mesh: Mesh) -> int:
    """Number of processes that read the same share of a batch as this one, itself included."""
    rows = _rows_of_processes(mesh)
    return sum(places == rows[jax.process_index()] for places in rows.values())
