"""What went wrong, in the body that each API's clients know how to read.

DeepSeek's is OpenAI's with a code that is always the same; the kind of error is in the status and
in ``type``. A body that is no JSON is a 400, one whose fields have wrong types a 422 (both in the
words of DeepSeek's parser), a value out of range a 400 again, as ``deepseek-recipe`` has it.
Anthropic's clients get Anthropic's shape below ``/anthropic``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qiusuo.data.errors import DataError
from qiusuo.engine.request import EngineError, RequestError

CODE = "invalid_request_error"  # DeepSeek's, whatever went wrong
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "unknown_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable_error",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
UNREADABLE = "Failed to parse the request body as JSON: "
WRONG_TYPE = "Failed to deserialize the JSON body into the target type: "
INTERNAL = "The server failed; what happened is in its log"

log = logging.getLogger("qiusuo.server")


class ApiError(Exception):
    """An answer that is an error. ``retry_after``: seconds, told in a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # no half a character
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}

    @property
    def body(self) -> dict[str, Any]:
        """In DeepSeek's and OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": CODE}
        return {"error": error}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def misfit(where: str, why: str) -> ApiError:
    """A field of a wrong type, or one that is missing."""
    return ApiError(422, WRONG_TYPE + (f"{where}: " if where else "") + why)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. What nobody foresaw is logged and not told."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _unreadable(error.errors())
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case EngineError():
            return ApiError(503, f"The model cannot answer now: {error}")
        case DataError() | RequestError():
            return ApiError(400, str(error))
    log.error("%s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, INTERNAL)


def failed_answer(error: Exception) -> ApiError:
    """The same for an answer that was under way: then nothing is the client's fault any more."""
    if isinstance(error, RequestError):
        log.error("an answer failed: %s", error)
        return ApiError(500, f"The answer failed: {error}")
    return as_api_error(error)


def answer_errors(app: FastAPI) -> None:
    """Let ``app`` answer what was foreseen with a body its clients can read; the rest does
    ``Bounds``."""
    kinds = (ApiError, RequestValidationError, HTTPException, EngineError, DataError, RequestError)
    for kind in kinds:
        app.add_exception_handler(kind, answer)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """In the shape that belongs to the request's path."""
    told = as_api_error(error)
    anthropic = request.scope["path"].startswith("/anthropic")
    body = told.anthropic_body if anthropic else told.body
    headers = dict(getattr(error, "headers", None) or {})
    return JSONResponse(body, status_code=told.status, headers=headers)


def _unreadable(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, with its place as ``messages[0].content``."""
    first = errors[0]
    place = list(first["loc"])
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"{UNREADABLE}{reason} at character {place[-1]}")
    if place == ["body"] and first["type"] == "missing":
        return ApiError(400, f"{UNREADABLE}the body is empty")
    if place == ["body"] and isinstance(first.get("input"), bytes):
        return ApiError(400, "Expected request with `Content-Type: application/json`")
    if place and place[0] != "body":  # a query, a header
        return ApiError(422, f"{'.'.join(map(str, place))}: {first['msg']}", param=str(place[-1]))
    return misfit(_path(place[1:]), first["msg"])


def _path(place: Sequence[str | int]) -> str:
    """Without the names that pydantic gives the members of a union."""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
    return path
