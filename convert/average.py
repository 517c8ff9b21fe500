"""Averages several checkpoints of a run into a new checkpoint."""

from collections.abc import Sequence

import numpy as np

from convert.orbax_files import OrbaxCheckpoint, save_streamed
from convert.staging import check_target, staged
from convert.tensor_source import copy_companions
from convert.to_orbax import leaf_dtypes, streamed_parameters
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, children, to_path
from moss_audio_jax.weights.locate import PARAMS, RUN_CHECKPOINTS, locate


def average(run: AnyPath, out: AnyPath, *, last: int | None = None, steps: Sequence[int] = ()) -> list[int]:
    """Writes `out`, a new directory on a disk: the mean of the run's newest `last` checkpoints, or those of `steps`.

    Means are computed in float32 and stored in the parameters' own type. A few pieces of `convert.blocks.PIECE_BYTES`
    are in memory at a time. Returns the steps.
    Raises MossAudioError for a LoRA adapter, and for steps without a checkpoint.
    """
    target = check_target(out)
    chosen = _chosen(to_path(run), last, steps)
    directories = [to_path(run) / RUN_CHECKPOINTS / str(step) for step in chosen]
    if locate(directories[0]).is_adapter:
        raise MossAudioError(
            f"{run} trains a LoRA adapter, whose factors have no meaningful mean: merge adapters with "
            "`moss-audio-convert to-hf`, or give a run that trains the model itself"
        )
    mean = _Mean([OrbaxCheckpoint(directory) for directory in directories])
    arrays = streamed_parameters(mean, leaf_dtypes(mean, None))
    with staged(target, sum(array.nbytes for array in arrays.values())) as work:
        copy_companions(mean, work, None)
        save_streamed(work / PARAMS, arrays)
    return chosen


def _chosen(run: AnyPath, last: int | None, steps: Sequence[int]) -> list[int]:
    """Selects steps, oldest first."""
    there = sorted(int(entry.name) for entry in children(to_path(run) / RUN_CHECKPOINTS) if entry.name.isdecimal())
    if (last is None) == (not steps):
        raise MossAudioError("average needs --last N or --steps A B ..., one of them: which checkpoints to take")
    listed = f"name some of those it has ({', '.join(map(str, there)) or 'none'})"
    if missing := sorted(set(steps) - set(there)):
        raise MossAudioError(f"{run} has no checkpoint of step {', '.join(map(str, missing))}: {listed}")
    if last is not None and last > len(there):
        raise MossAudioError(f"{run} has fewer checkpoints than --last {last}: {listed}, or keep more with --keep-last")
    chosen = sorted(set(steps)) if last is None else there[len(there) - last :]
    if len(chosen) < 2:
        raise MossAudioError(f"{run}: a mean needs at least 2 checkpoints: {listed}")
    return chosen


class _Mean:
    """The mean of checkpoints of one configuration: a `Checkpoint` whose tensors are means."""

    def __init__(self, checkpoints: Sequence[OrbaxCheckpoint]):
        self._checkpoints, first = checkpoints, checkpoints[0]
        self.directory, self.config, self.leaves, self.dtype = first.directory, first.config, first.leaves, first.dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        total = sum(checkpoint.read(name, start, stop).astype(np.float32) for checkpoint in self._checkpoints)
        return (np.asarray(total) / np.float32(len(self._checkpoints))).astype(self.dtype(name))
