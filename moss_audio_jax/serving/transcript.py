"""The form of a transcription, and its formats: json, text, verbose_json, srt, vtt."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from moss_audio_jax.inference.recordings import Transcript
from moss_audio_jax.sampling import MAX_SEED, MIN_SEED
from moss_audio_jax.serving.errors import ApiError, of_validation, refuse_unsupported
from moss_audio_jax.timelines.segment import Segment

Granularity = Literal["segment", "word"]

_LISTS = ("timestamp_granularities[]", "timestamp_granularities", "include[]", "include")
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "include": ([],),
    "chunking_strategy": ("auto",),
    "known_speaker_names[]": (),
    "known_speaker_references[]": (),
}


class TranscriptionForm(BaseModel):
    """The fields of the form but the file; they come as texts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    language: Annotated[str, Field(pattern=r"^([A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})?)?$")] = ""
    prompt: str = ""
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    timestamp_granularities: list[Granularity] = []
    stream: bool = False
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] = 0

    @property
    def timestamps(self) -> tuple[str, ...]:
        """What the model is asked for, one after the other: keys of `transcription.TOKENS_PER_SECOND`."""
        if self.response_format in ("srt", "vtt"):
            return ("sentences",)
        if self.response_format != "verbose_json":
            return ("none",)
        asked = self.timestamp_granularities or ["segment"]
        names: dict[Granularity, str] = {"segment": "sentences", "word": "words"}
        return tuple(timestamps for name, timestamps in names.items() if name in asked)

    @property
    def context(self) -> str:
        """What the question says of the recording."""
        told = [self.prompt.strip()] if self.prompt.strip() else []
        return " ".join([*told, *([f"The language is {self.language}."] if self.language else [])])


def read_form(form: FormData) -> tuple[TranscriptionForm, UploadFile]:
    """Returns the fields and the file; raises ApiError, which names the field, for what is wrong or not supported."""
    files = form.getlist("file")
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        message = "file must be given once, as a file of multipart/form-data"
        raise ApiError(message, param="file", code="missing_required_parameter")
    fields: dict[str, Any] = {}
    for name in form:
        if name in _LISTS:
            fields.setdefault(name.removesuffix("[]"), []).extend(form.getlist(name))
        elif name != "file":
            fields[name] = form[name]
            if len(form.getlist(name)) > 1:
                raise ApiError(f"{name[:40]!a} must be given once", code="invalid_value")
    refuse_unsupported(fields, _UNSUPPORTED)
    try:
        known = {name: value for name, value in fields.items() if name not in _UNSUPPORTED}
        read = TranscriptionForm.model_validate(known)
    except ValidationError as error:
        raise of_validation(error) from error
    if read.stream and read.response_format not in ("json", "text"):
        message = "stream must be false for this response_format: json and text can be streamed"
        raise ApiError(message, param="stream", code="invalid_value")
    if read.timestamp_granularities and read.response_format != "verbose_json":
        message = "timestamp_granularities must go with the response_format verbose_json"
        raise ApiError(message, param="timestamp_granularities", code="invalid_value")
    return read, files[0]


def usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(transcript.seconds)}


def response(form: TranscriptionForm, transcripts: Mapping[str, Transcript]) -> Response:
    """Returns transcripts, by what was asked for, in the form's format."""
    first = next(iter(transcripts.values()))
    match form.response_format:
        case "text":
            return Response(f"{first.text}\n", media_type="text/plain")
        case "srt":
            return Response(first.timeline.to_srt(), media_type="text/plain")
        case "vtt":
            return Response(first.timeline.to_vtt(), media_type="text/vtt")
        case "json":
            return JSONResponse({"text": first.text, "usage": usage(first)})
    content: dict[str, Any] = {
        "task": "transcribe",
        "language": form.language or "unknown",
        "duration": round(first.seconds, 3),
        "text": first.text,
    }
    if "sentences" in transcripts:
        found = transcripts["sentences"]
        content["segments"] = [
            {"id": number, **_times(segment, found.seconds), "text": segment.text}
            for number, segment in enumerate(found.timeline.segments)
        ]
    if "words" in transcripts:
        found = transcripts["words"]
        content["words"] = [
            {"word": segment.text, **_times(segment, found.seconds)} for segment in found.timeline.segments
        ]
    return JSONResponse({**content, "usage": usage(first)})


def _times(segment: Segment, seconds: float) -> dict[str, float]:
    """Returns the times of a segment in order, and within the recording."""
    start, end = (round(min(max(time, 0.0), seconds), 3) for time in segment.span)
    return {"start": start, "end": end}
