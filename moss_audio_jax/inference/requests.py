"""A request, its reply, and the handle of one that is coming."""

import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import GREEDY
from moss_audio_jax.inference.thinking import HAND_OVER, Piece, ThoughtSplitter, require_thought_ids, thought_ids
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.processor import ClipLike, Processor
from moss_audio_jax.prompts import AUDIO_SPAN, DEFAULT_SYSTEM_PROMPT
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.steering import IGNORE, MAX_BIASED, NO_BUDGET, STOP, WARM, Steering
from moss_audio_jax.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "loop", "cancelled"]
Loops = Literal["ignore", "stop", "warm"]
_LOOPS = {"ignore": IGNORE, "stop": STOP, "warm": WARM}


@dataclasses.dataclass(frozen=True)
class Request:
    """A question about clips, and how it is answered.

    text, audio, system_prompt, time_markers: as `Processor` takes them for one prompt.
    eos_ids: the answer stops after any of them; None takes the checkpoint's.
    stop: the answer's text ends before any of these strings. They are not looked for in a thought.
    n: number of answers. Answer i is that of `seed` + i.
    min_new_tokens: no end token is drawn before the answer has as many.
    logit_bias: id -> what is added to its logit, for up to 64 ids; -1e9 forbids it.
    loops: what to do about an answer that repeats itself (`steering.MAX_PERIOD`): "ignore" it, "stop", or draw the rest
        of it at a temperature of at least 1 ("warm") and stop at a second loop.
    thinking_budget: tokens after which an open thought is ended, and the answer follows. None: no limit.
    context: what is known about the clips; hot_words: names and terms that may occur. See `asked`.
    reuse: reads the clips apart from the question, and keeps what was read for other requests about the same clips.
    logprobs: of `Reply.logprobs`: by the model's own logits ("model"), or as the ids were drawn, after temperature,
        top-k, top-p, penalty and bias ("drawn").
    whole: the text comes in one piece at the end, which takes the engine less time. Without `stop`.
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
    n: int = 1
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    loops: Loops = "ignore"
    thinking_budget: int | None = None
    context: str = ""
    hot_words: Sequence[str] = ()
    reuse: bool = False
    logprobs: Literal["model", "drawn"] = "model"
    whole: bool = False

    @property
    def asked(self) -> str:
        """The question with context and hot words before it: "Context: ...", "These words may occur: a, b." in lines.

        Raises MossAudioError if `text` is a whole prompt.
        """
        hints = [f"Context: {self.context}"] if self.context else []
        hints += [f"These words may occur: {', '.join(self.hot_words)}."] if self.hot_words else []
        if hints and AUDIO_SPAN.search(self.text):
            raise MossAudioError(
                "context and hot_words can't be put into a whole prompt with audio spans: write them in"
            )
        return "\n".join([*hints, self.text])

    def check(self, processor: Processor) -> None:
        """Raises MossAudioError for options that can't be met."""
        vocab = processor.config.language_config.vocab_size
        if self.n < 1:
            raise MossAudioError(f"n must be 1 answer or more, not {self.n}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise MossAudioError(
                f"min_new_tokens must be 0 to max_new_tokens={self.max_new_tokens:,}, not {self.min_new_tokens}"
            )
        if len(self.logit_bias) > MAX_BIASED:
            raise MossAudioError(f"logit_bias must be of {MAX_BIASED} ids at most, not {len(self.logit_bias)}")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab or not math.isfinite(bias):
                raise MossAudioError(
                    f"logit_bias must be finite and of ids from 0 to {vocab - 1}, not {token}: {bias}; -1e9 forbids one"
                )
        if self.logprobs not in ("model", "drawn"):
            raise MossAudioError(f"logprobs must be model or drawn, not {self.logprobs!r}")
        if self.whole and self.stop:
            raise MossAudioError("an answer that comes whole can't end at a stop string: leave one of them out")
        if self.loops not in _LOOPS:
            raise MossAudioError(f"loops must be ignore, stop or warm, not {self.loops!r}")
        if self.thinking_budget is None:
            return
        require_thought_ids(processor.tokenizer)
        hand_over = len(processor.tokenizer.encode(HAND_OVER))
        if self.thinking_budget < 0:
            raise MossAudioError(f"thinking_budget must be 0 tokens or more, not {self.thinking_budget}")
        if self.thinking_budget + hand_over >= self.max_new_tokens:
            raise MossAudioError(
                f"max_new_tokens={self.max_new_tokens:,} leave no room for an answer after a thinking_budget of "
                f"{self.thinking_budget:,} and the {hand_over} tokens that end the thought: give more of them"
            )


def steering_of(request: Request, processor: Processor, opened: bool) -> Steering:
    """Returns the options of a request as the steering of one row. opened: see `Prompt`."""
    request.check(processor)
    row = no_steering(1, processor.tokenizer)
    steer(row, 0, request, opened)
    return row


def no_steering(rows: int, tokenizer: Tokenizer) -> Steering:
    return Steering.none(rows, thought_ids(tokenizer) or (-1, -1), tokenizer.encode(HAND_OVER))


