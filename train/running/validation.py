"""Validation of a run: every N steps it computes the loss on validation data and answers questions about them.

eval/loss, eval/token_accuracy   over the tokens of all reference answers, as in a training step but without dropout
eval/<source>/loss, ...          the same for one manifest
eval/wer, eval/f1, ...           of the generated answers, over all tasks with this metric (`best.METRICS`)
eval/unfinished                  number of answers cut off after --validation.max-new-tokens
eval/<source>/<task>/...         all measures of one task (docs/evaluation.md)
"""

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import MIN_NEW_TOKENS
from moss_audio_jax.inputs import MIN_TOKENS, bucket
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import num_parts, partition_spec
from moss_audio_jax.storage.paths import Path
from moss_audio_jax.weights.parameters import build_model
from train.config import RunConfig
from train.data import Message, SampleMaker, TrainingBatch
from train.data.budget import Budget, TooLong
from train.data.host_shares import share_of_batch
from train.data.packing import Bin, Packer, pack_row, stack_rows
from train.data.samples import Sample
from train.evaluation.answers import answer_questions, prompt_length, whole_batch
from train.evaluation.config import AnswerConfig
from train.evaluation.evaluate import has_timeline, timeline_plot
from train.evaluation.measures import measure
from train.evaluation.plots import plot_timelines
from train.evaluation.questions import Question, manifest_questions, manifest_texts, scene_questions
from train.optimizer import Parameters
from train.running.best import Measures, overall, require_metric
from train.running.directory import FIGURES
from train.running.report import ShownSample
from train.step import in_compute_dtype, validation_sums

log = logging.getLogger(__name__)

HELD_OUT_SEED = 2**31  # added to the run's seed for validation scenes, so that they differ from training scenes


class Validation:
    """Evaluations of a run, with the same questions each time. Packed sequences for the loss stay in host memory.

    With several processes, each reads all validation data for the loss but keeps only its share of the sequences, and
    decodes its share of the questions at each evaluation. All processes get all results.
    Raises MossAudioError before training for audio that can't be read, without validation data, and for a
    `best_metric` that the data do not have.
    """

    def __init__(self, config: RunConfig, processor: Processor, maker: SampleMaker, mesh: Mesh, out: Path):
        self._config, self._processor, self._mesh, self._figures = config, processor, mesh, out / FIGURES
        self._every = config.validation.every
        self.has_asked = False
        if self._every is None:
            if config.loop.best_metric is not None:
                raise MossAudioError("--best-metric needs --validation.every or --eval-data: give one, or leave it out")
            return
        self._answers = AnswerConfig(config.validation.batch_size, config.validation.max_new_tokens, maker.time_markers)
        self._items, texts = questions_and_texts(config)
        self._batches = _batches(config, _samples(maker, self._items, texts, config.data.budget), mesh)
        if config.loop.best_metric is not None:
            unanswered = measure(self._items, [""] * len(self._items))
            require_metric(config.loop.best_metric, overall([_per_token(np.zeros(3)), *_tasks(unanswered)]))

    @property
    def is_on(self) -> bool:
        """True if the run evaluates."""
        return self._every is not None

    def is_due(self, step: int) -> bool:
        """Returns True if an evaluation follows this step: every `validation.every` steps and after the last."""
        if self._every is None or step == 0:
            return False
        return step % self._every == 0 or step == self._config.last_step

    def ask(self, step: int, parameters: Parameters) -> tuple[dict[str, float], list[ShownSample]]:
        """Evaluates: returns scores by name, and an answer to each question; the first few answers have a figure.

        parameters: those after `step`; they are not modified. Raises MossAudioError if device memory is too small.
        """
        self.has_asked = True
        with _fitting_into_memory(step, self._config.validation.batch_size):
            copies = in_compute_dtype(parameters, self._config.step)
            model = build_model(self._processor.config, copies)
            sums = self._loss_sums(model, copies)
            found = answer_questions(model, self._processor, self._items, self._answers)
        answers = [answer.text for answer in found]
        measured = measure(self._items, answers)
        loss = _per_token(sum(sums.values(), np.zeros(3)))
        unfinished = {"unfinished": sum(not answer.finished for answer in found)}
        of_source = {source: _per_token(sums[source]) | measured.get(source, {}) for source in sums}
        scores = scalars("eval", loss | overall([loss, *_tasks(measured)]) | unfinished | measured | of_source)
        shown = self._config.validation.show_samples
        pairs = enumerate(zip(self._items, answers, strict=True))
        return dict(scores), [self._sample(step, item, answer, index < shown) for index, (item, answer) in pairs]

    def _loss_sums(self, model: MossAudio, parameters: Parameters) -> dict[str, np.ndarray]:
        """Returns source -> [3]: sum of losses, number of correct tokens, number of tokens."""
        graphdef, sums = nnx.split(model)[0], defaultdict(lambda: np.zeros(3))
        sharding = NamedSharding(self._mesh, partition_spec(("batch",), self._mesh))
        for source, batch in self._batches:
            placed = jax.make_array_from_process_local_data(sharding, batch)
            found = validation_sums(graphdef, self._config.step, parameters, placed)
            sums[source] += jax.device_get((found.loss, found.correct, found.tokens))
        return sums

    def _sample(self, step: int, item: Question, answer: str, shown: bool) -> ShownSample:
        figure = None
        # Figures are optional: without matplotlib the run continues without them.
        if shown and has_timeline(item) and importlib.util.find_spec("matplotlib") and jax.process_index() == 0:
            figure = self._figures / f"step {step} {item.name.replace('/', '_')}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            plot_timelines(figure, [timeline_plot(item, answer)])
        return ShownSample(item.name, item.text, item.reference, answer, figure)


