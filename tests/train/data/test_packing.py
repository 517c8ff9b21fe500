"""Bins keep their budgets and fill up; a packed sequence holds every sample unchanged."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_audio_jax.audio import round_bfloat16
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import make_inputs
from train.data.budget import Budget
from train.data.config import Strategy
from train.data.packing import Packer, balanced_chunks, pack_row, stack_rows
from train.data.samples import Sample, SampleMaker


@dataclass(frozen=True)
class Item:
    num_tokens: int
    num_chunks: int


def pack(
    items: list[Item], budget: Budget, strategy: Strategy = "best_fit", open_bins: int = 16
) -> tuple[list, Packer]:
    packer: Packer[Item] = Packer(budget, open_bins, strategy)
    return [closed for item in items if (closed := packer.add(item))], packer


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(Item, st.integers(1, 50), st.integers(0, 6)), max_size=80),
    st.sampled_from(["best_fit", "first_fit"]),
    st.integers(1, 5),
)
def test_every_item_lands_in_one_bin_within_budget(items: list[Item], strategy: Strategy, open_bins: int):
    closed, packer = pack(items, Budget(50, 6), strategy, open_bins)
    bins = [*closed, *packer.bins]
    assert len(packer.bins) <= open_bins
    assert sorted(map(id, items)) == sorted(id(item) for bin in bins for item in bin.items)
    for bin in bins:
        assert bin.free_tokens == 50 - sum(item.num_tokens for item in bin.items) >= 0
        assert bin.free_chunks == 6 - sum(item.num_chunks for item in bin.items) >= 0


def test_first_fit_takes_the_oldest_and_best_fit_the_fullest_bin():
    for strategy, expected in (("first_fit", [[60, 10], [45, 45]]), ("best_fit", [[60], [45, 45, 10]])):
        _, packer = pack([Item(size, 0) for size in (60, 45, 45, 10)], Budget(100, 1), strategy)
        assert [[item.num_tokens for item in bin.items] for bin in packer.bins] == expected


def realistic_clips(count: int) -> list[Item]:
    """Speech of 1 to 30 s, half of it under 9 s: audio, markers, a prompt of 30 tokens, 3.5 tokens a second said."""
    rng = np.random.default_rng(0)
    items = []
    for seconds in np.clip(rng.lognormal(math.log(9), 0.7, count), 1, 30):
        audio = math.ceil(seconds * 12.5)
        markers = sum(len(str(2 * number)) for number in range(1, audio // 25 + 1))
        items.append(Item(audio + markers + 31 + int(rng.poisson(3.5 * seconds)), math.ceil(seconds / 4)))
    return items


def fill(items: list[Item], budget: Budget, strategy: Strategy) -> tuple[float, float]:
    closed, _ = pack(items, budget, strategy)
    tokens = sum(budget.tokens - bin.free_tokens for bin in closed)
    chunks = sum(budget.chunks - bin.free_chunks for bin in closed)
    return tokens / len(closed) / budget.tokens, chunks / len(closed) / budget.chunks


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit"])
@pytest.mark.parametrize("tokens", [2048, 4096, 8192])
def test_speech_fills_both_budgets(tokens: int, strategy: Strategy):
    items = realistic_clips(4000)
    token_fill, chunk_fill = fill(items, Budget(tokens, balanced_chunks(items, tokens)), strategy)
    assert token_fill >= 0.97 and chunk_fill >= 0.90


def test_speech_and_text_fill_both_budgets():
    """30% of the examples are texts, half of them over 200 tokens."""
    rng = np.random.default_rng(1)
    texts = [Item(int(np.clip(length, 20, 2048)), 0) for length in rng.lognormal(math.log(200), 0.9, 1800)]
    items = [*realistic_clips(4200), *texts]
    items = [items[index] for index in rng.permutation(len(items))]
    token_fill, chunk_fill = fill(items, Budget(8192, balanced_chunks(items, 8192)), "best_fit")
    assert token_fill >= 0.97 and chunk_fill >= 0.90


def test_reopened_bins_go_on_alike():
    items = realistic_clips(600)
    budget = Budget(1024, balanced_chunks(items, 1024))
    _, packer = pack(items[:300], budget)
    reopened: Packer[Item] = Packer(budget)
    for bin in packer.bins:
        reopened.open_bin(bin.items)
    for item in items[300:]:
        one, other = packer.add(item), reopened.add(item)
        assert (one and one.items) == (other and other.items)


def test_bins_that_became_too_full_are_refused():
    with pytest.raises(MossAudioError, match="fit into one sequence of 100 tokens and 2 chunks"):
        Packer(Budget(100, 2)).open_bin([Item(60, 1), Item(60, 1)])


def sample(seed: int, clips: list[int], learned: int) -> Sample:
    """A sequence of random ids and of clips with these numbers of frames; its last ids are learned."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 500, 4).tolist()
    for frames in clips:
        ids += [511] * -(-frames // 8)
    ids += rng.integers(0, 500, 6).tolist()
    mels = [round_bfloat16(rng.normal(size=(128, frames)).astype(np.float32)) for frames in clips]
    inputs = make_inputs([ids], [mels], config=MossAudioConfig.preset("tiny"))
    mask = np.arange(len(ids)) >= len(ids) - learned
    heard = np.where(inputs.audio_slots[0, : len(ids)] >= 0, rng.integers(0, 500, len(ids)), -1)
    return Sample(f"sample {seed}", inputs, mask, heard, int((inputs.chunk_frames > 0).sum()))


def test_packed_sequence_holds_every_sample():
    samples = [sample(0, [90], 4), sample(1, [], 10), sample(2, [500, 8], 3), sample(3, [801], 5)]
    budget = Budget(300, 9)
    row = pack_row(samples, budget, groups=[2, 0, 2, 1], phase=3)
    assert row["phase"] == 3 and pack_row(samples, budget)["phase"] == 0
    assert not pack_row(samples, budget)["group"].any()
    for segment, each in enumerate(samples, start=1):
        here, one = row["segment_ids"] == segment, each.inputs
        length = each.num_tokens
        assert here.sum() == length
        np.testing.assert_array_equal(row["tokens"][here], one.tokens[0, :length])
        np.testing.assert_array_equal(row["positions"][here], np.arange(length))
        # Whatever a position's slot points at must be the same frames as before.
        slots, own = row["audio_slots"][here], one.audio_slots[0, :length]
        np.testing.assert_array_equal(slots >= 0, own >= 0)
        np.testing.assert_array_equal(_frames(row["audio_chunks"], slots), _frames(one.audio_chunks[0], own))
        for name in ("chunk_frames", "stem_frames"):
            np.testing.assert_array_equal(
                row[name][slots[slots >= 0] // 50], getattr(one, name)[0][own[own >= 0] // 50]
            )
        # Position t of a segment predicts t + 1 of the same one.
        np.testing.assert_array_equal(row["targets"][here][:-1], one.tokens[0, 1:length])
        np.testing.assert_array_equal(row["loss_mask"][here], [*each.loss_mask[1:].astype(np.float32), 0])
        np.testing.assert_array_equal(row["audio_labels"][here], each.audio_labels)
        assert set(row["group"][here]) == {[2, 0, 2, 1][segment - 1]}
    used = sum(each.num_tokens for each in samples)
    assert not row["segment_ids"][used:].any() and not row["loss_mask"][used:].any()
    assert (row["audio_slots"][used:] == -1).all() and not row["chunk_frames"][1 + 3 + 3 :].any()


def _frames(chunks: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The eight mel frames of each audio slot."""
    return chunks.reshape(-1, 8, chunks.shape[-1])[slots[slots >= 0]]


def test_rows_stack_to_a_batch(maker: SampleMaker):
    rows = [pack_row([maker.sample("a", "text " * count)], Budget(64, 2)) for count in (2, 4)]
    batch = stack_rows(rows)
    assert batch.inputs.tokens.shape == batch.targets.shape == batch.loss_mask.shape == (2, 64)
    assert batch.inputs.audio_chunks.shape == (2, 2, 400, 128)
    assert batch.group.shape == (2, 64) and batch.phase.shape == (2,)
    assert (batch.targets.dtype, batch.loss_mask.dtype) == (np.int32, np.float32)
    assert batch.loss_mask.sum(1).tolist() == [10, 20]  # bytes, <|endoftext|>, less the first


def test_errors():
    with pytest.raises(MossAudioError, match="budget"):
        Budget(1, 1)
    with pytest.raises(MossAudioError, match="open bins must be at least 1, not 0"):
        Packer(Budget(10, 1), open_bins=0)
    with pytest.raises(MossAudioError, match="best_fit or first_fit"):
        Packer(Budget(10, 1), strategy="worst_fit")  # type: ignore[arg-type]
