"""Evaluates a checkpoint: loads it, asks it questions with known answers and measures what it answers.

    config = EvaluationConfig(data=("test.jsonl",), scenes=100, seed=1)
    evaluation = evaluate("checkpoint", read_questions(config), config)
    evaluation.results["measures"]      # {"test.jsonl": {"transcribe": {"items": 50, "wer": 0.08, ...}}, ...}

docs/evaluation.md defines every number.
"""

import contextlib
import json
import posixpath
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from moss_audio_jax.commands.interruption import stops_on_ctrl_c
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.processor import load_processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import AnyPath, atomic_write
from moss_audio_jax.weights.checkpoint import load_model
from moss_audio_jax.weights.locate import locate
from train.evaluation.answers import Answer, answers_by_index
from train.evaluation.config import EvaluationConfig
from train.evaluation.measures import measure
from train.evaluation.metrics.timelines import parse_timeline
from train.evaluation.question_files import FILE_FORMATS
from train.evaluation.questions import (
    ASKABLE,
    Question,
    benchmark_questions,
    manifest_questions,
    scene_questions,
)

if TYPE_CHECKING:
    from train.evaluation.plots import TimelinePlot


def read_questions(config: EvaluationConfig) -> list[Question]:
    """Reads all questions of a configuration. Clips are decoded later, when a batch needs them."""
    questions: list[Question] = []
    for path in config.data:
        options = {"seed": config.seed, "limit": config.limit, "default_prompt": config.default_prompt}
        options["columns"] = config.columns
        questions += manifest_questions(path, config.objectives, **options)
    questions += scene_questions(config.scenes, config.scene, seed=config.seed)
    for benchmark in config.benchmark:
        name, equals, path = benchmark.partition("=")
        if not equals:
            raise MossAudioError(
                f"benchmark must be NAME=FILE, NAME one of {', '.join(FILE_FORMATS)}, not {benchmark!r}"
            )
        questions += benchmark_questions(name, path, config.audio_dir, limit=config.limit)
    if not questions:
        asked = ", ".join(config.objectives or ASKABLE)
        raise MossAudioError(
            f"there is nothing to ask: give --data with labels for {asked}, --scenes N or --benchmark NAME=FILE"
        )
    return questions


@dataclass(frozen=True)
class Evaluation:
    """Questions, answers and measures of a checkpoint.

    results: ready for JSON; its field `measures` is the result of `measure`.
    partial: True if the evaluation was interrupted; all fields then cover the answered questions only.
    """

    questions: Sequence[Question]
    answers: Sequence[Answer]
    results: dict[str, Any]
    partial: bool = False

    def save_results(self, path: AnyPath) -> None:
        """Writes `results` as JSON."""
        atomic_write(path, json.dumps(self.results, indent=2, ensure_ascii=False, default=str) + "\n")

    def save_predictions(self, path: AnyPath) -> None:
        """Writes one JSON line per question."""
        lines = []
        for question, answer in zip(self.questions, self.answers, strict=True):
            line = {name: getattr(question, name) for name in ("name", "source", "task")}
            line |= {"question": question.text, "reference": question.reference}
            line |= {"prediction": answer.text, "finished": answer.finished}
            line |= {"partial": True} if self.partial else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        atomic_write(path, "".join(lines))

    def save_plot(self, path: AnyPath, most: int = 4) -> None:
        """Writes a PNG of up to `most` clips whose events were asked for: true and predicted timelines.

        The clips are chosen to show as many labels as possible, independent of the answers.
        """
        from train.evaluation.plots import plot_timelines

        pairs = [pair for pair in zip(self.questions, self.answers, strict=True) if has_timeline(pair[0])]
        shown = indices_of_all_labels([question for question, _ in pairs], most)
        if shown:  # a partial evaluation may have none
            plot_timelines(path, [timeline_plot(pairs[index][0], pairs[index][1].text) for index in shown])


def indices_of_all_labels(questions: Sequence[Question], most: int) -> list[int]:
    """Sorted indices of up to `most` questions, chosen greedily by the number of labels that each adds."""
    chosen: list[int] = []
    seen: set[str] = set()
    while len(chosen) < min(most, len(questions)):
        rest = [index for index in range(len(questions)) if index not in chosen]
        chosen.append(max(rest, key=lambda index: len({label.text for label in questions[index].labels} - seen)))
        seen |= {label.text for label in questions[chosen[-1]].labels}
    return sorted(chosen)


def timeline_plot(question: Question, answer: str) -> "TimelinePlot":
    """Plot of the first clip of a question: its labels and the events of the answer."""
    from train.evaluation.plots import TimelinePlot

    said = parse_timeline(answer)
    return TimelinePlot(
        question.clips[0].wave(), question.labels, said.items, clip_title(question), said.malformed, answer
    )


def clip_title(question: Question) -> str:
    """File name of a question's first clip, and the place where the question is from."""
    audio = question.clips[0].audio
    file = posixpath.basename(audio) if isinstance(audio, str) else ""
    place = posixpath.basename(question.name)
    return f"{file} ({place})" if file else place


def has_timeline(question: Question) -> bool:
    """True if the question asks for a timeline, of events or of words."""
    return question.measure in ("events", "timed_text")


def evaluate(
    checkpoint: AnyPath,
    questions: Sequence[Question],
    config: EvaluationConfig,
    *,
    progress: bool = False,
    keep_partial: bool = False,
) -> Evaluation:
    """Loads a checkpoint, asks it all questions and measures its answers.

    keep_partial: Ctrl-C stops after the next answer, and the answers so far are measured.
    """
    processor = load_processor(checkpoint)
    model = load_model(checkpoint, dtype=config.dtype, mesh=make_mesh(**asdict(config.mesh)), verify=config.verify)
    stop = threading.Event()
    with stops_on_ctrl_c(stop.set) if keep_partial else contextlib.nullcontext():
        found = answers_by_index(
            model, processor, questions, config.answers, seed=config.seed, progress=progress, stop=stop.is_set
        )
    asked, partial = len(questions), len(found) < len(questions)
    questions, answers = [questions[index] for index in sorted(found)], [found[index] for index in sorted(found)]
    results = {
        "checkpoint": str(locate(checkpoint, weights=False).hub or checkpoint),
        "config": asdict(config),
        "dtype": str(jax.tree.leaves(nnx.state(model))[0].dtype),
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "items": len(questions),
        **({"partial": True, "items_in_all": asked} if partial else {}),
        "unfinished": sum(not answer.finished for answer in answers),
        "measures": measure(questions, [answer.text for answer in answers]),
    }
    return Evaluation(questions, answers, results, partial)
