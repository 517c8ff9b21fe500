"""A run of training: from its configuration to checkpoints and metrics, resumed where it stopped.

    out/config.json      the configuration and what became of it: see `resume`
    out/metrics.jsonl    a line for every step, and more for people: see `report`
    out/checkpoints/     see `checkpoints`

A run that was killed and is started again ends with the same parameters, bit for bit, as one that never stopped: a
step depends on the state and its batch alone, the data's iterator goes on exactly, and both are saved together.
Several processes (`distributed`) make the same batches as one, and may be others in number each time it is resumed.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moss_audio_jax.checkpoint import RUN_CHECKPOINTS, RUN_MODEL, abstract_parameters, base_directory, build_model
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.interruption import stops_on_ctrl_c
from moss_audio_jax.paths import AnyPath, Path, children, to_path
from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.tokens import Tokenizer
from train.best import Best
from train.check import require_usable
from train.checkpoints import Checkpoints
from train.chips import peak_flops
from train.config import RunConfig
from train.data import ExampleOrder, Prefetched, SampleMaker, TrainingBatch, TrainingData
from train.distributed import (
    ended_with_the_others,
    first_process_decides,
    first_process_does,
    share_of_batch,
    state_of_all,
)
from train.flops import Content, step_flops
from train.held_out import HeldOut
from train.initial import ModelSource, first_parameters
from train.model_files import copy_model_files, write_model_files
from train.report import Profile, Report
from train.resume import Record, ResumeConfig, compare, is_begun, rewinds, settle
from train.step import (
    TrainState,
    abstract_state,
    batch_sharding,
    new_state,
    require_even_batch,
    split_microbatches,
    train_step,
)
from train.watchdog import Watchdog

AGREE_EVERY = 10  # steps, on what the first process decides by its clock


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: the last one, which has a checkpoint.

    preempted: by SIGTERM or Ctrl-C, before the last step.
    best: of its evaluations, where it looks for one. stopped_early: since that was not beaten any more.
    """

    step: int
    preempted: bool
    best: Best | None = None
    stopped_early: bool = False


class Termination:
    """Says whether to stop after a step since there was a SIGTERM, the notice of a preemption, or Ctrl-C.

    Several processes stop after the same step, whichever of them was told: JAX has its own handler of SIGTERM then.
    """

    def __init__(self):
        self._requested = threading.Event()
        self._stack = ExitStack()
        self._saves_on_ctrl_c = False

    def __enter__(self) -> "Termination":
        if jax.process_count() == 1:
            before = signal.signal(signal.SIGTERM, lambda *_: self._requested.set())
            self._stack.callback(signal.signal, signal.SIGTERM, before)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested.is_set()

    def save_on_ctrl_c(self) -> None:
        """From now on Ctrl-C does what SIGTERM does; before the first step it ends the run, with nothing to save."""
        if not self._saves_on_ctrl_c:
            self._saves_on_ctrl_c = True
            self._stack.enter_context(stops_on_ctrl_c(lambda: os.kill(os.getpid(), signal.SIGTERM)))


def train(config: RunConfig, out: AnyPath, *, mesh: Mesh | None = None, resume: ResumeConfig | None = None) -> Outcome:
    """Trains until `config.last_step`, from the newest checkpoint in `out` if there is one. For the main thread.

    mesh: over the devices to use; None lays out all of them as the configuration says.
    resume: which options may be others than the run was begun with, and where it resumes.
    Raises MossAudioError for a configuration other than the one the run was begun with, too many skipped steps in a
    row, data that can't be used and checkpoints that can't be written or read.
    """
    out, resume = to_path(out), resume or ResumeConfig()
    source = _source(config, out, resume)
    if config.loop.check_data:
        require_usable(dataclasses.replace(config, model=source))
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    model = dataclasses.replace(config, model=source).trained_model()
    with ExitStack() as stack:
        stop = stack.enter_context(Termination())
        watchdog = stack.enter_context(Watchdog(config.loop.stuck_after))
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)
        order = ExampleOrder(config.mixture.groups(config.seed), config.seed)
        first_process_does(lambda: _write_files(config, resume, model, order, checkpoints, out))
        checkpoints.reload()
        record = Record.read(out)
        tokenizer = Tokenizer.from_dir(out / RUN_MODEL)
        maker = SampleMaker(tokenizer, model, answers=config.data.answers, thoughts=config.data.thoughts)
        held_out = HeldOut(config, Processor(tokenizer, model), maker, mesh, out)
        data = stack.enter_context(_data(config, mesh, order, maker))
        first = config.model
        if model.lora is not None:
            first = dataclasses.replace(first, checkpoint=str(base_directory(out / RUN_MODEL)))
        state, start = _first_or_restored_state(config, first, model, mesh, checkpoints, data, record, resume)
        report = stack.enter_context(_report(config, out, start, mesh, record))
        profile = stack.enter_context(Profile(out, config.loop.profile_first, config.loop.profile_steps))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(ended_with_the_others())  # last in, first out: closing checkpoints waits for the others
        skipped = record.skipped_steps
        return _run(config, model, state, start, data, checkpoints, report, profile, held_out, stop, watchdog, skipped)


