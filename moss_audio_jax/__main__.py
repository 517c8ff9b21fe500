"""`python -m moss_audio_jax`, or `moss-audio`: ask a checkpoint about a sound; see what it is made of."""

import dataclasses
import sys
import time
from typing import Annotated, Literal

import numpy as np
import tyro

from moss_audio_jax.commands.cli import Commands, PathArgument, run_cli
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.tokens import DEFAULT_SYSTEM_PROMPT

DEFAULT_PROMPT = "Transcribe the audio."

app = Commands()


@app.command
def generate(
    checkpoint: tyro.conf.Positional[PathArgument],
    clips: Annotated[tuple[PathArgument, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CLIP_OF_ONE_PROMPT ...]")],
    /,
    *,
    prompt: str | None = None,
    adapter: PathArgument | None = None,
    system: str = DEFAULT_SYSTEM_PROMPT,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_k: int = 50,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    time_markers: bool | None = None,
    special_tokens: bool = False,
    dtype: Literal["bfloat16", "float32"] | None = None,
    fsdp: int = -1,
    tensor: int = 1,
) -> None:
    """Answers one question about sounds, printing the text as it is produced.

    All clips are of one prompt, and there is one answer. For an answer a file, call it for each file, or give a
    manifest of them to `python -m train evaluate`.

    Args:
        checkpoint: A released directory, one that `python -m convert to-orbax` wrote, or a training run's.
        clips: Audio files (wav, flac, ogg, mp3) of one prompt, in the order in which the model hears them; none for
            text alone.
        prompt: The question; by default "Transcribe the audio.", where there is a clip.
        adapter: An adapter of LoRA for the checkpoint: PEFT's directory, one of `convert from-peft`, or a training run.
        system: The system prompt.
        max_new_tokens: The most tokens of an answer; one that is cut off there is reported on stderr.
        temperature: 0 takes the likeliest token; the authors sample at 1.
        top_k: When sampling, draw from the k likeliest tokens; 0 means all.
        top_p: When sampling, draw from the fewest tokens that reach this probability.
        repetition_penalty: Above 1 discourages what was said already.
        seed: Of the sampling; a whole number of 64 bits.
        time_markers: Seconds written between the audio tokens; by default as the checkpoint says.
        special_tokens: Print special tokens such as <|im_end|> too.
        dtype: bfloat16 or float32; by default bfloat16, and float32 on the CPU.
        fsdp: Devices that the weights and the batch are cut over; -1 takes all that are left.
        tensor: Devices that each layer is cut over.
    """
    from moss_audio_jax.generation import check_request, stream
    from moss_audio_jax.processor import load_processor
    from moss_audio_jax.sampling import Sampling
    from moss_audio_jax.sharding import make_mesh
    from moss_audio_jax.tokens import StreamDecoder
    from moss_audio_jax.weights.checkpoint import load_adapter, load_model  # JAX takes seconds to start: not for --help

    prompt = _checked_prompt(prompt, len(clips))
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    processor = load_processor(checkpoint)
    with waiting("reading the clips"):
        inputs = processor([prompt], [clips], system_prompt=system, time_markers=time_markers)
    check_request(processor.config, inputs, max_new_tokens, seed=seed)
    with waiting("loading the weights"):
        model = load_model(checkpoint, dtype=dtype, mesh=make_mesh(fsdp=fsdp, tensor=tensor))
        model = model if adapter is None else load_adapter(model, adapter)
    read = int((inputs.segment_ids != 0).sum())
    decoder = StreamDecoder(processor.tokenizer, skip_special_tokens=not special_tokens)
    start, count, finished = time.perf_counter(), 0, False
    pieces = stream(model, inputs, max_new_tokens=max_new_tokens, seed=seed, **dataclasses.asdict(sampling))
    with waiting(f"reading {read:,} tokens, {int((inputs.audio_slots >= 0).sum()):,} of them of audio"):
        piece = next(pieces, None)
    while piece is not None:
        count += piece.shape[1]
        finished = bool(np.isin(piece, model.config.eos_ids).any())
        print(decoder.feed(piece[0].tolist()), end="", flush=True)
        piece = next(pieces, None)
    print(decoder.flush(), flush=True)
    seconds = time.perf_counter() - start
    print(f"[{read} tokens read, {count} written in {seconds:.1f} s, compilation included]", file=sys.stderr)
    if not finished:
        print(
            f"[the answer was not finished: it was cut off after --max-new-tokens {max_new_tokens}; give more of them]",
            file=sys.stderr,
        )


def _checked_prompt(prompt: str | None, clips: int) -> str:
    if not clips and not prompt:
        raise MossAudioError("there is nothing to answer: give a clip, or a question with --prompt, or both")
    if clips > 1:
        print(
            f"[all {clips} clips are in one prompt, for one answer; for an answer a file, call `generate` for each, or "
            "`python -m train evaluate` with a manifest]",
            file=sys.stderr,
        )
    return DEFAULT_PROMPT if prompt is None else prompt


@app.command
def info(checkpoint: tyro.conf.Positional[PathArgument], /) -> None:
    """Prints a checkpoint's parts: shapes, dtypes, parameters, bytes.

    Args:
        checkpoint: A released directory, an Orbax one, or a training run's.
    """
    from moss_audio_jax.weights.info import describe

    print(describe(checkpoint))


def main() -> None:
    run_cli(lambda: app.cli(prog="moss-audio", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
