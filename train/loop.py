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
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import AnyPath, Path, to_path
from moss_audio_jax.storage.retries import retried
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.locate import RUN_MODEL, locate
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.batch import batch_sharding, require_even_batch, split_microbatches
from train.config import RunConfig
from train.data import ExampleOrder, Interrupted, Prefetched, SampleMaker, TrainingBatch, TrainingData
from train.data.augment import Augmentation
from train.data.host_shares import share_of_batch
from train.initialization import require_no_random_frozen
from train.planning.chips import peak_flops
from train.running.additions import with_begins
from train.running.beginning import clean_start, first_or_restored_state, saved_part, source_of, write_files
from train.running.between_steps import BetweenSteps, Outcome, Termination
from train.running.checkpoints import Checkpoints
from train.running.config import ResumeConfig
from train.running.config_file import stored_source
from train.running.directory import is_begun
from train.running.distributed import (
    HostSums,
    any_host_has,
    exit_if_peer_lost,
    gather_data_state,
    on_first_process,
)
from train.running.figures import DataFigures
from train.running.overview import described, overview
from train.running.preflight import require_usable, sample_maker
from train.running.profiling import Profile
from train.running.report import RunReport
from train.running.resume import Record, with_commits
from train.running.validation import Validation
from train.running.watchdog import Watchdog
from train.state import TrainState
from train.step import train_step


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
    source = source_of(config, out, resume)
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
        keep = stack.enter_context(clean_start(out))
        stop = stack.enter_context(Termination())
        watchdog = stack.enter_context(Watchdog(config.loop.stuck_after))
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)
        on_first_process(lambda: retried(out, lambda: write_files(config, resume, model, order, checkpoints, out)))
        checkpoints.reload()
        record = Record.read(out)
        tokenizer = Tokenizer.from_dir(out / RUN_MODEL)
        maker = sample_maker(config, tokenizer, model, Augmentation(config.augment))
        validation = Validation(config, Processor(tokenizer, model), maker, mesh, out)
        data = stack.enter_context(_data(config, mesh, order, maker))
        first = stored_source(out)  # of the first process, if a branch of the hub moved just now
        if model.lora is not None:
            first = dataclasses.replace(first, checkpoint=str(locate(out / RUN_MODEL).base().path))
        state, start = first_or_restored_state(config, first, model, mesh, checkpoints, data, record, resume)
        checkpoints.prepare(saved_part(state, model))
        figures = DataFigures(order, config.data, model, state.trainable, gather_data_state(data.get_state()))
        report = stack.enter_context(_report(config, out, start, mesh, figures, record))
        report.say(overview(config, list(map(described, groups)), mesh, state, start))
        profile = stack.enter_context(Profile(out, config.loop.profile_first, config.loop.profile_steps))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(exit_if_peer_lost())  # exits first: closing checkpoints would wait for the lost process
        between_steps = (lambda: gather_data_state(data.get_state()), checkpoints, report, validation, stop, watchdog)
        run = _Run(config, model, *between_steps, data, HostSums(mesh), profile, num_groups=len(order.groups))
        keep()
        return run(state, start, record.skipped_steps)


@dataclasses.dataclass
class _Run(BetweenSteps):
    """Training loop: steps, and between them checkpoints, evaluations and reports."""

    data: Prefetched
    host_sums: HostSums
    profile: Profile
    num_groups: int

    def __call__(self, state: TrainState, start: int, passed_over: Set[int]) -> Outcome:
        """Trains from step `start` to the end. passed_over: steps that read their batch but do not train on it."""
        config = self.config
        graphdef = nnx.split(build_model(self.model, dict(abstract_parameters(self.model, jnp.float32))))[0]
        self.begin(state, start)
        while self.goes_on():
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
            self.after(state)
        return self.end(state)

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
