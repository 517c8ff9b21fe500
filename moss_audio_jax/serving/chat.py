"""/v1/chat/completions: from a body to a request of an engine, and from its answers to OpenAI's objects.

body -> clips -> turns -> ids and mels -> engine -> answers -> completion, or chunks of one
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from moss_audio_jax.audio import SAMPLE_RATE, model_mel, num_audio_tokens
from moss_audio_jax.inference.engine import Request
from moss_audio_jax.inference.requests import Handle
from moss_audio_jax.inputs import Mel
from moss_audio_jax.prompts import Turn, build_conversation
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.serving.answers import Answers, reply_of
from moss_audio_jax.serving.chat_body import AudioUrlPart, ChatBody, Part, TextPart, read_chat
from moss_audio_jax.serving.errors import ApiError
from moss_audio_jax.serving.events import DONE, Events, EventStream, unless_gone
from moss_audio_jax.serving.media import from_base64, too_large, too_long
from moss_audio_jax.serving.service import Served, Service
from moss_audio_jax.tokenizer import Tokenizer

_FINISH = {"stop": "stop", "length": "length", "loop": "stop"}
_TOKENS_PER_SECOND = 12.5  # of audio

Content = Callable[[], bytes]  # of a clip; called in a thread


async def chat(service: Service, request: HttpRequest) -> Response:
    """Answers a chat."""
    body = await _read(service, request)
    answers, prompt_usage = await unless_gone(request, _begin(service, body))
    made = _Made(service.served(body.model), body, answers, prompt_usage)
    body.messages.clear()  # megabytes of clips
    if body.stream:
        return Events(made.chunks(), answers.cancel)
    try:
        return JSONResponse(await unless_gone(request, made.completion()))
    finally:
        answers.cancel()


async def _read(service: Service, request: HttpRequest) -> ChatBody:
    async with service.body():
        pieces = [piece async for piece in request.stream()]  # `request.body()` would keep it
        return read_chat(b"".join(pieces))


async def _begin(service: Service, body: ChatBody) -> tuple[Answers, Mapping[str, Any]]:
    """Reads the clips, and queues the request; returns its answers and the usage of its prompt."""
    served, n = service.served(body.model), body.n or 1
    if n > service.limits.max_answers:
        raise ApiError(f"n must be at most {service.limits.max_answers}", param="n", code="invalid_value")
    options = _options(service, body)
    place = served.admit(n)
    try:
        contents = await _contents(service, body)
    except BaseException:
        place.leave()
        raise
    usage: dict[str, Any] = {}
    prepare = lambda: _submit(service, served, body, contents, options, usage)  # noqa: E731
    return await service.ask(served, prepare, place.leave), usage


def _options(service: Service, body: ChatBody) -> dict[str, Any]:
    """Returns fields of `Request`, without those of its prompt and its length."""
    default = service.sampling
    sampling = Sampling(
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_k=default.top_k if body.top_k is None else max(body.top_k, 0),
        top_p=default.top_p if body.top_p is None else body.top_p,
        repetition_penalty=default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
    )
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError as error:
        raise ApiError("logit_bias must name ids of tokens", param="logit_bias", code="invalid_value") from error
    return {
        "sampling": sampling,
        "seed": secrets.randbits(63) if body.seed is None else body.seed,
        "stop": body.stop,
        "n": body.n or 1,
        "min_new_tokens": body.min_tokens or 0,
        "logit_bias": bias,
    }


async def _contents(service: Service, body: ChatBody) -> list[tuple[str, Content]]:
    """Returns each clip's field and what reads its bytes; fetches those of URLs."""
    found: list[tuple[str, Content]] = []
    left = service.limits.max_body
    for number, message in enumerate(body.messages):
        for index, part in enumerate(message.content):
            where = f"messages[{number}].content[{index}].{part.type}"
            if isinstance(part, TextPart):
                continue
            if message.role != "user":
                raise ApiError(f"{where} must be in a message of the user", param=where, code="invalid_value")
            if len(found) == service.limits.max_clips:
                most = service.limits.max_clips
                raise ApiError(f"the messages must have at most {most} clips", param=where, code="too_many_clips")
            if isinstance(part, AudioUrlPart):
                content = await service.media.load(part.audio_url.url, f"{where}.url", left, service.in_thread)
                if (left := left - len(content)) < 0:
                    raise too_large(where, service.limits.max_body)
                found.append((f"{where}.url", lambda content=content: content))
            else:
                name, data = f"{where}.data", part.input_audio.data
                found.append((name, lambda data=data, name=name: from_base64(data, name)))
    return found


