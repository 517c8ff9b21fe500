"""Routes of the endpoint, and what every request passes: draining, the key, the size of its body, the metrics."""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.serving.chat import chat
from moss_audio_jax.serving.errors import ApiError, api_error, unavailable
from moss_audio_jax.serving.events import Gone
from moss_audio_jax.serving.metrics import Metrics
from moss_audio_jax.serving.service import Service
from moss_audio_jax.serving.timelines import timelines
from moss_audio_jax.serving.transcriptions import transcriptions

log = logging.getLogger(__name__)

_LINGER = 5.0  # seconds in which the body of a refused request is read, so that its client sees the answer
_READ = "moss_audio_jax.read"  # in a request's scope: whether its body has been read to the end
_CLOSED_BY_CLIENT = 499  # as nginx counts them; nobody reads it

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def make_app(service: Service, *, page: bool = False) -> Starlette:
    """Makes the ASGI application. page: also serves the page for a browser."""
    routes: list[BaseRoute] = [
        Route("/health", _bound(service, _health), methods=["GET"]),
        Route("/metrics", _bound(service, _metrics), methods=["GET"]),
        Route("/v1/models", _bound(service, _models), methods=["GET"]),
        Route("/v1/models/{name:path}", _bound(service, _model), methods=["GET"]),
        Route("/v1/chat/completions", _bound(service, chat), methods=["POST"]),
        Route("/v1/audio/transcriptions", _bound(service, transcriptions), methods=["POST"]),
        Route("/v1/timelines", _bound(service, timelines), methods=["POST"]),
    ]
    known = frozenset(route.path for route in routes if isinstance(route, Route))
    open_paths = {"/health"}
    if page:
        from moss_audio_jax.serving.page import page_routes

        routes += page_routes()
        open_paths |= {"/", "/page"}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Gate, service=service, open_paths=open_paths, known=known)],
        exception_handlers={HTTPException: _http_error, Exception: _told},
    )
    app.state.service = service
    return app


def _bound(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def bound(request: Request) -> Response:
        try:
            return await endpoint(service, request)
        except HTTPException:
            raise
        except (Gone, ClientDisconnect):
            return Response(status_code=_CLOSED_BY_CLIENT)
        except Exception as error:  # Starlette would answer too, but close the connection
            told = await _told(request, error)
            if told.status_code != 408 and not request.scope.get(_READ):
                await _linger(request.receive)
            return told

    return bound


async def _health(service: Service, request: Request) -> Response:
    trouble = service.trouble()
    return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type=Metrics.content_type)


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service, name) for name in service.models]})


async def _model(service: Service, request: Request) -> Response:
    return JSONResponse(_described(service, service.served(request.path_params["name"]).name))


def _described(service: Service, name: str) -> dict[str, Any]:
    served = service.models[name]
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "moss-audio-jax",
        "max_model_len": served.engine.max_length,
    }


async def _told(request: Request, error: Exception) -> Response:
    told = api_error(error)
    if not isinstance(error, ApiError | MossAudioError):
        log.error("a request failed", exc_info=error)
    return told.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path[:100]!a}"
    messages = {404: f"there is no {path}", 405: f"{path} is not allowed: use another method"}
    return ApiError(messages.get(error.status_code, str(error.detail)), error.status_code).response()


class _Gate:
    """What every request passes on its way in, and its count on its way out.

    open_paths: without a key, and so are those below them. known: paths that the metrics tell apart.
    """

    def __init__(self, app: ASGIApp, *, service: Service, open_paths: set[str], known: frozenset[str]):
        self._app, self._service, self._open, self._known = app, service, open_paths, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        service, begun, status = self._service, time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        service.requests += 1
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, self._limited(scope, receive), noted)
            else:
                await _linger(receive)
                await refusal.response()(scope, receive, noted)
        except asyncio.CancelledError:  # at the end of draining
            if not status:
                await unavailable("the server has shut down").response()(scope, receive, noted)
        finally:
            service.requests -= 1
            path = scope["path"] if scope["path"] in self._known else "other"
            service.metrics.responded(path, status or 500, time.monotonic() - begun)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, path, key = dict(scope["headers"]), scope["path"], self._service.key
        is_open = path in self._open or any(path.startswith(f"{each}/") for each in self._open if each != "/")
        if key is not None and not is_open:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given, key.encode()) or scheme.lower() != b"bearer":
                return ApiError("a valid key must be given as `Authorization: Bearer KEY`", 401, code="invalid_api_key")
        if self._service.requests > self._service.limits.connections:
            return unavailable("the server has as many requests as it takes: try again later")
        if scope["method"] == "POST" and (trouble := self._service.trouble()) is not None:
            return unavailable(trouble)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._service.limits.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        most = self._service.limits.max_body_mb
        return ApiError(f"the body must have at most {most} MB", 413, code="body_too_large")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        seen, most = 0, self._service.limits.max_body

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            before, seen = seen, seen + len(message.get("body", b""))
            scope[_READ] = not message.get("more_body")
            if before <= most < seen:  # only once, so that the rest can be skipped
                raise self._too_large()
            return message

        return limited


async def _linger(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
