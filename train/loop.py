"""Training loop of a run, from its configuration to checkpoints and metrics. Resumes from the newest checkpoint.

    out/config.json      configuration and history: see `resume`
    out/metrics.jsonl    one line per step, and further records: see `report`
    out/checkpoints/     see `checkpoints`

A run that was killed and started again ends with bit-identical parameters to one that never stopped: a step depends
only on the state and its batch, the data iterator resumes exactly, and both are saved together. The checkpoint of a
step comes before its evaluation; a resumed run evaluates if `scores.jsonl` has no scores of that step. Several
processes (`distributed`) make the same batches as one. Their number may change whenever the run resumes.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moss_audio_jax.commands.interruption import stops_on_ctrl_c
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import AnyPath, Path, children, nothing_left, to_path
from moss_audio_jax.storage.retries import retried
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.locate import RUN_CHECKPOINTS, RUN_MODEL, locate
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.batch import batch_sharding, require_even_batch, split_microbatches
from train.config import ModelSource, RunConfig
from train.data import ExampleOrder, Interrupted, Prefetched, SampleMaker, TrainingBatch, TrainingData
from train.data.augment import Augmentation
from train.data.host_shares import share_of_batch
from train.initialization import first_parameters, frozen_dtypes, require_no_random_frozen
from train.planning.chips import peak_flops
from train.running.additions import with_begins
from train.running.best import Best
from train.running.checkpoints import Checkpoints
from train.running.config import ResumeConfig
from train.running.config_file import stored_source
from train.running.directory import CONFIG_FILE, RECORDS, is_begun
from train.running.distributed import (
    HostSums,
    any_host_has,
    exit_if_peer_lost,
    first_process_decides,
    gather_data_state,
    on_first_process,
)
from train.running.figures import DataFigures
from train.running.model_directory import copy_model_files, write_model_files
from train.running.overview import overview
from train.running.preflight import require_usable, sample_maker
from train.running.profiling import Profile
from train.running.report import RunReport
from train.running.resume import Record, compare, rewinds, with_commits, write_or_check_config
from train.running.validation import Validation
from train.running.watchdog import Watchdog
from train.state import TrainState, abstract_state, new_state, with_new_data
from train.step import train_step

AGREE_EVERY = 10  # steps between decisions of process 0 by its clock

Scores = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a run.

    step: its last step, which has a checkpoint.
    preempted: ended before the last step by SIGTERM or Ctrl-C.
    best: its best evaluation, if it has a `best_metric`. stopped_early: ended because `patience` evaluations did not
        improve on it.
    """

    step: int
    preempted: bool
    best: Best | None = None
    stopped_early: bool = False


