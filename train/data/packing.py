"""Several samples in one sequence, each a segment of its own, within a budget of tokens and one of audio chunks.

A packed sequence is a row of `ModelInputs`: segment ids 1, 2, ..., positions that restart, audio slots that count the
chunks of the whole row. Samples wait in a bounded number of open bins; a bin is closed when a sample fits none of them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import jax
import ml_dtypes
import numpy as np

from moss_audio_jax.config import DOWNSAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs
from train.data.budget import Budget
from train.data.config import Strategy
from train.data.samples import Sample


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingBatch:
    """What a training step reads; NumPy arrays as they are made.

    inputs: packed sequences; audio_chunks in bfloat16, to which every mel is rounded.
    targets: int32 [b, s], the id to predict at each position: the next one of the same segment.
    weights: float32 [b, s], 1 where the target is to be learned; 0 elsewhere, and there the target means nothing.
    heard: int32 [b, s], at audio tokens of clips with timed labels what is heard there (`SampleMaker`); -1 elsewhere.
    group: int32 [b, s], index of the mixture's group that each token is of.
    phase: int32 [b], the latest phase of the mixture (`ExampleOrder.phase`) that a sequence has examples of.
    progress: float32 [b], the share of a run's examples that is behind; None where the run has steps, not epochs.
    """

    inputs: ModelInputs
    targets: Any
    weights: Any
    heard: Any = None
    group: Any = None
    phase: Any = None
    progress: Any = None


class Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...

    @property
    def num_chunks(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


class Bin(Generic[Item]):
    """Items that share a sequence, and what they leave of its budget."""

    def __init__(self, budget: Budget):
        self.items: list[Item] = []
        self.free_tokens = budget.tokens
        self.free_chunks = budget.chunks

    def fits(self, item: Item) -> bool:
        return item.num_tokens <= self.free_tokens and item.num_chunks <= self.free_chunks

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.free_tokens -= item.num_tokens
        self.free_chunks -= item.num_chunks


class Packer(Generic[Item]):
    """Packs a stream of items; what comes out depends on their order and sizes alone.

    strategy: "first_fit" puts an item in the oldest open bin it fits; "best_fit" in the fullest one, tokens and
        chunks counted together.
    open_bins: how many bins wait for more items. More of them fill better and hold more memory.
    """

    def __init__(self, budget: Budget, open_bins: int = 16, strategy: Strategy = "best_fit"):
        if open_bins < 1:
            raise MossAudioError(f"expected at least 1 open bin to pack into, found {open_bins}; raise it.")
        if strategy not in ("best_fit", "first_fit"):
            raise MossAudioError(f"expected the strategy best_fit or first_fit, found {strategy!r}; correct it.")
        self.budget = budget
        self.bins: list[Bin[Item]] = []
        self.open_bins = open_bins
        self._strategy = strategy

    def add(self, item: Item) -> Bin[Item] | None:
        """Takes an item, which must fit the budget by itself; gives the bin that it made close, if any."""
        candidates = [bin for bin in self.bins if bin.fits(item)]
        if candidates and self._strategy == "first_fit":
            candidates[0].add(item)
            return None
        if candidates:
            min(candidates, key=self._left).add(item)
            return None
        closed = None
        if len(self.bins) >= self.open_bins:
            # By tokens alone: where text and clips are mixed, a bin out of chunks still waits for text.
            closed = min(self.bins, key=lambda bin: bin.free_tokens)
            self.bins.remove(closed)
        self.open_bin([item])
        return closed

    def open_bin(self, items: Sequence[Item]) -> None:
        """Opens a bin with these items in it; called in order, restores the bins of another packer."""
        self.bins.append(Bin(self.budget))
        for item in items:
            if not self.bins[-1].fits(item):
                raise MossAudioError(
                    f"expected examples that fit into one sequence of {self.budget.tokens} tokens and "
                    f"{self.budget.chunks} chunks, as when the state was saved, found longer ones; "
                    "restore the data, or start a new run."
                )
            self.bins[-1].add(item)

    def _left(self, bin: Bin[Item]) -> float:
        return bin.free_tokens / self.budget.tokens + bin.free_chunks / max(self.budget.chunks, 1)


def balanced_chunks(samples: Sequence[Sized], tokens: int) -> int:
    """The chunk budget that is used up together with a token budget by samples such as these, rounded up."""
    total_tokens = sum(sample.num_tokens for sample in samples)
    return math.ceil(tokens * sum(sample.num_chunks for sample in samples) / total_tokens)


Row = dict[str, np.ndarray]  # the arrays of a TrainingBatch without the batch axis


def empty_row(budget: Budget, frames: int, mel_bins: int) -> Row:
    """A packed sequence with nothing in it; of which chunks have so many frames and mel bins."""
    return {
        "tokens": np.zeros(budget.tokens, np.int32),
        "positions": np.zeros(budget.tokens, np.int32),
        "segment_ids": np.zeros(budget.tokens, np.int32),
        "audio_slots": np.full(budget.tokens, -1, np.int32),
        "audio_chunks": np.zeros((budget.chunks, frames, mel_bins), ml_dtypes.bfloat16),
        "chunk_frames": np.zeros(budget.chunks, np.int32),
        "stem_frames": np.zeros(budget.chunks, np.int32),
        "targets": np.zeros(budget.tokens, np.int32),
        "weights": np.zeros(budget.tokens, np.float32),
        "heard": np.full(budget.tokens, -1, np.int32),
        "group": np.zeros(budget.tokens, np.int32),
        "phase": np.zeros((), np.int32),
    }


def pack_row(samples: Sequence[Sample], budget: Budget, groups: Sequence[int] | None = None, phase: int = 0) -> Row:
    """One packed sequence: arrays of `budget` sizes by their names in ModelInputs and TrainingBatch.

    groups: of each sample, the index of its group in the mixture; None takes 0. phase: the latest among the samples.
    """
    frames, mel_bins = samples[0].inputs.audio_chunks.shape[2:]
    row = empty_row(budget, frames, mel_bins) | {"phase": np.array(phase, np.int32)}
    token, chunk = 0, 0
    for segment, (sample, group) in enumerate(zip(samples, groups or [0] * len(samples), strict=True), start=1):
        length, count, inputs = sample.num_tokens, sample.num_chunks, sample.inputs
        here, ids = slice(token, token + length), inputs.tokens[0, :length]
        row["tokens"][here] = ids
        row["positions"][here] = inputs.positions[0, :length]
        row["segment_ids"][here] = segment
        row["group"][here] = group
        slots = inputs.audio_slots[0, :length]
        row["audio_slots"][here] = np.where(slots >= 0, slots + chunk * (frames // DOWNSAMPLE_RATE), -1)
        for name in ("audio_chunks", "chunk_frames", "stem_frames"):
            row[name][chunk : chunk + count] = getattr(inputs, name)[0, :count]
        # The last token of a segment has no next one.
        row["targets"][token : token + length - 1] = ids[1:]
        row["weights"][token : token + length - 1] = sample.learned[1:]
        row["heard"][here] = sample.heard
        row["group"][here] = 0 if groups is None else groups[segment - 1]
        token, chunk = token + length, chunk + count
    return row


def batch_of_rows(arrays: Row) -> TrainingBatch:
    """A batch out of the arrays of its rows, which have a first axis for the rows."""
    names = {field.name for field in dataclasses.fields(ModelInputs)}
    inputs = ModelInputs(**{name: array for name, array in arrays.items() if name in names})
    return TrainingBatch(inputs, **{name: array for name, array in arrays.items() if name not in names})


def stack_rows(rows: Sequence[Row]) -> TrainingBatch:
    """A batch of packed sequences."""
    return batch_of_rows({name: np.stack([row[name] for row in rows]) for name in rows[0]})