def _source(config: RunConfig, out: Path, resume: ResumeConfig) -> ModelSource:
    """Where the model's configuration and tokenizer are; a run that has begun keeps them in its own directory."""
    if is_begun(out):
        return ModelSource(checkpoint=str(out))
    if resume.from_step is not None:
        raise MossAudioError(
            f"--from-step {resume.from_step}: {out} holds no run with a checkpoint; name another --out"
        )
    if resume.origin is not None:
        run, step = resume.origin
        there = sorted(int(path.name) for path in children(run / RUN_CHECKPOINTS) if path.name.isdecimal())
        if step not in there:
            raise MossAudioError(
                f"--branch {resume.branch}: {run} has no checkpoint of step {step}, only of "
                f"{', '.join(map(str, there)) or 'none'}; name one of these"
            )
        return ModelSource(checkpoint=str(run))
    return config.model


def _write_files(
    config: RunConfig,
    resume: ResumeConfig,
    model: MossAudioConfig,
    order: ExampleOrder,
    checkpoints: Checkpoints,
    out: Path,
) -> None:
    """The run's configuration and what goes with all checkpoints; puts those aside that come after `from_step`."""
    begun, step = is_begun(out), max(checkpoints.steps, default=0)
    if begun and resume.from_step is not None and rewinds(Record.read(out), resume):
        step = resume.from_step
        compare(config, out, step, resume)
        checkpoints.rewind(step)
    _require_ahead(resume, step, Record.read(out) if begun else None)
    settle(config, out, begun=begun, step=step, resume=resume)
    if not begun:
        (out / RUN_MODEL).rmtree(missing_ok=True)  # of a start that came to no checkpoint, perhaps of another model
        if resume.origin is not None:
            copy_model_files(resume.origin[0] / RUN_MODEL, out / RUN_MODEL)
    write_model_files(config.model, model, order, out / RUN_MODEL)


def _require_ahead(resume: ResumeConfig, step: int, record: Record | None) -> None:
    """Raises MossAudioError for steps to skip that were trained; those that the run has in its record are done."""
    behind = [skipped for skipped in resume.skipped if skipped <= step]
    if behind and not (record and record.skipped_steps.issuperset(resume.skipped)):
        raise MossAudioError(
            f"--skip-steps {resume.skip_steps}: the run resumes after step {step}, which has trained on them; give "
            f"--from-step with a checkpoint before step {behind[0]}, or later steps"
        )


def _run(
    config: RunConfig,
    model: MossAudioConfig,
    state: TrainState,
    start: int,
    data: Prefetched,
    checkpoints: Checkpoints,
    report: Report,
    profile: Profile,
    held_out: HeldOut,
    stop: Termination,
    watchdog: Watchdog,
    passed_over: Set[int],
) -> Outcome:
    graphdef = nnx.split(build_model(model, dict(abstract_parameters(model, jnp.float32))))[0]
    step, best = start, _best_so_far(config, checkpoints)
    clock = _Clock(config.loop.checkpoint_minutes)

    def save() -> None:
        with watchdog.long(f"the checkpoint of step {step}"):
            report.commit()
            checkpoints.save(step, _saved(state, model), state_of_all(data.get_state()), best)
        clock.restart()

    while step < config.last_step and not _is_exhausted(best, config) and not stop(step):
        watchdog.reached(f"the reading of batch {step + 1}")
        if step + 1 in passed_over:
            step, state = step + 1, _without_a_step(state, data, report)
            continue
        began = time.perf_counter()
        batch = next(data)
        data_wait = time.perf_counter() - began
        flops = step_flops(model, Content.of_batch(data.metrics, config.data), state.trainable)
        step += 1
        watchdog.reached(f"step {step}", long=step == start + 1)
        profile.before(step)
        state, metrics = train_step(graphdef, config.step, config.optimizer, state, batch)
        stop.save_on_ctrl_c()
        profile.after(step, metrics)
        report.add(step, metrics, {"data_wait": data_wait, **data.metrics, "model_flops": sum(flops.values())})
        if evaluated := held_out.is_due(step):
            with report.paused(), watchdog.long(f"the evaluation after step {step}"):
                scores, answers = held_out.ask(step, state.trainable | state.frozen)
                report.add_scores(step, scores)
                report.add_samples(step, answers[: config.loop.show_samples])
                report.add_answers(step, answers)
            best = best and best.after(step, scores.get(f"eval/{best.metric}"))
        # After the evaluation, whose outcome it holds: one that a kill has come before is made again.
        due = step % config.loop.checkpoint_every == 0 or (evaluated and best is not None) or clock.is_due(step)
        if due and step < config.last_step:
            save()
    watchdog.reached("the end", long=True)
    report.commit()
    if step > start and step not in checkpoints.steps:
        save()
    early = step < config.last_step and _is_exhausted(best, config)
    return Outcome(step, preempted=step < config.last_step and not early, best=best, stopped_early=early)


