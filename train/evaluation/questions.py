"""Questions with known answers: about labelled examples, about sound scenes, and those of public benchmarks.

    items = manifest_items("test.jsonl") + scene_items(100, SceneConfig(), seed=1)

`evaluate` asks them and judges the answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.objectives import OBJECTIVES, PROMPTS, TIME_QUESTIONS
from train.data.samples import Answers, with_prompt, without_thought
from train.data.scenes import SceneConfig, make_task
from train.data.shards import open_examples
from train.evaluation.question_files import read_benchmark


@dataclass(frozen=True, eq=False)
class Item:
    """One question, and what its answer is judged by.

    name: what errors and predictions call it.
    source, task: measures are taken over all items that share both, and so have one measure.
    turns: what the model reads: a question, or a conversation up to where it answers.
    reference: the right answer as it would be written; of multiple choice, the letter.
    measure: one of `evaluate.MEASURES`.
    labels: what a timeline is compared with, since the reference has rounded times.
    choices, groups: of multiple choice, see `benchmarks.Question`.
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
    def question(self) -> str:
        """The text of the last turn."""
        return "\n".join(piece for piece in self.turns[-1].content if isinstance(piece, str))

    @property
    def clips(self) -> list[Clip]:
        return [piece for turn in self.turns for piece in turn.content if isinstance(piece, Clip)]


# Questions about labelled examples

ASKABLE = tuple(name for name in OBJECTIVES if name != "plain_text")


def require_askable(objectives: Sequence[str]) -> None:
    """Raises MossAudioError for a name that is none of ASKABLE."""
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


def manifest_items(
    path: AnyPath,
    objectives: Sequence[str] = (),
    *,
    seed: int = 0,
    limit: int | None = None,
    answers: Answers = "last",
    default_prompt: str = "",
) -> list[Item]:
    """Every objective that applies to the examples of a manifest or a directory of shards.

    objectives: ask these only. seed: of the questions about a time; the others are asked in their first wording.
    limit: only so many examples, the first ones. answers: of a conversation's earlier turns, "last" leaves out the
    thoughts, as Qwen3's chat template does, and "all" shows them, as a sequence whose answers are all learned does.
    default_prompt: where a conversation's is blank.
    """
    require_askable(objectives)
    return [
        item
        for index, example in enumerate(_examples(path, limit))
        for item in example_items(example, str(path), objectives, (seed, index), answers, default_prompt)
    ]


def manifest_texts(path: AnyPath, *, limit: int | None = None) -> list[tuple[str, str]]:
    """Name and text of the examples that are nothing but text, about which nothing can be asked. limit: see there."""
    applies = OBJECTIVES["plain_text"].applies
    return [(example.name, example.text) for example in _examples(path, limit) if applies(example)]


def _examples(path: AnyPath, limit: int | None) -> Iterator[Example]:
    examples = open_examples(path)
    return (examples[index] for index in range(len(examples) if limit is None else min(limit, len(examples))))


def example_items(
    example: Example,
    source: str,
    objectives: Sequence[str] = (),
    seed: Sequence[int] = (0,),
    answers: Answers = "last",
    default_prompt: str = "",
) -> Iterator[Item]:
    """Every objective, or those given, that applies to one example; see `manifest_items`."""
    for name in objectives or ASKABLE:
        if not OBJECTIVES[name].applies(example):
            continue
        rendered = OBJECTIVES[name].render(example, np.random.default_rng(seed))
        assert not isinstance(rendered, str)  # plain text is not askable
        *turns, answer = with_prompt(rendered, default_prompt)
        if name in PROMPTS:
            turns = [Message("user", (*turns[0].content[:-1], PROMPTS[name][0]))]
        if answers == "last":
            turns = [without_thought(turn) for turn in turns]
        task, judged_by = _task(name, turns[-1].content[-1])
        reference = "\n".join(piece for piece in answer.content if isinstance(piece, str))
        labels = _TIMELINES[name](example) if name in _TIMELINES else ()
        yield Item(example.name, source, task, tuple(turns), reference, judged_by, labels)


def _task(objective: str, question: str | Clip) -> tuple[str, str]:
    """The task and the measure of a question; those about a time are two tasks."""
    if objective != "time_qa":
        return objective, _OBJECTIVE_MEASURES[objective]
    judged_by = "seconds" if _asks_for_seconds(question) else "label"
    return f"time_qa_{judged_by}", judged_by


def _asks_for_seconds(question: str | Clip) -> bool:
    openings = (
        wording.partition("{0}")[0] for kind in ("start", "end", "duration") for wording in TIME_QUESTIONS[kind]
    )
    return isinstance(question, str) and question.startswith(tuple(openings))


# Questions about sound scenes

_SCENE_MEASURES = {
    "timeline": "events",
    "caption": "label",
    "start": "seconds",
    "duration": "seconds",
    "what_at": "label",
    "pitch": "label",
    "loudness": "label",
}


def scene_items(count: int, config: SceneConfig, *, seed: int = 0) -> list[Item]:
    """Scenes 0 to `count` - 1 of a seed (which should not be that of training), one question about each."""
    return [_scene_item(index, config, seed) for index in range(count)]


def _scene_item(index: int, config: SceneConfig, seed: int) -> Item:
    task = make_task(seed, index, config)
    name = f"scene {index} of seed {seed}"
    turns = task.example(name).conversation[:1]  # what more training asks about a scene is left out
    judged_by = _SCENE_MEASURES[task.name]
    return Item(name, "scenes", task.name, turns, task.answer, judged_by, labels=task.scene.events)


# Questions of benchmarks


def benchmark_items(
    name: str, path: AnyPath, audio_dir: AnyPath | None = None, *, limit: int | None = None
) -> list[Item]:
    """The questions of a benchmark; open ones, and those whose answer is none of the options, are not judged."""
    items = []
    for question in read_benchmark(name, path, audio_dir)[:limit]:
        clips = [Clip(str(clip), name=f"{path}: {clip}") for clip in question.audio]
        is_choice = question.answer is not None
        items.append(
            Item(
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
    return items
