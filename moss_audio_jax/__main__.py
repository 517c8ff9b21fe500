"""`moss-audio` asks a checkpoint about a sound, and shows the parts of a checkpoint."""

import dataclasses
import sys
import time
from typing import Annotated, Literal

import tyro

from moss_audio_jax.commands.cli import Commands, run_cli
from moss_audio_jax.commands.options import MeshConfig
from moss_audio_jax.commands.paths import PathArgument
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT
from moss_audio_jax.sampling_config import Sampling

DEFAULT_PROMPT = "Transcribe the audio."

_GREEDY, _ALL_DEVICES = Sampling(), MeshConfig()

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
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = _GREEDY,
    seed: int = 0,
    time_markers: bool | None = None,
    context: str = "",
    hot_words: tuple[str, ...] = (),
    loops: Literal["ignore", "stop", "warm"] = "ignore",
    thinking: Literal["show", "hide", "only"] = "show",
    thinking_budget: int | None = None,
    special_tokens: bool = False,
    dtype: Literal["bfloat16", "float32"] | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
) -> None:
    """Answers one question about sounds, and prints the text as it is generated.

    All clips belong to one prompt, with one answer. For an answer per file, call it for each file, or give a manifest
    of them to `moss-audio-train evaluate`.

    Args:
        checkpoint: Released directory, Orbax checkpoint (`moss-audio-convert to-orbax`), or training run.
        clips: Audio files (wav, flac, ogg, mp3) of one prompt, in order; none for text alone.
        prompt: The question. Default with a clip: "Transcribe the audio."
        adapter: LoRA adapter of the checkpoint: PEFT's directory, one of `from-peft`, or a training run.
        system: System prompt.
        max_new_tokens: Maximum tokens of the answer. An answer that is cut off is reported on stderr.
        sampling: Sampling options.
        seed: Seed of the sampling, a whole number of 64 bits.
        time_markers: Insert time markers between audio tokens. Default: the checkpoint's setting.
        context: What is known about the clips, such as "A podcast about birds."; stands before the question.
        hot_words: Names and terms that may occur; stand before the question too.
        loops: What to do about an answer that repeats the same words without end: ignore it, stop the answer, or draw
            the rest of it at a temperature of 1 (warm) and stop at a second loop.
        thinking: Show the thought before the answer of a Thinking checkpoint (dimmed on a terminal), hide it, or show
            only it.
        thinking_budget: Maximum tokens of the thought. Then it is ended with the words that Qwen3's report publishes,
            and the answer follows. Default: no limit but that of all new tokens.
        special_tokens: Also print special tokens such as <|im_end|>.
        dtype: Dtype of weights and computation. Default: bfloat16, on the CPU float32.
        mesh: Device mesh.
    """
    import numpy as np

    from moss_audio_jax.generation import check_request, stream
    from moss_audio_jax.inference.requests import Request, steering_of
    from moss_audio_jax.inference.thinking import ThoughtPrinter, ThoughtSplitter, opens_thought, print_pieces
    from moss_audio_jax.processor import load_processor
    from moss_audio_jax.sharding import make_mesh
    from moss_audio_jax.tokenizer import StreamDecoder
    from moss_audio_jax.weights.checkpoint import load_adapter, load_model

    options = {"thinking_budget": thinking_budget, "context": context, "hot_words": hot_words, "loops": loops}
    request = Request(_checked_prompt(prompt, len(clips)), max_new_tokens=max_new_tokens, **options)
    processor = load_processor(checkpoint)
    with waiting("reading the clips"):
        inputs = processor([request.asked], [clips], system_prompt=system, time_markers=time_markers)
    check_request(processor.config, inputs, max_new_tokens, seed=seed)
    opened = opens_thought(processor.tokenizer, inputs.tokens[0][inputs.segment_ids[0] != 0].tolist())
    steering = steering_of(request, processor, opened)
    with waiting("loading the weights"):
        model = load_model(checkpoint, dtype=dtype, mesh=make_mesh(**dataclasses.asdict(mesh)))
        model = model if adapter is None else load_adapter(model, adapter)
    read = int((inputs.segment_ids != 0).sum())
    decoder = StreamDecoder(processor.tokenizer, skip_special_tokens=not special_tokens)
    start, count, finished = time.perf_counter(), 0, False
    splitter, printer = ThoughtSplitter(opened), ThoughtPrinter(thinking, dim=sys.stdout.isatty())
    sampled = dataclasses.asdict(sampling)
    pieces = stream(model, inputs, max_new_tokens=max_new_tokens, seed=seed, steering=steering, **sampled)
    with waiting(f"reading {read:,} tokens, {int((inputs.audio_slots >= 0).sum()):,} of them of audio"):
        piece = next(pieces, None)
    while piece is not None:
        count += piece.shape[1]
        finished = bool(np.isin(piece, model.config.eos_ids).any())
        print_pieces(splitter.feed(decoder.feed(piece[0].tolist())), printer)
        piece = next(pieces, None)
    print_pieces([*splitter.feed(decoder.flush()), *splitter.flush()], printer)
    print(printer.flush(), flush=True)
    seconds = time.perf_counter() - start
    print(f"[{read} tokens read, {count} written in {seconds:.1f} s, compilation included]", file=sys.stderr)
    if not finished and count < max_new_tokens:
        print("[the answer was not finished: it repeated itself, and --loops ended it]", file=sys.stderr)
    elif not finished:
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
            "`moss-audio-train evaluate` with a manifest]",
            file=sys.stderr,
        )
    return DEFAULT_PROMPT if prompt is None else prompt


@app.command
def info(checkpoint: tyro.conf.Positional[PathArgument], /) -> None:
    """Prints the parts of a checkpoint: shapes, dtypes, parameters, bytes.

    Args:
        checkpoint: Released directory, Orbax checkpoint, or training run.
    """
    from moss_audio_jax.weights.info import describe

    print(describe(checkpoint))


def main() -> None:
    run_cli(lambda: app.cli(prog="moss-audio", description=__doc__))


if __name__ == "__main__":
    main()
