"""Models by name, each an engine; the bound of their queues; threads that decode; and the end of all."""

import asyncio
import contextlib
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from moss_audio_jax.errors import shown
from moss_audio_jax.inference.engine import Engine
from moss_audio_jax.inference.requests import Handle
from moss_audio_jax.processor import Processor
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.serving.answers import Answers
from moss_audio_jax.serving.errors import ApiError, unavailable
from moss_audio_jax.serving.limits import Limits
from moss_audio_jax.serving.media import Media
from moss_audio_jax.serving.metrics import Metrics

Result = TypeVar("Result")

_LONGEST_TOKEN = 128  # characters: spaces, in Qwen's vocabulary
_MOST_MARKS = 100  # on a letter; putting them in order, as NFC does, takes quadratic time. Unicode advises 30 at most
_LONGEST_RETRY = 60  # seconds that a client is told to wait


class Place:
    """A place of `answers` answers among those of a model, until it is left."""

    def __init__(self, served: "Served", answers: int):
        self._served, self._answers = served, answers
        served.held += answers

    def leave(self) -> None:
        self._served.held -= self._answers
        self._answers = 0


@dataclass
class Served:
    """A model that is served. held: answers that are in progress or wait. seconds: of the last answers, about."""

    name: str
    engine: Engine
    processor: Processor
    queue: int
    created: int = field(default_factory=lambda: int(time.time()))
    held: int = 0
    seconds: float = 1.0

    def admit(self, answers: int = 1) -> Place:
        """Takes a place for answers. Raises ApiError, 429, if the queue is full, and 503 once the engine has ended."""
        if self.engine.closed is not None:
            raise unavailable(f"the engine of {self.name} has ended: restart the server", None)
        if answers > (most := self.engine.slots + self.queue):
            raise ApiError(f"n must be at most {most} on this server", param="n", code="invalid_value")
        if self.held + answers > most:
            raise overloaded(self.seconds * self.held / self.engine.slots)
        return Place(self, answers)

    def check_text(self, text: str, where: str) -> None:
        """Raises ApiError for a text that is far too long, or takes too long to encode. where: its field."""
        if len(text) > _LONGEST_TOKEN * self.engine.max_length:
            raise ApiError(
                f"{where} has {len(text):,} characters, more than the {self.engine.max_length:,} tokens of a request "
                "can hold: give a shorter text",
                param=where,
                code="context_length_exceeded",
            )
        marks = 0
        for character in "" if text.isascii() else text:
            marks = marks + 1 if unicodedata.combining(character) else 0
            if marks > _MOST_MARKS:
                message = f"{where} has a letter with more than {_MOST_MARKS} combining marks: remove them"
                raise ApiError(message, param=where, code="invalid_value")


def overloaded(seconds: float) -> ApiError:
    return ApiError(
        "the server has as many requests as it takes: try again later",
        429,
        code="overloaded",
        retry_after=max(1, min(_LONGEST_RETRY, round(seconds))),
    )


class Service:
    """What the routes share.

    models: by name, the base first; engines that are warm. key: that requests must have; None: none.
    sampling: of requests that do not say. window: seconds of a recording that are transcribed at once, at most.
    """

    def __init__(
        self,
        models: Mapping[str, Engine],
        processor: Processor,
        *,
        limits: Limits | None = None,
        media: Media | None = None,
        key: str | None = None,
        sampling: Sampling | None = None,
        window: float = 300.0,
    ):
        self.limits = limits = limits or Limits()
        self.media, self.key = media or Media(limits), key
        self.sampling, self.window = sampling or Sampling(), window
        self.metrics = Metrics()
        self.models = {name: Served(name, engine, processor, limits.queue) for name, engine in models.items()}
        for name, served in self.models.items():
            engine = served.engine
            self.metrics.watch(name, engine.slots, lambda e=engine: e.busy, lambda e=engine: e.waiting)
        self.draining = False
        self.requests = 0  # in progress
        self._bodies = 0
        self._readers = ThreadPoolExecutor(limits.readers, thread_name_prefix="reader")

    def served(self, name: str) -> Served:
        if name not in self.models:
            names = ", ".join(self.models)
            message = f"model must be one of {names}, not {shown(name)}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        return self.models[name]

    def trouble(self) -> str | None:
        """Says why requests are refused now, if they are."""
        if self.draining:
            return "the server is shutting down"
        ended = [served.name for served in self.models.values() if served.engine.closed is not None]
        return f"the engine of {ended[0]} has ended: restart the server" if ended else None

    @contextlib.asynccontextmanager
    async def body(self) -> AsyncIterator[None]:
        """Holds one of as many bodies as may be read at the same time, for as long as a body may take."""
        if self._bodies >= sum(served.engine.slots + served.queue for served in self.models.values()):
            raise overloaded(1)
        self._bodies += 1
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                yield
        except TimeoutError as error:
            message = f"the body must come within {self.limits.body_seconds:g} s"
            raise ApiError(message, 408, code="timeout") from error
        finally:
            self._bodies -= 1

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Runs work in one of the threads that decode clips."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def ask(self, served: Served, prepare: Callable[[], Handle], done: Callable[[], None]) -> Answers:
        """Begins answers. prepare: reads what is needed and submits the request, in another thread.

        done: called once, when the answers have ended or have not begun, also if this is cancelled.
        """
        loop, begun = asyncio.get_running_loop(), time.monotonic()

        def ended(answers: Answers) -> None:
            served.seconds += 0.2 * (time.monotonic() - begun - served.seconds)
            self.metrics.answered(served.name, answers)
            done()

        future: Future[Answers] = self._readers.submit(lambda: Answers(prepare(), loop, ended, begun))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.cancel()
            future.add_done_callback(lambda future: _abandon(future, loop, done))
            raise
        except BaseException:
            done()
            raise

    def close(self) -> None:
        """Ends what is left, and the engines."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        for served in self.models.values():
            served.engine.close()


def _abandon(future: Future[Answers], loop: asyncio.AbstractEventLoop, done: Callable[[], None]) -> None:
    """Ends answers that nobody waits for any more; called in any thread, once the future is done."""
    if future.cancelled() or future.exception() is not None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(done)
    else:
        future.result().cancel()
