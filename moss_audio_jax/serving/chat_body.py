"""The body of a chat: OpenAI's fields, as far as a model that answers in text has them, and a few of vLLM's."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from moss_audio_jax.sampling import MAX_SEED, MIN_SEED
from moss_audio_jax.serving.errors import ApiError, of_validation, refuse_unsupported
from moss_audio_jax.storage.json_files import parse_json

_MOST_TOKENS = 2**20
_MARKS, _MOST_MARKS = (b",", b"[", b"{"), 50_000  # base64 has none of them
# Fields that are refused, unless they have one of these values.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
}
# Fields that change no answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_IGNORED += ("prompt_cache_retention",)


class Body(BaseModel):
    """What bodies share: no other fields, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class InputAudio(Body):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus"] = "wav"


class InputAudioPart(Body):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(Body):
    url: str


class AudioUrlPart(Body):
    type: Literal["audio_url"]
    audio_url: AudioUrl


PARTS = ("text", "input_audio", "audio_url")
Part = Annotated[TextPart | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class Message(Body):
    """A turn. reasoning_content: of an earlier answer, as clients send it back; it is not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1)]
    name: str | None = None
    reasoning_content: JsonValue = None
    refusal: None = None
    annotations: JsonValue = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatBody(Body):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
    ] = []
    logprobs: bool | None = False
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=_MOST_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = None


def read_object(content: bytes) -> dict[str, Any]:
    """Reads an object of JSON; raises ApiError for anything else, and for one of very many values."""
    if sum(map(content.count, _MARKS)) > _MOST_MARKS:  # each takes a hundred bytes of memory or more
        raise ApiError("the body has far more values than any request needs", 413, code="body_too_large")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ApiError(f"the body must be an object of JSON ({error})", code="invalid_json") from error


def read_chat(content: bytes) -> ChatBody:
    """Reads a body; raises ApiError, which names the field, for what is wrong or not supported."""
    body = read_object(content)
    refuse_unsupported(body, _UNSUPPORTED)
    known = {name: value for name, value in body.items() if name not in _UNSUPPORTED and name not in _IGNORED}
    try:
        return ChatBody.model_validate(known)
    except ValidationError as error:
        raise of_validation(error, PARTS) from error
