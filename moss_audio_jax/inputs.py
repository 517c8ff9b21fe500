"""What the network reads: one batch of static shapes, whatever the numbers and lengths of its clips and texts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.errors import MossAudioError

MIN_TOKENS = 64  # the smallest bucket of tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A batch of sequences; b sequences of s tokens, c audio chunks each. Sequences are padded on the right.

    NumPy arrays as they are made, JAX arrays within a compiled function.

    tokens: ids; at audio positions the audio id, whose embedding is not used.
    positions: rotary positions, restarting at 0 in every packed example.
    segment_ids: 0 = padding; tokens see tokens of their own segment only.
    audio_slots: which of the sequence's encoded audio tokens stands at a position, -1 at text.
    audio_chunks: mel frames, each clip cut into chunks of its own, zeros after its end.
    chunk_frames: how many frames of a chunk are audio, 0 = empty chunk.
    stem_frames: how many the convolutions may see (see `AudioEncoder`).
    """

    tokens: Int[Any, "b s"]
    positions: Int[Any, "b s"]
    segment_ids: Int[Any, "b s"]
    audio_slots: Int[Any, "b s"]
    audio_chunks: Float[Any, "b c frames mel"]
    chunk_frames: Int[Any, "b c"]
    stem_frames: Int[Any, "b c"]


def make_inputs(
    token_ids: Sequence[Sequence[int]],
    mels: Sequence[Sequence[Float[np.ndarray, "mel frames"]]],
    *,
    config: MossAudioConfig,
    audio_token_id: int | None = None,
) -> ModelInputs:
    """A batch out of sequences of ids and, for each of them, the mels of its clips in order.

    token_ids: with the audio id at every audio position, as many as the clips have tokens (ceil(frames / 8) each).
    mels: [mel bins, frames] arrays, a list a sequence (empty for text alone).
    audio_token_id: None takes the checkpoint's.
    Sequence length and chunk count are rounded up to `bucket` sizes, which bounds the number of compilations.
    """
    audio_id = config.processor.audio_token_id if audio_token_id is None else audio_token_id
    if len(token_ids) != len(mels):
        raise MossAudioError(f"{len(token_ids)} sequences but {len(mels)} lists of mels: give one list a sequence")
    ids = [np.asarray(sequence, np.int32).reshape(-1) for sequence in token_ids]
    clips = [[np.asarray(mel, np.float32) for mel in sequence] for sequence in mels]
    for row, (sequence, sequence_clips) in enumerate(zip(ids, clips, strict=True)):
        _check_sequence(row, sequence, sequence_clips, audio_id, config)

    batch, length = len(ids), bucket(max(map(len, ids), default=1), MIN_TOKENS)
    tokens = np.zeros((batch, length), np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = sequence
        positions[row, : len(sequence)] = np.arange(len(sequence))
        segment_ids[row, : len(sequence)] = 1

    chunks, chunk_frames, stem_frames = _chunk_clips(clips, config)
    slots = np.full_like(tokens, -1)
    tokens_per_chunk = chunks.shape[2] // DOWNSAMPLE_RATE
    for row, sequence in enumerate(ids):
        # The encoder gives every chunk the same number of tokens; those past a chunk's frames are skipped.
        valid = np.arange(tokens_per_chunk) < -(-chunk_frames[row] // DOWNSAMPLE_RATE)[:, None]
        slots[row, : len(sequence)][sequence == audio_id] = np.flatnonzero(valid)
    return ModelInputs(tokens, positions, segment_ids, slots, chunks, chunk_frames, stem_frames)


def padded(inputs: ModelInputs, tokens: int, chunks: int) -> ModelInputs:
    """A batch, NumPy arrays, with so many tokens and chunks a sequence, which are no fewer than it has."""

    def pad(array: np.ndarray, length: int, value: int = 0) -> np.ndarray:
        return np.pad(
            array,
            [(0, length - n) if axis == 1 else (0, 0) for axis, n in enumerate(array.shape)],
            constant_values=value,
        )

    return ModelInputs(
        tokens=pad(inputs.tokens, tokens),
        positions=pad(inputs.positions, tokens),
        segment_ids=pad(inputs.segment_ids, tokens),
        audio_slots=pad(inputs.audio_slots, tokens, -1),
        audio_chunks=pad(inputs.audio_chunks, chunks),
        chunk_frames=pad(inputs.chunk_frames, chunks),
        stem_frames=pad(inputs.stem_frames, chunks),
    )


def bucket(size: int, smallest: int) -> int:
    """The next of smallest * (1, 1.5, 2, 3, 4, 6, 8, ...): at most half is padding, and there are few of them."""
    power = smallest
    while power < size:
        power *= 2
    three_quarters = power * 3 // 4
    return three_quarters if size <= three_quarters and three_quarters >= smallest else power


def _check_sequence(row: int, ids: np.ndarray, clips: list[np.ndarray], audio_id: int, config: MossAudioConfig) -> None:
    bins, vocab = config.audio_config.num_mel_bins, config.language_config.vocab_size
    if len(ids) == 0:
        raise MossAudioError(f"sequence {row} has no tokens")
    if ids.min() < 0 or ids.max() >= vocab:
        raise MossAudioError(
            f"sequence {row} holds id {ids.min() if ids.min() < 0 else ids.max()}, outside 0..{vocab - 1}"
        )
    for index, mel in enumerate(clips):
        if mel.ndim != 2 or mel.shape[0] != bins or mel.shape[1] == 0:
            raise MossAudioError(
                f"clip {index} of sequence {row} has shape {mel.shape}: a mel is [{bins}, frames] with at least 1 frame"
            )
    expected = sum(-(-mel.shape[1] // DOWNSAMPLE_RATE) for mel in clips)
    found = int((ids == audio_id).sum())
    if expected != found:
        raise MossAudioError(
            f"sequence {row} has {found} audio positions (id {audio_id}), but its {len(clips)} clips make {expected} "
            f"tokens (ceil(frames / {DOWNSAMPLE_RATE}) each)"
        )


def _chunk_clips(
    clips: list[list[np.ndarray]], config: MossAudioConfig
) -> tuple[Float[np.ndarray, "b c frames mel"], Int[np.ndarray, "b c"], Int[np.ndarray, "b c"]]:
    """`audio_chunks`, `chunk_frames` and `stem_frames` of ModelInputs."""
    size = config.audio_config.chunk_frames
    if size is None:  # a chunk is a whole clip
        size = bucket(max((mel.shape[1] for row in clips for mel in row), default=1), 50 * DOWNSAMPLE_RATE)
    pieces = [
        [(mel[:, start : start + size], mel.shape[1]) for mel in row for start in range(0, mel.shape[1], size)]
        for row in clips
    ]
    most = max(map(len, pieces), default=0)
    count = bucket(most, 1) if most else 0
    chunks = np.zeros((len(clips), count, size, config.audio_config.num_mel_bins), np.float32)
    chunk_frames = np.zeros((len(clips), count), np.int32)
    stem_frames = np.zeros((len(clips), count), np.int32)
    for row, row_pieces in enumerate(pieces):
        for column, (piece, clip_frames) in enumerate(row_pieces):
            chunks[row, column, : piece.shape[1]] = piece.T
            chunk_frames[row, column] = piece.shape[1]
            stem_frames[row, column] = min(clip_frames, size)
    return chunks, chunk_frames, stem_frames
