"""Continuous batching: requests come at any time, and a slot that is free takes the next one at once.

    request -> prompt, in the caller's thread -> queue -> a free slot -> pieces of text, to its handle

One thread runs the devices. It decodes all slots together in a compiled loop, which returns after `every` tokens, or,
while requests wait, as soon as an answer has ended. An answer depends on its request alone.
"""

import bisect
import collections
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
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
from moss_audio_jax.inference.prefixes import Prefixes
from moss_audio_jax.inference.requests import FinishReason as FinishReason
from moss_audio_jax.inference.requests import Handle, Prompt, no_steering, steer
from moss_audio_jax.inference.requests import Reply as Reply
from moss_audio_jax.inference.requests import Request as Request
from moss_audio_jax.inference.sessions import Session
from moss_audio_jax.inference.slots import (
    QUESTION_PIECES,
    ReadPrompts,
    empty_slots,
    insert,
    newest,
    prompt_shape,
    prompt_shapes,
    question_pieces,
    read_on,
    read_prompts,
    widen,
)
from moss_audio_jax.inference.thinking import opens_thought
from moss_audio_jax.inference.turns import Turns
from moss_audio_jax.inputs import Mel, ModelInputs, bucket, encode_sequence, padded
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import ClipLike, Processor
from moss_audio_jax.prompts import build_prompt
from moss_audio_jax.sampling import SamplingArrays, row_seeds
from moss_audio_jax.sharding import mesh_of, num_parts, on_automatic_mesh, on_host, on_mesh_of


