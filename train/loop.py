"""A run of training: from its configuration to checkpoints and metrics, resumed where it stopped.

    out/config.json      the configuration, which a resumed run must share
    out/metrics.jsonl    a line for every step, and more for people: see `report`
    out/checkpoints/     see `checkpoints`

A run that was killed and is started again ends with the same parameters, bit for bit, as one that never stopped: a
step depends on the state and its batch alone, the data's iterator goes on exactly, and both are saved together.
Several processes (`distributed`) make the same batches as one, and may be others in number each time it is resumed.
"""

import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moss_audio_jax.checkpoint import RUN_MODEL, abstract_parameters, base_directory, build_model
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.paths import AnyPath, Path, to_path
from moss_audio_jax.processor import Processor
from moss_audio_jax.retries import retried
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.tokens import Tokenizer
from train.best import Best
from train.check import require_usable
from train.checkpoints import Checkpoints
from train.chips import peak_flops
from train.config import RunConfig, settle
from train.data import ExampleOrder, Prefetched, SampleMaker, TrainingBatch, TrainingData
from train.distributed import ended_with_the_others, first_process_does, share_of_batch, state_of_all
from train.flops import Content, step_flops
from train.held_out import HeldOut
from train.initial import ModelSource, first_parameters
from train.model_files import write_model_files
from train.report import Profile, Report
from train.step import (
    TrainState,
    abstract_state,
    batch_sharding,
    new_state,
    require_even_batch,
    split_microbatches,
    train_step,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: the last one, which has a checkpoint. preempted: by SIGTERM, before the last step.

    best: of its evaluations, where it looks for one. stopped_early: since that was not beaten any more.
    """

    step: int
    preempted: bool
    best: Best | None = None
    stopped_early: bool = False


def train(config: RunConfig, out: AnyPath, *, mesh: Mesh | None = None) -> Outcome:
    """Trains until `config.last_step`, from the newest checkpoint in `out` if there is one. For the main thread.

    mesh: over the devices to use; None lays out all of them as the configuration says.
    Raises MossAudioError for a configuration other than the one the run was begun with, too many skipped steps in a
    row, data that can't be used and checkpoints that can't be written or read.
    """
    if config.loop.check_data:
        require_usable(config)
    out = to_path(out)
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    model = config.trained_model()
    with ExitStack() as stack:
        stop = stack.enter_context(_termination())
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)
        order = ExampleOrder(config.mixture.groups(config.seed), config.seed)

        def write_files() -> None:
            settle(config, out, begun=bool(checkpoints.steps))
            write_model_files(config.model, model, order, out / RUN_MODEL)

        first_process_does(lambda: retried(out, write_files))
        tokenizer = Tokenizer.from_dir(out / RUN_MODEL)
        maker = SampleMaker(tokenizer, model, answers=config.data.answers, thoughts=config.data.thoughts)
        held_out = HeldOut(config, Processor(tokenizer, model), maker, mesh, out)
        data = stack.enter_context(_data(config, mesh, order, maker))
        source = config.model
        if model.lora is not None:
            source = dataclasses.replace(source, checkpoint=str(base_directory(out / RUN_MODEL)))
        state, start = _first_or_restored_state(config, source, model, mesh, checkpoints, data)
        report = stack.enter_context(_report(config, out, start, mesh))
        profile = stack.enter_context(Profile(out, config.loop.profile_first, config.loop.profile_steps))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(ended_with_the_others())  # last in, first out: closing checkpoints waits for the others
        return _run(config, model, state, start, data, checkpoints, report, profile, held_out, stop)


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
    stop: Callable[[int], bool],
) -> Outcome:
    graphdef = nnx.split(build_model(model, dict(abstract_parameters(model, jnp.float32))))[0]
    step, best = start, _best_so_far(config, checkpoints)

    def save() -> None:
        report.commit()
        checkpoints.save(step, _saved(state, model), state_of_all(data.get_state()), best)

    while step < config.last_step and not _is_exhausted(best, config) and not stop(step):
        began = time.perf_counter()
        batch = next(data)
        data_wait = time.perf_counter() - began
        flops = step_flops(model, Content.of_batch(data.metrics, config.data), state.trainable)
        step += 1
        profile.before(step)
        state, metrics = train_step(graphdef, config.step, config.optimizer, state, batch)
        profile.after(step, metrics)
        report.add(step, metrics, {"data_wait": data_wait, **data.metrics, "model_flops": sum(flops.values())})
        if evaluated := held_out.is_due(step):
            with report.paused():
                scores, answers = held_out.ask(step, state.trainable | state.frozen)
                report.add_scores(step, scores)
                report.add_samples(step, answers[: config.loop.show_samples])
                report.add_answers(step, answers)
            best = best and best.after(step, scores.get(f"eval/{best.metric}"))
        # After the evaluation, whose outcome it holds: one that a kill has come before is made again.
        if (step % config.loop.checkpoint_every == 0 or (evaluated and best is not None)) and step < config.last_step:
            save()
    report.commit()
    if step > start and step not in checkpoints.steps:
        save()
    early = step < config.last_step and _is_exhausted(best, config)
    return Outcome(step, preempted=step < config.last_step and not early, best=best, stopped_early=early)


def _best_so_far(config: RunConfig, checkpoints: Checkpoints) -> Best | None:
    """Of the evaluations before the restored step; None if the run looks for no best."""
    metric, known = config.loop.best_metric, checkpoints.best
    if metric is None:
        return None
    return known if known is not None and known.metric == metric else Best(metric)


def _is_exhausted(best: Best | None, config: RunConfig) -> bool:
    """Whether the last evaluations were so many without a better one that the run ends."""
    return best is not None and config.loop.patience is not None and best.since >= config.loop.patience


def _report(config: RunConfig, out: Path, start: int, mesh: Mesh) -> Report:
    return Report(
        out,
        start=start,
        last_step=config.last_step,
        log_every=config.loop.log_every,
        max_skipped_in_a_row=config.loop.max_skipped_in_a_row,
        batch_tokens=config.data.batch_size * config.data.tokens,
        peak_flops=peak_flops(mesh.devices.flat),
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
) -> tuple[TrainState, int]:
    """The state to go on from, the data set to match it, and how many steps it has behind it.

    source: as the configuration says, but for an adapter's base, of which the run keeps the one that it began with.
    """
    dtypes = config.frozen_dtypes(abstract_parameters(model, jnp.float32))
    target = abstract_state(model, config.optimizer, frozen_dtypes=dtypes, mesh=mesh)
    restored = checkpoints.restore(_saved(target, model))
    first = functools.partial(first_parameters, dtypes=dtypes, seed=config.seed, mesh=mesh)
    if restored is None:
        return new_state(first(source, model), model, config.optimizer, seed=config.seed, mesh=mesh), 0
    state, data_state = restored
    data.set_state(data_state)
    if model.lora is not None:
        parameters = first(source, model)
        state = dataclasses.replace(state, frozen={path: parameters[path] for path in target.frozen})
    return state, int(state.step)


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


@contextmanager
def _termination() -> Iterator[Callable[[int], bool]]:
    """Says whether to stop after a step since there was a SIGTERM, the notice of a preemption.

    Several processes stop after the same step, whichever of them was told: JAX has its own handler of the signal then.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield lambda step: requested.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
