"""Answers a file of requests through the engine: `moss-audio generate --batch requests.jsonl`.

A request is a line of JSON; only the prompt, or a clip, is needed:

    {"prompt": "When does it bark?", "clips": ["dog.wav"], "max_new_tokens": 64, "temperature": 1.0, "top_k": 50,
     "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7, "system": "You are a helpful assistant.", "stop": ["."]}

`context`, `hot_words`, `loops`, `min_new_tokens` and `thinking_budget` are those of `Request` too.

A result is a line too, in the order of the requests:

    {"line": 1, "text": "At 2.4 seconds.", "tokens": 8, "finish_reason": "stop"}
    {"line": 2, "error": "requests.jsonl, line 2: ..."}
"""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moss_audio_jax.audio import mel_frames, num_audio_tokens, num_samples
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.engine import Reply, Request
from moss_audio_jax.processor import Processor
from moss_audio_jax.prompts import build_prompt
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.schema import TEXT, Rule, check_keys, each, integer, number
from moss_audio_jax.storage.json_files import parse_json
from moss_audio_jax.storage.paths import AnyPath, join, read_bytes, reason, to_path

_SAMPLING = tuple(option.name for option in dataclasses.fields(Sampling))
# Fields of `Request`, which has further rules for them.
_STEERING: dict[str, Rule] = {
    "context": TEXT,
    "hot_words": each(TEXT),
    "stop": each(TEXT),
    "loops": TEXT,
    "min_new_tokens": integer(0, 2**20),
    "thinking_budget": integer(0, 2**20),
}
_RULES: dict[str, Rule] = {
    "prompt": TEXT,
    "clips": each(TEXT),
    "system": TEXT,
    "max_new_tokens": integer(1, 2**20),
    "seed": integer(-(2**63), 2**64 - 1),
    **{name: number(-1e9, 1e9) for name in _SAMPLING},  # `Sampling` has the rules
    **_STEERING,
}


@dataclass(frozen=True)
class Line:
    """A line of the file: a request, or why it is none. number: from 1."""

    number: int
    request: Request | None = None
    error: str = ""


def read_requests(path: AnyPath, default: Request) -> list[Line]:
    """Reads a file of requests; clips are relative to it, empty lines are left out.

    default: what a line does not say. Its text is the prompt of a line without one.
    Raises MossAudioError if the file can't be read, or has no request.
    """
    path = to_path(path)
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise MossAudioError(f"{path} can't be read ({reason(error)}): check the path of --batch") from error
    found = [_line(path, number, text, default) for number, text in enumerate(lines, start=1) if text.strip()]
    if not found:
        raise MossAudioError(f"{path} must hold a request on each line, not nothing: write some")
    return found


def _line(path: Any, number: int, text: bytes, default: Request) -> Line:
    where = f"{path}, line {number}"
    try:
        content = parse_json(text)
    except ValueError as error:
        return Line(number, error=f"{where} must be an object of JSON ({error}): correct it")
    try:
        return Line(number, _request(path, content, default))
    except MossAudioError as error:
        return Line(number, error=f"{where}: {error}")


def _request(path: Any, content: Mapping[str, Any], default: Request) -> Request:
    unknown = sorted(content.keys() - _RULES.keys())
    if unknown:
        raise MossAudioError(f"a request may have {', '.join(_RULES)}, not {unknown[0]!r}: correct it")
    check_keys(dict(content), _RULES, "request")
    given = {name: value for name, value in content.items() if value is not None}
    clips = tuple(join(path.parent, clip) for clip in given.get("clips", ()))
    if not clips and not given.get("prompt"):
        raise MossAudioError("a request must have a prompt, or clips, or both: add one")
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    return dataclasses.replace(
        default,
        text=given.get("prompt", default.text),
        audio=clips,
        max_new_tokens=given.get("max_new_tokens", default.max_new_tokens),
        seed=given.get("seed", default.seed),
        system_prompt=given.get("system", default.system_prompt),
        sampling=dataclasses.replace(default.sampling, **sampling),
        **{name: given[name] for name in _STEERING if name in given},
    )


def with_lengths(lines: Iterable[Line], processor: Processor, where: str) -> Iterator[tuple[Line, int]]:
    """Yields the lines with the tokens of their prompts and answers at most; a line that is too long gets its error."""
    limit = processor.config.language_config.max_position_embeddings
    for line in lines:
        if line.request is None:
            yield line, 0
            continue
        try:
            length = request_length(line.request, processor)
            if length > limit:
                raise MossAudioError(
                    f"prompt and answer have up to {length:,} tokens, more than the model's {limit:,} positions: give "
                    "shorter audio or fewer max_new_tokens"
                )
            yield line, length
        except MossAudioError as error:
            yield Line(line.number, error=f"{where}, line {line.number}: {error}"), 0


def request_length(request: Request, processor: Processor) -> int:
    """Returns the tokens of a request's prompt and answer at most, from the headers of its clips, which are paths."""
    clips = [num_audio_tokens(mel_frames(num_samples(clip))) for clip in request.audio]
    prompt = build_prompt(
        processor.tokenizer,
        request.asked,
        clips,
        system_prompt=request.system_prompt,
        time_markers=request.time_markers,
        processor=processor.config.processor,
    )
    return len(prompt) + request.max_new_tokens


class Answering(Protocol):
    def result(self, timeout: float | None = None) -> Reply: ...


def answer_lines(
    lines: Iterable[Line], submit: Callable[[Request], Answering], in_flight: int, where: str
) -> Iterator[dict[str, Any]]:
    """Yields the results of the lines, in their order. submit: of an engine; at most `in_flight` wait for answers."""
    waiting: deque[tuple[Line, Answering | MossAudioError]] = deque()
    for line in lines:
        if line.request is None:
            waiting.append((line, MossAudioError(line.error)))
        else:
            try:
                waiting.append((line, submit(line.request)))
            except MossAudioError as error:
                waiting.append((line, MossAudioError(f"{where}, line {line.number}: {error}")))
        while len(waiting) >= in_flight:
            yield _result(*waiting.popleft(), where)
    while waiting:
        yield _result(*waiting.popleft(), where)


def _result(line: Line, answer: Answering | MossAudioError, where: str) -> dict[str, Any]:
    if isinstance(answer, MossAudioError):
        return {"line": line.number, "error": str(answer)}
    try:
        reply = answer.result()
    except MossAudioError as error:
        return {"line": line.number, "error": f"{where}, line {line.number}: {error}"}
    return {
        "line": line.number,
        "text": reply.text,
        **({"reasoning": reply.reasoning} if reply.reasoning else {}),
        "tokens": len(reply.ids),
        "finish_reason": reply.finish_reason,
    }


def to_line(result: Mapping[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"
