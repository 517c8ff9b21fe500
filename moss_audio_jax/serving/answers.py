"""Answers of an engine, as asyncio awaits them: no thread waits for them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.requests import Handle, Reply
from moss_audio_jax.inference.thinking import Piece
from moss_audio_jax.serving.errors import ApiError, unavailable


def reply_of(handle: Handle) -> Reply:
    """Returns an answer that has ended. Raises ApiError if it failed, or was ended from outside."""
    try:
        reply = handle.reply()
    except MossAudioError as error:
        raise ApiError(str(error), 500, code="answer_failed") from error
    if reply.finish_reason == "cancelled":
        raise unavailable("the server ended the answer, as it is shutting down")
    return reply


class Answers:
    """The answers to a request, from its handle.

    done: called in the loop's thread, once all of them have ended. begun: seconds of `time.monotonic` at the request.
    """

    def __init__(
        self, handle: Handle, loop: asyncio.AbstractEventLoop, done: Callable[["Answers"], None], begun: float
    ):
        self.handles = handle.answers
        self.first_piece: float | None = None  # seconds from the request to it
        self._queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        self._end = asyncio.Event()
        self._left, self._done, self._begun = len(self.handles), done, begun
        for number, answer in enumerate(self.handles):
            answer.listen(self._listener(number, loop))

    def _listener(self, number: int, loop: asyncio.AbstractEventLoop) -> Callable[[Piece | None], None]:
        def tell(piece: Piece | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._take, number, piece)

        return tell

    def _take(self, number: int, piece: Piece | None) -> None:
        if self.first_piece is None and piece is not None:
            self.first_piece = time.monotonic() - self._begun
        self._queue.put_nowait((number, piece))
        self._left -= piece is None
        if not self._left:
            self._left = -1  # only once
            self._end.set()
            self._done(self)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """Yields the pieces of all answers as they come, each with its answer's number; None is the end of one."""
        for _ in range(len(self.handles)):
            while True:
                number, piece = await self._queue.get()
                yield number, piece
                if piece is None:
                    break

    async def ended(self) -> None:
        """Waits until all answers have ended."""
        await self._end.wait()

    async def replies(self) -> Sequence[Reply]:
        """Waits for all answers. Raises what went wrong with one."""
        await self.ended()
        return [reply_of(handle) for handle in self.handles]

    def cancel(self) -> None:
        """Ends what has not ended, and frees its slots."""
        self.handles[0].cancel()
