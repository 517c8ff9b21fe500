"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from moss_audio_jax.errors import MossAudioError, shown

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error for the client. param: the field of the request. retry_after: seconds after which to try again."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def content(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # In ASCII, as a message may quote half of a surrogate pair.
        return Response(json.dumps(self.content()), self.status, headers, "application/json")


def api_error(error: BaseException) -> ApiError:
    """Returns what the client is told of any error; a defect of the server shows nothing of itself."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MossAudioError):
        return ApiError(str(error))
    return ApiError("the server failed to answer: its log says why", 500)


def unavailable(message: str, retry_after: int | None = 10) -> ApiError:
    return ApiError(message, 503, code="unavailable", retry_after=retry_after)


def of_validation(error: ValidationError, tags: Sequence[str] = ()) -> ApiError:
    """Names the first field that is wrong. tags: kinds of a content part, which pydantic puts into paths."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param, after_index = "", False
    for place in first["loc"]:
        if isinstance(place, int):
            param += f"[{place}]"
        elif not (after_index and place in tags):
            param += f".{place}" if param else str(place)
        after_index = isinstance(place, int)
    param = param if param.isascii() and param.isprintable() else shown(param)
    if first["type"] == "extra_forbidden":
        return ApiError(f"{param} is no field of this request: leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"{param} must be given", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{param or 'the body'}: {message}", param=param or None, code="invalid_value")


def refuse_unsupported(body: Mapping[str, Any], harmless: Mapping[str, Sequence[Any]]) -> None:
    """Raises ApiError for a field that OpenAI has and this server has not.

    harmless: such fields, with the values that change nothing; null is one of them.
    """
    for name, values in harmless.items():
        if body.get(name) is not None and body[name] not in values:
            only = [json.dumps(value) for value in values if value not in ([], None)]
            message = f"{name} is not supported: leave it out" + (f", or give {' or '.join(only)}" if only else "")
            raise ApiError(message, param=name, code="unsupported_parameter")
