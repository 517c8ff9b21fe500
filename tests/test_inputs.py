"""Batches have few shapes, put every clip's tokens in place, and refuse what does not fit."""

import dataclasses

import numpy as np
import pytest

from moss_audio_jax import MossAudioConfig, MossAudioError, make_inputs
from moss_audio_jax.inputs import bucket, encode_sequence, padded
from tests.conftest import TINY_AUDIO_ID, question_parts, random_mel

CONFIG = MossAudioConfig.preset("tiny")


def test_buckets_waste_at_most_a_fifth_and_are_few():
    sizes = [bucket(size, 64) for size in range(1, 10_000)]
    assert all(size <= chosen for size, chosen in enumerate(sizes, start=1))
    assert all(chosen - size < chosen / 5 for size, chosen in enumerate(sizes, start=1) if chosen > 4 * 64)
    assert sorted(set(sizes))[:10] == [64, 128, 192, 256, 320, 384, 448, 512, 640, 768] and len(set(sizes)) < 28
    assert [bucket(size, 1) for size in (0, 1, 5, 8, 9, 10, 11, 17)] == [1, 1, 5, 8, 10, 10, 12, 20]


def test_slots_count_the_valid_tokens_of_every_clip():
    ids, mels = question_parts([403, 237])  # two chunks (50 + 1 tokens), and one of 30 tokens
    inputs = make_inputs([ids], [mels], config=CONFIG)
    assert inputs.chunk_frames.tolist() == [[400, 3, 237]]
    assert inputs.stem_frames.tolist() == [[400, 400, 237]]  # only the clip shorter than a chunk is cut
    slots = inputs.audio_slots[0][inputs.audio_slots[0] >= 0]
    assert slots.tolist() == [*range(50), 50, *range(100, 130)]
    np.testing.assert_array_equal(inputs.audio_slots[0] >= 0, inputs.tokens[0] == TINY_AUDIO_ID)
    np.testing.assert_array_equal(inputs.audio_chunks[0, 1, :3], mels[0][:, 400:].T)
    assert not inputs.audio_chunks[0, 1, 3:].any() and not inputs.audio_chunks[0, 2, 237:].any()


def test_padding_is_segment_0_without_audio():
    ids, mels = question_parts([8])
    inputs = make_inputs([ids, [1, 2]], [mels, []], config=CONFIG)
    assert inputs.tokens.shape == (2, 64)
    assert inputs.segment_ids.sum(1).tolist() == [len(ids), 2]
    assert (inputs.audio_slots[1] == -1).all() and inputs.chunk_frames[1].tolist() == [0]
    assert inputs.positions[0, : len(ids)].tolist() == list(range(len(ids)))


def test_a_batch_is_its_sequences_padded_to_buckets():
    parts = [question_parts([403, 237]), question_parts([8], seed=1)]
    batch = make_inputs(*zip(*parts, strict=True), config=CONFIG)
    for row, (ids, mels) in enumerate(parts):
        alone = encode_sequence(ids, mels, CONFIG)
        assert alone.tokens.shape == (1, len(ids)) and alone.chunk_frames.shape == (1, [3, 1][row])
        for name, array in vars(padded(alone, batch.tokens.shape[1], batch.chunk_frames.shape[1])).items():
            np.testing.assert_array_equal(getattr(batch, name)[row], array[0], err_msg=name)


def test_a_batch_may_have_no_sequences():
    inputs = make_inputs([], [], config=CONFIG)
    assert inputs.tokens.shape == (0, 64) and inputs.audio_chunks.shape == (0, 0, 400, 128)


def test_text_alone_has_no_chunks():
    assert make_inputs([[1, 2, 3]], [[]], config=CONFIG).audio_chunks.shape == (1, 0, 400, 128)


def test_whole_clips_are_single_chunks():
    audio = dataclasses.replace(CONFIG.audio_config, chunk_frames=None)
    ids, mels = question_parts([403, 237])
    inputs = make_inputs([ids], [mels], config=dataclasses.replace(CONFIG, audio_config=audio))
    assert inputs.audio_chunks.shape == (1, 2, 600, 128)
    assert inputs.stem_frames.tolist() == inputs.chunk_frames.tolist() == [[403, 237]]


@pytest.mark.parametrize(
    ("ids", "mels", "message"),
    [
        ([[511, 1]], [[]], "1 audio positions .* make 0 tokens"),
        ([[511] * 3], [[random_mel(16)]], "3 audio positions .* 1 clips make 2"),
        ([[1]], [], "1 sequences but 0 lists"),
        ([[]], [[]], "no tokens"),
        ([[512]], [[]], "id 512"),
        ([[-1]], [[]], "id -1"),
        ([[511]], [[np.zeros((80, 8), np.float32)]], r"\(80, 8\)"),
        ([[1]], [[np.zeros((128, 0), np.float32)]], r"\(128, 0\)"),
    ],
)
def test_what_does_not_fit_is_named(ids, mels, message):
    with pytest.raises(MossAudioError, match=message):
        make_inputs(ids, mels, config=CONFIG)
