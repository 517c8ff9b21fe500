"""The port and PyTorch side by side on this machine: `python -m benchmarks.vs_pytorch [--json FILE]`.

Both frameworks get the same float32 weights and the same inputs in one process. The repeats are interleaved, so that a
machine that slows down slows both; medians are compared. The model has the released widths of the encoder, where the
kernels are the released model's, but few layers: the whole takes minutes. Needs the extra `test` (PyTorch).
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from convert.rehearse import write_random_checkpoint
from moss_audio_jax.audio import log_mel, num_audio_tokens, round_bfloat16
from moss_audio_jax.checkpoint import load_model
from moss_audio_jax.cli import run_door
from moss_audio_jax.config import EncoderConfig, LanguageConfig, MossAudioConfig, ProcessorConfig
from moss_audio_jax.generate import Sampling, _decode_until, _prefill
from moss_audio_jax.info import align
from moss_audio_jax.inputs import ModelInputs, make_inputs
from moss_audio_jax.language_model import KVCache
from moss_audio_jax.model import MossAudio
from moss_audio_jax.tokens import audio_span

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
    processor=ProcessorConfig(audio_token_id=32767, audio_start_id=32765, audio_end_id=32766),
)
NEW_TOKENS = 64
RELEASED_CONV_CHUNKS = 64  # the released code encodes so many chunks at a time

Timed = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Row:
    """ratio: PyTorch's time over ours; above 1 the port is faster."""

    name: str
    ours_seconds: float
    pytorch_seconds: float
    ratio: float


def compare(name: str, ours: Timed, pytorch: Timed, repeats: int) -> Row:
    """Medians of interleaved runs, after one of each that is not counted (it compiles)."""
    times: dict[Timed, list[float]] = {ours: [], pytorch: []}
    for repeat in range(repeats + 1):
        for run, seconds in times.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds.append(time.perf_counter() - start)
    mine, theirs = (statistics.median(seconds) for seconds in times.values())
    return Row(name, mine, theirs, theirs / mine)


def wave(seconds: float) -> np.ndarray:
    """Noise with a slow swell, float32 at 16 kHz."""
    count = int(seconds * 16000)
    noise = np.random.default_rng(0).standard_normal(count, np.float32)
    return 0.1 * noise * (1 + np.sin(np.arange(count, dtype=np.float32) / 8000))


def question(mel: np.ndarray) -> tuple[list[int], ModelInputs]:
    """A clip with its time markers between some ids of text."""
    span = audio_span(num_audio_tokens(mel.shape[1]), processor=CONFIG.processor)
    ids = [*range(100, 116), 32765, *span, 32766, *range(200, 216)]
    return ids, make_inputs([ids], [[mel]], config=CONFIG)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def rows(directory: Path, repeats: int) -> Iterator[Row]:
    """The rows, one by one as they are measured."""
    import torch
    from transformers import DynamicCache, WhisperFeatureExtractor

    from convert.pytorch_reference import load_reference

    half_minute, ten_minutes = wave(30), wave(600)
    extractor = WhisperFeatureExtractor(feature_size=128)
    yield compare(
        "mel of 30 s",
        lambda: round_bfloat16(log_mel(half_minute)),
        lambda: torch.from_numpy(extractor._np_extract_fbank_features(half_minute[None], "cpu")).bfloat16(),
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

    for name, sound, times in (("30 s", half_minute, repeats), ("10 min", ten_minutes, min(repeats, 3))):
        mel = round_bfloat16(log_mel(sound))
        inputs, tensor = jax.device_put(question(mel)[1]), torch.from_numpy(mel)
        yield compare(
            f"encoder on {name}",
            lambda inputs=inputs: encode(state, inputs),
            lambda tensor=tensor: encode_pytorch(tensor),
            times,
        )

    mel = round_bfloat16(log_mel(half_minute))
    ids, inputs = question(mel)
    inputs = jax.device_put(inputs)
    tokens, clip = torch.tensor([ids]), torch.from_numpy(mel)
    is_audio = tokens == CONFIG.processor.audio_token_id
    with torch.no_grad():
        audio = reference.encode_audio([clip])
        embedded = reference.language_model.embed_tokens(tokens).index_put((is_audio,), audio.adapter_output)
    x, deepstack = jax.block_until_ready(jax.jit(lambda state: nnx.merge(graphdef, state).embed(inputs))(state))

    @jax.jit
    def prefill(state: nnx.State, x: jax.Array, deepstack: jax.Array):
        model = nnx.merge(graphdef, state)
        cache = KVCache.empty(CONFIG.language_config, 1, x.shape[1] + NEW_TOKENS, x.dtype)
        hidden, cache = model.language_model.extend(x, inputs.positions, inputs.segment_ids, cache, deepstack)
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


def _decode_row(model: MossAudio, inputs: ModelInputs, prefill_pytorch: Timed, reference, repeats: int) -> Row:
    """NEW_TOKENS greedy steps after the prompt; the prefill before them is not timed."""
    import torch

    graphdef, state = nnx.split(model)
    prefilled, caches = [], []
    for _ in range(repeats + 1):
        prefilled.append(_prefill(graphdef, state, inputs, NEW_TOKENS + 1, Sampling(), (), 0))
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
        return _decode_until(graphdef, state, prefilled.pop(), NEW_TOKENS + 1, Sampling(), ())

    return compare(f"decode of {NEW_TOKENS} tokens", decode, decode_pytorch, repeats)


def _backward_row(model: MossAudio, inputs: ModelInputs, tokens, clip, reference, repeats: int) -> Row:
    """Loss of every next token, and its gradient for every parameter."""
    import torch

    graphdef, state = nnx.split(model)
    length = tokens.shape[1]

    @jax.jit
    def backward(state: nnx.State):
        def loss(state):
            model = nnx.merge(graphdef, state)
            logits = model.logits(model.hidden_states(inputs)[:, : length - 1])
            return cross_entropy(logits, inputs.tokens[:, 1:length])

        return jax.value_and_grad(loss)(state)

    def backward_pytorch():
        reference.zero_grad()
        logits = reference(tokens, [clip], CONFIG.processor.audio_token_id).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        loss.backward()
        return loss

    return compare("forward and backward, 30 s", lambda: backward(state), backward_pytorch, repeats)


def run(
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    repeats: int = 5,
) -> None:
    """Compares the port with PyTorch on this machine.

    Args:
        json_file: Write the rows there as a JSON list.
        repeats: Timed runs of each side (three at most on ten minutes of sound).
    """
    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        write_random_checkpoint(CONFIG, Path(scratch) / "model")
        for row in rows(Path(scratch) / "model", repeats):
            print(f"{row.name}: {row.ratio:.2f}", file=sys.stderr, flush=True)
            measured.append(row)
    cells = [("", "ours, s", "PyTorch, s", "PyTorch / ours")]
    for row in measured:
        cells.append((row.name, f"{row.ours_seconds:.4f}", f"{row.pytorch_seconds:.4f}", f"{row.ratio:.2f}"))
    print(align(cells))
    if json_file:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in measured], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run_door(lambda: tyro.cli(run))
