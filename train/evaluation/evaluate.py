"""Evaluation: what a model answers to questions whose answers are known, and how right that is.

    items = manifest_items("test.jsonl") + scene_items(100, SceneConfig(), seed=1)
    answers = ask(model, processor, items)      # one text an item
    measure(items, answers)                     # {"test.jsonl": {"transcribe": {"items": 50, "wer": 0.08, ...}}, ...}

docs/evaluation.md defines every number.
"""

import contextlib
import json
import math
import posixpath
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.commands.interruption import stops_on_ctrl_c
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import generate
from moss_audio_jax.inputs import ModelInputs, make_inputs, padded
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor, load_processor
from moss_audio_jax.sharding import make_mesh, mesh_of, num_parts, partition_spec
from moss_audio_jax.storage.paths import AnyPath, atomic_write
from moss_audio_jax.tokens import build_conversation
from moss_audio_jax.weights.checkpoint import load_model
from train.data.manifest import Clip
from train.data.samples import FRAMES_PER_SECOND, TOKENS_PER_SECOND, turns_and_mels
from train.evaluation.config import AnswerConfig, EvaluationConfig
from train.evaluation.metrics import (
    EventCounts,
    character_error_rate,
    final_answer,
    parse_timeline,
    score_events,
    score_matches,
    score_seconds,
    score_timestamps,
    without_times,
    word_error_rate,
)
from train.evaluation.multiple_choice import score_choices
from train.evaluation.question_files import LAYOUTS
from train.evaluation.questions import ASKABLE, Item, benchmark_items, manifest_items, scene_items
from train.running.distributed import share_of_batch

if TYPE_CHECKING:
    from train.evaluation.plots import TimelinePlot

ONSET_TOLERANCE = 0.2  # seconds, of event F1
SECONDS_TOLERANCE = 0.2  # seconds, of a time that was asked for


# Answers


class Answer(NamedTuple):
    """`finished` is False if it was cut off."""

    text: str
    finished: bool


def ask(
    model: MossAudio, processor: Processor, items: Sequence[Item], *, batch_size: int = 8, max_new_tokens: int = 512
) -> list[str]:
    """The model's greedy answers, one an item."""
    answers = answer_items(model, processor, items, AnswerConfig(batch_size, max_new_tokens))
    return [answer.text for answer in answers]


def answer_items(
    model: MossAudio,
    processor: Processor,
    items: Sequence[Item],
    config: AnswerConfig,
    *,
    seed: int = 0,
    progress: bool = False,
) -> list[Answer]:
    """The model's answers, one an item, in their order.

    Items of like length share a batch, longest first, so that little is padded, one program serves each bucket of
    lengths and a lack of memory shows at once. The next batch is decoded while the device answers this one.
    An answer does not depend on what it is batched with; the seed of a sampled one is `seed` + the item's index.
    Of several processes, whose devices the model is sharded over, each reads its share of a batch and gets all answers.
    Raises MossAudioError that names the clip if one can't be read, mostly before the first batch.
    """
    answers = _answers(model, processor, items, config, seed, progress, stop=lambda: False)
    return [answers[index] for index in range(len(items))]


def _answers(
    model: MossAudio,
    processor: Processor,
    items: Sequence[Item],
    config: AnswerConfig,
    seed: int,
    progress: bool,
    stop: Callable[[], bool],
) -> dict[int, Answer]:
    """By the items' indices: of all, or of those before `stop` said so after a batch."""
    answers: dict[int, Answer] = {}
    eos = model.config.eos_ids
    with tqdm(total=len(items), unit="item", disable=not progress) as bar:
        for indices, inputs in _batches(processor, items, config, mesh_of(nnx.state(model))):
            rows = generate(
                model,
                inputs,
                max_new_tokens=config.max_new_tokens,
                seeds=[seed + index for index in indices],
                **asdict(config.sampling),
            )
            before = len(answers)
            for index, row in zip(indices, rows, strict=True):
                answers.setdefault(index, Answer(processor.decode(row), bool(np.isin(row, eos).any())))
            bar.update(len(answers) - before)
            if stop():
                break
    return answers


