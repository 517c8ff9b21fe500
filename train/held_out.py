"""Evaluation while a run trains: every so many steps its model reads held-out data, and answers questions about them.

eval/loss, eval/token_accuracy   of the right answers' tokens, all of them: as in a step, without its dropout
eval/wer, eval/f1, ...           of its own answers, over all tasks that are measured so (`best.METRICS`)
eval/<source>/<task>/...         everything about one task (docs/evaluation.md)
"""

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moss_audio_jax.checkpoint import build_model
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.model import MossAudio
from moss_audio_jax.paths import Path
from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import num_parts, partition_spec
from train.best import Measured, overall, require_metric
from train.config import RunConfig
from train.data import Message, SampleMaker, TrainingBatch
from train.data.budget import Budget, TooLong
from train.data.packing import Packer, pack_row, stack_rows
from train.data.samples import Sample
from train.distributed import share_of_batch
from train.evaluate import AnswerConfig, answer_items, has_events, measure
from train.metrics import parse_timeline
from train.optimizer import Parameters
from train.plots import plot_timeline
from train.questions import Item, manifest_items, manifest_texts, scene_items
from train.report import ShownSample
from train.step import held_out_sums, in_compute_dtype

log = logging.getLogger(__name__)

HELD_OUT_SEED = 2**31  # of scenes: added to the run's own seed, which makes those it trains on
FIGURES = "figures"
BATCH = 16