class Engine:
    """Answers many requests at once; may be called from any number of threads.

    slots: answers in progress at most. max_length: tokens of a prompt and its answer at most; keys and values take
    slots * max_length * 2 * layers * key-value heads * head size. every: tokens between two pieces of a stream.
    prompts: read together, each group filled up to this number; None takes the number of data-parallel parts of the
    model's mesh. Clips of `reuse` are read one by one.
    prefix_bytes: memory for what was read of clips that further requests may ask about (`Request.reuse`, `listen`); the
    least recently used is dropped first.
    kv_int8: keys and values are rounded to int8, with a float32 scale for each token of a head (`Int8Slots`).
    turns: shared by engines on the same devices, which then use them one at a time.
    Close it, or use it as a context manager: `with moss.Engine(model, processor) as engine:`.
    """

    def __init__(
        self,
        model: MossAudio,
        processor: Processor,
        *,
        slots: int = 16,
        max_length: int = 4096,
        every: int = 8,
        prompts: int | None = None,
        prefix_bytes: int = 2**30,
        kv_int8: bool = False,
        turns: Turns | None = None,
    ):
        limit = model.config.language_config.max_position_embeddings
        mesh = mesh_of(nnx.state(model))
        prompts = (1 if mesh is None else num_parts("batch", mesh)) if prompts is None else prompts
        most_of = {"slots": (slots, None), "max_length": (max_length, limit)}
        most_of |= {"every": (every, None), "prompts": (prompts, None)}
        for name, (value, most) in most_of.items():
            if value < 1 or (most is not None and value > most):
                allowed = "1 or more" if most is None else f"1 to the model's {most:,} positions"
                raise MossAudioError(f"{name} of an engine must be {allowed}, not {value}")
        self._model, self._processor = model, processor
        self.slots, self.max_length, self._every = slots, max_length, every
        graphdef, state = nnx.split(model)
        self._graphdef, self._state = graphdef, on_automatic_mesh(state)
        self._shapes = prompt_shapes(model.config, max_length)
        dtype = model.language_model.embed_tokens.embedding.dtype
        with on_mesh_of(self._state):
            self._answers = empty_slots(
                model.config, slots, max_length, max_length, dtype, np.int8 if kv_int8 else None
            )
            self._layers = copied_layers(self._graphdef, self._state)
        self._prompts, self._prefixes = prompts, Prefixes(prefix_bytes)
        self._just_read: tuple[Prompt, ReadPrompts, int] | None = None  # its row, while further answers are to begin
        self._handles: list[Handle | None] = [None] * slots
        self._samplings = [GREEDY] * slots
        self._seeds = np.zeros((slots, 2), np.uint32)
        self._eos_ids = np.full((slots, MIN_EOS_IDS), -1, np.int32)
        self._limits = np.zeros(slots, np.int32)
        self._steering = no_steering(slots, processor.tokenizer)
        self._as_drawn = np.zeros(slots, bool)
        self._read_by_handle = np.zeros(slots, np.int32)  # tokens of each answer that its handle has
        self._waiting: collections.deque[Handle] = collections.deque()
        self._changed = threading.Condition()
        self._closed: str | None = None
        self._turns = turns or Turns()
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
        return self.submit_mels(request, [self._processor.mel(clip) for clip in request.audio])

    def submit_mels(self, request: Request, mels: Sequence[Mel]) -> Handle:
        """Queues a request whose clips are given as mels; those of the request are not read."""
        ids = build_prompt(
            self._processor.tokenizer,
            request.asked,
            [num_audio_tokens(mel.shape[1]) for mel in mels],
            system_prompt=request.system_prompt,
            time_markers=request.time_markers,
            processor=self._model.config.processor,
        )
        return self.submit_ids(request, ids, mels)

    def submit_ids(self, request: Request, ids: Sequence[int], mels: Sequence[Mel]) -> Handle:
        """Queues a request whose prompt is encoded already: its own text, clips and system prompt are not read."""
        return self.submit_all([(request, ids, mels)])[0]

    def submit_all(self, requests: Iterable[tuple[Request, Sequence[int], Sequence[Mel]]]) -> list[Handle]:
        """Queues requests, encoded as for `submit_ids`, at once, so that what the engine does depends on them alone.

        Hence several processes that share the model's mesh may each have an engine of their own: they submit the same,
        and no more before all of it is answered.
        """
        firsts = [self._handle(request, ids, mels) for request, ids, mels in requests]
        with self._changed:
            if self._closed is not None:
                raise MossAudioError(f"the engine is closed ({self._closed}): make another one")
            still = [handle for handle in self._waiting if not handle.done]  # without those that were cancelled
            self._waiting = collections.deque([*still, *(handle for first in firsts for handle in first.answers)])
            self._changed.notify()
        return firsts

    def _handle(self, request: Request, ids: Sequence[int], mels: Sequence[Mel]) -> Handle:
        """Makes the handle of the first answer to a request."""
        prompt = self._prompt(request, list(ids), mels)
        config, tokenizer = self._model.config, self._processor.tokenizer
        eos_ids = tuple(config.eos_ids if request.eos_ids is None else request.eos_ids)
        others = [Handle(request, prompt, eos_ids, tokenizer, number) for number in range(1, request.n)]
        return Handle(request, prompt, eos_ids, tokenizer, 0, others)

    @property
    def closed(self) -> str | None:
        """Why it takes no requests: by `close`, or after an error; None while it takes them."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        with self._changed:
            return sum(not handle.done for handle in self._waiting)

    @property
    def busy(self) -> int:
        """Slots in use."""
        return sum(handle is not None for handle in self._handles)

    def run(self, requests: Iterable[Request]) -> list[Reply]:
        """Answers requests, and returns the replies in their order."""
        handles = [self.submit(request) for request in requests]
        return [handle.result() for handle in handles]

    def listen(self, *audio: ClipLike, **options: Any) -> Session:
        """Reads clips, for any number of questions about them. options: the other fields of each `Request`."""
        return Session(self, [self._processor.mel(clip) for clip in audio], options)

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Compiles all programs. Call it before the first request; otherwise each compiles when it is needed first.

        progress: called with the number of prompt shapes that are done, and of all.
        """
        with self._changed:
            if self._waiting or any(self._handles):
                raise MossAudioError("the engine has requests: warm it up before the first")
            sequence = encode_sequence([0], [], self._model.config)
            pieces = QUESTION_PIECES[: bisect.bisect_left(QUESTION_PIECES, self.max_length) + 1]
            for number, (tokens, chunks) in enumerate(self._shapes):
                one = padded(sequence, tokens, chunks)
                self._insert(self._read(_joined([one] * self._prompts)), [0] * self._prompts, [0] * self._prompts)
                if chunks:  # clips that are read apart from questions, one by one
                    for piece in pieces if number == 1 else pieces[:1]:
                        self._insert(self._read_on(self._read(one), [0] * piece), [0], [0])
                progress(number + 1, len(self._shapes))
            self._limits[0] = 0
            self._decode(steps=1)
            self._newest()

    def close(self) -> None:
        """Ends all answers as cancelled, and frees the thread."""
        with self._changed:
            self._closed = self._closed or "by close()"
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _prompt(self, request: Request, ids: list[int], mels: Sequence[Mel]) -> Prompt:
        """Checks a request, and arranges what is read for it."""
        config = self._model.config
        whole = encode_sequence(ids, mels, config)
        check_request(config, whole, request.max_new_tokens, request.seed)
        request.check(self._processor)
        if len(ids) + request.max_new_tokens > self.max_length:
            raise MossAudioError(
                f"a prompt of {len(ids):,} tokens and max_new_tokens={request.max_new_tokens:,} are more than the "
                f"engine's max_length of {self.max_length:,}: give shorter audio, fewer new tokens, or make an engine "
                "with a larger max_length"
            )
        opened = opens_thought(self._processor.tokenizer, ids)
        cut, key = 0, b""
        if request.reuse and mels:
            cut = len(ids) - ids[::-1].index(config.processor.audio_end_id)
            digest = hashlib.sha256(np.asarray(ids[:cut], np.int64).tobytes())
            for mel in mels:
                digest.update(mel.tobytes())
            key, whole = digest.digest(), encode_sequence(ids[:cut], mels, config)
        inputs = padded(whole, *prompt_shape(self._shapes, whole))
        return Prompt(inputs, ids[cut:] if cut else (), key, opened, request.n)

    # The thread

    def _work(self) -> None:
        try:
            while self._requests_came():
                with self._turns:
                    self._begin(self._admitted())
                    self._decode(self._steps(), until_one_stops=bool(self._waiting))
                    self._deliver()
        except Exception as error:  # each caller gets it
            self._close_with(error)
        else:
            self._close_with(None)

    def _steps(self) -> int:
        """Returns the number of tokens to draw before the next are delivered: a first one is at once."""
        in_use = np.array([handle is not None for handle in self._handles])
        return 1 if (in_use & (self._read_by_handle == 0)).any() else self._every

    def _requests_came(self) -> bool:
        """Waits while there is nothing to do. Returns False when closed."""
        with self._changed:
            while self._closed is None and not self._waiting and not any(self._handles):
                self._changed.wait()
            return self._closed is None

    def _admitted(self) -> list[tuple[int, Handle]]:
        """Puts waiting requests into free slots, and returns them."""
        with self._changed:
            admitted = []
            for slot in (slot for slot, handle in enumerate(self._handles) if handle is None):
                while self._waiting and self._waiting[0].done:  # cancelled
                    self._waiting.popleft()
                if self._waiting:
                    self._handles[slot] = handle = self._waiting.popleft()
                    admitted.append((slot, handle))
        return admitted

    def _begin(self, admitted: list[tuple[int, Handle]]) -> None:
        """Reads prompts, each once for all answers to it that begin, and begins them in slots."""
        by_prompt: dict[int, tuple[Prompt, list[int]]] = {}
        for slot, handle in admitted:
            self._set_options(slot, handle)
            by_prompt.setdefault(id(handle.prompt), (handle.prompt, []))[1].append(slot)
        shapes: dict[tuple[int, int], list[tuple[Prompt, list[int]]]] = collections.defaultdict(list)
        for prompt, slots in by_prompt.values():
            if self._just_read is not None and self._just_read[0] is prompt:
                self._begin_answers(self._just_read[1], {self._just_read[2]: (prompt, slots)})
            elif self._prompts == 1 or prompt.question:
                self._begin_answers(self._read_whole(prompt), {0: (prompt, slots)})
            else:
                shapes[prompt.inputs.tokens.shape[1], prompt.inputs.audio_chunks.shape[1]].append((prompt, slots))
        for group in shapes.values():
            for start in range(0, len(group), self._prompts):
                few = group[start : start + self._prompts]
                inputs = [prompt.inputs for prompt, _ in few]
                inputs += inputs[-1:] * (self._prompts - len(few))
                self._begin_answers(self._read(_joined(inputs)), dict(enumerate(few)))

    def _begin_answers(self, read: ReadPrompts, rows: Mapping[int, tuple[Prompt, list[int]]]) -> None:
        """Begins answers in slots. rows: row of what was read -> its prompt, and the slots of answers to it.

        Keeps what was read while further answers are to begin: requests wait in order, so they are to one prompt.
        """
        for row, (prompt, slots) in rows.items():
            prompt.answers -= len(slots)
            if prompt.answers:
                self._just_read = prompt, read, row
            elif self._just_read is not None and self._just_read[0] is prompt:
                self._just_read = None
        pairs = [(slot, row) for row, (_, slots) in rows.items() for slot in slots]
        size = len(read.hidden)  # as many at a time as prompts are read: one program
        for start in range(0, len(pairs), size):
            few = pairs[start : start + size]
            few += few[-1:] * (size - len(few))
            self._insert(read, [slot for slot, _ in few], [row for _, row in few])

    def _set_options(self, slot: int, handle: Handle) -> None:
        request = handle.request
        self._samplings[slot], self._limits[slot] = request.sampling, request.max_new_tokens
        self._seeds[slot], self._read_by_handle[slot] = row_seeds(handle.number + 1, request.seed, None)[-1], 0
        self._set_eos_ids(slot, handle.eos_ids)
        self._as_drawn[slot] = request.logprobs == "drawn"
        steer(self._steering, slot, request, handle.prompt.opened)

    def _read_whole(self, prompt: Prompt) -> ReadPrompts:
        if not prompt.question:
            return self._read(prompt.inputs)
        before = self._prefixes.get(prompt.key)
        if before is None:
            before = self._read(prompt.inputs)
            self._prefixes.put(prompt.key, before)
        return self._read_on(before, prompt.question)

    def _set_eos_ids(self, slot: int, eos_ids: Sequence[int]) -> None:
        size = bucket(len(eos_ids), self._eos_ids.shape[1])
        widths = ((0, 0), (0, size - self._eos_ids.shape[1]))
        self._eos_ids = np.pad(self._eos_ids, widths, constant_values=-1)
        self._eos_ids[slot] = padded_eos(eos_ids, size)

    def _read(self, inputs: ModelInputs) -> ReadPrompts:
        with on_mesh_of(self._state):
            return read_prompts(self._graphdef, self._state, inputs)

    def _read_on(self, before: ReadPrompts, ids: Sequence[int]) -> ReadPrompts:
        with on_mesh_of(self._state):
            read, done = widen(before, self.max_length), 0
            for size in question_pieces(len(ids)):
                piece = np.array(ids[done : done + size], np.int32)
                tokens, done = np.pad(piece, (0, size - len(piece)))[None], done + size
                read = read_on(self._graphdef, self._state, read, tokens, np.array([len(piece)], np.int32))
            return read

    def _insert(self, read: ReadPrompts, slots: list[int], rows: list[int]) -> None:
        with on_mesh_of(self._state):
            self._answers = insert(self._answers, read, np.array(slots, np.int32), np.array(rows, np.int32))

    def _decode(self, steps: int, until_one_stops: bool = False) -> None:
        drawing = Drawing(
            SamplingArrays.of(*self._samplings),
            self._seeds,
            self._eos_ids,
            self._limits,
            np.zeros_like(self._limits),
            self._steering,
            self._as_drawn,
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

    def _newest(self) -> tuple[np.ndarray, np.ndarray]:
        """Fetches the ids and logprobs that the handles lack: at most `every` of each answer, not all of them."""
        with on_mesh_of(self._state):
            tokens, logprobs = newest(self._answers, self._read_by_handle, self._every)
        return on_host(tokens), on_host(logprobs)

    def _deliver(self) -> None:
        """Gives each handle its new tokens, and frees the slots of the answers that have ended."""
        answers = self._answers
        tokens, logprobs = self._newest()
        counts, stopped, finite = map(on_host, (answers.counts, answers.stopped, answers.finite))
        for slot, handle in enumerate(self._handles):
            if handle is None:
                continue
            begin, end = self._read_by_handle[slot], counts[slot]
            if not finite[slot]:
                error = MossAudioError(why_not_finite(self._model, slot, int(end)))
                handle.finish("cancelled", error)
            elif end > begin:
                new = slice(end - begin)
                handle.feed(tokens[slot, new].tolist(), logprobs[slot, new].tolist(), last=bool(stopped[slot]))
            self._read_by_handle[slot] = end
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


def _joined(inputs: Sequence[ModelInputs]) -> ModelInputs:
    """Makes one batch of several of the same shape."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *inputs)
