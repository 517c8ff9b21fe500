"""Questions on the command line: one, several about the same clips, or those in a file of requests."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, load_audio
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import check_request, stream
from moss_audio_jax.inference.batch_file import answer_lines, read_requests, request_length, to_line, with_lengths
from moss_audio_jax.inference.engine import Request
from moss_audio_jax.inference.loading import Loading
from moss_audio_jax.inference.requests import steering_of
from moss_audio_jax.inference.thinking import Shown, ThoughtPrinter, ThoughtSplitter, opens_thought, print_pieces
from moss_audio_jax.storage.paths import AnyPath, GrowingFile, exists, require_writable
from moss_audio_jax.tokenizer import StreamDecoder

_IN_FLIGHT = 2  # requests that wait for their answers, for each slot


def answer_prompt(
    loading: Loading,
    prompt: str,
    clips: Sequence[AnyPath],
    options: Mapping[str, Any],
    thinking: Shown,
    *,
    special_tokens: bool,
) -> None:
    """Prints the answer to one prompt as it is generated, and on stderr whether it is finished.

    options: the other fields of its `Request`. thinking: what is printed of the answer.
    """
    request = Request(prompt, clips, **options)
    processor = loading.processor()
    with waiting("reading the clips"):
        inputs = processor(
            [request.asked], [clips], system_prompt=request.system_prompt, time_markers=request.time_markers
        )
    check_request(processor.config, inputs, request.max_new_tokens, seed=request.seed)
    opened = opens_thought(processor.tokenizer, inputs.tokens[0][inputs.segment_ids[0] != 0].tolist())
    steering = steering_of(request, processor, opened)
    model = loading.model()
    read = int((inputs.segment_ids != 0).sum())
    decoder = StreamDecoder(processor.tokenizer, skip_special_tokens=not special_tokens)
    splitter, printer = ThoughtSplitter(opened), ThoughtPrinter(thinking, dim=sys.stdout.isatty())
    start, count, finished = time.perf_counter(), 0, False
    pieces = stream(
        model,
        inputs,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        seed=request.seed,
        steering=steering,
    )
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
    if not finished and count < request.max_new_tokens:
        print("[the answer was not finished: it repeated itself, and --loops ended it]", file=sys.stderr)
    elif not finished:
        print(
            f"[the answer was not finished: it was cut off after --max-new-tokens {request.max_new_tokens}; give more "
            "of them]",
            file=sys.stderr,
        )


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
