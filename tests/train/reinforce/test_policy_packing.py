"""Groups of answers in packed sequences: every token in its place, and a question's audio once in each sequence."""

from typing import Any

import numpy as np
import pytest

from moss_audio_jax.inputs import encode_sequence
from tests.conftest import SMALL_MODEL, random_mel
from train.data.budget import Budget
from train.reinforce.objective import advantages
from train.reinforce.packing import packed, policy_batch, segments_of
from train.reinforce.rollout import Encoded, Group

AUDIO = SMALL_MODEL.processor.audio_token_id
BUDGET = Budget(64, 3)
FRAMES, MELS = SMALL_MODEL.audio_config.chunk_frames, SMALL_MODEL.audio_config.num_mel_bins


def group(text: int, frames: int, lengths: list[int], seed: int) -> Group:
    """A question of `text` ids and a clip, with random answers."""
    rng, question = np.random.default_rng(seed), None
    ids = rng.integers(0, 200, text).tolist() + [AUDIO] * -(-frames // 8)
    mels = [random_mel(frames, seed)] if frames else []
    encoded: Any = Encoded(question, ids, mels, encode_sequence(ids, mels, SMALL_MODEL))
    answers = [rng.integers(0, 200, length).tolist() for length in lengths]
    logprobs = [rng.uniform(-5, 0, length).tolist() for length in lengths]
    return Group(encoded, answers, logprobs, [], np.array(rng.permutation(len(lengths)), float), {})


GROUPS = [group(9, 80, [5, 3, 7, 2, 9], seed=0), group(4, 0, [6, 4], seed=1), group(6, 120, [20, 8, 1], seed=2)]


@pytest.mark.parametrize("algorithm", ["dapo", "grpo"])
def test_every_answer_is_a_segment_after_its_prompt(algorithm: Any):
    batch = policy_batch(GROUPS, algorithm, BUDGET, 2, FRAMES, MELS)
    flat = {
        name: getattr(batch, name).reshape(-1, BUDGET.tokens) for name in ("targets", "loss_mask", "drawn", "weight")
    }
    flat |= {"advantages": batch.advantages.reshape(-1, BUDGET.tokens)}
    inputs = batch.inputs
    found = []
    for row in range(len(flat["targets"])):
        tokens, segments = (getattr(inputs, name).reshape(-1, BUDGET.tokens)[row] for name in ("tokens", "segment_ids"))
        slots = inputs.audio_slots.reshape(-1, BUDGET.tokens)[row]
        chunks = inputs.audio_chunks.reshape(-1, *inputs.audio_chunks.shape[2:])[row]
        for number in range(1, segments.max(initial=0) + 1):
            here = np.flatnonzero(segments == number)
            np.testing.assert_array_equal(inputs.positions.reshape(-1, BUDGET.tokens)[row][here], np.arange(len(here)))
            learned = here[flat["loss_mask"][row][here] == 1]
            np.testing.assert_array_equal(flat["targets"][row][learned], tokens[learned + 1])
            assert learned[-1] == here[-2]
            answer = tuple(flat["targets"][row][learned].tolist())
            heard = slots[here][tokens[here] == AUDIO]
            first = chunks[heard[0] // (FRAMES // 8)] if len(heard) else None
            found.append((answer, flat["drawn"][row][learned], flat["advantages"][row][learned], first))
    by_answer = {answer: rest for answer, *rest in found}
    assert len(found) == len(by_answer) == 10
    for one in GROUPS:
        for ids, logprobs, advantage in zip(one.ids, one.logprobs, advantages(one.reward.tolist()), strict=True):
            drawn, its_advantage, audio = by_answer[tuple(ids)]
            np.testing.assert_allclose(drawn, logprobs, rtol=1e-6)
            np.testing.assert_allclose(its_advantage, advantage)
            if one.encoded.mels:
                frames = one.encoded.mels[0].shape[1]
                np.testing.assert_allclose(np.asarray(audio, np.float32)[:frames], one.encoded.mels[0].T, rtol=1e-2)
    np.testing.assert_allclose(flat["weight"].sum(), 1, rtol=1e-5)
    assert len(set(flat["weight"][flat["weight"] > 0].tolist())) == (1 if algorithm == "dapo" else 10)


def test_answers_to_a_question_share_its_audio():
    """Eight answers to questions with a clip, in one sequence with room for two chunks."""
    (one,) = packed(segments_of(GROUPS, "dapo"), Budget(400, 2))
    assert len(one.segments) == 10 and one.used_chunks == 2
    several = packed(segments_of(GROUPS, "dapo"), BUDGET)
    assert all(sequence.used_chunks <= len(sequence.chunks) for sequence in several)
