"""Runs of several processes, usually one per host: initialization, communication, and the exit if a process is lost.

    first host:   moss-audio-train run ... --coordinator first-host:1234 --num-processes 2 --process-id 0
    second host:  moss-audio-train run ... --coordinator first-host:1234 --num-processes 2 --process-id 1
    TPU pods:     moss-audio-train run ... --distributed      on every host; JAX detects the rest

The run's directory and the data must be on a file system that all processes share.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # detects the cluster in `jax.distributed.initialize`
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moss_audio_jax.errors import MossAudioError, StorageError
from train.data.host_shares import processes_with_this_share
from train.data.pipeline import merge_states
from train.running.config import DistributedConfig
from train.running.rendezvous import rendezvous

BATCH_SECONDS = 1800  # time limit for another process to read a batch
BATCHES_KEPT = 64  # in the key-value store; no process is that many batches behind another
LOST = 75  # exit code EX_TEMPFAIL: run the same command again
DECISION_MILLISECONDS = 86_400_000  # a day: a lost process is detected earlier
# Words in JAX's errors about a process that can't be reached any more.
UNREACHABLE = re.compile(r"gloo|connection|heartbeat|unavailable|coordination service|deadline_exceeded", re.IGNORECASE)


def join(config: DistributedConfig) -> None:
    """Connects to the other processes, if the run has any. Must be called before JAX uses a device.

    Raises MossAudioError with the numbers of missing processes if not all join in time.
    """
    if not config.distributed and config.coordinator is None:
        return
    try:
        coordinator, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            config.coordinator, config.num_processes, config.process_id, None, None, config.join_within
        )
        if (
            coordinator is not None and count is not None and number is not None
        ):  # else JAX raises and names what is unknown
            rendezvous(coordinator, count, number, config.join_within)
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            devices,
            initialization_timeout=config.join_within,
            heartbeat_timeout_seconds=config.lost_after,
            shutdown_timeout_seconds=config.lost_after,
        )
    except MossAudioError:
        raise
    except (RuntimeError, ValueError) as error:
        raise MossAudioError(
            f"the processes of the run did not meet ({str(error).splitlines()[0]}): start all of them with the same "
            "--coordinator and --num-processes, each with its own --process-id"
        ) from error


class HostSums:
    """Sums and maxima over all hosts of each host's figures. The training step computes them.

    A separate program could run before the step on one host and after it on another, and their collectives would be
    mixed up. Hosts that read the same share of the batch count as one.
    """

    def __init__(self, mesh: Mesh):
        self._weight = 1 / processes_with_this_share(mesh)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def place(self, sums: Mapping[str, float], greatest: Mapping[str, float]) -> tuple[jax.Array, jax.Array] | None:
        """Makes the argument `host_figures` of `train_step`; None for a single process. Values must be 0 or more."""
        if jax.process_count() == 1:
            return None
        return self._put([value * self._weight for value in sums.values()]), self._put(list(greatest.values()))

    def of_step(
        self, metrics: dict[str, jax.Array], sums: Mapping[str, float], greatest: Mapping[str, float]
    ) -> Callable[[], dict[str, float]]:
        """Removes a step's figures from its metrics. Returns a function that waits for the step and returns them."""
        if jax.process_count() == 1:
            return lambda: {**sums, **greatest}
        arrays = metrics.pop("host_sums"), metrics.pop("host_greatest")
        names = [*sums, *greatest]
        return lambda: dict(zip(names, np.concatenate(jax.device_get(arrays)).tolist(), strict=True))

    def now(self, sums: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
        """Returns the sums over all hosts and this host's `own` figures. Hosts wait for each other.

        No step may be running.
        """
        if jax.process_count() == 1:
            return {**sums, **own}
        mine = np.array([value * self._weight for value in sums.values()])
        found = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine)).sum(0)
        return {**dict(zip(sums, found.tolist(), strict=True)), **own}

    def _put(self, values: Sequence[float]) -> jax.Array:
        """Makes an array [devices, values] over all hosts. Each host fills one of its rows; its others are 0."""
        rows = np.zeros((jax.local_device_count(), len(values)), np.float32)
        rows[0] = values
        return jax.make_array_from_process_local_data(self._sharding, rows)


def any_host_has(batch: int, here: bool) -> bool:
    """Returns True if any process has data for this batch. Each process calls this for every batch in order.

    here: this process has data; it then does not wait for the others.
    """
    if jax.process_count() == 1:
        return here
    client = global_state.client
    assert client is not None
    mine = jax.process_index()
    client.key_value_set(_batch_key(mine, batch), "1" if here else "0", allow_overwrite=True)
    if batch > BATCHES_KEPT:
        client.key_value_delete(_batch_key(mine, batch - BATCHES_KEPT))
    return here or any(
        client.blocking_key_value_get(_batch_key(process, batch), 1000 * BATCH_SECONDS) == "1"
        for process in range(jax.process_count())
    )


def _batch_key(process: int, batch: int) -> str:
    return f"moss-audio/batches/{process}/{batch}"


def on_first_process(work: Callable[[], None]) -> None:
    """Calls `work`, which usually writes files, in process 0 while the others wait.

    If it raises MossAudioError there, all processes raise one of the same kind.
    """
    error = None
    if jax.process_index() == 0:
        try:
            work()
        except MossAudioError as refused:
            error = refused
    kinds = (None, MossAudioError, StorageError)
    kind = kinds.index(None if error is None else StorageError if isinstance(error, StorageError) else MossAudioError)
    if jax.process_count() > 1:
        kind = int(multihost_utils.broadcast_one_to_all(np.int32(kind)))
    if error is not None:
        raise error
    if (failed := kinds[kind]) is not None:
        raise failed("process 0 of the run has failed: see its message")


def from_first_process(value: Any) -> Any:
    """Broadcasts a JSON value from process 0 to all. Every process must call it."""
    if jax.process_count() == 1:
        return value
    # Broadcast needs equal shapes: first the size, then a buffer of that size, whose content counts in process 0 only.
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(mine, size))
    return json.loads(np.asarray(text, np.uint8).tobytes())


def first_process_decides(name: str, decide: Callable[[], bool]) -> bool:
    """Returns the decision of process 0 in all processes. Uses no device, so it does not wait for running steps.

    name: unique in the whole run.
    """
    if jax.process_count() == 1:
        return decide()
    store = global_state.client
    assert store is not None  # there are several processes
    if jax.process_index() == 0:
        store.key_value_set(f"moss-audio/{name}", "yes" if decide() else "no")
    return store.blocking_key_value_get(f"moss-audio/{name}", DECISION_MILLISECONDS) == "yes"


def gather_data_state(state: dict[str, Any]) -> dict[str, Any]:
    """Merges the data states of all processes. Every process must call it at the same step."""
    if jax.process_count() == 1:
        return state
    mine = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(mine.size))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)  # all-gather needs equal shapes
    padded[: mine.size] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return merge_states([json.loads(row[:size].tobytes()) for row, size in zip(rows, lengths, strict=True)])


@contextmanager
def exit_if_peer_lost() -> Iterator[None]:
    """Ends this process at once when a computation fails because another process is lost.

    It can't save a checkpoint, since a regular shutdown would wait for the lost process. On TPU a collective waits
    instead of failing: there JAX ends the process after `DistributedConfig.lost_after`, with its own message.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not UNREACHABLE.search(str(error)):
            raise
        print(
            f"error: another process of the run has died or can't be reached, found by process {jax.process_index()} "
            f"of {jax.process_count()} ({str(error).splitlines()[0][:300]}): see the messages of the others, and run "
            "the same command on all of them, which resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)
