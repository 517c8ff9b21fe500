"""The port and PyTorch side by side on this machine: `python -m benchmarks.vs_pytorch [--json FILE]`.

Both frameworks get the same float32 weights and the same inputs in one process. The repeats are interleaved, so that a
machine that slows down slows both; medians are compared. The model has the released widths of the encoder, where the
kernels are the released model's, but few layers: the whole takes minutes. Needs the extra `test` (PyTorch).
Answers through the engine (`benchmarks.answering`) and an epoch of fine-tuning (`benchmarks.fine_tuning`) follow, and
last, in CPU seconds, what feeds the model: `benchmarks.input_pipeline` says how, and compares more of it.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.side_by_side import Comparison, Timed, compare, report
from convert.rehearse import write_random_checkpoint
from moss_audio_jax.audio import model_mel, num_audio_tokens
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.config import EncoderConfig, LanguageConfig, MossAudioConfig, ProcessorConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import copied_layers, decode_answers, make_drawing, prefill_prompts
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.model import MossAudio
from moss_audio_jax.prompts import audio_span
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.weights.checkpoint import load_model
from moss_audio_jax.weights.parameters import parameters_of
from train.batch import split_microbatches
from train.config import OptimizerConfig, StepConfig
from train.data.packing import TrainingBatch
from train.state import new_state
from train.step import train_step

CONFIG = MossAudioConfig(
    audio_config=EncoderConfig(encoder_layers=8, deepstack_encoder_layer_indexes=(2, 4, 6)),
    language_config=LanguageConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    adapter_hidden_size=2048,
    deepstack_num_inject_layers=3,
    eos_ids=(32764,),
    processor=ProcessorConfig(audio_token_id=32767, audio_start_id=32765, audio_end_id=32766),
)
Part = Literal["matmuls", "model", "answers", "fine-tuning", "inputs"]
NEW_TOKENS = 64
# Tokens, inputs and outputs: of the encoder MLP, of a tap of a convolution, of the language model MLP, and of the head
# for one token.
MATMULS = ((400, 1280, 5120), (3200, 480, 480), (448, 1024, 3072), (1, 1024, 32768))
MATMULS_TIMED = 20  # of each, for one timing
RELEASED_CONV_CHUNKS = 64  # the released code encodes this many chunks at a time

# float32 without dropout, as PyTorch's side runs; nothing recomputed on either. The rate stays what it is.
STEP = StepConfig(compute_dtype="float32", remat="none", encoder_dropout=False, spike_sigma=0)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, final_fraction=1.0)
LOSS_TOLERANCE = 1e-3
INPUTS = {"clips": 60, "longest": 30.0, "batches": 1}  # of `input_rows`


def wave(seconds: float) -> np.ndarray:
    """Noise with a slow swell, float32 at 16 kHz."""
    count = int(seconds * 16000)
    noise = np.random.default_rng(0).standard_normal(count, np.float32)
    return 0.1 * noise * (1 + np.sin(np.arange(count, dtype=np.float32) / 8000))


def question(mel: np.ndarray, config: MossAudioConfig) -> tuple[list[int], ModelInputs]:
    """A clip with its time markers between some ids of text."""
    processor = config.processor
    span = audio_span(num_audio_tokens(mel.shape[1]), processor=processor)
    ids = [*range(100, 116), processor.audio_start_id, *span, processor.audio_end_id, *range(200, 216)]
    return ids, make_inputs([ids], [[mel]], config=config)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def matmul_rows(repeats: int) -> Iterator[Comparison]:
    """Plain matmuls of the model's shapes: how much of the other rows is the frameworks' matmul."""
    import torch

    multiply = jax.jit(jnp.matmul)
    for tokens, features, outputs in MATMULS:
        rng = np.random.default_rng(0)
        x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((tokens, features), (features, outputs)))
        on_device, tensors = jax.device_put((x, kernel)), (torch.from_numpy(x), torch.from_numpy(kernel))
        yield compare(
            f"matmul {tokens} x {features} x {outputs}",
            lambda on_device=on_device: [multiply(*on_device) for _ in range(MATMULS_TIMED)],
            lambda tensors=tensors: [torch.matmul(*tensors) for _ in range(MATMULS_TIMED)],
            repeats,
        )


def rows(directory: Path, repeats: int, short: float = 30, long: float = 600) -> Iterator[Comparison]:
    """The rows, one by one as they are measured. short, long: seconds of the clips."""
    import torch
    from transformers import DynamicCache, WhisperFeatureExtractor

    from convert.pytorch_reference import load_reference

    short_wave, long_wave = wave(short), wave(long)
    extractor = WhisperFeatureExtractor(feature_size=128)
    yield compare(
        f"mel of {short:g} s",
        lambda: model_mel(short_wave, "the short clip"),
        lambda: torch.from_numpy(extractor._np_extract_fbank_features(short_wave[None], "cpu")).bfloat16(),
        repeats,
    )

    model, reference = load_model(directory, dtype=jnp.float32), load_reference(directory)
    graphdef, state = nnx.split(model)

    @jax.jit
    def encode(state: nnx.State, inputs: ModelInputs):
        encoder = nnx.merge(graphdef, state).audio_encoder
        return encoder(inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)

    @torch.no_grad()
    def encode_pytorch(mel: torch.Tensor):
        return [reference.audio_encoder(part) for part in mel.split(400 * RELEASED_CONV_CHUNKS, dim=1)]

    config = model.config
    for sound, times in ((short_wave, repeats), (long_wave, min(repeats, 3))):
        mel = model_mel(sound, "the clip")
        inputs, tensor = jax.device_put(question(mel, config)[1]), torch.from_numpy(mel)
        yield compare(
            f"encoder on {len(sound) / 16000:g} s",
            lambda inputs=inputs: encode(state, inputs),
            lambda tensor=tensor: encode_pytorch(tensor),
            times,
        )

    mel = model_mel(short_wave, "the short clip")
    ids, inputs = question(mel, config)
    inputs = jax.device_put(inputs)
    tokens, clip = torch.tensor([ids]), torch.from_numpy(mel)
    is_audio = tokens == config.processor.audio_token_id
    with torch.no_grad():
        audio = reference.encode_audio([clip])
        embedded = reference.language_model.embed_tokens(tokens).index_put((is_audio,), audio.adapter_output)
    x, deepstack = jax.block_until_ready(jax.jit(lambda state: nnx.merge(graphdef, state).embed(inputs))(state))

    @jax.jit
    def prefill(state: nnx.State, x: jax.Array, deepstack: jax.Array):
        model = nnx.merge(graphdef, state)
        counts = jnp.array([len(ids)], jnp.int32)
        hidden, cache = model.language_model.prefill(x, counts, x.shape[1] + NEW_TOKENS, deepstack)
        return model.logits(hidden[:, len(ids) - 1]), cache

    @torch.no_grad()
    def prefill_pytorch():
        cache = DynamicCache(config=reference.language_model.config)
        with reference._deepstack(is_audio, audio.deepstack_merged):
            output = reference.language_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        return reference.lm_head(output.last_hidden_state[:, -1]), cache

    yield compare(f"prefill of {len(ids)} tokens", lambda: prefill(state, x, deepstack), prefill_pytorch, repeats)
    yield _decode_row(model, inputs, prefill_pytorch, reference, repeats)
    yield _backward_row(model, inputs, tokens, clip, reference, repeats)
    yield _training_row(model, inputs, tokens, clip, reference, repeats)  # the last: it takes the parameters over


def model_rows(directory: Path, repeats: int) -> Iterator[Comparison]:
    """`rows` of a checkpoint that is written to a new directory."""
    write_random_checkpoint(CONFIG, directory)
    yield from rows(directory, repeats)


def answering_rows(directory: Path, repeats: int) -> Iterator[Comparison]:
    """Answers through the engine, of a checkpoint that is written to a new directory."""
    from benchmarks import answering

    write_random_checkpoint(CONFIG, directory)
    yield from answering.rows(directory, repeats)


def fine_tuning_rows(scratch: Path, repeats: int) -> Iterator[Comparison]:
    """An epoch, of a smaller model. scratch: a new directory."""
    from benchmarks import fine_tuning

    write_random_checkpoint(fine_tuning.CONFIG, scratch)
    yield from fine_tuning.rows(scratch, repeats)


def input_rows(scratch: Path, repeats: int) -> Iterator[Comparison]:
    """From files to what a training step reads. Leaves PyTorch a single thread."""
    from benchmarks import input_pipeline

    wav = input_pipeline.FORMATS[:1]
    for measured in input_pipeline.rows(scratch, wav, input_pipeline.DATA, **INPUTS, runs=repeats):
        yield dataclasses.replace(measured.row, name=f"input pipeline, an hour of {measured.row.name}")


def _decode_row(model: MossAudio, inputs: ModelInputs, prefill_pytorch: Timed, reference, repeats: int) -> Comparison:
    """NEW_TOKENS greedy steps after the prompt; the prefill before them is not timed."""
    import torch

    graphdef, state = nnx.split(model)
    drawing = make_drawing(1, Sampling(), (), NEW_TOKENS)
    layers = copied_layers(graphdef, state)
    prefilled, caches = [], []
    for _ in range(repeats + 1):
        prefilled.append(prefill_prompts(graphdef, state, inputs, drawing.fill, NEW_TOKENS))
        caches.append(prefill_pytorch())
    jax.block_until_ready(prefilled)

    @torch.no_grad()
    def decode_pytorch():
        logits, cache = caches.pop()
        for _ in range(NEW_TOKENS):
            embeds = reference.language_model.embed_tokens(logits.argmax(-1, keepdim=True))
            output = reference.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            logits = reference.lm_head(output.last_hidden_state[:, -1])
        return logits

    def decode():
        return decode_answers(graphdef, state, layers, prefilled.pop(), drawing, NEW_TOKENS)

    return compare(f"decode of {NEW_TOKENS} tokens", decode, decode_pytorch, repeats)


def _backward_row(model: MossAudio, inputs: ModelInputs, tokens, clip, reference, repeats: int) -> Comparison:
    """Loss of every next token, and its gradient for every parameter."""

    graphdef, state = nnx.split(model)
    length = tokens.shape[1]

    @jax.jit
    def backward(state: nnx.State):
        def loss(state):
            model = nnx.merge(graphdef, state)
            logits = model.logits(model.hidden_states(inputs).last[:, : length - 1])
            return cross_entropy(logits, inputs.tokens[:, 1:length])

        return jax.value_and_grad(loss)(state)

    def backward_pytorch():
        reference.zero_grad()
        loss = _pytorch_loss(reference, tokens, clip, model.config)
        loss.backward()
        return loss

    return compare(f"forward and backward, {length} tokens", lambda: backward(state), backward_pytorch, repeats)


def _training_row(model: MossAudio, inputs: ModelInputs, tokens, clip, reference, repeats: int) -> Comparison:
    """`train_step` on one sequence, and PyTorch's: loss, gradients, clipping, AdamW. Every step moves the parameters.

    Raises MossAudioError if the two losses part at any step; from the second on they show the updates as well.
    """
    import torch

    length = tokens.shape[1]
    weights = (np.arange(inputs.tokens.shape[1]) < length - 1).astype(np.float32)[None]
    targets = np.roll(np.asarray(inputs.tokens), -1, axis=1)
    batch = jax.device_put(split_microbatches(TrainingBatch(inputs, targets, weights), 1))
    graphdef = nnx.split(model)[0]
    state = new_state(parameters_of(model), model.config, OPTIMIZER)
    optimizer = _torch_adamw(reference)

    def step():
        nonlocal state
        state, metrics = train_step(graphdef, STEP, OPTIMIZER, state, batch)
        return state.trainable, metrics["loss"]

    def step_pytorch():
        optimizer.zero_grad()
        loss = _pytorch_loss(reference, tokens, clip, model.config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return loss.item()

    def check(ours: tuple[object, jax.Array], pytorch: float) -> None:
        loss = float(ours[1])
        if not abs(loss - pytorch) <= LOSS_TOLERANCE * abs(pytorch):
            raise MossAudioError(
                f"training step: expected PyTorch's loss {pytorch:.6f} to {LOSS_TOLERANCE:.0e}, found {loss:.6f}; "
                "the two sides do not compute the same, so their times say nothing: run tests/parity."
            )

    return compare(f"training step, {length} tokens", step, step_pytorch, repeats, check=check)


def _pytorch_loss(reference, tokens, clip, config: MossAudioConfig):
    """Mean over every next token."""
    from torch.nn.functional import cross_entropy

    logits = reference(tokens, [clip], config.processor.audio_token_id).logits
    return cross_entropy(logits[0, :-1], tokens[0, 1:])


def _torch_adamw(reference):
    """PyTorch's fastest AdamW on the CPU, as OPTIMIZER says: norms and biases do not decay."""
    import torch

    decayed = [parameter for parameter in reference.parameters() if parameter.ndim > 1]
    undecayed = [parameter for parameter in reference.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    betas = (OPTIMIZER.b1, OPTIMIZER.b2)
    return torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=betas, eps=OPTIMIZER.eps, fused=True)


def run(
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    repeats: int = 5,
    parts: tuple[Part, ...] = get_args(Part),
) -> None:
    """Compares the port with PyTorch on this machine.

    Args:
        json_file: Write the rows there as a JSON list.
        repeats: Timed runs of each side (three at most on ten minutes of sound).
        parts: What to measure: plain matmuls, the model, answers of an engine, an epoch of fine-tuning, the input
            pipeline.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        measured: dict[Part, Callable[[], Iterator[Comparison]]] = {
            "matmuls": lambda: matmul_rows(repeats),
            "model": lambda: model_rows(scratch / "model", repeats),
            "answers": lambda: answering_rows(scratch / "answering", repeats),
            "fine-tuning": lambda: fine_tuning_rows(scratch / "small", repeats),
            "inputs": lambda: input_rows(scratch, repeats),
        }
        report(chain.from_iterable(measured[part]() for part in parts), "s", json_file)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run))
