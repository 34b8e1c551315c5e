"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvant.errors import KvantError
from kvant.server.log import log, request_id
from kvant.server.schema import FIELDS

__all__ = ["ApiError", "add_handlers", "error_body", "error_of", "error_response"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "unavailable_error",
}
_LONGEST_VALUE = 80  # characters of a wrong value that an error repeats
_LONGEST_MESSAGE = 1000
_LONGEST_PARAM = 200
_KINDS = re.compile(r"(str|bool)$|(list|dict|function|constrained)\W")
"""What pydantic puts into places beside names: which kind of several it tried."""


class ApiError(Exception):
    """An answer that is no success. ``param`` is the field that is wrong, ``retry_after`` seconds
    after which trying again makes sense."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


def error_of(error: Exception) -> ApiError:
    """What a client is told of an error. What nobody raised on purpose is logged, not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, KvantError):
        message = " ".join(str(error).split())
        return ApiError(error.http_status, message, param=_field_of(message))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _detail(error))
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply; send it flatter")
    log.exception("unexpected error", exc_info=error)
    return ApiError(500, "the server failed; its log has the reason under this request's id")


def error_body(error: ApiError) -> dict[str, Any]:
    """The object that is sent."""
    return {
        "error": {
            "message": _cut(error.message, _LONGEST_MESSAGE),
            "type": _TYPES.get(error.status, "server_error"),
            "param": error.param and _cut(error.param, _LONGEST_PARAM),
            "code": error.code or error.status,
            "request_id": request_id.get(),
        }
    }


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """A whole answer."""
    found = dict(headers or {})
    if error.retry_after is not None:
        found["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        found["WWW-Authenticate"] = "Bearer"
    body = json.dumps(error_body(error))
    return Response(body, error.status, headers=found, media_type="application/json")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _detail(error: HTTPException) -> str:
    if error.status_code == 400:  # FastAPI does not say what it could not read
        return "the body is not valid JSON in UTF-8, or nested too deeply"
    return str(error.detail)


def _field_of(message: str) -> str | None:
    """The field that the message of a KvantError begins with, if it is one of requests."""
    found = re.match(r"(\w+)[\w.\[\]]*", message)
    return found[0] if found and found[1] in FIELDS else None


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that a schema found wrong."""
    first = error.errors()[0]
    place = [f"[{part}]" if isinstance(part, int) else part for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error')}")
    if first["type"] in ("missing", "model_attributes_type") and not place:
        return ApiError(400, "the body must be a JSON object sent as application/json")
    param = ".".join(part for part in place if not _KINDS.match(part)).replace(".[", "[")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this parameter is not supported; leave it out"
    value = first.get("input")
    if first["type"] not in ("missing", "value_error") and isinstance(value, str | int | float):
        message += f" (got {_cut(ascii(value), _LONGEST_VALUE)})"
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def add_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` this shape."""

    async def handle(request: Request, error: Exception) -> Response:
        found = error_of(error)
        if isinstance(error, HTTPException):
            found.message = f"{request.method} {request.url.path[:200]}: {found.message}"
        allowed = error.headers if isinstance(error, HTTPException) else None
        return error_response(found, allowed)

    kinds = ApiError, KvantError, HTTPException, RequestValidationError, RecursionError, Exception
    for kind in kinds:
        app.add_exception_handler(kind, handle)
