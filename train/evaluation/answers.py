"""Asks a model: questions -> batched prompts -> generated answers."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import generate
from moss_audio_jax.inputs import ModelInputs, make_inputs, padded
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor
from moss_audio_jax.prompts import build_conversation
from moss_audio_jax.sharding import mesh_of, num_parts, partition_spec
from train.data.host_shares import share_of_batch
from train.data.manifest import Clip
from train.data.samples import FRAMES_PER_SECOND, TOKENS_PER_SECOND, turns_and_mels
from train.evaluation.config import AnswerConfig
from train.evaluation.questions import Question


class Answer(NamedTuple):
    """Text of an answer. `finished` is False if it was cut off at `max_new_tokens`."""

    text: str
    finished: bool


def ask(
    model: MossAudio,
    processor: Processor,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 512,
) -> list[str]:
    """Returns the model's greedy answers, one per question."""
    answers = answer_questions(model, processor, questions, AnswerConfig(batch_size, max_new_tokens))
    return [answer.text for answer in answers]


def answer_questions(
    model: MossAudio, processor: Processor, questions: Sequence[Question], config: AnswerConfig, *, seed: int = 0
) -> list[Answer]:
    """Returns the model's answers in the order of the questions.

    An answer does not depend on the other questions of its batch. With sampling, question i uses seed + i.
    The model may be sharded over several processes: each reads its share of a batch and gets all answers.

    Raises MossAudioError that names the clip if one can't be read, usually before the first batch is generated.
    """
    answers = answers_by_index(model, processor, questions, config, seed=seed)
    return [answers[index] for index in range(len(questions))]


