"""The network's input: one batch of static shapes, for clips and texts of any number and length."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig, downsampled_length
from moss_audio_jax.errors import MossAudioError

MIN_TOKENS = 64  # the smallest bucket of tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A batch of b sequences of s tokens and c audio chunks each, padded on the right.

    NumPy arrays when they are made, JAX arrays in a compiled function.

    tokens: ids; at audio positions the audio id, whose embedding is not used.
    positions: rotary positions, which restart at 0 in every packed example.
    segment_ids: 0 = padding; a token attends within its own segment.
    audio_slots: index into the sequence's encoded audio tokens, -1 at text.
    audio_chunks: mel frames; each clip is cut into chunks of its own, with zeros after its end.
    chunk_frames: number of frames of a chunk that are audio, 0 = empty chunk.
    stem_frames: number of frames that the convolutions see (see `AudioEncoder`).
    """

    tokens: Int[Any, "b s"]
    positions: Int[Any, "b s"]
    segment_ids: Int[Any, "b s"]
    audio_slots: Int[Any, "b s"]
    audio_chunks: Float[Any, "b c frames mel"]
    chunk_frames: Int[Any, "b c"]
    stem_frames: Int[Any, "b c"]


Mel = Float[np.ndarray, "mel frames"]


def make_inputs(
    token_ids: Sequence[Sequence[int]],
    mels: Sequence[Sequence[Mel]],
    *,
    config: MossAudioConfig,
    audio_token_id: int | None = None,
) -> ModelInputs:
    """Makes a batch of sequences of ids and, for each of them, the mels of its clips in order.

    token_ids: with the audio id at every audio position, ceil(frames / 8) of them for each clip.
    mels: [mel bins, frames] arrays, one list for each sequence (empty for text alone).
    audio_token_id: None takes the checkpoint's.
    Sequence length and chunk count are rounded up to `bucket` sizes, which bounds the number of compilations.
    """
    audio_id = config.processor.audio_token_id if audio_token_id is None else audio_token_id
    if len(token_ids) != len(mels):
        raise MossAudioError(f"{len(token_ids)} sequences but {len(mels)} lists of mels: give one list a sequence")
    frames = _frames_of_chunk(config, [mel for clips in mels for mel in clips])
    rows = [
        _encode(row, ids, clips, audio_id, config, frames)
        for row, (ids, clips) in enumerate(zip(token_ids, mels, strict=True))
    ]
    tokens = bucket(max((row.tokens.shape[1] for row in rows), default=1), MIN_TOKENS)
    chunks = max((row.audio_chunks.shape[1] for row in rows), default=0)
    chunks = bucket(chunks, 1) if chunks else 0
    # A batch of no sequences comes first: there may be no others.
    ids, counts = np.zeros((0, tokens), np.int32), np.zeros((0, chunks), np.int32)
    audio = np.zeros((0, chunks, frames, config.audio_config.num_mel_bins), np.float32)
    empty = ModelInputs(ids, ids, ids, ids, audio, counts, counts)
    return jax.tree.map(lambda *x: np.concatenate(x), empty, *(padded(row, tokens, chunks) for row in rows))


def encode_sequence(ids: Sequence[int], mels: Sequence[Mel], config: MossAudioConfig) -> ModelInputs:
    """Makes a batch of one sequence without padding: of as many tokens and chunks as it has. See `make_inputs`."""
    return _encode(0, ids, mels, config.processor.audio_token_id, config, _frames_of_chunk(config, mels))


def _frames_of_chunk(config: MossAudioConfig, mels: Sequence[Mel]) -> int:
    """Returns the frames of every chunk of a batch: the model's, or a bucket for whole clips."""
    if config.audio_config.chunk_frames is not None:
        return config.audio_config.chunk_frames
    return bucket(max((np.shape(mel)[-1] for mel in mels if np.ndim(mel)), default=1), 25 * DOWNSAMPLE_RATE)


def _encode(
    row: int, ids: Sequence[int], mels: Sequence[Mel], audio_id: int, config: MossAudioConfig, frames: int
) -> ModelInputs:
    """Encodes sequence `row` of a batch, unpadded. frames: of a chunk."""
    tokens = np.asarray(ids, np.int32).reshape(-1)
    clips = [np.asarray(mel, np.float32) for mel in mels]
    _check_sequence(row, tokens, clips, audio_id, config)
    chunks, chunk_frames, stem_frames = _cut_into_chunks(clips, frames, config.audio_config.num_mel_bins)
    # The encoder returns equally many tokens for every chunk; those past a chunk's frames are skipped.
    valid = np.arange(frames // DOWNSAMPLE_RATE) < downsampled_length(chunk_frames)[:, None]  # [c, tokens per chunk]
    slots = np.full_like(tokens, -1)
    slots[tokens == audio_id] = np.flatnonzero(valid)
    positions = np.arange(len(tokens), dtype=np.int32)
    arrays = (tokens, positions, np.ones_like(tokens), slots, chunks, chunk_frames, stem_frames)
    return ModelInputs(*(array[None] for array in arrays))


def _cut_into_chunks(
    clips: list[np.ndarray], size: int, mel_bins: int
) -> tuple[Float[np.ndarray, "c size mel"], Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Cuts clips into chunks of `size` frames: `audio_chunks`, `chunk_frames` and `stem_frames` of one sequence."""
    pieces = [
        (mel[:, start : start + size], min(mel.shape[1], size))
        for mel in clips
        for start in range(0, mel.shape[1], size)
    ]
    chunks = np.zeros((len(pieces), size, mel_bins), np.float32)
    for chunk, (piece, _) in zip(chunks, pieces, strict=True):
        chunk[: piece.shape[1]] = piece.T
    chunk_frames = np.array([piece.shape[1] for piece, _ in pieces], np.int32)
    stem_frames = np.array([frames for _, frames in pieces], np.int32)
    return chunks, chunk_frames, stem_frames


def padded(inputs: ModelInputs, tokens: int, chunks: int) -> ModelInputs:
    """Pads a batch of NumPy arrays to this many tokens and chunks a sequence, no fewer than it has."""

    def pad(array: np.ndarray, length: int, value: int = 0) -> np.ndarray:
        widths = [(0, length - n) if axis == 1 else (0, 0) for axis, n in enumerate(array.shape)]
        return np.pad(array, widths, constant_values=value)

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
    """Returns the next of smallest * (1, 2, ..., 7, 8, 10, 12, 14, 16, 20, ...): few sizes, with little padding.

    From 4 * smallest on, less than a fifth of a size is padding.
    """
    units = max(-(-size // smallest), 1)
    step = 1 << max(units.bit_length() - 3, 0)
    return smallest * step * -(-units // step)


def coarse_buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Returns smallest * (1, 1.5, 2, 3, 4, 6, ...) below `largest`, and `largest`: so few that all are compiled."""
    sizes, size = [], smallest
    while size < largest:
        sizes += [size, size + size // 2]
        size *= 2
    return (*(size for size in sizes if size < largest), largest)


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
    expected = sum(downsampled_length(mel.shape[1]) for mel in clips)
    found = int((ids == audio_id).sum())
    if expected != found:
        raise MossAudioError(
            f"sequence {row} has {found} audio positions (id {audio_id}), but its {len(clips)} clips make {expected} "
            f"tokens (ceil(frames / {DOWNSAMPLE_RATE}) each)"
        )
