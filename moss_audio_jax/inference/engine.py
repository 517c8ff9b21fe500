"""Continuous batching: requests come at any time, and a slot that is free takes the next one at once.

    request -> prompt, in the caller's thread -> queue -> a free slot -> pieces of text, to its handle

One thread runs the devices. It decodes all slots together in a compiled loop, which returns after `every` tokens, or,
while requests wait, as soon as an answer has ended. An answer depends on its request alone.
"""

import collections
import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
from flax import nnx

from moss_audio_jax.audio import num_audio_tokens
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import (
    GREEDY,
    MIN_EOS_IDS,
    Drawing,
    check_request,
    copied_layers,
    decode_answers,
    padded_eos,
    why_not_finite,
)
from moss_audio_jax.inference.slots import admit, empty_slots, prompt_shape, prompt_shapes
from moss_audio_jax.inputs import ModelInputs, bucket, encode_sequence, padded
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import ClipLike, Processor
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT, build_prompt
from moss_audio_jax.sampling import SamplingArrays, row_seeds
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.sharding import on_automatic_mesh, on_host, on_mesh_of
from moss_audio_jax.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A question about clips, and how it is answered.

    text, audio, system_prompt, time_markers: as `Processor` takes them for one prompt.
    eos_ids: the answer stops after any of them; None takes the checkpoint's.
    stop: the answer ends before any of these strings.
    """

    text: str
    audio: Sequence[ClipLike] = ()
    max_new_tokens: int = 1024
    sampling: Sampling = GREEDY
    seed: int = 0
    eos_ids: Sequence[int] | None = None
    stop: Sequence[str] = ()
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    time_markers: bool | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer. ids: all that were drawn. finish_reason: "length" if it was cut off at `max_new_tokens`."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason


class Handle:
    """An answer that is coming. Iterating over it yields its pieces of text, each once."""

    def __init__(self, request: Request, prompt: ModelInputs, eos_ids: tuple[int, ...], processor: Processor):
        self.request, self.prompt, self.eos_ids = request, prompt, eos_ids
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._decoder = StreamDecoder(processor.tokenizer)
        self._ids: list[int] = []
        self._text, self._shown = "", 0
        self._done, self._lock = threading.Event(), threading.RLock()  # both threads may end it
        self._reason: FinishReason | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for the next iteration
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Reply:
        """Waits for the whole answer. Raises TimeoutError after `timeout` seconds, and what went wrong, if it did."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._reason is not None
        return Reply(self._text, tuple(self._ids), self._reason)

    def cancel(self) -> None:
        """Ends the answer with what there is; its slot is free after the next tokens."""
        self.finish("cancelled")

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def feed(self, ids: Sequence[int], *, last: bool) -> None:
        """Takes the next ids, from the engine's thread; ends the answer at a stop string."""
        with self._lock:
            if self.done:
                return
            self._ids += ids
            self._text += self._decoder.feed(ids) + (self._decoder.flush() if last else "")
            found = [index for stop in self.request.stop if (index := self._text.find(stop)) >= 0]
            if found:
                self._text = self._text[: min(found)]
                self.finish("stop")
                return
            # The end of the text may be the beginning of a stop string.
            held_back = 0 if last else max(map(len, self.request.stop), default=1) - 1
            self._show(len(self._text) - held_back)
            if last:
                self.finish("stop" if self._ids[-1] in self.eos_ids else "length")

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        with self._lock:
            if self.done:
                return
            self._show(len(self._text))
            self._reason, self._error = reason, error
            self._done.set()
            self._pieces.put(None)

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._pieces.put(self._text[self._shown : end])
            self._shown = end


