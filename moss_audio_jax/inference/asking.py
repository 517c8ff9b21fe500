"""Several questions at once on the command line: about the same clips, or in a file of requests."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moss_audio_jax.audio import SAMPLE_RATE, load_audio
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.batch_file import answer_lines, read_requests, request_length, to_line, with_lengths
from moss_audio_jax.inference.engine import Request
from moss_audio_jax.inference.loading import Loading
from moss_audio_jax.inference.thinking import Shown, ThoughtPrinter, print_pieces
from moss_audio_jax.storage.paths import AnyPath, GrowingFile, exists, require_writable

_IN_FLIGHT = 2  # requests that wait for their answers, for each slot


def answer_prompts(
    loading: Loading, prompts: Sequence[str], clips: Sequence[AnyPath], options: Mapping[str, Any], thinking: Shown
) -> None:
    """Prints the answers to several questions about the same clips, each under its question, in their order.

    The clips are read once. thinking: what is printed of each answer.
    """
    if not clips and not all(prompts):
        raise MossAudioError("there is nothing to answer: give a clip, or a question with each --prompt")
    processor = loading.processor()
    requests = [Request(prompt, clips, **options) for prompt in prompts]
    with waiting("reading the clips"):
        length = max(request_length(request, processor) for request in requests)
        waves = [load_audio(clip) for clip in clips]
    audio = [(wave, SAMPLE_RATE) for wave in waves]
    requests = [Request(prompt, audio, reuse=bool(audio), **options) for prompt in prompts]
    with loading.engine(processor, len(requests), length) as engine:
        handles = [engine.submit(request) for request in requests]
        for number, (prompt, handle) in enumerate(zip(prompts, handles, strict=True), start=1):
            print(f"{'' if number == 1 else chr(10)}# {prompt}")
            printer = ThoughtPrinter(thinking, dim=sys.stdout.isatty())
            print_pieces(handle.pieces(), printer)
            print(printer.flush(), flush=True)
            if handle.result().finish_reason != "stop":
                print(
                    f"[answer {number} was not finished ({handle.result().finish_reason}): give more --max-new-tokens]",
                    file=sys.stderr,
                )


def answer_batch(loading: Loading, batch: AnyPath, out: AnyPath | None, default: Mapping[str, Any]) -> None:
    """Answers a file of requests, and writes the results in order; exits with code 1 if one has an error."""
    lines = read_requests(batch, Request(**default))
    if out is not None:
        if exists(out):
            raise MossAudioError(f"{out} already exists: name a new file for the results, or remove it first")
        require_writable(out)
    processor = loading.processor()
    with waiting("looking at the requests"):
        measured = list(with_lengths(lines, processor, str(batch)))
    lines, longest = [line for line, _ in measured], max(length for _, length in measured)
    asked = sum(line.request is not None for line in lines)
    failed = 0
    engine = loading.engine(processor, asked, longest) if asked else None
    file = None if out is None else GrowingFile(out)
    try:
        for result in answer_lines(lines, engine.submit if engine else _nobody, _IN_FLIGHT * loading.slots, str(batch)):
            failed += "error" in result
            if file is None:
                print(to_line(result), end="", flush=True)
            else:
                file.write(to_line(result).encode())
                file.flush()
    finally:
        if file is not None:
            file.close()
        if engine is not None:
            engine.close()
    if failed:
        print(
            f"error: {failed} of {len(lines)} requests were not answered: their results have an error, which names the "
            "line",
            file=sys.stderr,
        )
        sys.exit(1)


def _nobody(request: Request) -> Any:
    raise AssertionError("no line has a request")
