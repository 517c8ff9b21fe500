"""Checkpoints of a run: parameters, the rest of the state and the position in the data, committed together.

    checkpoints/<step>/params   parameters as a tree, as `load_model` reads them
    checkpoints/<step>/state    step, moments, dropout key, counts of skipped steps
    checkpoints/<step>/ema      moving averages of the trained parameters as a tree, if the run keeps them
    checkpoints/<step>/checksums    JSON: checksums of the arrays of these three (`weights.checksums`)
    checkpoints/<step>/data     JSON: state of the data iterators of all processes
    checkpoints/<step>/best     JSON: best evaluation before this checkpoint, if the run has a `best_metric`
    best.json                   the same after the last evaluation, which follows the checkpoint of its step

A checkpoint gets its name when it is complete, so a killed run leaves no partial checkpoint. gs:// has no atomic
rename: a checkpoint there is complete once it contains `commit_success.txt`, which is written last.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.paths import AnyPath, Path, absolute, atomic_write, children, exists
from moss_audio_jax.storage.retries import is_transient, retried, summary
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights import checksums
from moss_audio_jax.weights.checksums import CHECKSUMS
from moss_audio_jax.weights.locate import PARAMS, RUN_BEST, RUN_BEST_FILE, RUN_CHECKPOINTS, RUN_EMA
from moss_audio_jax.weights.orbax import cast, retried_alone
from train.running.best import Best
from train.running.directory import DAMAGED, DATA, LATER, STATE
from train.state import TrainState

# Fields of the state that checkpoints of older runs lack. They then start at 0.
NEWER = ("phase", "spikes_in_a_row")
# TensorStore's errors for files that are missing, truncated or hold something else.
_DAMAGE = re.compile(r"\b(?:NOT_FOUND|DATA_LOSS|OUT_OF_RANGE)\b|Error decoding|blosc|corrupt|checksum", re.IGNORECASE)
_ARRAYS, _JSON = (ocp.args.StandardSave, ocp.args.StandardRestore), (ocp.args.JsonSave, ocp.args.JsonRestore)


class Checkpoints:
    """Checkpoints in a run's directory. They are written in the background; `close` waits for that.

    read_only: changes nothing, so the run may be training at the same time.
    best: best evaluation before the checkpoint that was saved or restored last. The checkpoint of its step is never
        deleted. Every checkpoint contains it, so a run resumed from any checkpoint continues with the same best.
    """

    def __init__(self, run: AnyPath, *, keep_last: int = 3, keep_every: int | None = None, read_only: bool = False):
        self._run, self._read_only = absolute(run), read_only
        self._directory = self._run / RUN_CHECKPOINTS
        self.best: Best | None = None
        self._policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last), _KeepBest(self)]
        if keep_every is not None:
            self._policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._saved: tuple[int, ocp.args.Composite] | None = None  # last one, perhaps still being written
        self._manager = retried(self._directory, self._opened)

    def _opened(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(self._policies),
            cleanup_tmp_directories=not self._read_only,
            create=not self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            read_only=self._read_only,
        )
        handlers = {
            PARAMS: ocp.StandardCheckpointHandler(),
            STATE: ocp.StandardCheckpointHandler(),
            DATA: ocp.JsonCheckpointHandler(),
            RUN_EMA: ocp.StandardCheckpointHandler(),
            RUN_BEST: ocp.JsonCheckpointHandler(),
            CHECKSUMS: ocp.JsonCheckpointHandler(),
        }
        registry = ocp.DefaultCheckpointHandlerRegistry()
        for item, handler in handlers.items():
            is_json = isinstance(handler, ocp.JsonCheckpointHandler)
            for argument in _JSON if is_json else _ARRAYS:
                registry.add(item, argument, handler)
        return ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def prepare(self, state: TrainState) -> None:
        """Compiles the programs of `save`, which may have little time when the run is preempted."""
        _checksums(state)

    def save(self, step: int, state: TrainState, data: dict[str, Any], best: Best | None = None) -> None:
        """Saves a checkpoint. Returns once the arrays are copied to the host, so the state may be donated.

        A previous save that failed with a transient storage error is not repeated: this one replaces it. Raises
        MossAudioError if this or the previous save can't be written.
        """
        arrays = _items(state)
        items: dict[str, Any] = {item: ocp.args.StandardSave(_tree(item, leaves)) for item, leaves in arrays.items()}
        record = checksums.record(_checksums(state))
        items |= {DATA: ocp.args.JsonSave(data), CHECKSUMS: ocp.args.JsonSave(record)}
        if best is not None:
            items[RUN_BEST] = ocp.args.JsonSave(dataclasses.asdict(best))
        self.best = best
        self._saved = step, ocp.args.Composite(**items)
        self._write(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def _write(self, work: Callable[[], object]) -> None:
        def attempt() -> None:
            try:
                work()
            except Exception as error:
                if is_transient(error) and jax.process_count() == 1:
                    self._manager = self._opened()  # lists complete checkpoints, deletes partial ones
                raise

        try:
            retried_alone(self._directory, attempt)
        except MossAudioError:
            raise
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def publish(self, best: Best) -> None:
        """Writes best.json, which names the checkpoint of `RUN/best`; raises MossAudioError if it can't be written."""
        if jax.process_index() == 0:
            try:
                atomic_write(self._run / RUN_BEST_FILE, json.dumps(dataclasses.asdict(best), allow_nan=False) + "\n")
            except OSError as error:
                raise self._unwritable(error) from error

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest state and its data state; None if there is no checkpoint.

        target: shapes, dtypes and shardings (`state.abstract_state`), on any mesh.
        A checkpoint is damaged if two reads fail because of its files. It is then reported, moved to
        `damaged_checkpoints`, and the previous one is restored. Raises MossAudioError if all are damaged. With several
        processes any damage raises MossAudioError, since each process reads only its own shards. Errors that do not
        prove damage, such as missing access, raise MossAudioError and move nothing.
        """
        steps = self.steps
        if not steps:
            return None
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                restored = self._restored_or_damaged(step, target)
            except _Damaged as found:
                error = found.error
                if jax.process_count() > 1:
                    raise MossAudioError(
                        f"{self._directory}: checkpoint {step} can't be read ({summary(error)}): move it out of "
                        "that directory and run the same command again, which resumes from the previous checkpoint"
                    ) from error
                damaged[step] = summary(error)
                continue
            for newer, reason in damaged.items():
                print(f"checkpoint {newer} can't be read, {step} is restored instead: {reason}", file=sys.stderr)
                self._put_aside(newer, reason)
            return restored
        raise MossAudioError(
            f"{self._directory}: none of the checkpoints {', '.join(map(str, steps))} can be read "
            f"({damaged[steps[-1]]}): restore one from a copy, or start a new run with another --out"
        )

    def restore_step(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the state and the data state of one step; raises MossAudioError if that can't be read."""
        self._require(step)
        try:
            return self._restored_or_damaged(step, target)
        except _Damaged as error:
            raise MossAudioError(
                f"{self._directory}: checkpoint {step} can't be read ({error}): name another one"
            ) from error

    def rewind(self, step: int) -> None:
        """Moves the checkpoints after this step to `later_checkpoints`; raises MossAudioError if it has none itself."""
        self._require(step)
        for later in [found for found in self.steps if found > step]:
            self._move(later, self._run / LATER, f"the run was resumed from the checkpoint of step {step}")

    def reload(self) -> None:
        """Lists the checkpoints again: another process may have moved some."""
        self._manager.reload()

    def _require(self, step: int) -> None:
        if step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise MossAudioError(f"{self._directory} has no checkpoint of step {step}: there are {there}")

    def _restored_or_damaged(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores a checkpoint. Raises _Damaged, or MossAudioError for an error that does not prove damage."""
        for last in (False, True):
            try:
                return retried_alone(self._directory, lambda: self._restore(step, target))
            except checksums.ChecksumError as error:
                if last or jax.process_count() > 1:
                    raise _Damaged(error) from error
            except MossAudioError:
                raise
            except (OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
                if not _is_damage(error):
                    raise MossAudioError(
                        f"{self._directory}: checkpoint {step} can't be restored, and not because it is damaged "
                        f"({summary(error)}): repair that and run the same command again, or move the checkpoint "
                        "out of that directory to resume from the previous one"
                    ) from error
                if last or jax.process_count() > 1:
                    raise _Damaged(error) from error
        raise AssertionError

    def _restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        parameters, rest = _parts(target)
        stored = self._manager.item_metadata(step)
        older = _lacks(stored[STATE])
        wanted = {
            PARAMS: parameters,
            STATE: {name: leaf for name, leaf in rest.items() if name not in older},
        }
        if target.ema is not None and (self._directory / str(step) / RUN_EMA).is_dir():
            wanted[RUN_EMA] = target.ema
        arguments = {
            item: ocp.args.StandardRestore(_tree(item, _as_stored(leaves, stored[item])))
            for item, leaves in wanted.items()
        }
        json_items = [item for item in (RUN_BEST, CHECKSUMS) if exists(self._directory / str(step) / item)]
        arguments |= {item: ocp.args.JsonRestore() for item in (DATA, *json_items)}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        # Older versions evaluated before the checkpoint of a step, so their `best` counts that evaluation.
        self.best = Best(**({"evaluated": step} | restored[RUN_BEST])) if RUN_BEST in json_items else None
        arrays = {item: flatten(restored[item]) for item in wanted}
        if CHECKSUMS in json_items:
            self._require_as_written(step, arrays, restored[CHECKSUMS])
        found = {
            item: {name: cast(arrays[item].pop(name), leaf) for name, leaf in leaves.items()}
            for item, leaves in wanted.items()
        }
        of_state = found[STATE] | {name: _zero(rest[name]) for name in older}
        state = jax.tree.unflatten(jax.tree.structure(_without_parameters(target)), [of_state[name] for name in rest])
        trainable = {path: found[PARAMS][path] for path in target.trainable}
        frozen = {path: found[PARAMS][path] for path in target.frozen}
        ema = found.get(RUN_EMA)
        if target.ema is not None and ema is None:  # averages start as a copy of the parameters
            ema = {path: jnp.copy(leaf) for path, leaf in trainable.items()}
        return dataclasses.replace(state, trainable=trainable, frozen=frozen, ema=ema), restored[DATA]

    def _require_as_written(self, step: int, arrays: dict[str, dict[str, jax.Array]], record: Any) -> None:
        """Raises ChecksumError if arrays of a checkpoint are not those that were saved."""
        directory = self._directory / str(step)
        expected = checksums.of_record(record, f"{directory / CHECKSUMS}")
        for item, leaves in arrays.items():
            if damage := checksums.damage(directory / item, expected.get(item, {}), checksums.of_arrays(leaves)):
                raise checksums.ChecksumError(damage)

    def _put_aside(self, step: int, reason: str) -> None:
        self._move(step, self._run / DAMAGED, reason)
        self._manager.reload()

    def _move(self, step: int, aside: Path, reason: str) -> None:
        """Moves a checkpoint to the directory `aside` under an unused name, and writes the reason to NAME.txt there."""
        taken = sum(path.name.startswith(str(step)) and path.is_dir() for path in children(aside))
        name = f"{step}-{taken}" if taken else str(step)
        retried(aside, lambda: aside.mkdir(exist_ok=True))
        atomic_write(aside / f"{name}.txt", reason + "\n")  # first: on gs:// a directory exists only with a file
        (self._directory / str(step)).rename(aside / name)

    def close(self) -> None:
        """Waits for the last save; raises MossAudioError if it can't be written."""
        try:
            self._write(self._finish)
        finally:
            self._saved = None
            self._manager.close()

    def _finish(self) -> None:
        """Waits for the last save; repeats it if it failed with a transient storage error."""
        self._manager.wait_until_finished()
        if self._saved is None or self._saved[0] in self._manager.all_steps():
            return
        step, items = self._saved
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(items[PARAMS].item) if isinstance(leaf, jax.Array)):
            raise StorageError(
                f"{self._directory}: storage failed while checkpoint {step} was written: run the same command again, "
                "which resumes from the previous checkpoint"
            )
        self._manager.save(step, args=items)
        self._manager.wait_until_finished()

    def _unwritable(self, error: Exception) -> MossAudioError:
        return MossAudioError(
            f"{self._directory}: a checkpoint can't be written ({summary(error)}): free disk space and run the same "
            "command again, which resumes from the newest complete checkpoint"
        )