class Termination:
    """Returns True after a step if the run must stop: after SIGTERM, which announces a preemption, or Ctrl-C.

    With several processes JAX handles SIGTERM: all stop after the same step, whichever got the signal.
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

    def is_requested(self) -> bool:
        """Returns True if the run may stop while it waits for data. Several processes stop only after a step."""
        return self._requested.is_set()

    def save_on_ctrl_c(self) -> None:
        """Makes Ctrl-C act like SIGTERM. Before the first step there is nothing to save, and it ends the run."""
        if not self._saves_on_ctrl_c:
            self._saves_on_ctrl_c = True
            self._stack.enter_context(stops_on_ctrl_c(lambda: os.kill(os.getpid(), signal.SIGTERM)))


def train(config: RunConfig, out: AnyPath, *, mesh: Mesh | None = None, resume: ResumeConfig | None = None) -> Outcome:
    """Trains until `config.last_step`, from the newest checkpoint in `out` if there is one. Needs the main thread.

    mesh: devices to use; None makes a mesh of all devices by `config.mesh`.
    resume: options that may differ from the run's configuration, and the step to resume from.
    Raises MossAudioError if another option differs from the run's configuration, if too many steps in a row are
    skipped, for unusable data, and for checkpoints that can't be written or read.
    """
    out, resume = to_path(out), resume or ResumeConfig()
    before = out if is_begun(out) else None if resume.origin is None else resume.origin[0]
    config = dataclasses.replace(config, model=with_commits(config.model, before))
    source = _source(config, out, resume)
    config = with_begins(config, out, resume)
    model = dataclasses.replace(config, model=source).model_config()
    if source is config.model:
        require_no_random_frozen(config, model)
    if config.loop.check_data:
        require_usable(dataclasses.replace(config, model=source))
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    groups = config.mixture.groups(config.seed, config.columns)
    order = ExampleOrder(groups, config.seed)
    with ExitStack() as stack:
        keep = stack.enter_context(_nothing_left(out))
        stop = stack.enter_context(Termination())
        watchdog = stack.enter_context(Watchdog(config.loop.stuck_after))
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)
        on_first_process(lambda: retried(out, lambda: _write_files(config, resume, model, order, checkpoints, out)))
        checkpoints.reload()
        record = Record.read(out)
        tokenizer = Tokenizer.from_dir(out / RUN_MODEL)
        maker = sample_maker(config, tokenizer, model, Augmentation(config.augment))
        validation = Validation(config, Processor(tokenizer, model), maker, mesh, out)
        data = stack.enter_context(_data(config, mesh, order, maker))
        first = stored_source(out)  # of the first process, if a branch of the hub moved just now
        if model.lora is not None:
            first = dataclasses.replace(first, checkpoint=str(locate(out / RUN_MODEL).base().path))
        state, start = _first_or_restored_state(config, first, model, mesh, checkpoints, data, record, resume)
        checkpoints.prepare(_saved(state, model))
        figures = DataFigures(order, config.data, model, state.trainable, gather_data_state(data.get_state()))
        report = stack.enter_context(_report(config, out, start, mesh, figures, record))
        report.say(overview(config, groups, mesh, state, start))
        profile = stack.enter_context(Profile(out, config.loop.profile_first, config.loop.profile_steps))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(exit_if_peer_lost())  # exits first: closing checkpoints would wait for the lost process
        between_steps = (checkpoints, report, profile, validation, stop, watchdog)
        run = _Run(config, model, data, HostSums(mesh), *between_steps, num_groups=len(order.groups))
        keep()
        return run(state, start, record.skipped_steps)


def _nothing_left(out: Path) -> AbstractContextManager[Callable[[], None]]:
    """Removes the files of a start that fails before training begins. Keeps those of a run with a checkpoint."""
    if jax.process_index() or is_begun(out):
        return nullcontext(lambda: None)
    return nothing_left(out, (CONFIG_FILE, RUN_MODEL, RUN_CHECKPOINTS, *RECORDS))


def _source(config: RunConfig, out: Path, resume: ResumeConfig) -> ModelSource:
    """Source of the model's configuration and tokenizer. A run with a checkpoint has them in its own directory."""
    if is_begun(out):
        return ModelSource(checkpoint=str(out))
    if resume.from_step is not None:
        raise MossAudioError(
            f"--from-step {resume.from_step}: {out} holds no run with a checkpoint: name another --out"
        )
    if resume.origin is not None:
        run, step = resume.origin
        there = sorted(int(path.name) for path in children(run / RUN_CHECKPOINTS) if path.name.isdecimal())
        if step not in there:
            raise MossAudioError(
                f"--branch {resume.branch}: {run} has no checkpoint of step {step}, only of "
                f"{', '.join(map(str, there)) or 'none'}: name one of these"
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
    """Writes config.json and model/ of the run. With `from_step` first moves later checkpoints aside."""
    begun, step = is_begun(out), max(checkpoints.steps, default=0)
    if begun and resume.from_step is not None and rewinds(Record.read(out), resume):
        step = resume.from_step
        compare(config, out, step, resume)
        checkpoints.rewind(step)
    _require_ahead(resume, step, Record.read(out) if begun else None)
    write_or_check_config(config, out, begun=begun, step=step, resume=resume)
    if not begun:
        (out / RUN_MODEL).rmtree(missing_ok=True)  # left by a start without a checkpoint, perhaps of another model
        if resume.origin is not None:
            copy_model_files(resume.origin[0] / RUN_MODEL, out / RUN_MODEL)
    write_model_files(config.model, model, order, out / RUN_MODEL)


def _require_ahead(resume: ResumeConfig, step: int, record: Record | None) -> None:
    """Raises MossAudioError if steps to skip were already trained, unless the run's record has them as skipped."""
    behind = [skipped for skipped in resume.skipped if skipped <= step]
    if behind and not (record and record.skipped_steps.issuperset(resume.skipped)):
        raise MossAudioError(
            f"--skip-steps {resume.skip_steps}: the run resumes after step {step} and has already trained on steps "
            f"of this range: give --from-step with a checkpoint before step {behind[0]}, or later steps"
        )


@dataclasses.dataclass
class _Run:
    """Training loop: steps, and between them checkpoints, evaluations and reports."""

    config: RunConfig
    model: MossAudioConfig
    data: Prefetched
    host_sums: HostSums
    checkpoints: Checkpoints
    report: RunReport
    profile: Profile
    validation: Validation
    stop: Termination
    watchdog: Watchdog
    num_groups: int

    def __call__(self, state: TrainState, start: int, passed_over: Set[int]) -> Outcome:
        """Trains from step `start` to the end. passed_over: steps that read their batch but do not train on it."""
        config, last_step = self.config, self.config.last_step
        graphdef = nnx.split(build_model(self.model, dict(abstract_parameters(self.model, jnp.float32))))[0]
        self.step = self.saved = start
        self.best, self.clock = _best_so_far(config, self.checkpoints), _Clock(config.loop.checkpoint_minutes)
        self.at_end = False
        self._evaluate_again(state)
        while self.step != last_step and not _is_exhausted(self.best, config) and not self.stop(self.step):
            taken = self._next_batch()
            if taken is None:
                break
            batch, sums, waited = taken
            self.step += 1
            # A step of --skip-steps counts its data and advances the step, nothing else.
            if self.step in passed_over:
                self.report.pass_over(functools.partial(self.host_sums.now, sums, waited))
                state = dataclasses.replace(state, step=state.step + 1)
                continue
            self.watchdog.reached(f"step {self.step}", long=self.step == start + 1)
            self.profile.before(self.step)
            host_figures = self.host_sums.place(sums, waited)
            # Asynchronous: the report fetches these metrics while the next step runs.
            state, metrics = train_step(
                graphdef, config.step, config.optimizer, state, batch, self.num_groups, host_figures
            )
            self.stop.save_on_ctrl_c()
            self.profile.after(self.step, metrics)
            self.report.add(self.step, metrics, self.host_sums.of_step(metrics, sums, waited))
            # A checkpoint comes before the evaluation of its step.
            evaluates = self.validation.is_due(self.step)
            if self._saves(evaluates):
                self._save(state)
            if evaluates:
                self._evaluate(state)
        return self._end(state)

    def _next_batch(self) -> tuple[TrainingBatch, dict[str, float], dict[str, float]] | None:
        """Returns a batch, this host's sums of it, and its waiting time. None at the end of data or to stop."""
        self.watchdog.reached(f"the reading of batch {self.step + 1}")
        began = time.perf_counter()
        try:
            batch = self.data.take(self.stop.is_requested)
        except StopIteration:
            self.at_end = True
            return None
        except Interrupted:
            return None
        return batch, self.data.sums, {"data_wait": time.perf_counter() - began}

    def _saves(self, evaluates: bool) -> bool:
        """Returns True if a checkpoint is due after this step. evaluates: an evaluation follows this step."""
        # The first evaluation may run out of memory, so the training until then is saved first.
        before_evaluation = evaluates and (self.best is not None or not self.validation.has_asked)
        is_last = self.step == self.config.last_step
        by_step = self.step % self.config.loop.checkpoint_every == 0
        return by_step or is_last or before_evaluation or self.clock.is_due(self.step)

    def _save(self, state: TrainState) -> None:
        with self.watchdog.long(f"the checkpoint of step {self.step}"):
            self.report.commit()
            self.checkpoints.save(
                self.step, _saved(state, self.model), gather_data_state(self.data.get_state()), self.best
            )
        self.saved = self.step
        self.clock.restart()

    def _evaluate_again(self, state: TrainState) -> None:
        """Completes the evaluation of the step that the run resumes from: makes it if missing, counts it in `best`."""
        if self.best is not None and self.best.evaluated is not None:
            self.checkpoints.publish(self.best)  # as of this step: best.json may be of a later step
        if self.validation.is_due(self.step) and (self.best is None or self.best.evaluated != self.step):
            self._evaluate(state, self.report.scores_of(self.step))

    def _evaluate(self, state: TrainState, recorded: Scores | None = None) -> None:
        """Evaluates and records the scores, or takes the `recorded` ones; then updates the best evaluation."""
        with self.watchdog.long(f"the evaluation after step {self.step}"):
            scores = recorded or self._scores(state)
        if self.best is not None:
            self.best = self.best.after(self.step, scores.get(f"eval/{self.best.metric}"))
            self.checkpoints.publish(self.best)

    def _scores(self, state: TrainState) -> Scores:
        """Evaluates and records the results. Scores come last: they tell a resumed run that the rest is complete."""
        with self.report.paused():
            scores, answers = self.validation.ask(self.step, (state.ema or state.trainable) | state.frozen)
            self.report.add_samples(self.step, answers[: self.config.validation.show_samples])
            self.report.add_answers(self.step, answers)
            self.report.add_scores(self.step, scores)
        self.report.commit()
        return scores

    def _end(self, state: TrainState) -> Outcome:
        """Saves the last step if it is not saved, and evaluates at the end of the data."""
        self.watchdog.reached("the end", long=True)
        self.report.commit()
        if self.step > self.saved:
            self._save(state)
        if self.at_end and self.validation.is_on and self.report.scores_of(self.step) is None:
            self._evaluate(state)
        is_over = self.at_end or self.step == self.config.last_step
        early = not is_over and _is_exhausted(self.best, self.config)
        return Outcome(self.step, preempted=not is_over and not early, best=self.best, stopped_early=early)


class _Clock:
    """Clock for checkpoints every N minutes. None: never."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Returns True if the time is over. All processes get the answer of process 0's clock."""
        seconds = self._seconds
        if seconds is None or (jax.process_count() > 1 and step % AGREE_EVERY):
            return False
        return first_process_decides(f"checkpoint/{step}", lambda: time.monotonic() - self._last >= seconds)


def _best_so_far(config: RunConfig, checkpoints: Checkpoints) -> Best | None:
    """Returns the best evaluation before the restored step; None without a `best_metric`."""
    metric, known = config.loop.best_metric, checkpoints.best
    if metric is None:
        return None
    return known if known is not None and known.metric == metric else Best(metric)


def _is_exhausted(best: Best | None, config: RunConfig) -> bool:
    """Returns True if the last `patience` evaluations did not improve on the best one."""
    return best is not None and config.loop.patience is not None and best.since >= config.loop.patience


def _report(config: RunConfig, out: Path, start: int, mesh: Mesh, figures: DataFigures, record: Record) -> RunReport:
    return RunReport(
        out,
        figures=figures,
        start=start,
        last_step=config.last_step,
        log_every=config.loop.log_every,
        max_skipped_in_a_row=config.loop.max_skipped_in_a_row,
        peak_flops=peak_flops(mesh.devices.flat),
        restarts=record.starts - 1,
        wandb=config.loop.wandb,
        groups=figures.groups,
        joining=figures.joining,
    )


def _saved(state: TrainState, model: MossAudioConfig) -> TrainState:
    """Returns the part of a state that checkpoints hold. With LoRA the frozen parameters are read from the base."""
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
    """Returns the initial or restored state and its step. Sets the position of `data` to match.

    source: source of the first parameters. With LoRA it is the base that the run began with.
    """
    # 1. Restore from the run's own checkpoints, or for a new branch from the other run.
    dtypes = frozen_dtypes(config, abstract_parameters(model, jnp.float32))
    target = abstract_state(model, config.optimizer, frozen_dtypes=dtypes, mesh=mesh)
    saved = _saved(target, model)
    restored = checkpoints.restore(saved)
    first = functools.partial(first_parameters, dtypes=dtypes, seed=config.seed, mesh=mesh)
    is_branch = restored is None and resume.origin is not None
    if restored is None and resume.origin is not None:
        with Checkpoints(resume.origin[0], read_only=True) as others:
            restored = others.restore_step(resume.origin[1], saved)
    # 2. A new run begins at step 0 with its first parameters.
    if restored is None:
        return new_state(first(source, model), model, config.optimizer, seed=config.seed, mesh=mesh), 0
    state, data_state = restored
    if model.lora is not None:
        parameters = first(source, model)
        state = dataclasses.replace(state, frozen={path: parameters[path] for path in target.frozen})
    if is_branch and not resume.branch_optimizer:
        parameters = state.trainable | state.frozen
        del restored, state  # frees the moments
        return new_state(parameters, model, config.optimizer, seed=config.seed, mesh=mesh), 0
    # 3. Resume the data where the checkpoint was saved, unless options of the data have changed.
    step = int(state.step)
    if not data.set_state(data_state, allow_other_data=is_branch or record.has_other_data_since(step)):
        state = with_new_data(state)  # forgets statistics of the old data
    return state, step


@contextmanager
def _data(config: RunConfig, mesh: Mesh, order: ExampleOrder, maker: SampleMaker) -> Iterator[Prefetched]:
    """Yields batches, split into microbatches and placed on devices. Every process reads its share of each."""
    require_even_batch(config.data.batch_size, config.microbatches, mesh)
    host, hosts = share_of_batch(mesh)
    batches = TrainingData(
        order,
        maker,
        config.data,
        host=host,
        hosts=hosts,
        workers=config.loop.workers,
        epochs=config.loop.epochs,
        exists=any_host_has,
    )
    sharding, sequences = batch_sharding(mesh), config.data.batch_size // config.microbatches // hosts

    def put(batch: TrainingBatch) -> TrainingBatch:
        microbatches = len(batch.targets) // sequences  # more than configured once the batch has grown
        dealt = split_microbatches(_deal(batch, microbatches), microbatches)
        return jax.make_array_from_process_local_data(sharding, dealt)

    data = Prefetched(batches, put)
    try:
        yield data
    finally:
        data.close()


def _deal(batch: TrainingBatch, hands: int) -> TrainingBatch:
    """Deals rows to microbatches in turn, so that their rows do not depend on the number of processes.

    [rows, ...] -> [rows, ...]: rows 0, hands, 2 hands ... come first, then rows 1, hands + 1 ...
    """
    return jax.tree.map(lambda x: x.reshape(-1, hands, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), batch)
