"""`moss-audio serve`: loads models, warms up their engines, serves them, and ends in order."""

import asyncio
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from moss_audio_jax.commands.interruption import end, stops_on_ctrl_c
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.serving.limits import Limits
from moss_audio_jax.storage.paths import AnyPath, to_path

if TYPE_CHECKING:
    from moss_audio_jax.inference.engine import Engine
    from moss_audio_jax.inference.loading import Loading
    from moss_audio_jax.serving.service import Service

KEY_VARIABLE = "MOSS_AUDIO_API_KEY"
DEFAULT_LENGTH = 8192
_LAST_SECONDS = 5  # for connections that are open after the last answer


@dataclasses.dataclass(frozen=True)
class Serving:
    """Options of the server that are not limits of requests. adapters: NAME=PATH."""

    host: str
    port: int
    name: str | None
    adapters: Sequence[str]
    max_length: int | None
    window: float
    sampling: Sampling
    api_key: str | None
    allow_url_hosts: Sequence[str]
    allow_files: AnyPath | None
    drain_seconds: float
    page: bool


def serve(loading: "Loading", serving: Serving, limits: Limits) -> None:
    """Serves until SIGTERM or Ctrl-C; then answers what is in progress, and ends the process with code 0."""
    require_server()
    from moss_audio_jax.serving.app import make_app

    key = serving.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise MossAudioError("--api-key must be of printable ASCII characters: headers hold no others")
    base = serving.name or to_path(loading.checkpoint).name
    adapters = adapters_by_name(serving.adapters, base)
    listening = bound_socket(serving.host, serving.port)
    service = _service(loading, serving, limits, base, adapters, key)
    app = make_app(service, page=serving.page)
    host = f"[{serving.host}]" if ":" in serving.host else serving.host
    names = ", ".join(service.models)
    print(f"[{names} at http://{host}:{listening.getsockname()[1]}; Ctrl-C ends]", file=sys.stderr, flush=True)
    asyncio.run(_run_and_end(app, service, listening, serving.drain_seconds))


def require_server() -> None:
    """Raises MossAudioError if a library of the extra `serve` is not installed."""
    try:
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MossAudioError(
            f"serving needs {error.name}, which is not installed: pip install 'moss-audio-jax[serve]'"
        ) from error


def adapters_by_name(given: Sequence[str], base: str) -> dict[str, str]:
    """Reads NAME=PATH of each adapter."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not (name and equals and path):
            raise MossAudioError(f"--adapter must be NAME=PATH, not {each!r}")
        if name == base or name in found:
            raise MossAudioError(f"--adapter must give each model a name of its own, not {name!r} again")
        found[name] = path
    return found


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound but does not listen yet, so that nobody waits for a server that loads."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise MossAudioError(
            f"port {port} of {host} can't be used ({getattr(error, 'strerror', None) or error}): give another --port, "
            "or another --host"
        ) from error
    return found


def _service(
    loading: "Loading", serving: Serving, limits: Limits, base: str, adapters: Mapping[str, str], key: str | None
) -> "Service":
    from moss_audio_jax.inference.engine import Engine
    from moss_audio_jax.inference.turns import Turns
    from moss_audio_jax.serving.media import Media
    from moss_audio_jax.serving.service import Service

    processor = loading.processor()
    positions = processor.config.language_config.max_position_embeddings
    length = min(DEFAULT_LENGTH, positions) if serving.max_length is None else serving.max_length
    models = {base: loading.model()}
    for name, path in adapters.items():
        with waiting(f"loading {name}"):
            models[name] = loading.adapted(models[base], path)
    turns, engines = Turns(), dict[str, Engine]()
    for name, model in models.items():
        engines[name] = Engine(
            model, processor, slots=loading.slots, max_length=length, turns=turns, kv_int8=loading.kv_int8
        )
        _warm_up(name, engines[name])
    files = None if serving.allow_files is None else os.fspath(serving.allow_files)
    media = Media(limits, frozenset(host.lower() for host in serving.allow_url_hosts), files)
    return Service(
        engines, processor, limits=limits, media=media, key=key, sampling=serving.sampling, window=serving.window
    )


def _warm_up(name: str, engine: "Engine") -> None:
    told = f"compiling the programs of {name}"

    def tell(done: int, of: int) -> None:
        nonlocal told
        told = f"compiling the programs of {name}, {done} of {of} shapes done"

    with waiting(lambda: told):
        engine.warm_up(tell)


async def _run_and_end(app: Any, service: "Service", listening: socket.socket, drain_seconds: float) -> NoReturn:
    """Serves, and ends the process whatever still waits: for a device, or for the address of a host."""
    await run(app, service, listening, drain_seconds)
    closing = threading.Thread(target=service.close, daemon=True)
    closing.start()
    closing.join(_LAST_SECONDS)
    end(0)


async def run(app: Any, service: "Service", listening: socket.socket, drain_seconds: float) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until the answers in progress have ended, at most `drain_seconds`.

    Meanwhile other requests are refused with 503. Call it in the main thread.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:  # uvicorn's would refuse connections at once
            drain()

    def drain() -> None:
        loop.call_soon_threadsafe(draining.set)

    loop, draining = asyncio.get_running_loop(), asyncio.Event()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_LAST_SECONDS,
        limit_concurrency=2 * service.limits.connections,  # uvicorn says so in plain text, `app` in JSON
    )
    server = Server(config)
    with stops_on_ctrl_c(drain):
        serving = asyncio.ensure_future(server.serve([listening]))
        ending = asyncio.ensure_future(draining.wait())
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        service.draining = True
        try:
            async with asyncio.timeout(drain_seconds):
                while service.requests and not serving.done():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            print(f"[{service.requests} requests had not ended after {drain_seconds:g} s]", file=sys.stderr, flush=True)
        server.should_exit = True
        ending.cancel()
        await serving