@contextmanager
def _fitting_into_memory(step: int, batch: int) -> Iterator[None]:
    """Turns an out-of-memory error of a device into a MossAudioError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MossAudioError(
            f"the evaluation after step {step} runs out of device memory ({str(error).splitlines()[0][:300]}): run the "
            f"same command with --validation.batch-size below {batch}, which resumes from the newest checkpoint"
        ) from error


class EvaluationShapes(NamedTuple):
    """Largest shapes of an evaluation.

    prompts: questions in a batch. prompt_tokens, prompt_chunks: length of the longest question.
    new_tokens: length of an answer.
    sequences: sequences in a batch of eval/loss, each of `data.tokens` tokens and `data.chunks` chunks.
    """

    prompts: int
    prompt_tokens: int
    prompt_chunks: int
    new_tokens: int
    sequences: int


def evaluation_shapes(config: RunConfig, parts: int, items: Sequence[Question] | None = None) -> EvaluationShapes:
    """Computes the largest shapes of a run's evaluations, to plan memory.

    parts: number of shards of a batch (`num_parts("batch", mesh)`).
    items: questions (`questions_and_texts`). The length of their audio is read from headers, that of their texts is
        estimated. None: the longest question is as long as a training sequence.
    """
    prompts = whole_batch(config.validation.batch_size, parts)
    tokens, chunks = config.data.tokens, config.data.chunks
    if items is not None:
        prompts = min(prompts, whole_batch(len(items), parts))
        chunk_frames = config.model_config().audio_config.chunk_frames
        assert chunk_frames is not None  # `SampleMaker` requires it
        lengths = [prompt_length(item, chunk_frames) for item in items]
        tokens, chunks = (max(counts) for counts in zip(*lengths, strict=True))
    return EvaluationShapes(
        prompts=prompts,
        prompt_tokens=bucket(tokens, MIN_TOKENS),
        prompt_chunks=bucket(chunks, 1) if chunks else 0,
        new_tokens=bucket(config.validation.max_new_tokens, MIN_NEW_TOKENS),
        sequences=_sequences(config, parts),
    )


def _sequences(config: RunConfig, parts: int) -> int:
    """Returns the sequences in a batch of eval/loss: at most those of a training microbatch, which fits in memory."""
    return min(config.data.batch_size // config.microbatches, whole_batch(config.validation.batch_size, parts))


def _per_token(sums: np.ndarray) -> dict[str, float | None]:
    """Computes the mean loss and accuracy; None without tokens. sums: [3], as `_loss_sums` returns for a source."""
    loss, correct, tokens = sums.tolist()
    loss_per_token, share_correct = (loss / tokens, correct / tokens) if tokens else (None, None)
    return {"loss": loss_per_token, "token_accuracy": share_correct, "tokens": tokens}


def questions_and_texts(config: RunConfig) -> tuple[list[Question], list[tuple[str, str, str]]]:
    """Reads the validation data: questions to answer, and (source, name, text) of texts, which only have a loss.

    Thoughts of earlier turns are in the prompt if the run trains with them.
    """
    paths, count, objectives = config.validation.data, config.validation.count, config.validation.objectives
    if objectives and not paths:
        raise MossAudioError(
            "--validation.objectives needs --validation.data: give both, or leave --validation.objectives out"
        )
    if not paths:
        return scene_questions(count, config.held_out_scenes, seed=config.seed + HELD_OUT_SEED), []
    items = []
    for path in paths:
        prompt = config.data.default_prompt
        found = manifest_questions(
            path,
            objectives,
            limit=count,
            answers=config.data.answers,
            default_prompt=prompt,
            columns=config.columns,
        )
        if objectives and not found:
            raise MossAudioError(
                f"{path} has no labels for --validation.objectives {', '.join(objectives)}: name others, "
                "or leave it out"
            )
        items += found
    texts = ((path, manifest_texts(path, limit=count, columns=config.columns)) for path in paths)
    return items, [(path, *text) for path, found in texts for text in found]


def _samples(
    maker: SampleMaker, items: Sequence[Question], texts: Sequence[tuple[str, str, str]], budget: Budget
) -> Iterator[tuple[str, Sample]]:
    """Yields (source, sample) of every question with its reference answer, and of every text."""
    for item in items:
        yield item.source, maker.sample(item.name, (*item.turns, Message("assistant", (item.reference,))))
    for source, name, text in texts:
        for sample in maker.text_samples(name, text, budget):
            yield source, sample


def _batches(config: RunConfig, samples: Iterable[tuple[str, Sample]], mesh: Mesh) -> list[tuple[str, TrainingBatch]]:
    """Packs samples into batches, each of one source and all of one shape; returns this process's rows of each.

    Samples longer than a training sequence are truncated as in training, or left out with a warning. The last batch of
    a source is padded with copies of its first row that have an empty loss mask.
    """
    budget, rows = config.data.budget, _sequences(config, num_parts("batch", mesh))
    # 1. Pack the samples of each source into bins of one sequence.
    packers: defaultdict[str, Packer[Sample]] = defaultdict(lambda: Packer(budget))
    bins: defaultdict[str, list[Bin[Sample]]] = defaultdict(list)
    for source, sample in samples:
        try:
            kept = sample.within(budget, truncate=config.data.oversize == "truncate")
        except TooLong as error:
            log.warning("left out of eval/loss: %s", error)
        else:
            closed = packers[source].add(kept)
            bins[source] += [closed] if closed is not None else []
    for source, packer in packers.items():
        bins[source] += packer.bins
    if not bins:
        paths = ", ".join(config.validation.data) or "the scenes"
        raise MossAudioError(
            f"there is nothing in {paths} to evaluate on that fits into {budget.tokens} tokens and {budget.chunks} "
            "chunks of audio: give other --validation.data, or leave --validation.every out"
        )
    # 2. Cut the bins into batches of `rows` sequences, of which this host has `share`.
    host, hosts = share_of_batch(mesh)
    share = rows // hosts
    batches = []
    for source, packed in bins.items():
        filler = pack_row(packed[0].items, budget)
        filler["loss_mask"][:] = 0
        for first in range(0, len(packed), rows):
            mine = packed[first : first + rows][host * share : (host + 1) * share]
            filled = [pack_row(bin.items, budget) for bin in mine] + [filler] * (share - len(mine))
            batches.append((source, stack_rows(filled)))
    return batches


def _tasks(measures: Mapping[str, Mapping[str, Measures]]) -> list[Measures]:
    """Flattens source -> task -> measures."""
    return [measured for tasks in measures.values() for measured in tasks.values()]


def scalars(prefix: str, measures: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Flattens nested dicts to (path, number) pairs. Values that are not numbers, such as None, are left out."""
    found = []
    for name, value in measures.items():
        path = f"{prefix}/{name}"
        if name == "by_class":  # leaves out classes that only answers name: their curves would have few points
            value = {label: counts for label, counts in value.items() if counts["reference_events"]}
        if isinstance(value, Mapping):
            found += scalars(path, value)
        elif isinstance(value, int | float):
            found.append((path, float(value)))
    return found