def whole_batch(size: int, parts: int) -> int:
    """A size, rounded up so that as many parts share it evenly."""
    return -(-size // parts) * parts


def _batches(
    processor: Processor, items: Sequence[Item], config: AnswerConfig, mesh: Mesh | None
) -> Iterator[tuple[Sequence[int], ModelInputs]]:
    """The index of the item in each row, and the prompts; all batches have as many rows, the last some items twice."""
    if not items:
        return
    parts = 1 if mesh is None else num_parts("batch", mesh)
    size = whole_batch(min(config.batch_size, len(items)), parts)
    host, hosts = (0, 1) if mesh is None or jax.process_count() == 1 else share_of_batch(mesh)
    mine = slice(host * size // hosts, (host + 1) * size // hosts)

    def make(indices: Sequence[int]) -> ModelInputs:
        encoded = {index: _encode(processor, items[index], config.time_markers) for index in dict.fromkeys(indices)}
        ids, mels = zip(*(encoded[index] for index in indices), strict=True)
        return make_inputs(ids, mels, config=processor.config)

    with ThreadPoolExecutor() as pool:
        lengths = list(pool.map(_length, items))
        order = sorted(range(len(items)), key=lengths.__getitem__, reverse=True)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [batch + batch[:1] * (size - len(batch)) for batch in batches]
        coming = [pool.submit(make, batch[mine]) for batch in batches[:1]]
        for number, indices in enumerate(batches):
            inputs = coming.pop()
            coming += [pool.submit(make, batch[mine]) for batch in batches[number + 1 : number + 2]]
            if mesh is None or jax.process_count() == 1:
                yield indices, inputs.result()
            else:
                yield _of_all_processes(indices[mine], inputs, mesh)


def _of_all_processes(indices: Sequence[int], inputs: Future[ModelInputs], mesh: Mesh) -> tuple[list[int], ModelInputs]:
    """One batch of the rows that each process has read, on the devices of all; and which item is in which row of it.

    Raises MossAudioError in all processes if one of them can't read its share.
    """
    error = inputs.exception()
    shape = (0, 0) if error else (inputs.result().tokens.shape[1], inputs.result().audio_chunks.shape[1])
    shapes = multihost_utils.process_allgather(np.array([error is not None, *shape], np.int32)).reshape(-1, 3)
    failed, tokens, chunks = shapes.max(0).tolist()
    if error is not None:
        raise error
    if failed:
        raise MossAudioError("another process of the evaluation has failed: its message says why")
    rows = padded(inputs.result(), tokens, chunks), np.asarray(indices, np.int32)
    sharding = NamedSharding(mesh, partition_spec(("batch",), mesh))
    batch, places = jax.make_array_from_process_local_data(sharding, rows)
    return np.asarray(multihost_utils.process_allgather(places, tiled=True)).tolist(), batch


def _encode(processor: Processor, item: Item, time_markers: bool | None) -> tuple[list[int], list[np.ndarray]]:
    """Ids of a prompt, and the mels of its clips."""
    turns, mels = turns_and_mels(item.turns, lambda clip: _named(clip.name, processor.mel, clip.wave()))
    encode = partial(build_conversation, time_markers=time_markers, processor=processor.config.processor)
    return _named(item.name, encode, processor.tokenizer, turns).ids, mels


def _named(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it; an error then says what it is about."""
    try:
        return function(*arguments)
    except MossAudioError as error:
        raise type(error)(f"{name}: {error}") from error


_CHARACTERS_PER_TOKEN = 4
_TOKENS_AROUND = 32  # the roles, the marks of a clip, the system message
_MARKERS_PER_SECOND = 1.0  # digits of time markers


def prompt_length(item: Item, chunk_frames: int) -> tuple[int, int]:
    """About how many tokens and chunks a prompt has; no audio is decoded for it."""
    seconds = list(map(_seconds, item.clips))
    tokens = _length(item) + _MARKERS_PER_SECOND * sum(seconds) + _TOKENS_AROUND
    return math.ceil(tokens), sum(math.ceil(FRAMES_PER_SECOND * clip / chunk_frames) for clip in seconds)


def _length(item: Item) -> float:
    """Roughly how many tokens a prompt has; no audio is decoded for it."""
    characters = sum(len(piece) for turn in item.turns for piece in turn.content if isinstance(piece, str))
    return characters / _CHARACTERS_PER_TOKEN + TOKENS_PER_SECOND * sum(map(_seconds, item.clips))


def _seconds(clip: Clip) -> float:
    return clip.num_samples() / SAMPLE_RATE


# Measures

Measures = dict[str, Any]


def measure(items: Sequence[Item], answers: Sequence[str]) -> dict[str, dict[str, Measures]]:
    """Source -> task -> measures and the counts behind them, for JSON. docs/evaluation.md explains the fields."""
    grouped: defaultdict[tuple[str, str], list[tuple[Item, str]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        grouped[item.source, item.task].append((item, answer))
    measures: dict[str, dict[str, Measures]] = {}
    for (source, task), pairs in grouped.items():
        judge = MEASURES[pairs[0][0].measure]
        measured = judge([item for item, _ in pairs], [answer for _, answer in pairs])
        measures.setdefault(source, {})[task] = {"items": len(pairs), **measured}
    return measures


def _measure_text(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    return _error_rates(map(final_answer, answers), [final_answer(item.reference) for item in items])


def _error_rates(texts: Iterable[str], references: Sequence[str]) -> Measures:
    predictions = list(texts)
    words, characters = (rate(predictions, references) for rate in (word_error_rate, character_error_rate))
    return {
        "wer": words.rate,
        "word_edits": words.edits,
        "words": words.length,
        "cer": characters.rate,
        "character_edits": characters.edits,
        "characters": characters.length,
    }


def _measure_timed_text(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    texts = (without_times(final_answer(answer)) for answer in answers)
    references = [final_answer(" ".join(label.text for label in item.labels)) for item in items]
    return _timestamps(items, answers) | _error_rates(texts, references)


def _timestamps(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    timelines = [parse_timeline(answer) for answer in answers]
    score = score_timestamps([timeline.items for timeline in timelines], [item.labels for item in items])
    return asdict(score) | {"malformed": sum(timeline.malformed for timeline in timelines)}


def _measure_events(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    predictions = [parse_timeline(answer).items for answer in answers]
    score = score_events(predictions, [item.labels for item in items], ONSET_TOLERANCE)
    return {
        **_event_counts(score.total),
        "onset_ms": score.onset_ms,
        "offset_ms": score.offset_ms,
        **_timestamps(items, answers),
        "by_class": {label: _event_counts(counts) for label, counts in score.by_class.items()},
    }


def _event_counts(counts: EventCounts) -> Measures:
    rates = {name: getattr(counts, name) for name in ("f1", "precision", "recall")}
    return rates | {f"{name}_events": count for name, count in asdict(counts).items()}


def _measure_seconds(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    score = score_seconds(answers, [float(final_answer(item.reference)) for item in items], SECONDS_TOLERANCE)
    return {
        "mean_error_s": score.mean_error,
        "share_within": score.share_within,
        "within": score.within,
        "unreadable": score.unreadable,
    }


def _measure_label(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    score = score_matches(map(final_answer, answers), [final_answer(item.reference) for item in items])
    return {"accuracy": score.accuracy, "correct": score.correct}


def _measure_reply(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    return _measure_label(items, answers) | _measure_text(items, answers)


def _measure_choice(items: Sequence[Item], answers: Sequence[str]) -> Measures:
    by_group: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, item in enumerate(items):
        for kind, group in item.groups.items():
            by_group[kind][group].append(index)

    def accuracy(indices: Sequence[int]) -> Measures:
        score = score_choices(
            [answers[index] for index in indices],
            [items[index].choices for index in indices],
            [items[index].reference for index in indices],
        )
        counts = asdict(score)
        return {"items": counts.pop("total"), "accuracy": score.accuracy, **counts}

    groups = {
        kind: {group: accuracy(indices) for group, indices in sorted(members.items())}
        for kind, members in by_group.items()
    }
    return accuracy(range(len(items))) | {"by_group": groups}


MEASURES: dict[str, Callable[[Sequence[Item], Sequence[str]], Measures]] = {
    "text": _measure_text,
    "timed_text": _measure_timed_text,
    "events": _measure_events,
    "seconds": _measure_seconds,
    "label": _measure_label,
    "reply": _measure_reply,
    "choice": _measure_choice,
    "unjudged": lambda items, answers: {},
}

_SHOWN = {  # field -> how the table writes it
    "accuracy": "accuracy {:.1%}",
    "f1": "F1 {:.1%}",
    "onset_ms": "onset {:.0f} ms",
    "offset_ms": "offset {:.0f} ms",
    "mean_error_s": "error {:.2f} s",
    "share_within": f"within {SECONDS_TOLERANCE} s {{:.1%}}",
    "aas_ms": "AAS {:.0f} ms",
    "matched_slots": "slots {} matched",
    "missing_slots": "{} missing",
    "surplus_slots": "{} surplus",
    "wer": "WER {:.1%}",
    "cer": "CER {:.1%}",
    "malformed": "malformed {}",
    "unreadable": "unreadable {}",
    "unanswered": "unanswered {}",
    "ambiguous": "ambiguous {}",
}


def table(measures: Mapping[str, Mapping[str, Measures]]) -> str:
    """A line a task, with what is mostly looked at; a rate of nothing is left out."""
    rows = [("source", "task", "items", "")]
    for source, tasks in measures.items():
        for task, measured in tasks.items():
            cells = [shown.format(measured[name]) for name, shown in _SHOWN.items() if measured.get(name) is not None]
            rows.append((source, task, str(measured["items"]), ", ".join(cells) or "not judged: read the predictions"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{source:<{widths[0]}}  {task:<{widths[1]}}  {count:>{widths[2]}}  {cells}".rstrip()
        for source, task, count, cells in rows
    )


# The command


def read_items(config: EvaluationConfig) -> list[Item]:
    """All that a configuration asks. Clips are held as they are stored, and decoded when they are needed."""
    items: list[Item] = []
    for path in config.data:
        options = {"seed": config.seed, "limit": config.limit, "default_prompt": config.default_prompt}
        items += manifest_items(path, config.objectives, **options)
    items += scene_items(config.scenes, config.scene, seed=config.seed)
    for benchmark in config.benchmark:
        name, equals, path = benchmark.partition("=")
        if not equals:
            raise MossAudioError(f"benchmark must be NAME=FILE, NAME one of {', '.join(LAYOUTS)}, not {benchmark!r}")
        items += benchmark_items(name, path, config.audio_dir, limit=config.limit)
    if not items:
        asked = ", ".join(config.objectives or ASKABLE)
        raise MossAudioError(
            f"there is nothing to ask: give --data with labels for {asked}, --scenes N or --benchmark NAME=FILE"
        )
    return items


@dataclass(frozen=True)
class Evaluation:
    """results: for JSON; its field `measures` is what `measure` gives.

    partial: not all was asked, and everything is of the items that were.
    """

    items: Sequence[Item]
    answers: Sequence[Answer]
    results: dict[str, Any]
    partial: bool = False

    def save_results(self, path: AnyPath) -> None:
        atomic_write(path, json.dumps(self.results, indent=2, ensure_ascii=False, default=str) + "\n")

    def save_predictions(self, path: AnyPath) -> None:
        """A line of JSON an item."""
        lines = []
        for item, answer in zip(self.items, self.answers, strict=True):
            line = {name: getattr(item, name) for name in ("name", "source", "task", "question", "reference")}
            line |= {"prediction": answer.text, "finished": answer.finished}
            line |= {"partial": True} if self.partial else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        atomic_write(path, "".join(lines))

    def save_plot(self, path: AnyPath, most: int = 4) -> None:
        """Clips whose events were asked for: what is in them, and what the model says is.

        They are chosen so that as many labels as possible are in them, whatever the answers.
        """
        from train.evaluation.plots import plot_timelines

        pairs = [(item, answer) for item, answer in zip(self.items, self.answers, strict=True) if has_events(item)]
        shown = _of_all_labels([item for item, _ in pairs], most)
        if shown:  # of a partial evaluation there may be none
            plot_timelines(path, [timeline_plot(pairs[index][0], pairs[index][1].text) for index in shown])


def _of_all_labels(items: Sequence[Item], most: int) -> list[int]:
    """The indices of so many items, in order: those that bring the most new labels, by what is true, come first."""
    chosen: list[int] = []
    seen: set[str] = set()
    while len(chosen) < min(most, len(items)):
        rest = [index for index in range(len(items)) if index not in chosen]
        chosen.append(max(rest, key=lambda index: len({label.text for label in items[index].labels} - seen)))
        seen |= {label.text for label in items[chosen[-1]].labels}
    return sorted(chosen)


def timeline_plot(item: Item, answer: str) -> "TimelinePlot":
    """A clip whose events were asked for, and what the model answered."""
    from train.evaluation.plots import TimelinePlot

    said = parse_timeline(answer)
    return TimelinePlot(item.clips[0].wave(), item.labels, said.items, clip_title(item), said.malformed, answer)


def clip_title(item: Item) -> str:
    """The name of the file that a question is about, and where the question is from."""
    audio = item.clips[0].audio
    file = posixpath.basename(audio) if isinstance(audio, str) else ""
    place = posixpath.basename(item.name)
    return f"{file} ({place})" if file else place


def has_events(item: Item) -> bool:
    """Whether the question asks for a timeline of events."""
    return item.measure == "events"


def evaluate(
    checkpoint: AnyPath,
    items: Sequence[Item],
    config: EvaluationConfig,
    *,
    progress: bool = False,
    keep_partial: bool = False,
) -> Evaluation:
    """Loads a checkpoint, asks it all items and measures its answers.

    keep_partial: Ctrl-C ends the asking after the batch at hand, and what was answered so far is measured.
    """
    processor = load_processor(checkpoint)
    model = load_model(checkpoint, dtype=config.dtype, mesh=make_mesh(**asdict(config.mesh)))
    stop = threading.Event()
    with stops_on_ctrl_c(stop.set) if keep_partial else contextlib.nullcontext():
        found = _answers(model, processor, items, config.answers, config.seed, progress, stop.is_set)
    asked, partial = len(items), len(found) < len(items)
    items, answers = [items[index] for index in sorted(found)], [found[index] for index in sorted(found)]
    results = {
        "checkpoint": str(checkpoint),
        "config": asdict(config),
        "dtype": str(jax.tree.leaves(nnx.state(model))[0].dtype),
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "items": len(items),
        **({"partial": True, "items_in_all": asked} if partial else {}),
        "unfinished": sum(not answer.finished for answer in answers),
        "measures": measure(items, [answer.text for answer in answers]),
    }
    return Evaluation(items, answers, results, partial)
