"""Counters and gauges for Prometheus. `rate(moss_audio_tokens_total[1m])` is tokens a second."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

from moss_audio_jax.serving.answers import Answers

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)


class Metrics:
    """The metrics of one server."""

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of_model = {"labelnames": ("model",), "registry": self.registry}
        of_request = {"labelnames": ("path", "status"), "registry": self.registry}
        self.requests = Counter("moss_audio_requests", "HTTP requests that have ended.", **of_request)
        self.errors = Counter("moss_audio_errors", "HTTP requests that ended in an error.", **of_request)
        self.seconds = Histogram(
            "moss_audio_request_seconds", "From a request to the end of its response.", ("path",),
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self.first = Histogram(
            "moss_audio_time_to_first_token_seconds", "From a request to the first text of its answer.",
            buckets=_SECONDS, **of_model,
        )  # fmt: skip
        self.tokens = Counter("moss_audio_tokens", "Tokens of answers.", **of_model)
        self.prompt_tokens = Counter("moss_audio_prompt_tokens", "Tokens of prompts, audio included.", **of_model)
        self.failed = Counter("moss_audio_failed_answers", "Answers that ended in an error.", **of_model)
        self.waiting = Gauge("moss_audio_queue", "Answers that wait for a slot.", **of_model)
        self.busy = Gauge("moss_audio_slots_busy", "Slots in use.", **of_model)
        self.slots = Gauge("moss_audio_slots", "Slots.", **of_model)

    def watch(self, model: str, slots: int, busy: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Shows the state of an engine."""
        self.slots.labels(model).set(slots)
        self.busy.labels(model).set_function(busy)
        self.waiting.labels(model).set_function(waiting)
        for counter in (self.tokens, self.prompt_tokens, self.failed, self.first):
            counter.labels(model)

    def answered(self, model: str, answers: Answers) -> None:
        """Counts the answers to a request, once they have ended."""
        if answers.first_piece is not None:
            self.first.labels(model).observe(answers.first_piece)
        prompt = answers.handles[0].prompt
        read = int((prompt.inputs.segment_ids != 0).sum()) + len(prompt.question)
        self.prompt_tokens.labels(model).inc(read)
        for handle in answers.handles:
            self.tokens.labels(model).inc(len(handle.drawn(0)))
            self.failed.labels(model).inc(handle.failed)

    def responded(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        if status >= 400:
            self.errors.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
