"""An epoch of fine-tuning: clips packed into sequences here, a sequence each in PyTorch, as the public script does.

That script pads every sample to 8192 tokens; the first row leaves its padding out, the second pads. Both sides begin
with mels and ids in memory, and make gradients of every parameter and AdamW's steps with them, in float32. A token is
useful if it belongs to a sample; all are learned but the first of each. The rate is next to nothing, so that the mean
loss of an epoch is one number, and both sides must agree on it. The model is the preset `small`, since a larger one
would take hours at 8192 tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.side_by_side import Comparison, compare
from moss_audio_jax.audio import num_audio_tokens, round_bfloat16
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import make_inputs
from moss_audio_jax.prompts import audio_span
from moss_audio_jax.weights.checkpoint import load_model
from moss_audio_jax.weights.parameters import parameters_of
from train.batch import split_microbatches
from train.config import OptimizerConfig, StepConfig
from train.data.budget import Budget
from train.data.packing import Packer, TrainingBatch, pack_row, stack_rows
from train.data.samples import FRAMES_PER_SECOND, Sample
from train.state import new_state
from train.step import train_step

CONFIG = MossAudioConfig.preset("small")
CLIPS, SHORTEST, LONGEST = 64, 1.0, 30.0  # seconds
PADDED = 8192  # tokens
TEXT_IDS = 40  # of a question and its answer, some of them on either side of the clip
BUDGET, SEQUENCES = Budget(tokens=1024, chunks=21), 4  # of a batch here

STEP = StepConfig(compute_dtype="float32", remat="none", encoder_dropout=False, spike_sigma=0, loss_chunk=512)
OPTIMIZER = OptimizerConfig(learning_rate=1e-9, warmup_steps=0, final_fraction=1.0)
LOSS_TOLERANCE = 1e-4


def samples(clips: int, config: MossAudioConfig) -> list[tuple[Sample, np.ndarray]]:
    """Clips of noise, of lengths that are all alike likely, each between some ids of text; and their mels."""
    rng, processor, made = np.random.default_rng(0), config.processor, []
    for number in range(clips):
        frames = round(rng.uniform(SHORTEST, LONGEST) * FRAMES_PER_SECOND)
        mel = round_bfloat16(rng.normal(0, 0.5, (config.audio_config.num_mel_bins, frames)).astype(np.float32))
        text = rng.integers(0, processor.audio_start_id - 1, TEXT_IDS).tolist()
        span = audio_span(num_audio_tokens(frames), processor=processor)
        ids = [*text[:10], processor.audio_start_id, *span, processor.audio_end_id, *text[10:]]
        inputs = make_inputs([ids], [[mel]], config=config)
        chunks = int((np.asarray(inputs.chunk_frames) > 0).sum())
        loss_mask, audio_labels = np.ones(len(ids), bool), np.full(len(ids), -1, np.int32)
        made.append((Sample(f"clip {number}", inputs, loss_mask, audio_labels, chunks), mel))
    return made


def packed(samples: list[Sample]) -> list[TrainingBatch]:
    """All of them in batches of one shape; rows that are left over learn nothing."""
    packer: Packer[Sample] = Packer(BUDGET)
    bins = [closed for sample in samples if (closed := packer.add(sample)) is not None] + packer.bins
    rows = [pack_row(bin.items, BUDGET) for bin in bins]
    nothing = {**rows[0], "loss_mask": np.zeros_like(rows[0]["loss_mask"])}
    rows += [nothing] * (-len(rows) % SEQUENCES)
    batches = [stack_rows(rows[first : first + SEQUENCES]) for first in range(0, len(rows), SEQUENCES)]
    return [jax.device_put(split_microbatches(batch, 1)) for batch in batches]


def rows(directory: Path, repeats: int, clips: int = CLIPS, padded: int = PADDED) -> Iterator[Comparison]:
    """One row beside PyTorch without padding, one beside it as it is. directory: a released model of CONFIG's kind."""
    import torch

    from convert.pytorch_reference import load_reference

    model, reference = load_model(directory, dtype=jnp.float32), load_reference(directory)
    made = samples(clips, model.config)
    batches, graphdef = packed([sample for sample, _ in made]), nnx.split(model)[0]
    state = new_state(parameters_of(model), model.config, OPTIMIZER)

    def epoch():
        nonlocal state
        metrics = []
        for batch in batches:
            state, of_step = train_step(graphdef, STEP, OPTIMIZER, state, batch)
            metrics.append((of_step["loss"], of_step["tokens"]))
        return state.trainable, metrics

    parameters = list(reference.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=OPTIMIZER.learning_rate, fused=True)
    audio_id = model.config.processor.audio_token_id

    def epoch_pytorch(length: int | None):
        losses = []
        for sample, mel in made:
            ids = sample.inputs.tokens[0, : sample.num_tokens]
            tokens = torch.from_numpy(np.pad(ids, (0, (length or len(ids)) - len(ids))))[None].long()
            optimizer.zero_grad()
            logits = reference(tokens, [torch.from_numpy(mel)], audio_id).logits[0, : len(ids) - 1]
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1 : len(ids)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
            optimizer.step()
            losses.append((loss.item(), len(ids) - 1))
        return losses

    def check(ours, pytorch) -> None:
        found, expected = (_mean([(float(loss), int(count)) for loss, count in side]) for side in (ours[1], pytorch))
        if found[1] != expected[1] or not abs(found[0] - expected[0]) <= LOSS_TOLERANCE * expected[0]:
            raise MossAudioError(
                f"fine-tuning epoch: expected PyTorch's loss {expected[0]:.6f} of {expected[1]} tokens, found "
                f"{found[0]:.6f} of {found[1]}; the two sides do not compute the same: run tests/parity."
            )

    useful = sum(sample.num_tokens for sample, _ in made)
    for name, length, times in (("one at a time", None, repeats), (f"padded to {padded}", padded, 1)):
        yield compare(
            f"fine-tuning on {clips} clips, {useful:,} tokens; PyTorch {name}",
            epoch,
            lambda length=length: epoch_pytorch(length),
            times,
            check=check,
        )


def _mean(losses: list[tuple[float, int]]) -> tuple[float, int]:
    count = sum(count for _, count in losses)
    return sum(loss * count for loss, count in losses) / count, count
