"""Checkpoints of a run: parameters, everything else of the state, and where the data stood, in one commit.

    checkpoints/<step>/params   the parameters as a tree, laid out as `load_model` reads them
    checkpoints/<step>/state    step, moments, dropout key, counts of skipped steps
    checkpoints/<step>/ema      the moving averages of the trained parameters as a tree, where the run keeps them
    checkpoints/<step>/data     JSON of the data's iterator, of all processes
    checkpoints/<step>/best     JSON of the best evaluation so far, where the run looks for one

A checkpoint appears under its name only when all of it is whole, so a killed run leaves none that is half written. On
gs://, where nothing can be renamed at once, it counts only when `commit_success.txt` is in it, which is written last.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moss_audio_jax.checkpoint import PARAMS, RUN_BEST, RUN_CHECKPOINTS, RUN_EMA, flatten, unflatten
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.paths import AnyPath, absolute, children, write_whole
from train.best import Best
from train.step import TrainState

STATE, DATA = "state", "data"
DAMAGED = "damaged_checkpoints"
# What a state has now and checkpoints of older runs lack: it starts at 0 then.
NEWER = ("phase", "spikes_in_a_row")


class Checkpoints:
    """The checkpoints in a run's directory. Saving goes on in the background; `close` waits for it.

    best: the best evaluation as of the checkpoint that was saved or restored last, which no rule deletes. It travels
        in every checkpoint, so that a run that goes on from any of them knows what one that never stopped knew there.
    """

    def __init__(self, run: AnyPath, *, keep_last: int = 3, keep_every: int | None = None):
        self._run = absolute(run)
        self._directory = self._run / RUN_CHECKPOINTS
        self.best: Best | None = None
        policies: list[Any] = [preservation_policy.LatestN(keep_last), _KeepBest(self)]
        if keep_every is not None:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        handlers = {
            PARAMS: ocp.StandardCheckpointHandler(),
            STATE: ocp.StandardCheckpointHandler(),
            DATA: ocp.JsonCheckpointHandler(),
            RUN_EMA: ocp.StandardCheckpointHandler(),
            RUN_BEST: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data: dict[str, Any], best: Best | None = None) -> None:
        """Returns when the arrays are copied to the host, so the state may be donated; the rest happens meanwhile.

        Raises MossAudioError if this or the save before can't be written.
        """
        parameters, rest = _parts(state)
        items = {
            PARAMS: ocp.args.StandardSave(parameters),
            STATE: ocp.args.StandardSave(rest),
            DATA: ocp.args.JsonSave(data),
        }
        if state.ema is not None:
            items[RUN_EMA] = ocp.args.StandardSave(unflatten(state.ema))
        if best is not None:
            items[RUN_BEST] = ocp.args.JsonSave(dataclasses.asdict(best))
        self.best = best
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and the data's; None if there is no checkpoint.

        target: shapes, dtypes and shardings (`step.abstract_state`), on any mesh. A checkpoint that can't be read is
        named and put aside into `damaged_checkpoints`, and the one before is taken; an error if none can be read, and
        of several processes, each of which reads but its own part and knows nothing of the others.
        """
        steps = self.steps
        if not steps:
            return None
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                restored = self._restore(step, target)
            except (OSError, ValueError, KeyError) as error:
                if jax.process_count() > 1:
                    raise MossAudioError(
                        f"{self._directory}: checkpoint {step} can't be read ({_first_line(error)}); move it out of "
                        "that directory and run the same command again, which goes on from the one before"
                    ) from error
                damaged[step] = _first_line(error)
                continue
            for newer, reason in damaged.items():
                print(f"checkpoint {newer} can't be read, {step} is taken; {reason}", file=sys.stderr)
                self._put_aside(newer, reason)
            return restored
        raise MossAudioError(
            f"{self._directory}: none of the checkpoints {', '.join(map(str, steps))} can be read "
            f"({damaged[steps[-1]]}); restore one from a copy, or begin anew with another --out"
        )

    def _restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        parameters, rest = _parts(target)
        older = self._lacks(step)
        items = {
            PARAMS: ocp.args.StandardRestore(parameters),
            STATE: ocp.args.StandardRestore({name: leaf for name, leaf in rest.items() if name not in older}),
            DATA: ocp.args.JsonRestore(),
        }
        if target.ema is not None and (self._directory / str(step) / RUN_EMA).is_dir():
            items[RUN_EMA] = ocp.args.StandardRestore(unflatten(target.ema))
        if (self._directory / str(step) / RUN_BEST).is_dir():
            items[RUN_BEST] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        self.best = Best(**restored[RUN_BEST]) if RUN_BEST in items else None
        flat = flatten(restored[PARAMS])
        found = restored[STATE] | {name: _zero(rest[name]) for name in older}
        leaves = [found[name] for name in rest]
        state = jax.tree.unflatten(jax.tree.structure(_without_parameters(target)), leaves)
        trainable = {path: flat[path] for path in target.trainable}
        frozen = {path: flat[path] for path in target.frozen}
        ema = flatten(restored[RUN_EMA]) if RUN_EMA in items else None
        if target.ema is not None and ema is None:  # they begin with the parameters
            ema = {path: jnp.copy(leaf) for path, leaf in trainable.items()}
        return dataclasses.replace(state, trainable=trainable, frozen=frozen, ema=ema), restored[DATA]

    def _lacks(self, step: int) -> set[str]:
        """What of NEWER a checkpoint was written without."""
        stored = self._manager.item_metadata(step)[STATE]
        return set() if stored is None else {name for name in NEWER if name not in stored}

    def _put_aside(self, step: int, reason: str) -> None:
        aside = self._run / DAMAGED
        taken = sum(path.name.startswith(str(step)) and path.is_dir() for path in children(aside))
        name = f"{step}-{taken}" if taken else str(step)
        aside.mkdir(exist_ok=True)
        write_whole(aside / f"{name}.txt", reason + "\n")
        (self._directory / str(step)).rename(aside / name)
        self._manager.reload()

    def close(self) -> None:
        """Waits until the last save is whole; raises MossAudioError if it can't be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        finally:
            self._manager.close()

    def _unwritable(self, error: Exception) -> MossAudioError:
        return MossAudioError(
            f"{self._directory}: a checkpoint can't be written ({_first_line(error)}); make room and run again, "
            "which resumes from the newest whole one"
        )


class _KeepBest(preservation_policy.PreservationPolicy):
    """Orbax's BestN takes the last of equals, trips over NaN, and forgets evaluations whose checkpoint is gone."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best
        return [best is not None and checkpoint.step == best.step for checkpoint in checkpoints]


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters as a tree, and all else by name."""
    rest, _ = jax.tree_util.tree_flatten_with_path(_without_parameters(state))
    by_name = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in rest}
    return unflatten(state.trainable | state.frozen), by_name


def _without_parameters(state: TrainState) -> TrainState:
    return dataclasses.replace(state, trainable={}, frozen={}, ema=None)


def _zero(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
