"""Packing: several samples in one sequence, within a budget of tokens and a budget of audio chunks.

A packed sequence is a row of `ModelInputs`. Each sample is a segment: segment ids are 1, 2, ..., positions restart, and
audio slots count the chunks of the whole row. Samples wait in a bounded number of open bins; when a sample fits none of
them, a bin is closed and becomes a row.
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
    """A batch of packed sequences for a training step; NumPy arrays when it is made.

    inputs: packed sequences; audio_chunks in bfloat16, to which every mel is rounded.
    targets: int32 [b, s], the id that each position predicts: the next one of its segment.
    loss_mask: float32 [b, s], 1 where the target is supervised, else 0; there the target has no meaning.
    audio_labels: int32 [b, s], at audio tokens of clips with timed labels the id of the event there, or of a digit of
        the time (`SampleMaker`); -1 elsewhere.
    group: int32 [b, s], index of the mixture's group that each token is from.
    phase: int32 [b], the latest phase of the mixture (`ExampleOrder.phase`) among the examples of a sequence.
    progress: float32 [b], share of a run's examples read so far; None if the run's length is given in steps.
    """

    inputs: ModelInputs
    targets: Any
    loss_mask: Any
    audio_labels: Any = None
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
    """Items that share a sequence, and the rest of its budget."""

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
    """Packs a stream of items into bins. The result depends only on their order and sizes.

    strategy: "first_fit" puts an item into the oldest open bin that has room; "best_fit" into the fullest one, by
        tokens and chunks together.
    open_bins: number of bins that wait for more items. More fill better, and take more memory.
    """

    def __init__(self, budget: Budget, open_bins: int = 16, strategy: Strategy = "best_fit"):
        if open_bins < 1:
            raise MossAudioError(f"open bins must be at least 1, not {open_bins}: raise their number")
        if strategy not in ("best_fit", "first_fit"):
            raise MossAudioError(f"the packing strategy must be best_fit or first_fit, not {strategy!r}")
        self.budget = budget
        self.bins: list[Bin[Item]] = []
        self.open_bins = open_bins
        self._strategy = strategy

    def add(self, item: Item) -> Bin[Item] | None:
        """Adds an item, which must fit the budget by itself; returns the bin that had to be closed for it, if any."""
        candidates = [bin for bin in self.bins if bin.fits(item)]
        if candidates and self._strategy == "first_fit":
            candidates[0].add(item)
            return None
        if candidates:
            min(candidates, key=self._left).add(item)
            return None
        closed = None
        if len(self.bins) >= self.open_bins:
            # The fullest by tokens: in a mix of text and clips, a bin without free chunks can still take text.
            closed = min(self.bins, key=lambda bin: bin.free_tokens)
            self.bins.remove(closed)
        self.open_bin([item])
        return closed

    def open_bin(self, items: Sequence[Item]) -> None:
        """Opens a bin with these items. Called for each bin of another packer in order, it restores that packer."""
        self.bins.append(Bin(self.budget))
        for item in items:
            if not self.bins[-1].fits(item):
                raise MossAudioError(
                    f"examples must fit into one sequence of {self.budget.tokens} tokens and {self.budget.chunks} "
                    "chunks, as when the state was saved, and some are longer now: restore the data, or start a new run"
                )
            self.bins[-1].add(item)

    def _left(self, bin: Bin[Item]) -> float:
        """Shares of the two budgets that a bin has left, added up."""
        return bin.free_tokens / self.budget.tokens + bin.free_chunks / max(self.budget.chunks, 1)


def balanced_chunks(samples: Sequence[Sized], tokens: int) -> int:
    """Computes the chunk budget that samples such as these use up together with a token budget, rounded up."""
    total_tokens = sum(sample.num_tokens for sample in samples)
    return math.ceil(tokens * sum(sample.num_chunks for sample in samples) / total_tokens)


Row = dict[str, np.ndarray]  # the arrays of a TrainingBatch without the batch axis


def empty_row(budget: Budget, frames: int, mel_bins: int) -> Row:
    """Returns a row of padding alone. frames, mel_bins: of a chunk."""
    return {
        "tokens": np.zeros(budget.tokens, np.int32),
        "positions": np.zeros(budget.tokens, np.int32),
        "segment_ids": np.zeros(budget.tokens, np.int32),
        "audio_slots": np.full(budget.tokens, -1, np.int32),
        "audio_chunks": np.zeros((budget.chunks, frames, mel_bins), ml_dtypes.bfloat16),
        "chunk_frames": np.zeros(budget.chunks, np.int32),
        "stem_frames": np.zeros(budget.chunks, np.int32),
        "targets": np.zeros(budget.tokens, np.int32),
        "loss_mask": np.zeros(budget.tokens, np.float32),
        "audio_labels": np.full(budget.tokens, -1, np.int32),
        "group": np.zeros(budget.tokens, np.int32),
        "phase": np.zeros((), np.int32),
    }


def pack_row(samples: Sequence[Sample], budget: Budget, groups: Sequence[int] | None = None, phase: int = 0) -> Row:
    """Packs samples into one row: arrays of `budget` sizes, by their names in ModelInputs and TrainingBatch.

    groups: index of each sample's group in the mixture; None takes 0. phase: the latest among the samples.
    """
    frames, mel_bins = samples[0].inputs.audio_chunks.shape[2:]
    row = empty_row(budget, frames, mel_bins) | {"phase": np.array(phase, np.int32)}
    token, chunk = 0, 0  # where the next sample starts
    for segment, (sample, group) in enumerate(zip(samples, groups or [0] * len(samples), strict=True), start=1):
        length, count, inputs = sample.num_tokens, sample.num_chunks, sample.inputs
        here, ids = slice(token, token + length), inputs.tokens[0, :length]
        row["tokens"][here] = ids
        row["positions"][here] = inputs.positions[0, :length]
        row["segment_ids"][here] = segment
        row["group"][here] = group
        # A slot is chunk * tokens per chunk + token: shift it by the chunks of the samples before.
        slots = inputs.audio_slots[0, :length]
        row["audio_slots"][here] = np.where(slots >= 0, slots + chunk * (frames // DOWNSAMPLE_RATE), -1)
        for name in ("audio_chunks", "chunk_frames", "stem_frames"):
            row[name][chunk : chunk + count] = getattr(inputs, name)[0, :count]
        # Position t predicts t + 1; the last token of a segment has no next one.
        row["targets"][token : token + length - 1] = ids[1:]
        row["loss_mask"][token : token + length - 1] = sample.loss_mask[1:]
        row["audio_labels"][here] = sample.audio_labels
        token, chunk = token + length, chunk + count
    return row


def batch_of_rows(arrays: Row) -> TrainingBatch:
    """Makes a batch of arrays by name that have the row axis already."""
    names = {field.name for field in dataclasses.fields(ModelInputs)}
    inputs = ModelInputs(**{name: array for name, array in arrays.items() if name in names})
    return TrainingBatch(inputs, **{name: array for name, array in arrays.items() if name not in names})


def stack_rows(rows: Sequence[Row]) -> TrainingBatch:
    """Stacks rows to a batch."""
    return batch_of_rows({name: np.stack([row[name] for row in rows]) for name in rows[0]})