def steer(steering: Steering, row: int, request: Request, opened: bool) -> None:
    """Writes the options of a request into a row of NumPy arrays."""
    steering.least[row], steering.loops[row] = request.min_new_tokens, _LOOPS[request.loops]
    steering.budgets[row] = NO_BUDGET if request.thinking_budget is None else request.thinking_budget
    steering.opened[row] = opened
    steering.biased[row], steering.bias[row] = -1, 0
    for place, (token, bias) in enumerate(request.logit_bias.items()):
        steering.biased[row, place], steering.bias[row, place] = token, bias


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer.

    text: without the thought before it, which is the `reasoning`.
    ids: all that were drawn, up to the one that completed a stop string.
    finish_reason: "stop" at an end token or a stop string, "length" at `max_new_tokens`, "loop" if the answer repeated
        itself and the request forbade that, or "cancelled".
    logprobs: of each id, by the model's own logits, before any bias, penalty, temperature or limit; or those of
        `Request.logprobs`. They are not compared by ==.
    others: the other answers to a request for n of them.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    reasoning: str = ""
    logprobs: tuple[float, ...] = dataclasses.field(default=(), compare=False, repr=False)
    others: tuple["Reply", ...] = ()


@dataclasses.dataclass(eq=False)
class Prompt:
    """What is read before the answers to a request.

    inputs: of a shape of `prompt_shapes`; the whole prompt, or what comes before the question.
    question: the ids that follow. key: of what comes before them. opened: the prompt ends in an open thought.
    answers: how many of them are still to begin.
    """

    inputs: ModelInputs
    question: Sequence[int] = ()
    key: bytes = b""
    opened: bool = False
    answers: int = 1


class Handle:
    """An answer that is coming. Iterating over it, or over its `pieces`, yields each piece once; or `listen` to it."""

    def __init__(
        self,
        request: Request,
        prompt: Prompt,
        eos_ids: tuple[int, ...],
        tokenizer: Tokenizer,
        number: int = 0,
        others: "Sequence[Handle]" = (),
    ):
        self.request, self.prompt, self.eos_ids = request, prompt, eos_ids
        self.number, self._others = number, others  # of the answers to the request
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._tell: Callable[[Piece | None], None] = self._pieces.put  # None at the end
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = ThoughtSplitter(prompt.opened)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._reasoning, self._text, self._shown = "", "", 0
        self._done, self._lock = threading.Event(), threading.RLock()  # both threads may end it
        self._reason: FinishReason | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields the text of the answer, without its thought."""
        return (piece.text for piece in self.pieces() if piece.kind == "text")

    def pieces(self) -> Iterator[Piece]:
        """Yields the pieces of the thought and of the text, as (kind, text)."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for the next iteration
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Reply:
        """Waits for the whole answer. Raises TimeoutError after `timeout` seconds, and what went wrong, if it did."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        return dataclasses.replace(self.reply(), others=tuple(other.result(timeout) for other in self._others))

    def reply(self) -> Reply:
        """Returns this answer without the others to its request, once it is `done`; raises what went wrong."""
        if self._error is not None:
            raise self._error
        assert self._reason is not None, "the answer is not done"
        return Reply(self._text, tuple(self._ids), self._reason, self._reasoning, tuple(self._logprobs))

    def listen(self, listener: Callable[[Piece | None], None]) -> None:
        """Gives each piece to `listener`, those that have come first, and None at the end: instead of iterating.

        It is called from the engine's thread, so it must neither wait nor raise.
        """
        with self._lock:
            while not self._pieces.empty():
                listener(self._pieces.get())
            self._tell = listener

    def drawn(self, begin: int) -> list[tuple[int, float]]:
        """Returns the ids from number `begin` on, each with its logprob, as far as they have come."""
        with self._lock:
            return list(zip(self._ids[begin:], self._logprobs[begin:], strict=True))

    def cancel(self) -> None:
        """Ends the answer with what there is; its slot is free after the next tokens."""
        for handle in self.answers:
            handle.finish("cancelled")

    @property
    def answers(self) -> "tuple[Handle, ...]":
        """All answers to the request, this one first."""
        return (self, *self._others)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def feed(self, ids: Sequence[int], logprobs: Sequence[float], *, last: bool) -> None:
        """Takes the next ids, from the engine's thread; ends the answer at a stop string. last: it has ended."""
        with self._lock:
            if self.request.whole and not self.done:
                self._ids += ids
                self._logprobs += logprobs
                if last:
                    self._take(self._splitter.feed(self._decoder.feed(self._ids)))
                ids = logprobs = ()
            for token, logprob in zip(ids, logprobs, strict=True):
                if self.done:
                    return
                self._ids.append(token)
                self._logprobs.append(logprob)
                self._take(self._splitter.feed(self._decoder.feed([token])))
            if last and not self.done:
                self._take([*self._splitter.feed(self._decoder.flush()), *self._splitter.flush()])
            if last and not self.done:
                ended, cut_off = self._ids[-1] in self.eos_ids, len(self._ids) >= self.request.max_new_tokens
                self.finish("stop" if ended else "length" if cut_off else "loop")
            elif not self.done:
                # The end of the text may be the beginning of a stop string.
                self._show(len(self._text) - max(map(len, self.request.stop), default=1) + 1)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        with self._lock:
            if self.done:
                return
            self._show(len(self._text))
            self._reason, self._error = reason, error
            self._done.set()
            self._tell(None)

    def _take(self, pieces: Iterator[Piece] | list[Piece]) -> None:
        for piece in pieces:
            if piece.kind == "reasoning":
                self._reasoning += piece.text
                self._tell(piece)
                continue
            before, self._text = len(self._text), self._text + piece.text
            stops = self.request.stop
            found = [index for stop in stops if (index := self._text.find(stop, max(0, before - len(stop)))) >= 0]
            if found:
                self._text = self._text[: min(found)]
                self.finish("stop")
                return

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._tell(Piece("text", self._text[self._shown : end]))
            self._shown = end