def answers_by_index(
    model: MossAudio,
    processor: Processor,
    questions: Sequence[Question],
    config: AnswerConfig,
    *,
    seed: int = 0,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[int, Answer]:
    """Returns answers by question index; see `answer_questions`.

    progress: show a progress bar.
    stop: called after each batch; if it returns True, only the answers so far are returned.
    """
    answers: dict[int, Answer] = {}
    eos = model.config.eos_ids
    with tqdm(total=len(questions), unit="item", disable=not progress) as bar:
        for indices, inputs in _batches(processor, questions, config, mesh_of(nnx.state(model))):
            rows = generate(
                model,
                inputs,
                max_new_tokens=config.max_new_tokens,
                seeds=[seed + index for index in indices],
                **asdict(config.sampling),
            )  # int32 [batch, new tokens]
            before = len(answers)
            for index, row in zip(indices, rows, strict=True):
                # The last batch repeats questions to fill its rows: the first answer counts.
                answers.setdefault(index, Answer(processor.decode(row), bool(np.isin(row, eos).any())))
            bar.update(len(answers) - before)
            if stop():
                break
    return answers


def whole_batch(size: int, parts: int) -> int:
    """Rounds a batch size up to a multiple of `parts`."""
    return -(-size // parts) * parts


def _batches(
    processor: Processor, questions: Sequence[Question], config: AnswerConfig, mesh: Mesh | None
) -> Iterator[tuple[Sequence[int], ModelInputs]]:
    """Yields the question index of each row, and the prompts as [batch, tokens].

    All batches have the same number of rows: the last one repeats some questions. Questions are sorted by length:
    a batch then has little padding, and each length bucket compiles one program.
    """
    if not questions:
        return
    parts = 1 if mesh is None else num_parts("batch", mesh)
    size = whole_batch(min(config.batch_size, len(questions)), parts)
    host, hosts = (0, 1) if mesh is None or jax.process_count() == 1 else share_of_batch(mesh)
    mine = slice(host * size // hosts, (host + 1) * size // hosts)  # rows that this process reads

    def make(indices: Sequence[int]) -> ModelInputs:
        encoded = {index: _encode(processor, questions[index], config.time_markers) for index in dict.fromkeys(indices)}
        ids, mels = zip(*(encoded[index] for index in indices), strict=True)
        return make_inputs(ids, mels, config=processor.config)

    with ThreadPoolExecutor() as pool:
        # Longest first, so that running out of memory shows in the first batch.
        lengths = list(pool.map(_length, questions))
        order = sorted(range(len(questions)), key=lengths.__getitem__, reverse=True)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [batch + batch[:1] * (size - len(batch)) for batch in batches]
        # One batch ahead: the host decodes audio for the next batch while the device generates for this one.
        coming = [pool.submit(make, batch[mine]) for batch in batches[:1]]
        for number, indices in enumerate(batches):
            inputs = coming.pop()
            coming += [pool.submit(make, batch[mine]) for batch in batches[number + 1 : number + 2]]
            if mesh is None or jax.process_count() == 1:
                yield indices, inputs.result()
            else:
                yield _gathered(indices[mine], inputs, mesh)


def _gathered(indices: Sequence[int], inputs: Future[ModelInputs], mesh: Mesh) -> tuple[list[int], ModelInputs]:
    """Puts the rows that each process has read into one global batch; returns it with the question index of each row.

    Raises MossAudioError in every process if one of them can't read its share.
    """
    # 1. Agree on the shape: every process pads its rows to the longest prompt of any process.
    error = inputs.exception()
    shape = (0, 0) if error else (inputs.result().tokens.shape[1], inputs.result().audio_chunks.shape[1])
    shapes = multihost_utils.process_allgather(np.array([error is not None, *shape], np.int32)).reshape(-1, 3)
    failed, tokens, chunks = shapes.max(0).tolist()
    if error is not None:
        raise error
    if failed:
        raise MossAudioError("another process of the evaluation has failed: its message says why")
    # 2. Shard the rows over the data-parallel axes. The indices travel with them, since a mesh may reorder processes.
    rows = padded(inputs.result(), tokens, chunks), np.asarray(indices, np.int32)
    sharding = NamedSharding(mesh, partition_spec(("batch",), mesh))
    batch, places = jax.make_array_from_process_local_data(sharding, rows)
    return np.asarray(multihost_utils.process_allgather(places, tiled=True)).tolist(), batch


def _encode(processor: Processor, question: Question, time_markers: bool | None) -> tuple[list[int], list[np.ndarray]]:
    """Returns the token ids of a prompt, and the mels [mel bins, frames] of its clips."""
    turns, mels = turns_and_mels(question.turns, lambda clip: _named(clip.name, processor.mel, clip.wave()))
    encode = partial(build_conversation, time_markers=time_markers, processor=processor.config.processor)
    return _named(question.name, encode, processor.tokenizer, turns).ids, mels


def _named(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; a MossAudioError from it gets the prefix `name`."""
    try:
        return function(*arguments)
    except MossAudioError as error:
        raise type(error)(f"{name}: {error}") from error


# Prompt lengths, estimated from audio headers alone

_CHARACTERS_PER_TOKEN = 4
_TOKENS_AROUND = 32  # role headers, audio begin and end marks, the system message
_MARKERS_PER_SECOND = 1.0  # digits of time markers


def prompt_length(question: Question, chunk_frames: int) -> tuple[int, int]:
    """Estimates tokens and audio chunks of a prompt without decoding audio."""
    seconds = list(map(_seconds, question.clips))
    tokens = _length(question) + _MARKERS_PER_SECOND * sum(seconds) + _TOKENS_AROUND
    return math.ceil(tokens), sum(math.ceil(FRAMES_PER_SECOND * clip / chunk_frames) for clip in seconds)


def _length(question: Question) -> float:
    """Estimated tokens of the text and the audio of a prompt."""
    characters = sum(len(piece) for turn in question.turns for piece in turn.content if isinstance(piece, str))
    return characters / _CHARACTERS_PER_TOKEN + TOKENS_PER_SECOND * sum(map(_seconds, question.clips))


def _seconds(clip: Clip) -> float:
    return clip.num_samples() / SAMPLE_RATE
