"""Server that speaks what the page uses, with answers that are made up; timelines are real."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from moss_audio_jax import Timeline
from moss_audio_jax.serving.page import page_routes

SENTENCES = (("[S01]Good morning.", 0.4, 1.3), ("[S02]Is it <b>on</b>?", 1.9, 2.9), ("[S01]It is.", 3.4, 4.4))
SOUNDS = ("[0.50]tone[1.30]", "[2.00]tone[2.80][3.50]tone[4.30]")


@dataclass
class Stub:
    """The server's state. requests: bodies of chats, with their audio decoded; files: those that were transcribed."""

    models: tuple[str, ...] = ("moss",)
    key: str | None = None
    requests: list[Any] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)  # until then an answer stops after its first word
    stopped: threading.Event = field(default_factory=threading.Event)  # the browser hung up

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._keyed(self._models)),
                Route("/v1/chat/completions", self._keyed(self._chat), methods=["POST"]),
                Route("/v1/audio/transcriptions", self._keyed(self._transcribe), methods=["POST"]),
                Route("/v1/timelines", self._keyed(self._timeline), methods=["POST"]),
                *page_routes(),
            ]
        )

    def _keyed(self, endpoint: Any) -> Any:
        async def checked(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, "the key must be the server's")
            return await endpoint(request)

        return checked

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        audio = body["messages"][0]["content"][0]["input_audio"]
        audio["data"] = base64.b64decode(audio["data"])
        self.requests.append(body)
        last = body["messages"][-1]["content"]
        question = last if isinstance(last, str) else last[-1]["text"]
        if question == "busy":
            return _error(429, "there are 8 requests ahead", {"Retry-After": "7"})
        if question == "wrong":
            return _error(400, "the clip must be shorter than 60 s, not 61.0 s: cut it")
        return StreamingResponse(self._events(question), media_type="text/event-stream")

    async def _events(self, question: str) -> AsyncIterator[str]:
        try:
            if question == "think":
                yield _event({"reasoning_content": "Hm, a "})
                yield _event({"reasoning_content": "tone."})
            first, second = SOUNDS if "sounds" in question else ("<i>A</i> ", "tone.")
            yield _event({"content": first})
            if question == "slow":
                while not self.go_on.is_set():
                    await asyncio.sleep(0.01)
            if question == "break":
                yield f"data: {json.dumps({'error': {'message': 'the engine died'}})}\n\n"
                return
            yield _event({"content": second})
            yield _event({}, "length" if question == "long" else "stop")
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.stopped.set()
            raise

    async def _transcribe(self, request: Request) -> Response:
        form = await request.form()
        self.files.append(await form["file"].read())  # type: ignore[union-attr]
        if form.get("stream") == "true":
            return StreamingResponse(self._pieces(), media_type="text/event-stream")
        segments = [
            {"id": i, "start": begin, "end": end, "text": text} for i, (text, begin, end) in enumerate(SENTENCES)
        ]
        words = [{"word": word, "start": i / 2, "end": i / 2 + 0.4} for i, word in enumerate(("Good", "morning"))]
        return JSONResponse(
            {
                "task": "transcribe",
                "language": "en",
                "duration": 5.0,
                "text": " ".join(text for text, _, _ in SENTENCES),
                **({"words": words} if form["timestamp_granularities[]"] == "word" else {"segments": segments}),
            }
        )

    async def _pieces(self) -> AsyncIterator[str]:
        for number, (text, _, _) in enumerate(SENTENCES):
            yield f"data: {json.dumps({'type': 'transcript.text.delta', 'delta': text})}\n\n"
            while number == 0 and not self.go_on.is_set():
                await asyncio.sleep(0.01)
        text = "".join(text for text, _, _ in SENTENCES)
        yield f"data: {json.dumps({'type': 'transcript.text.done', 'text': text})}\n\ndata: [DONE]\n\n"

    async def _timeline(self, request: Request) -> Response:
        body = await request.json()
        timeline = Timeline.parse(body["text"], body["seconds"])
        if body["format"] == "json":
            return JSONResponse(timeline.to_json())
        return PlainTextResponse({"srt": timeline.to_srt, "vtt": timeline.to_vtt}[body["format"]]())


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """Serves an application on a free port of this machine; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server ended at once"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def _event(delta: dict[str, str], reason: str | None = None) -> str:
    chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return f"data: {json.dumps(chunk)}\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)
