"""Groups of answers -> batches of an update: each prompt with one of its answers is a segment of a packed sequence.

Segments of one question in the same sequence share its chunks of audio, which are encoded once there.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.config import DOWNSAMPLE_RATE
from moss_audio_jax.inputs import ModelInputs, bucket
from train.batch import batch_sharding, split_microbatches
from train.data.budget import Budget
from train.data.packing import Row, empty_row
from train.reinforce.config import Algorithm
from train.reinforce.objective import PolicyBatch, advantages
from train.reinforce.rollout import Group

OF_TOKENS = ("advantages", "drawn", "weight")


class Segment(NamedTuple):
    """An answer to be packed. group: number of its question's."""

    group: int
    prompt: ModelInputs
    ids: np.ndarray
    logprobs: np.ndarray
    advantage: float
    weight: float

    @property
    def num_tokens(self) -> int:
        return self.prompt.tokens.shape[1] + len(self.ids)


def segments_of(groups: Sequence[Group], algorithm: Algorithm) -> list[Segment]:
    """Returns all answers of an update, with their advantages and the weights of their tokens in its objective."""
    answers = sum(len(group.ids) for group in groups)
    tokens = sum(len(ids) for group in groups for ids in group.ids)
    return [
        Segment(
            number,
            group.encoded.inputs,
            np.array(ids, np.int32),
            np.array(logprobs, np.float32),
            advantage,
            1 / tokens if algorithm == "dapo" else 1 / (answers * len(ids)),
        )
        for number, group in enumerate(groups)
        for ids, logprobs, advantage in zip(group.ids, group.logprobs, advantages(group.reward.tolist()), strict=True)
    ]


class _Sequence:
    """Segments that share a sequence. chunks: group -> number of its first chunk."""

    def __init__(self, budget: Budget):
        self.segments: list[Segment] = []
        self.chunks: dict[int, int] = {}
        self.free_tokens, self.used_chunks, self._budget = budget.tokens, 0, budget

    def fits(self, segment: Segment) -> bool:
        new = 0 if segment.group in self.chunks else segment.prompt.audio_chunks.shape[1]
        return segment.num_tokens <= self.free_tokens and self.used_chunks + new <= self._budget.chunks

    def add(self, segment: Segment) -> None:
        if segment.group not in self.chunks:
            self.chunks[segment.group] = self.used_chunks
            self.used_chunks += segment.prompt.audio_chunks.shape[1]
        self.free_tokens -= segment.num_tokens
        self.segments.append(segment)


def packed(segments: Sequence[Segment], budget: Budget) -> list[_Sequence]:
    """Packs segments in their order, into the fullest sequence that has room and their audio, else only room."""
    sequences: list[_Sequence] = []
    for segment in segments:
        fitting = [sequence for sequence in sequences if sequence.fits(segment)]
        if fitting:
            chosen = min(fitting, key=lambda one: (segment.group not in one.chunks, one.free_tokens))
        else:
            sequences.append(chosen := _Sequence(budget))
        chosen.add(segment)
    return sequences


def row_of(sequence: _Sequence, budget: Budget, frames: int, mel_bins: int) -> Row:
    """Returns the arrays of a packed sequence by their names in ModelInputs and PolicyBatch."""
    row = empty_row(budget, frames, mel_bins)
    row |= {name: np.zeros(budget.tokens, np.float32) for name in OF_TOKENS}
    begin = 0
    for number, segment in enumerate(sequence.segments, start=1):
        prompt, length = segment.prompt, segment.num_tokens
        here, of_prompt = slice(begin, begin + length), prompt.tokens.shape[1]
        ids = np.concatenate([prompt.tokens[0], segment.ids])
        row["tokens"][here] = ids
        row["positions"][here] = np.arange(length)
        row["segment_ids"][here] = number
        chunk, slots = sequence.chunks[segment.group], prompt.audio_slots[0]
        shift = chunk * (frames // DOWNSAMPLE_RATE)
        row["audio_slots"][begin : begin + of_prompt] = np.where(slots >= 0, slots + shift, -1)
        for name in ("audio_chunks", "chunk_frames", "stem_frames"):
            array = getattr(prompt, name)[0]
            row[name][chunk : chunk + len(array)] = array
        # Position t predicts t + 1: the last one of the prompt predicts the first one of the answer.
        row["targets"][begin : begin + length - 1] = ids[1:]
        drawn = slice(begin + of_prompt - 1, begin + length - 1)
        row["loss_mask"][drawn] = 1
        row["drawn"][drawn] = segment.logprobs
        row["advantages"][drawn] = segment.advantage
        row["weight"][drawn] = segment.weight
        begin += length
    return row


def policy_batch(
    groups: Sequence[Group], algorithm: Algorithm, budget: Budget, rows: int, frames: int, mel_bins: int
) -> PolicyBatch:
    """Makes the NumPy arrays of an update, in microbatches of `rows` sequences; frames, mel_bins: of a chunk.

    The number of microbatches is one of few (`inputs.bucket`), so that few programs are compiled: the last sequences
    may be empty.
    """
    sequences = packed(segments_of(groups, algorithm), budget)
    count = bucket(-(-len(sequences) // rows), 1)
    made = [row_of(sequence, budget, frames, mel_bins) for sequence in sequences]
    made += [row_of(_Sequence(budget), budget, frames, mel_bins)] * (count * rows - len(made))
    arrays = {name: np.stack([row[name] for row in made]) for name in made[0]}
    inputs = ModelInputs(**{field.name: arrays[field.name] for field in dataclasses.fields(ModelInputs)})
    batch = PolicyBatch(inputs, **{name: arrays[name] for name in ("targets", "loss_mask", *OF_TOKENS)})
    return split_microbatches(batch, count)


def placed(batch: PolicyBatch, mesh: Mesh) -> PolicyBatch:
    """Puts a batch, which every process has as a whole, onto the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)
