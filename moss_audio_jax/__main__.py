"""`python -m moss_audio_jax`, or `moss-audio`: ask a checkpoint about a sound; see what it is made of."""

import sys
import time
from typing import Literal

import tyro

from moss_audio_jax.cli import Commands, PathArgument, run_door
from moss_audio_jax.tokens import DEFAULT_SYSTEM_PROMPT

app = Commands()


@app.command
def generate(
    checkpoint: tyro.conf.Positional[PathArgument],
    clips: tyro.conf.Positional[tuple[PathArgument, ...]],
    /,
    *,
    prompt: str = "Transcribe the audio.",
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
    """Answers a question about sounds, printing the text as it is produced.

    Args:
        checkpoint: A released directory, one that `python -m convert to-orbax` wrote, or a training run's.
        clips: Audio files (wav, flac, ogg, mp3), in the order in which the model hears them; none for text alone.
        prompt: The question.
        adapter: An adapter of LoRA for the checkpoint: PEFT's directory, one of `convert from-peft`, or a training run.
        system: The system prompt.
        max_new_tokens: Stop after so many tokens at the latest.
        temperature: 0 takes the likeliest token; the authors sample at 1.
        top_k: When sampling, draw from the k likeliest tokens; 0 means all.
        top_p: When sampling, draw from the fewest tokens that reach this probability.
        repetition_penalty: Above 1 discourages what was said already.
        seed: Of the sampling.
        time_markers: Seconds written between the audio tokens; by default as the checkpoint says.
        special_tokens: Print special tokens such as <|im_end|> too.
        dtype: bfloat16 or float32; by default bfloat16, and float32 on the CPU.
        fsdp: Devices that the weights and the batch are cut over; -1 takes all that are left.
        tensor: Devices that each layer is cut over.
    """
    from moss_audio_jax.checkpoint import load_adapter, load_model  # JAX takes seconds to start: not for --help
    from moss_audio_jax.generate import stream
    from moss_audio_jax.processor import load_processor
    from moss_audio_jax.sharding import make_mesh
    from moss_audio_jax.tokens import StreamDecoder

    processor = load_processor(checkpoint)
    inputs = processor([prompt], [clips], system_prompt=system, time_markers=time_markers)
    model = load_model(checkpoint, dtype=dtype, mesh=make_mesh(fsdp=fsdp, tensor=tensor))
    model = model if adapter is None else load_adapter(model, adapter)
    pieces = stream(
        model,
        inputs,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    decoder = StreamDecoder(processor.tokenizer, skip_special_tokens=not special_tokens)
    start, count = time.perf_counter(), 0
    for piece in pieces:
        count += piece.shape[1]
        print(decoder.feed(piece[0].tolist()), end="", flush=True)
    print(decoder.flush(), flush=True)
    seconds = time.perf_counter() - start
    read = int((inputs.segment_ids != 0).sum())
    print(f"[{read} tokens read, {count} written in {seconds:.1f} s, compilation included]", file=sys.stderr)


@app.command
def info(checkpoint: tyro.conf.Positional[PathArgument], /) -> None:
    """Prints a checkpoint's parts: shapes, dtypes, parameters, bytes.

    Args:
        checkpoint: A released directory, an Orbax one, or a training run's.
    """
    from moss_audio_jax.info import describe

    print(describe(checkpoint))


def main() -> None:
    run_door(lambda: app.cli(prog="moss-audio", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