class Engine:
    """Answers many requests at once; may be called from any number of threads.

    slots: answers in progress at most. max_length: tokens of a prompt and its answer at most; keys and values take
    slots * max_length * 2 * layers * key-value heads * head size. every: tokens between two pieces of a stream.
    Close it, or use it as a context manager: `with moss.Engine(model, processor) as engine:`.
    """

    def __init__(
        self, model: MossAudio, processor: Processor, *, slots: int = 16, max_length: int = 4096, every: int = 8
    ):
        limit = model.config.language_config.max_position_embeddings
        for name, value, most in (("slots", slots, None), ("max_length", max_length, limit), ("every", every, None)):
            if value < 1 or (most is not None and value > most):
                allowed = "1 or more" if most is None else f"1 to the model's {most:,} positions"
                raise MossAudioError(f"{name} of an engine must be {allowed}, not {value}")
        self._model, self._processor = model, processor
        self._max_length, self._every = max_length, every
        graphdef, state = nnx.split(model)
        self._graphdef, self._state = graphdef, on_automatic_mesh(state)
        self._shapes = prompt_shapes(model.config, max_length)
        dtype = model.language_model.embed_tokens.embedding.dtype
        with on_mesh_of(self._state):
            self._answers = empty_slots(model.config, slots, max_length, max_length, dtype)
            self._layers = copied_layers(self._graphdef, self._state)
        self._handles: list[Handle | None] = [None] * slots
        self._samplings = [GREEDY] * slots
        self._seeds = np.zeros((slots, 2), np.uint32)
        self._eos_ids = np.full((slots, MIN_EOS_IDS), -1, np.int32)
        self._limits = np.zeros(slots, np.int32)
        self._read = np.zeros(slots, np.int32)  # tokens of each answer that its handle has
        self._waiting: collections.deque[Handle] = collections.deque()
        self._changed = threading.Condition()
        self._closed: str | None = None
        self._thread = threading.Thread(target=self._work, name="moss-audio engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(self, request: Request) -> Handle:
        """Reads the clips and encodes the prompt, in the calling thread, and queues the request.

        Raises MossAudioError for a request that can't be answered.
        """
        handle = self._handle(request)
        with self._changed:
            if self._closed is not None:
                raise MossAudioError(f"the engine is closed ({self._closed}): make another one")
            self._waiting.append(handle)
            self._changed.notify()
        return handle

    def run(self, requests: Iterable[Request]) -> list[Reply]:
        """Answers requests, and returns the replies in their order."""
        handles = [self.submit(request) for request in requests]
        return [handle.result() for handle in handles]

    def warm_up(self) -> None:
        """Compiles all programs. Call it before the first request; otherwise each compiles when it is needed first."""
        with self._changed:
            if self._waiting or any(self._handles):
                raise MossAudioError("the engine has requests: warm it up before the first")
            config = self._model.config
            for tokens, chunks in self._shapes:
                self._admit(0, padded(encode_sequence([0], [], config), tokens, chunks))
                self._limits[0] = 0
                self._decode(steps=1)

    def close(self) -> None:
        """Ends all answers as cancelled, and frees the thread."""
        with self._changed:
            self._closed = self._closed or "by close()"
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _handle(self, request: Request) -> Handle:
        processor, config = self._processor, self._model.config
        mels = [processor.mel(clip) for clip in request.audio]
        ids = build_prompt(
            processor.tokenizer,
            request.text,
            [num_audio_tokens(mel.shape[1]) for mel in mels],
            system_prompt=request.system_prompt,
            time_markers=request.time_markers,
            processor=config.processor,
        )
        prompt = encode_sequence(ids, mels, config)
        check_request(config, prompt, request.max_new_tokens, request.seed)
        if len(ids) + request.max_new_tokens > self._max_length:
            raise MossAudioError(
                f"a prompt of {len(ids):,} tokens and max_new_tokens={request.max_new_tokens:,} are more than the "
                f"engine's max_length of {self._max_length:,}: give shorter audio, fewer new tokens, or make an engine "
                "with a larger max_length"
            )
        eos_ids = tuple(config.eos_ids if request.eos_ids is None else request.eos_ids)
        return Handle(request, padded(prompt, *prompt_shape(self._shapes, prompt)), eos_ids, processor)

    # The thread

    def _work(self) -> None:
        try:
            while self._next_requests():
                self._decode(self._every, until_one_stops=bool(self._waiting))
                self._deliver()
        except Exception as error:  # each caller gets it
            self._close_with(error)
        else:
            self._close_with(None)

    def _next_requests(self) -> bool:
        """Puts waiting requests into free slots; waits if there is nothing to do. Returns False when closed."""
        with self._changed:
            while self._closed is None and not self._waiting and not any(self._handles):
                self._changed.wait()
            if self._closed is not None:
                return False
            admitted = []
            for slot in (slot for slot, handle in enumerate(self._handles) if handle is None):
                while self._waiting and self._waiting[0].done:  # cancelled
                    self._waiting.popleft()
                if self._waiting:
                    self._handles[slot] = handle = self._waiting.popleft()
                    admitted.append((slot, handle))
        for slot, handle in admitted:
            request = handle.request
            self._samplings[slot], self._limits[slot] = request.sampling, request.max_new_tokens
            self._seeds[slot], self._read[slot] = row_seeds(1, request.seed, None)[0], 0
            self._set_eos_ids(slot, handle.eos_ids)
            self._admit(slot, handle.prompt)
        return True

    def _set_eos_ids(self, slot: int, eos_ids: Sequence[int]) -> None:
        size = bucket(len(eos_ids), self._eos_ids.shape[1])
        widths = ((0, 0), (0, size - self._eos_ids.shape[1]))
        self._eos_ids = np.pad(self._eos_ids, widths, constant_values=-1)
        self._eos_ids[slot] = padded_eos(eos_ids, size)

    def _admit(self, slot: int, prompt: ModelInputs) -> None:
        with on_mesh_of(self._state):
            self._answers = admit(self._graphdef, self._state, self._answers, prompt, np.int32(slot))

    def _decode(self, steps: int, until_one_stops: bool = False) -> None:
        drawing = Drawing(
            SamplingArrays.of(*self._samplings), self._seeds, self._eos_ids, self._limits, np.zeros_like(self._limits)
        )
        with on_mesh_of(self._state):
            self._answers = decode_answers(
                self._graphdef,
                self._state,
                self._layers,
                self._answers,
                drawing,
                np.int32(steps),
                np.bool_(until_one_stops),
            )

    def _deliver(self) -> None:
        """Gives each handle its new tokens, and frees the slots of the answers that have ended."""
        answers = self._answers
        tokens, counts, stopped, finite = map(
            on_host, (answers.tokens, answers.counts, answers.stopped, answers.finite)
        )
        for slot, handle in enumerate(self._handles):
            if handle is None:
                continue
            begin, end = self._read[slot], counts[slot]
            if not finite[slot]:
                error = MossAudioError(why_not_finite(self._model, slot, int(end)))
                handle.finish("cancelled", error)
            elif end > begin:
                handle.feed(tokens[slot, begin:end].tolist(), last=bool(stopped[slot]))
            self._read[slot] = end
            if stopped[slot]:
                self._handles[slot] = None
            elif handle.done:  # cancelled, or at a stop string: it ends at its next token
                self._limits[slot] = 0

    def _close_with(self, error: Exception | None) -> None:
        with self._changed:
            self._closed = self._closed or f"after {type(error).__name__}: {error}"
            left = [*self._waiting, *(handle for handle in self._handles if handle is not None)]
            self._waiting.clear()
        for handle in left:
            handle.finish("cancelled", error)