class _Clock:
    """Says when a checkpoint is due by the time since the last one; None never."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """The same in all processes, by the clock of the first."""
        seconds = self._seconds
        if seconds is None or (jax.process_count() > 1 and step % AGREE_EVERY):
            return False
        return first_process_decides(f"checkpoint/{step}", lambda: time.monotonic() - self._last >= seconds)


def _without_a_step(state: TrainState, data: Prefetched, report: Report) -> TrainState:
    """The state after a batch that is read and not trained on: its step is counted, and nothing else changes."""
    with report.paused():
        next(data)
        return dataclasses.replace(state, step=state.step + 1)


def _best_so_far(config: RunConfig, checkpoints: Checkpoints) -> Best | None:
    """Of the evaluations before the restored step; None if the run looks for no best."""
    metric, known = config.loop.best_metric, checkpoints.best
    if metric is None:
        return None
    return known if known is not None and known.metric == metric else Best(metric)


def _is_exhausted(best: Best | None, config: RunConfig) -> bool:
    """Whether the last evaluations were so many without a better one that the run ends."""
    return best is not None and config.loop.patience is not None and best.since >= config.loop.patience


def _report(config: RunConfig, out: Path, start: int, mesh: Mesh, record: Record) -> Report:
    return Report(
        out,
        start=start,
        last_step=config.last_step,
        log_every=config.loop.log_every,
        max_skipped_in_a_row=config.loop.max_skipped_in_a_row,
        batch_tokens=config.data.batch_size * config.data.tokens,
        peak_flops=peak_flops(mesh.devices.flat),
        restarts=record.starts - 1,
        wandb=config.loop.wandb,
    )


def _saved(state: TrainState, model: MossAudioConfig) -> TrainState:
    """What a checkpoint holds: with LoRA no frozen parameters, which are the base's and are read from there."""
    return state if model.lora is None else dataclasses.replace(state, frozen={})


def _first_or_restored_state(
    config: RunConfig,
    source: ModelSource,
    model: MossAudioConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    data: Prefetched,
    record: Record,
    resume: ResumeConfig,
) -> tuple[TrainState, int]:
    """The state to resume from, the data set to match it, and how many steps it has behind it.

    source: as the configuration says, but for an adapter's base, of which the run keeps the one that it began with.
    """
    dtypes = config.frozen_dtypes(abstract_parameters(model, jnp.float32))
    target = abstract_state(model, config.optimizer, frozen_dtypes=dtypes, mesh=mesh)
    saved = _saved(target, model)
    restored = checkpoints.restore(saved)
    first = functools.partial(first_parameters, dtypes=dtypes, seed=config.seed, mesh=mesh)
    is_branch = restored is None and resume.origin is not None
    if restored is None and resume.origin is not None:
        with Checkpoints(resume.origin[0], read_only=True) as others:
            restored = others.restore_step(resume.origin[1], saved)
    if restored is None:
        return new_state(first(source, model), model, config.optimizer, seed=config.seed, mesh=mesh), 0
    state, data_state = restored
    if model.lora is not None:
        parameters = first(source, model)
        state = dataclasses.replace(state, frozen={path: parameters[path] for path in target.frozen})
    if is_branch and not resume.branch_optimizer:
        parameters = state.trainable | state.frozen
        del restored, state  # and with them the moments
        return new_state(parameters, model, config.optimizer, seed=config.seed, mesh=mesh), 0
    step = int(state.step)
    data.set_state(data_state, allow_other_data=is_branch or record.has_other_data_since(step))
    return state, step


@contextmanager
def _data(config: RunConfig, mesh: Mesh, order: ExampleOrder, maker: SampleMaker) -> Iterator[Prefetched]:
    """Batches in microbatches, on their devices; every process reads its share of each."""
    require_even_batch(config.data.batch_size, config.microbatches, mesh)
    host, hosts = share_of_batch(mesh)
    batches = TrainingData(order, maker, config.data, host=host, hosts=hosts, workers=config.loop.workers)
    sharding = batch_sharding(mesh)

    def put(batch: TrainingBatch) -> TrainingBatch:
        dealt = split_microbatches(_deal(batch, config.microbatches), config.microbatches)
        return jax.make_array_from_process_local_data(sharding, dealt)

    data = Prefetched(batches, put)
    try:
        yield data
    finally:
        data.close()


def _deal(batch: TrainingBatch, hands: int) -> TrainingBatch:
    """Rows dealt out in turn, so that each microbatch has the same ones however many processes share its rows."""
    return jax.tree.map(lambda x: x.reshape(-1, hands, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), batch)
