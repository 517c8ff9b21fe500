"""/v1/audio/transcriptions: a recording of any length, window by window, with the seams of `moss-audio transcribe`."""

import bisect
import contextlib
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.recordings import Joiner, Transcript
from moss_audio_jax.inference.requests import Handle
from moss_audio_jax.inference.transcription import Answers as Asking
from moss_audio_jax.inference.windows import SHORTEST_WINDOW, Cutting, Place, Window, cut
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT
from moss_audio_jax.serving.answers import Answers, reply_of
from moss_audio_jax.serving.errors import ApiError
from moss_audio_jax.serving.events import DONE, Events, EventStream, unless_gone
from moss_audio_jax.serving.media import pieces_of
from moss_audio_jax.serving.service import Place as QueuePlace
from moss_audio_jax.serving.service import Served, Service
from moss_audio_jax.serving.transcript import TranscriptionForm, read_form, response, usage


async def transcriptions(service: Service, request: HttpRequest) -> Response:
    """Transcribes a file."""
    async with service.body(), request.form(max_files=1, max_fields=32) as sent:
        form, file = read_form(sent)
        content = await file.read()
    served = service.served(form.model)
    served.check_text(form.context, "prompt")
    place = served.admit()
    try:
        work = _Work(service, served, form, content)
        if form.stream:
            events = await unless_gone(request, _begun(work.events()))
            return Events(events, place.leave)
        found = await unless_gone(request, work.transcripts())
    except BaseException:
        place.leave()
        raise
    place.leave()
    return response(form, found)


async def _begun(events: EventStream) -> EventStream:
    """Returns the events once the first has come, so that a file that can't be read is an error with its status."""
    first = await anext(events)

    async def all_of_them() -> EventStream:
        async with contextlib.aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_of_them()


class _Work:
    """A recording that is transcribed."""

    def __init__(self, service: Service, served: Served, form: TranscriptionForm, content: bytes):
        self._service, self._served, self._form, self._content = service, served, form, content

    async def transcripts(self) -> dict[str, Transcript]:
        """Returns a transcript for each kind of times that is asked for."""
        found: dict[str, Transcript] = {}
        for timestamps in self._form.timestamps:
            joiner = Joiner()
            async with contextlib.aclosing(self._answered(timestamps)) as answered:
                async for place, answers in answered:
                    await _add(joiner, place, answers)
            found[timestamps] = joiner.transcript()
        return found

    async def events(self) -> EventStream:
        """Yields the text as it comes: of a recording of one window piece by piece, of others window by window."""
        (timestamps,), joiner, told = self._form.timestamps, Joiner(), ""
        async with contextlib.aclosing(self._answered(timestamps)) as answered:
            async for place, answers in answered:
                if place.last and not place.begin:
                    async for text in _stripped(answers):
                        told += text
                        yield _delta(text)
                await _add(joiner, place, answers)
                settled = joiner.settled
                if len(settled) > len(told):
                    yield _delta(settled[len(told) :])
                    told = settled
        transcript = joiner.transcript()
        if transcript.text.startswith(told) and transcript.text != told:
            yield _delta(transcript.text[len(told) :])
        yield {"type": "transcript.text.done", "text": transcript.text, "usage": usage(transcript)}
        yield DONE

    async def _answered(self, timestamps: str) -> AsyncGenerator[tuple[Place, Answers], None]:
        """Yields the windows in order, with their answers, which may not have ended.

        One window holds the place of the request; as many others as there are places for are answered meanwhile.
        """
        service, served, limits = self._service, self._served, self._service.limits
        sampling = service.sampling
        if self._form.temperature is not None:
            sampling = dataclasses.replace(sampling, temperature=self._form.temperature)
        fixed = (sampling, self._form.seed, None, "stop")  # time markers as the checkpoint's, no loops
        asking = Asking(timestamps, None, DEFAULT_SYSTEM_PROMPT, None, *fixed, window=service.window)
        seconds = await service.in_thread(lambda: longest_window(served, asking, self._form.context))
        wave = pieces_of(self._content, "file", limits.max_audio_seconds)
        windows, waiting = cut(wave, Cutting.of(seconds)), deque[tuple[Place, Answers]]()
        more = True
        try:
            while True:
                while more and len(waiting) < served.engine.slots:
                    place = _spare_place(served) if waiting else None
                    if waiting and place is None:
                        break
                    begun = await self._begin(windows, asking, place)
                    more = begun is not None
                    if begun is not None:
                        waiting.append(begun)
                if not waiting:
                    return
                yield waiting[0]
                waiting.popleft()
        finally:
            for _, answers in waiting:
                answers.cancel()

    async def _begin(self, windows: Any, asking: Asking, place: QueuePlace | None) -> tuple[Place, Answers] | None:
        """Asks about the next window; None if there is none. place: that is left once the answer has ended."""
        leave = place.leave if place else _nothing
        try:
            window: Window | None = await self._service.in_thread(lambda: next(windows, None))
        except BaseException:
            leave()
            raise
        if window is None:
            leave()
            return None

        def submit() -> Handle:
            request = dataclasses.replace(asking.request(window), context=self._form.context)
            return self._served.engine.submit(request)

        return window.place, await self._service.ask(self._served, submit, leave)


def _nothing() -> None: ...


def _spare_place(served: Served) -> QueuePlace | None:
    try:
        return served.admit()
    except ApiError:
        return None


async def _stripped(answers: Answers) -> AsyncGenerator[str, None]:
    """Yields the text of an answer as it comes, without white space at both ends."""
    begun, held = False, ""
    async for _, piece in answers.pieces():
        if piece is not None and piece.kind == "text":
            held += piece.text
            text = held.rstrip() if begun else held.strip()
            if text:
                begun, held = True, held[len(held.rstrip()) :]
                yield text


async def _add(joiner: Joiner, place: Place, answers: Answers) -> None:
    await answers.ended()
    joiner.add(place, reply_of(answers.handles[0]))


def _delta(text: str) -> dict[str, Any]:
    return {"type": "transcript.text.delta", "delta": text}


def longest_window(served: Served, asking: Asking, context: str) -> float:
    """Returns the longest window whose prompt and answer the engine has room for, in seconds."""
    more = len(served.processor.tokenizer.encode(f"Context: {context}\n"))

    def is_too_long(seconds: float) -> bool:
        try:
            return asking.length(served.processor, seconds) + more > served.engine.max_length
        except MossAudioError:  # more than the model's positions
            return True

    choices = [*range(int(SHORTEST_WINDOW), int(asking.window)), asking.window]
    fitting = bisect.bisect_left(choices, True, key=is_too_long)
    if not fitting:
        raise ApiError(
            f"a window of {SHORTEST_WINDOW:g} s with this prompt and its answer have more than the engine's "
            f"{served.engine.max_length:,} tokens: give a shorter prompt, or restart the server with more --max-length"
        )
    return choices[fitting - 1]
