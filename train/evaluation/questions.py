"""Questions with known answers: from labelled examples, sound scenes and public benchmarks.

    questions = manifest_questions("test.jsonl") + scene_questions(100, SceneConfig(), seed=1)

`answers` asks them, `measures` judges the answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath
from train.data.config import Answers, ColumnsConfig, SceneConfig
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.objectives import OBJECTIVES, PROMPTS, TIME_QUESTIONS
from train.data.samples import with_prompt, without_thought
from train.data.scenes import make_task
from train.data.shards import open_examples
from train.evaluation.question_files import read_benchmark


@dataclass(frozen=True, eq=False)
class Question:
    """One question and its known answer.

    name: place of origin, in errors and predictions.
    source, task: measures are aggregated over all questions that share both; these have the same `measure`.
    turns: the prompt: one question, or a conversation up to the answer.
    reference: the right answer as text; for multiple choice, its letter.
    measure: a key of `measures.MEASURES`.
    labels: exact times of a timeline, since `reference` has rounded ones.
    choices, groups: of multiple choice, see `question_files.BenchmarkQuestion`.
    """

    name: str
    source: str
    task: str
    turns: tuple[Message, ...]
    reference: str
    measure: str
    labels: tuple[TimedText, ...] = ()
    choices: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Text of the last turn."""
        return "\n".join(piece for piece in self.turns[-1].content if isinstance(piece, str))

    @property
    def clips(self) -> list[Clip]:
        return [piece for turn in self.turns for piece in turn.content if isinstance(piece, Clip)]


# Labelled examples

ASKABLE = tuple(name for name in OBJECTIVES if name != "plain_text")


def require_askable(objectives: Sequence[str]) -> None:
    """Raises MossAudioError for a name that is not in ASKABLE."""
    unknown = sorted(set(objectives) - set(ASKABLE))
    if unknown:
        raise MossAudioError(f"objectives must be some of {', '.join(ASKABLE)}, found {unknown[0]!r}")


_OBJECTIVE_MEASURES = {
    "transcribe": "text",
    "transcribe_words": "timed_text",
    "transcribe_sentences": "timed_text",
    "caption": "unjudged",
    "events": "events",
    "conversation": "reply",
}
_TIMELINES: dict[str, Callable[[Example], tuple[TimedText, ...]]] = {
    "transcribe_words": lambda example: example.words,
    "transcribe_sentences": lambda example: example.segments,
    "events": lambda example: example.events,
}


def manifest_questions(
    path: AnyPath,
    objectives: Sequence[str] = (),
    *,
    seed: int = 0,
    limit: int | None = None,
    answers: Answers = "last",
    default_prompt: str = "",
    columns: ColumnsConfig | None = None,
) -> list[Question]:
    """Returns a question for each example of a manifest or directory of shards and each objective that applies to it.

    objectives: ask only these.
    seed: of the questions about a time. The others use the first prompt of their objective.
    limit: maximum number of examples; the first ones are taken.
    answers: "last" removes the thoughts from earlier turns of a conversation, as Qwen3's chat template does; "all"
        keeps them, as in sequences that are trained on all answers.
    default_prompt: user text where a conversation has none.
    columns: of data that is no manifest.
    """
    require_askable(objectives)
    return [
        question
        for index, example in enumerate(_examples(path, limit, columns))
        for question in example_questions(example, str(path), objectives, (seed, index), answers, default_prompt)
    ]


def manifest_texts(
    path: AnyPath, *, limit: int | None = None, columns: ColumnsConfig | None = None
) -> list[tuple[str, str]]:
    """Returns name and text of the plain-text examples, which have no question. limit: as in `manifest_questions`."""
    applies = OBJECTIVES["plain_text"].applies
    return [(example.name, example.text) for example in _examples(path, limit, columns) if applies(example)]


