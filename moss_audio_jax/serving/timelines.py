"""/v1/timelines: the times in any answer of the model, as data or as subtitles; no model is asked."""

from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moss_audio_jax.serving.chat_body import Body, read_object
from moss_audio_jax.serving.errors import ApiError, of_validation
from moss_audio_jax.serving.service import Service
from moss_audio_jax.timelines.timeline import Timeline

MEDIA_TYPES = {"srt": "application/x-subrip", "vtt": "text/vtt", "csv": "text/csv", "audacity": "text/plain"}
_WRITERS: Mapping[str, Callable[[Timeline], str]] = {
    "srt": Timeline.to_srt,
    "vtt": Timeline.to_vtt,
    "csv": Timeline.to_csv,
    "audacity": Timeline.to_audacity,
}


class TimelineBody(Body):
    """text: an answer. seconds: length of its clip."""

    text: Annotated[str, Field(max_length=200_000)]
    seconds: Annotated[float, Field(ge=0, le=1e7)] | None = None
    format: str = "json"


async def timelines(service: Service, request: Request) -> Response:
    async with service.body():
        content = read_object(await request.body())
    try:
        body = TimelineBody.model_validate(content)
    except ValidationError as error:
        raise of_validation(error) from error
    if body.format != "json" and body.format not in _WRITERS:
        names = ", ".join(("json", *_WRITERS))
        raise ApiError(f"format must be one of {names}", param="format", code="invalid_value")
    timeline = await service.in_thread(lambda: Timeline.parse(body.text, body.seconds))
    if body.format == "json":
        return JSONResponse(timeline.to_json())
    return Response(_WRITERS[body.format](timeline), media_type=MEDIA_TYPES[body.format])
