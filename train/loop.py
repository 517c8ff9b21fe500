"""A run of training: from its configuration to checkpoints and metrics, resumed where it stopped.

    out/config.json      the configuration, which a resumed run must share
    out/metrics.jsonl    a line for every step
    out/checkpoints/     see `checkpoints`

A run that was killed and is started again ends with the same parameters, bit for bit, as one that never stopped: a
step depends on the state and its batch alone, the data's iterator goes on exactly, and both are saved together.
"""

import dataclasses
import datetime
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.checkpoint import abstract_parameters, build_model, is_orbax, load_model
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.released import ReleasedCheckpoint
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.tokens import Tokenizer
from train.checkpoints import Checkpoints
from train.config import ModelSource, RunConfig, settle
from train.data import ExampleOrder, Prefetched, SampleMaker, TrainingBatch, TrainingData
from train.optimizer import Parameters, is_frozen
from train.step import (
    TrainState,
    abstract_state,
    batch_sharding,
    initial_parameters,
    new_state,
    parameters_of,
    split_microbatches,
    train_step,
)

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: the last one, which has a checkpoint. preempted: by SIGTERM, before the last step."""

    step: int
    preempted: bool


def train(config: RunConfig, out: Path, *, mesh: Mesh | None = None) -> Outcome:
    """Trains until `config.last_step`, from the newest checkpoint in `out` if there is one. For the main thread.

    mesh: over the devices to use; None lays out all of them as the configuration says.
    Raises MossAudioError for a configuration other than the one the run was begun with, too many skipped steps in a
    row, data that can't be used and checkpoints that can't be written or read.
    """
    if jax.process_count() > 1:
        raise MossAudioError(f"a run is one process so far, found {jax.process_count()}: start it on one host")
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    model = model_config(config.model)
    with ExitStack() as stack:
        stop = stack.enter_context(_termination())
        data = stack.enter_context(_data(config, model, mesh))
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)
        settle(config, out, begun=bool(checkpoints.steps))
        state, start = _first_or_restored_state(config, model, mesh, checkpoints, data)
        report = stack.enter_context(Report(config, out, start))
        stack.enter_context(jax.set_mesh(mesh))
        return _run(config, model, state, start, data, checkpoints, report, stop)


def _run(
    config: RunConfig,
    model: MossAudioConfig,
    state: TrainState,
    start: int,
    data: Prefetched,
    checkpoints: Checkpoints,
    report: "Report",
    stop: "Termination",
) -> Outcome:
    graphdef = nnx.split(build_model(model, dict(abstract_parameters(model, jnp.float32))))[0]
    step = start
    while step < config.last_step and not stop.requested:
        began = time.perf_counter()
        batch = next(data)
        data_wait = time.perf_counter() - began
        state, metrics = train_step(graphdef, config.step, config.optimizer, state, batch)
        step += 1
        report.add(step, metrics, {"data_wait": data_wait, **data.metrics})
        if step % config.loop.checkpoint_every == 0 and step < config.last_step:
            checkpoints.save(step, state, data.get_state())
    report.flush()
    if step > start and step not in checkpoints.steps:
        checkpoints.save(step, state, data.get_state())
    return Outcome(step, preempted=step < config.last_step)


def model_config(source: ModelSource) -> MossAudioConfig:
    if source.checkpoint is None:
        return MossAudioConfig.preset(source.preset)
    if is_orbax(source.checkpoint):
        return MossAudioConfig.from_hf(source.checkpoint)
    return ReleasedCheckpoint(Path(source.checkpoint)).config


def first_parameters(config: RunConfig, model: MossAudioConfig, mesh: Mesh) -> Parameters:
    """Float32 where they are trained, in the dtype of computation where they are frozen, which saves memory."""
    if config.model.checkpoint is None:
        parameters = initial_parameters(model, seed=config.seed, mesh=mesh)
    else:
        parameters = parameters_of(load_model(config.model.checkpoint, dtype=jnp.float32, mesh=mesh))
    dtypes = _frozen_dtypes(config, parameters)
    # Taken out one by one, so that no frozen parameter is there in both dtypes for longer than it takes.
    return {path: parameters.pop(path).astype(dtypes.get(path, jnp.float32)) for path in list(parameters)}


def _frozen_dtypes(config: RunConfig, paths: Any) -> dict[str, Any]:
    return {path: config.step.compute_dtype for path in paths if is_frozen(path, config.optimizer.freeze)}


def _first_or_restored_state(
    config: RunConfig, model: MossAudioConfig, mesh: Mesh, checkpoints: Checkpoints, data: Prefetched
) -> tuple[TrainState, int]:
    """The state to go on from, the data set to match it, and how many steps it has behind it."""
    dtypes = _frozen_dtypes(config, abstract_parameters(model, jnp.float32))
    restored = checkpoints.restore(abstract_state(model, config.optimizer, frozen_dtypes=dtypes, mesh=mesh))
    if restored is None:
        parameters = first_parameters(config, model, mesh)
        return new_state(parameters, model, config.optimizer, seed=config.seed, mesh=mesh), 0
    state, data_state = restored
    data.set_state(data_state)
    return state, int(state.step)


@contextmanager
def _data(config: RunConfig, model: MossAudioConfig, mesh: Mesh) -> Iterator[Prefetched]:
    """Batches in microbatches, on their devices."""
    tokenizer = Tokenizer.from_dir(config.model.tokenizer_directory)
    order = ExampleOrder(config.mixture.groups(), config.seed)
    batches = TrainingData(order, SampleMaker(tokenizer, model), config.data, workers=config.loop.workers)
    sharding = batch_sharding(mesh)

    def put(batch: TrainingBatch) -> TrainingBatch:
        return jax.device_put(split_microbatches(batch, config.microbatches), sharding)

    data = Prefetched(batches, put)
    try:
        yield data
    finally:
        data.close()


@dataclasses.dataclass
class Termination:
    requested: bool = False


@contextmanager
def _termination() -> Iterator[Termination]:
    """Turns SIGTERM, the notice of a preemption, into a flag that is looked at between steps."""
    termination = Termination()

    def request(*_: Any) -> None:
        termination.requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)


class Report:
    """Lines of metrics and of progress. A step's are fetched while the next one runs, so no step waits for them."""

    def __init__(self, config: RunConfig, out: Path, start: int):
        self._config, self._path = config, out / METRICS_FILE
        self._keep_lines_until(start)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
        self._last = time.perf_counter()
        self._unprinted: list[dict[str, Any]] = []

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.flush()
        finally:
            self._file.close()

    def _keep_lines_until(self, step: int) -> None:
        """Takes away the lines of steps that a killed run made after its last checkpoint: they are run again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text("utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:  # the last line may be cut off
                break
            kept.append(line)
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept), "utf-8")
        partial.replace(self._path)

    def add(self, step: int, metrics: dict[str, jax.Array], host: dict[str, float]) -> None:
        """Takes a step that was started, and writes the one before."""
        self.flush()
        self._pending = step, metrics, host

    def flush(self) -> None:
        """Waits for the last step that was added; raises MossAudioError if too many in a row were skipped."""
        if self._pending is None:
            return
        step, metrics, host = self._pending
        self._pending = None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        line = {"step": step, "step_seconds": now - self._last, **values, **host}
        self._last = now
        self._unprinted.append(line)
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if step % self._config.loop.log_every == 0 or step == self._config.last_step:
            print(self._progress(), file=sys.stderr, flush=True)
        if values["skipped_in_a_row"] >= self._config.loop.max_skipped_in_a_row:
            raise MossAudioError(
                f"step {step}: {values['skipped_in_a_row']} steps in a row were skipped (loss {values['loss']}, "
                f"gradient norm {values['grad_norm']}); look at {self._path}, and lower the learning rate or mend the "
                "data in a new run"
            )

    def _progress(self) -> str:
        """Rates over the steps since the last line of progress."""
        line, count = self._unprinted[-1], len(self._unprinted)
        seconds, wait, fill = (
            sum(line[name] for line in self._unprinted) for name in ("step_seconds", "data_wait", "token_fill")
        )
        self._unprinted = []
        tokens = fill * self._config.data.batch_size * self._config.data.tokens
        left = datetime.timedelta(seconds=round((self._config.last_step - line["step"]) * seconds / count))
        return (
            f"step {line['step']}/{self._config.last_step}  loss {line['loss']:.4f}  {tokens / seconds:,.0f} tokens/s  "
            f"data wait {wait / seconds:.0%}  skipped {line['skipped_total']}  {left} left"
        )