def _examples(path: AnyPath, limit: int | None, columns: ColumnsConfig | None) -> Iterator[Example]:
    examples = open_examples(path, columns)
    return (examples[index] for index in range(len(examples) if limit is None else min(limit, len(examples))))


def example_questions(
    example: Example,
    source: str,
    objectives: Sequence[str] = (),
    seed: Sequence[int] = (0,),
    answers: Answers = "last",
    default_prompt: str = "",
) -> Iterator[Question]:
    """Yields a question for each objective that applies to the example; see `manifest_questions`."""
    for name in objectives or ASKABLE:
        if not OBJECTIVES[name].applies(example):
            continue
        rendered = OBJECTIVES[name].render(example, np.random.default_rng(seed))
        assert not isinstance(rendered, str)  # plain text is not askable
        *turns, answer = with_prompt(rendered, default_prompt)
        if name in PROMPTS:  # one fixed wording, so that results are comparable
            turns = [Message("user", (*turns[0].content[:-1], PROMPTS[name][0]))]
        if answers == "last":
            turns = [without_thought(turn) for turn in turns]
        task, measure = _task(name, turns[-1].content[-1])
        reference = "\n".join(piece for piece in answer.content if isinstance(piece, str))
        labels = _TIMELINES[name](example) if name in _TIMELINES else ()
        yield Question(example.name, source, task, tuple(turns), reference, measure, labels)


def _task(objective: str, question: str | Clip) -> tuple[str, str]:
    """Returns task and measure. `time_qa` is two tasks: answers in seconds, and answers that are a label."""
    if objective != "time_qa":
        return objective, _OBJECTIVE_MEASURES[objective]
    measure = "seconds" if _asks_for_seconds(question) else "label"
    return f"time_qa_{measure}", measure


def _asks_for_seconds(question: str | Clip) -> bool:
    openings = (
        wording.partition("{0}")[0] for kind in ("start", "end", "duration") for wording in TIME_QUESTIONS[kind]
    )
    return isinstance(question, str) and question.startswith(tuple(openings))


# Sound scenes

SCENE_MEASURES = {
    "timeline": "events",
    "words": "timed_text",
    "transcript": "text",
    "caption": "label",
    "start": "seconds",
    "duration": "seconds",
    "what_at": "label",
    "pitch": "label",
    "fine_pitch": "label",
    "loudness": "label",
    "fine_loudness": "label",
    "voice": "label",
    "speaker": "label",
    "drum": "label",
}


def scene_questions(count: int, config: SceneConfig, *, seed: int = 0) -> list[Question]:
    """Returns one question about each of the scenes 0 to `count` - 1. The seed should not be that of training."""
    return [scene_question(index, config, seed) for index in range(count)]


def scene_question(index: int, config: SceneConfig, seed: int) -> Question:
    """Makes the question about one scene."""
    task = make_task(seed, index, config)
    name = f"scene {index} of seed {seed}"
    turns = task.example(name).conversation[:1]  # the first of the questions that training asks
    return Question(name, "scenes", task.name, turns, task.answer, SCENE_MEASURES[task.name], labels=task.scene.events)


# Benchmarks


def benchmark_questions(
    name: str, path: AnyPath, audio_dir: AnyPath | None = None, *, limit: int | None = None
) -> list[Question]:
    """Returns the questions of a benchmark. Open ones, and those whose answer is not an option, are not judged.

    Arguments and errors: as in `question_files.read_benchmark`.
    """
    questions = []
    for question in read_benchmark(name, path, audio_dir)[:limit]:
        clips = [Clip(str(clip), name=f"{path}: {clip}") for clip in question.audio]
        is_choice = question.answer is not None
        questions.append(
            Question(
                name=question.id,
                source=name,
                task="choice" if is_choice else "open",
                turns=(Message("user", (*clips, question.prompt())),),
                reference=question.answer or "",
                measure="choice" if is_choice else "unjudged",
                choices=question.choices,
                groups=question.groups,
            )
        )
    return questions