class HeldOut:
    """What a run's evaluations ask, the same each time; the packed sequences of the loss stay in the host's memory.

    Of several processes each reads all of it, holds its share of the sequences and gets all results.
    Raises MossAudioError, before anything is trained, for audio that can't be read, where there is nothing to evaluate
    on, and for a `best_metric` that the data can't be measured by.
    """

    def __init__(self, config: RunConfig, processor: Processor, maker: SampleMaker, mesh: Mesh, out: Path):
        self._config, self._processor, self._mesh, self._figures = config, processor, mesh, out / FIGURES
        self._every = config.loop.evaluate_every
        if self._every is None:
            return
        self._parts = num_parts("batch", mesh)  # which have to divide a batch
        batch = -(-BATCH // self._parts) * self._parts
        self._answers = AnswerConfig(batch, config.loop.evaluate_tokens, maker.time_markers)
        self._items, texts = questions_and_texts(config)
        self._batches = _batches(config, _samples(maker, self._items, texts, config.data.budget), mesh)
        if config.loop.best_metric is not None:
            unanswered = measure(self._items, [""] * len(self._items))
            require_metric(config.loop.best_metric, overall([_per_token(0, 0, 0), *_tasks(unanswered)]))

    def is_due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def ask(self, step: int, parameters: Parameters) -> tuple[dict[str, float], list[ShownSample]]:
        """Scores by name, and an answer to each question; the first of them have a picture.

        parameters: of the step; they are read only.
        """
        copies = in_compute_dtype(parameters, self._config.step)
        model = build_model(self._processor.config, copies)
        loss, answers = self._loss(model, copies), self._ask(model)
        measured = measure(self._items, answers)
        scores = dict(scalars("eval", loss | overall([loss, *_tasks(measured)]) | measured))
        shown = self._config.loop.show_samples
        pairs = enumerate(zip(self._items, answers, strict=True))
        return scores, [self._sample(step, item, answer, index < shown) for index, (item, answer) in pairs]

    def _loss(self, model: MossAudio, parameters: Parameters) -> dict[str, float | None]:
        graphdef, totals = nnx.split(model)[0], np.zeros(3)
        sharding = NamedSharding(self._mesh, partition_spec(("batch",), self._mesh))
        for batch in self._batches:
            placed = jax.make_array_from_process_local_data(sharding, batch)
            sums = held_out_sums(graphdef, self._config.step, parameters, placed)
            totals += jax.device_get((sums.loss, sums.correct, sums.weight))
        return _per_token(*totals.tolist())

    def _ask(self, model: MossAudio) -> list[str]:
        filling = self._items[:1] * (-len(self._items) % self._parts)
        answers = answer_items(model, self._processor, self._items + filling, self._answers)
        return [answer.text for answer in answers[: len(self._items)]]

    def _sample(self, step: int, item: Item, answer: str, shown: bool) -> ShownSample:
        figure = None
        # Pictures are an extra; a run doesn't end for want of them.
        if shown and has_events(item) and importlib.util.find_spec("matplotlib") and jax.process_index() == 0:
            figure = self._figures / f"step {step} {item.name.replace('/', '_')}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            plot_timeline(figure, item.clips[0].wave(), item.labels, parse_timeline(answer).items)
        return ShownSample(item.name, item.question, item.reference, answer, figure)


def _per_token(loss: float, correct: float, tokens: float) -> dict[str, float | None]:
    """Of sums over tokens; None of none."""
    loss_per_token, share_correct = (loss / tokens, correct / tokens) if tokens else (None, None)
    return {"loss": loss_per_token, "token_accuracy": share_correct, "tokens": tokens}


def questions_and_texts(config: RunConfig) -> tuple[list[Item], list[tuple[str, str]]]:
    """What is asked, and texts of which only the loss is taken, with their names."""
    paths, count, objectives = config.loop.evaluate_data, config.loop.evaluate_count, config.loop.evaluate_objectives
    if objectives and not paths:
        raise MossAudioError("evaluate_objectives needs evaluate_data: give both, or leave evaluate_objectives out")
    if not paths:
        return scene_items(count, config.mixture.scenes.scenes, seed=config.seed + HELD_OUT_SEED), []
    items = []
    for path in paths:
        found = manifest_items(path, objectives, limit=count)
        if objectives and not found:
            raise MossAudioError(
                f"{path} has no labels that evaluate_objectives {', '.join(objectives)} could ask about: name others, "
                "or leave it out"
            )
        items += found
    return items, [text for path in paths for text in manifest_texts(path, limit=count)]


def _samples(
    maker: SampleMaker, items: Sequence[Item], texts: Sequence[tuple[str, str]], budget: Budget
) -> Iterator[Sample]:
    for item in items:
        yield maker.sample(item.name, (*item.turns, Message("assistant", (item.reference,))))
    for name, text in texts:
        yield from maker.text_samples(name, text, budget)


def _batches(config: RunConfig, samples: Iterable[Sample], mesh: Mesh) -> list[TrainingBatch]:
    """This process's rows of batches as large as a microbatch of training: so all have one shape, and one that fits.

    Samples longer than a sequence of training are cut as there, or left out and named. The last rows may repeat the
    first one, of which nothing is to be learned then.
    """
    budget, rows = config.data.budget, config.data.batch_size // config.microbatches
    packer: Packer[Sample] = Packer(budget)
    bins = []
    for sample in samples:
        try:
            kept = sample.within(budget, truncate=config.data.oversize == "truncate")
        except TooLong as error:
            log.warning("left out of eval/loss: %s", error)
        else:
            closed = packer.add(kept)
            bins += [closed] if closed is not None else []
    bins += packer.bins
    if not bins:
        paths = ", ".join(config.loop.evaluate_data) or "the scenes"
        raise MossAudioError(
            f"there is nothing in {paths} to evaluate on that fits into {budget.tokens} tokens and {budget.chunks} "
            "chunks of audio: give other evaluate_data, or leave evaluate_every out"
        )
    host, hosts = share_of_batch(mesh)
    share = rows // hosts
    filler = pack_row(bins[0].items, budget)
    filler["weights"][:] = 0
    batches = []
    for first in range(0, len(bins), rows):
        mine = [pack_row(bin.items, budget) for bin in bins[first : first + rows][host * share : (host + 1) * share]]
        batches.append(stack_rows(mine + [filler] * (share - len(mine))))
    return batches


def _tasks(measures: Mapping[str, Mapping[str, Measured]]) -> list[Measured]:
    return [measured for tasks in measures.values() for measured in tasks.values()]


def scalars(prefix: str, measures: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Nested dicts to numbers by path; what there was nothing to measure of has no number."""
    found = []
    for name, value in measures.items():
        path = f"{prefix}/{name}"
        if name == "by_class":  # a class that only the model has named would be a curve of one point
            value = {label: counts for label, counts in value.items() if counts["reference_events"]}
        if isinstance(value, Mapping):
            found += scalars(path, value)
        elif isinstance(value, int | float):
            found.append((path, float(value)))
    return found