def _submit(
    service: Service,
    served: Served,
    body: ChatBody,
    contents: Sequence[tuple[str, Content]],
    options: Mapping[str, Any],
    usage: dict[str, Any],
) -> Handle:
    """Decodes the clips, encodes the conversation, and queues the request."""
    config = served.processor.config
    served.check_text("".join(part.text for part in _parts(body) if isinstance(part, TextPart)), "messages")
    mels = _mels(service, served, contents)
    counts = iter([num_audio_tokens(mel.shape[1]) for mel in mels])
    turns = [
        Turn(
            "system" if message.role == "developer" else message.role,
            [part.text if isinstance(part, TextPart) else next(counts) for part in message.content],
        )
        for message in body.messages
    ]
    ids = build_conversation(served.processor.tokenizer, turns, processor=config.processor).ids
    room = served.engine.max_length - len(ids)
    asked = body.max_completion_tokens or body.max_tokens
    if room < max(asked or 1, 1):
        raise ApiError(
            f"the messages have {len(ids):,} tokens, and with an answer of {asked or 1:,} they must have at most "
            f"{served.engine.max_length:,}: give shorter audio or text, or fewer max_completion_tokens",
            param="messages",
            code="context_length_exceeded",
        )
    audio = ids.count(config.processor.audio_token_id)
    usage |= {"prompt_tokens": len(ids), "prompt_tokens_details": {"audio_tokens": audio, "cached_tokens": 0}}
    length = asked or min(service.limits.max_new_tokens, room)
    return served.engine.submit_ids(Request("", max_new_tokens=length, **options), ids, mels)


def _parts(body: ChatBody) -> Iterator[Part]:
    return (part for message in body.messages for part in message.content)


def _mels(service: Service, served: Served, contents: Sequence[tuple[str, Content]]) -> list[Mel]:
    most = min(service.limits.max_audio_seconds, served.engine.max_length / _TOKENS_PER_SECOND)
    mels, left = [], most
    for where, content in contents:
        if left <= 0:
            raise too_long(where, most)
        wave = service.media.wave(content(), where, left)
        left -= len(wave) / SAMPLE_RATE
        mels.append(model_mel(wave, where))
    return mels


class _Made:
    """Objects of OpenAI, made of the answers to a body."""

    def __init__(self, served: Served, body: ChatBody, answers: Answers, prompt_usage: Mapping[str, Any]):
        self._served, self._body, self._answers, self._prompt_usage = served, body, answers, prompt_usage
        self._about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}

    async def completion(self) -> dict[str, Any]:
        """Waits for the answers, and returns them."""
        replies = await self._answers.replies()
        choices = [
            {
                "index": number,
                "message": {
                    "role": "assistant",
                    "content": reply.text,
                    "reasoning_content": reply.reasoning or None,
                    "refusal": None,
                },
                "logprobs": self._logprobs(number, 0),
                "finish_reason": _FINISH[reply.finish_reason],
            }
            for number, reply in enumerate(replies)
        ]
        return {**self._about, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def chunks(self) -> EventStream:
        """Yields the answers as they come."""
        handles = self._answers.handles
        told = [0] * len(handles)  # logprobs
        with_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        for number in range(len(handles)):
            yield self._chunk(number, {"role": "assistant", "content": ""}, with_usage=with_usage)
        async for number, piece in self._answers.pieces():
            reason = None if piece is not None else _FINISH[reply_of(handles[number]).finish_reason]
            kind = "reasoning_content" if piece is not None and piece.kind == "reasoning" else "content"
            delta = {} if piece is None else {kind: piece.text}
            logprobs = self._logprobs(number, told[number])
            told[number] += 0 if logprobs is None else len(logprobs["content"])
            yield self._chunk(number, delta, logprobs, reason, with_usage)
        if with_usage:
            yield {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}
        yield DONE

    def _chunk(
        self,
        number: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        reason: str | None = None,
        with_usage: bool = False,
    ) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if with_usage else {}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _usage(self) -> dict[str, Any]:
        completion = sum(len(handle.drawn(0)) for handle in self._answers.handles)
        total = self._prompt_usage["prompt_tokens"] + completion
        return {**self._prompt_usage, "completion_tokens": completion, "total_tokens": total}

    def _logprobs(self, number: int, begin: int) -> dict[str, Any] | None:
        """Returns the tokens of an answer from number `begin` on, without the one that ends it, with their logprobs."""
        if not self._body.logprobs:
            return None
        handle, tokenizer = self._answers.handles[number], self._served.processor.tokenizer
        drawn = [(token, logprob) for token, logprob in handle.drawn(begin) if token not in handle.eos_ids]
        return {"content": [_token(tokenizer, token, logprob) for token, logprob in drawn], "refusal": None}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.decode_bytes([token], skip_special_tokens=False)
    return {
        "token": content.decode("utf-8", "replace"),
        "bytes": list(content),
        "logprob": max(logprob, -9999.0),
        "top_logprobs": [],
    }
