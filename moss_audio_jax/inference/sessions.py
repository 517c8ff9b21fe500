"""Several questions about the same clips, which are read once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.requests import Handle, Reply, Request
from moss_audio_jax.inputs import Mel
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import ClipLike, Processor

if TYPE_CHECKING:
    from moss_audio_jax.inference.engine import Engine


class Session:
    """Questions about clips that the model reads with the first of them: `session.ask("Who speaks first?")`.

    A question is answered as if it were the first: it does not know of the others. `Engine.listen` and `listen` make
    sessions.
    """

    def __init__(self, engine: "Engine", mels: Sequence[Mel], options: dict[str, Any], *, owner: bool = False):
        if not mels:
            raise MossAudioError("a session needs a clip to listen to: give one, or ask an engine without a session")
        self._engine, self._mels, self._options, self._owner = engine, mels, options, owner

    def submit(self, prompt: str, **options: Any) -> Handle:
        """Queues a question; see `Engine.submit`. options: fields of `Request`, instead of the session's."""
        return self._engine.submit_mels(Request(prompt, reuse=True, **(self._options | options)), self._mels)

    def ask(self, prompt: str, **options: Any) -> Reply:
        """Answers a question."""
        return self.submit(prompt, **options).result()

    def close(self) -> None:
        """Closes the engine, if the session has one of its own."""
        if self._owner:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def listen(
    model: MossAudio,
    processor: Processor,
    audio: ClipLike | list[ClipLike],
    *,
    max_length: int = 4096,
    **options: Any,
) -> Session:
    """Reads clips, for any number of questions about them, one at a time, with an engine of one slot.

    max_length: of a prompt and its answer. options: fields of each `Request`, such as `max_new_tokens`.
    """
    from moss_audio_jax.inference.engine import Engine

    mels = [processor.mel(clip) for clip in (audio if isinstance(audio, list) else [audio])]
    return Session(Engine(model, processor, slots=1, max_length=max_length), mels, options, owner=True)