def _items(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """Returns the arrays of a state by item and path."""
    parameters, rest = _parts(state)
    return {PARAMS: parameters, STATE: rest} | ({} if state.ema is None else {RUN_EMA: state.ema})


def _checksums(state: TrainState) -> dict[str, dict[str, str]]:
    return {item: checksums.of_arrays(leaves) for item, leaves in _items(state).items()}


class _Damaged(Exception):
    """A checkpoint's files are missing, truncated or hold something else. error: the reason."""

    def __init__(self, error: Exception):
        super().__init__(summary(error))
        self.error = error


def _is_damage(error: Exception) -> bool:
    """Returns True if an error proves that files are damaged. Other errors leave that open."""
    if isinstance(
        error, (FileNotFoundError, NotADirectoryError, LookupError, json.JSONDecodeError, UnicodeDecodeError)
    ):
        return True
    return isinstance(error, ValueError) and _DAMAGE.search(str(error)) is not None


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of the best evaluation.

    Orbax's BestN prefers the last of equals, fails on NaN, and forgets evaluations whose checkpoint was deleted.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best
        return [best is not None and checkpoint.step == best.step for checkpoint in checkpoints]


def _lacks(stored: Any) -> set[str]:
    """Returns the fields of NEWER that a checkpoint's state lacks. stored: its metadata."""
    return set() if stored is None else {name for name in NEWER if name not in stored}


def _as_stored(leaves: dict[str, jax.ShapeDtypeStruct], stored: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns leaves with the dtypes in which they are stored, which their checksums are of."""
    found = {} if stored is None else flatten(stored.tree)
    return {name: leaf.update(dtype=found[name].dtype) if name in found else leaf for name, leaf in leaves.items()}


def _tree(item: str, leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree that an item is stored as."""
    return leaves if item == STATE else unflatten(leaves)


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a state into its parameters by path and everything else by name."""
    rest, _ = jax.tree_util.tree_flatten_with_path(_without_parameters(state))
    by_name = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in rest}
    return state.trainable | state.frozen, by_name


def _without_parameters(state: TrainState) -> TrainState:
    return dataclasses.replace(state, trainable={}, frozen={}, ema=None)


def _zero(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
