"""A run of training: from its configuration to checkpoints and metrics, resumed where it stopped.

    out/config.json      the configuration, which a resumed run must share
    out/metrics.jsonl    a line for every step, and more for people: see `report`
    out/checkpoints/     see `checkpoints`

A run that was killed and is started again ends with the same parameters, bit for bit, as one that never stopped: a
step depends on the state and its batch alone, the data's iterator goes on exactly, and both are saved together. The
checkpoint of a step comes before its evaluation, which a resumed run makes if `scores.jsonl` does not hold it.
Several processes (`distributed`) make the same batches as one, and may be others in number each time it is resumed.
"""

import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.tokens import Tokenizer
from train.best import Best
from train.check import require_usable
from train.checkpoints import Checkpoints
from train.chips import peak_flops
from train.config import RunConfig, settle
from train.data import ExampleOrder, Prefetched, SampleMaker, TrainingBatch, TrainingData
from train.data.augment import Augmentation
from train.distributed import (
    HostSums,
    any_host_has,
    ended_with_the_others,
    first_process_does,
    share_of_batch,
    state_of_all,
)
from train.figures import DataFigures
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

Scores = Mapping[str, float | None]


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
    model = config.trained_model()
    config.require_no_random_frozen(model)
    if config.loop.check_data:
        require_usable(config)
    out = to_path(out)
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    order = ExampleOrder(config.mixture.groups(config.seed), config.seed)
    augmentation = Augmentation(config.augment)
    with ExitStack() as stack:
        stop = stack.enter_context(_termination())
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)

        def write_files() -> None:
            settle(config, out, begun=bool(checkpoints.steps))
            write_model_files(config.model, model, order, out / RUN_MODEL)

        first_process_does(write_files)
        tokenizer = Tokenizer.from_dir(out / RUN_MODEL)
        maker = SampleMaker(
            tokenizer,
            model,
            answers=config.data.answers,
            thoughts=config.data.thoughts,
            augmentation=augmentation,
        )
        held_out = HeldOut(config, Processor(tokenizer, model), maker, mesh, out)
        data = stack.enter_context(_data(config, mesh, order, maker))
        source = config.model
        if model.lora is not None:
            source = dataclasses.replace(source, checkpoint=str(base_directory(out / RUN_MODEL)))
        state, start = _first_or_restored_state(config, source, model, mesh, checkpoints, data)
        figures = DataFigures(order, config.data, model, state.trainable, state_of_all(data.get_state()))
        report = stack.enter_context(_report(config, out, start, mesh, figures))
        profile = stack.enter_context(Profile(out, config.loop.profile_first, config.loop.profile_steps))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(ended_with_the_others())  # last in, first out: closing checkpoints waits for the others
        return _run(config, model, state, start, data, HostSums(mesh), checkpoints, report, profile, held_out, stop)


def _run(
    config: RunConfig,
    model: MossAudioConfig,
    state: TrainState,
    start: int,
    data: Prefetched,
    host_sums: HostSums,
    checkpoints: Checkpoints,
    report: Report,
    profile: Profile,
    held_out: HeldOut,
    stop: Callable[[int], bool],
) -> Outcome:
    graphdef = nnx.split(build_model(model, dict(abstract_parameters(model, jnp.float32))))[0]
    step, saved, best = start, start, _best_so_far(config, checkpoints)

    def save() -> None:
        nonlocal saved
        report.commit()
        checkpoints.save(step, _saved(state, model), state_of_all(data.get_state()), best)
        saved = step

    def evaluate(recorded: Scores | None = None) -> None:
        nonlocal best
        scores = recorded or _evaluated(config, held_out, report, step, state)
        if best is not None:
            best = best.after(step, scores.get(f"eval/{best.metric}"))
            checkpoints.publish(best)

    if best is not None and best.evaluated is not None:
        checkpoints.publish(best)  # as of this step, which the run may have gone beyond
    if held_out.is_due(step) and (best is None or best.evaluated != step):
        evaluate(report.scores_of(step))
    last_step, at_end = config.last_step, False
    while step != last_step and not _is_exhausted(best, config) and not stop(step):
        began = time.perf_counter()
        try:
            batch = next(data)
        except StopIteration:
            at_end = True
            break
        data_wait = time.perf_counter() - began
        step += 1
        profile.before(step)
        state, metrics = train_step(graphdef, config.step, config.optimizer, state, batch)
        profile.after(step, metrics)
        report.add(step, metrics, host_sums(data.sums, {"data_wait": data_wait}))
        evaluated = held_out.is_due(step)
        # The first evaluation may find too little memory: what was trained until then is to be saved.
        before_evaluation = evaluated and (best is not None or not held_out.has_asked)
        if step % config.loop.checkpoint_every == 0 or step == last_step or before_evaluation:
            save()
        if evaluated:
            evaluate()
    report.commit()
    if step > saved:
        save()
    if at_end and held_out.is_on and report.scores_of(step) is None:
        evaluate()
    is_over = at_end or step == last_step
    early = not is_over and _is_exhausted(best, config)
    return Outcome(step, preempted=not is_over and not early, best=best, stopped_early=early)


def _evaluated(config: RunConfig, held_out: HeldOut, report: Report, step: int, state: TrainState) -> Scores:
    """Makes and records an evaluation; the scores last, by which a resumed run knows that it was made."""
    with report.paused():
        scores, answers = held_out.ask(step, state.trainable | state.frozen)
        report.add_samples(step, answers[: config.loop.show_samples])
        report.add_answers(step, answers)
        report.add_scores(step, scores)
    report.commit()
    return scores


def _best_so_far(config: RunConfig, checkpoints: Checkpoints) -> Best | None:
    """Of the evaluations before the restored step; None if the run looks for no best."""
    metric, known = config.loop.best_metric, checkpoints.best
    if metric is None:
        return None
    return known if known is not None and known.metric == metric else Best(metric)


def _is_exhausted(best: Best | None, config: RunConfig) -> bool:
    """Whether the last evaluations were so many without a better one that the run ends."""
    return best is not None and config.loop.patience is not None and best.since >= config.loop.patience


def _report(config: RunConfig, out: Path, start: int, mesh: Mesh, figures: DataFigures) -> Report:
    return Report(
        out,
        figures=figures,
        start=start,
        last_step=config.last_step,
        log_every=config.loop.log_every,
        max_skipped_in_a_row=config.loop.max_skipped_in_a_row,
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
        microbatches = len(batch.targets) // sequences  # more than configured where the batch has grown
        dealt = split_microbatches(_deal(batch, microbatches), microbatches)
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
