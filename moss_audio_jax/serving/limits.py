"""What a request may cost. Each limit is an option of `moss-audio serve`."""

import dataclasses

from moss_audio_jax.commands.options import require, require_positive

MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests; what is beyond one is refused."""

    queue: int = 32
    """Answers of a model that wait for a slot at most; a request beyond it gets 429 and is to be tried again."""
    max_body_mb: int = 64
    """Megabytes of a request's body, and of the clips that it names."""
    body_seconds: float = 60.0
    """Seconds in which a body must have come, and a clip from a URL too."""
    max_audio_seconds: float = 7200.0
    """Seconds of audio of a request. A chat is also bounded by --max-length, at 12.5 tokens a second."""
    max_clips: int = 16
    """Clips of a chat."""
    max_answers: int = 8
    """Answers (n) of a request."""
    max_new_tokens: int = 1024
    """Tokens of a chat's answer where the request does not say; there may be fewer if the clips leave less room."""
    readers: int = 2
    """Threads that decode clips."""
    connections: int = 256
    """Requests at the same time, of any kind, and half of the open connections; beyond it 503."""

    def __post_init__(self):
        names = ("max_body_mb", "max_clips", "max_answers", "max_new_tokens", "readers", "connections")
        require_positive(self, None, *names)
        require(self, None, ("queue",), lambda value: value >= 0, "0 or more")
        seconds = ("body_seconds", "max_audio_seconds")
        require(self, None, seconds, lambda value: 0 < value < float("inf"), "above 0, and finite")

    @property
    def max_body(self) -> int:
        """Bytes."""
        return self.max_body_mb * MEGABYTE
