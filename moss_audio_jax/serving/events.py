"""Server-sent events, and clients that leave before their answer has come."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.serving.errors import ApiError, api_error

log = logging.getLogger(__name__)

Result = TypeVar("Result")

EventStream = AsyncGenerator[Mapping[str, Any] | str, None]  # texts as they are; it is closed at the end

DONE = "[DONE]"


class Gone(Exception):
    """The client has closed the connection."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`; cancels it and raises Gone when the client leaves. The body must have been read."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """A stream of events, each a JSON object. An error becomes the last one.

    closed: called at the end, also if the client leaves before the first event.
    """

    def __init__(self, events: EventStream, closed: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._events, self._closed = _lines(events), closed
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._closed()


async def _lines(events: EventStream) -> AsyncGenerator[str, None]:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"
    except Exception as error:
        told = api_error(error)
        if not isinstance(error, ApiError | MossAudioError):
            log.exception("a stream failed")
        yield f"data: {json.dumps(told.content())}\n\n"
