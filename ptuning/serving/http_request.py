"""Reading a request: its key, its body, and errors in OpenAI's format.

Bodies are read and parsed here and not by FastAPI: their size is limited while they arrive, they are not converted to Python
objects that JSON cannot represent (lone surrogates, NaN), and an error is one sentence that names the parameter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ptuning.errors import UserError
from ptuning.inference.types import AnswerFailed, EngineBusy, EngineStopped
from ptuning.redaction import logger, placeless
from ptuning.serving import proxy
from ptuning.serving.auth import Scope, scope_of
from ptuning.serving.protocol import ErrorBody, ErrorDetail, complaint
from ptuning.serving.served_models import UnknownModel
from ptuning.settings.running import ServeConfig

log = logger(__name__)

Asked = TypeVar("Asked", bound=BaseModel)

BUSY, REFUSED = proxy.BUSY.decode(), proxy.REFUSED.decode()

DRAIN_S = 1.0
"""Seconds to read the rest of a refused body."""


class ApiError(Exception):
    """An error response."""

    def __init__(
        self, status: int, message: str, kind: str, param: str | None = None, *, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code or _CODES.get(status)))

    def response(self) -> Response:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


_CODES = {401: "invalid_api_key", 413: "body_too_large", 429: "rate_limit_exceeded"}

_ROUTES = {
    404: "there is no such route; see /openapi.json for all routes",
    405: "this route does not support this method; see /openapi.json for all routes",
}


def as_api_error(error: Exception) -> ApiError:
    """Any error as the client sees it: never the text of an exception that was not written for users."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "invalid_request_error", "model", code="model_not_found")
    if isinstance(error, UserError):
        return ApiError(400, placeless(str(error)), "invalid_request_error")
    if isinstance(error, EngineBusy):
        return ApiError(429, str(error), "rate_limit_error", retry_after="1")
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), "server_error", retry_after="5")
    if isinstance(error, TimeoutError):
        # OpenAI's clients retry twice after a timeout unless a header forbids it.
        return ApiError(
            408,
            "the answer took longer than this server allows; ask for less",
            "timeout",
            x_should_retry="false",
        )
    if isinstance(error, HTTPException):
        message = _ROUTES.get(error.status_code, "the request cannot be answered; change it")
        return ApiError(error.status_code, message, "invalid_request_error", **_named(error.headers))
    if not isinstance(error, AnswerFailed):
        log.error("a request failed", exc_info=error)
    message = placeless(str(error)) if isinstance(error, AnswerFailed) else "something went wrong here; see the server's log"
    return ApiError(500, message, "server_error", x_should_retry="false")


def _named(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers as `ApiError` takes them."""
    return {name.replace("-", "_"): value for name, value in (headers or {}).items()}


def authorize(request: Request, keys: dict[str, Scope], wanted: Scope) -> None:
    """Refuse a request without a key of this scope."""
    scope = scope_of(request.headers.get("authorization"), keys)
    if scope is None:
        message = "the API key is missing or unknown; send Authorization: Bearer KEY"
        raise ApiError(401, message, "authentication_error", www_authenticate="Bearer")
    if wanted == "admin" and scope != "admin":
        raise ApiError(403, "this API key may ask but not administrate; use one with the scope admin", "permission_error")


async def read_body(request: Request, shape: type[Asked], limits: ServeConfig) -> Asked:
    """The parsed body. Its size and the time to receive it are limited."""
    # A web page can send forms and plain text to a local server without permission (CORS), but not JSON.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "the body must be plain application/json; set Content-Type", "invalid_request_error")
    most = limits.max_body_kb * 1024
    declared = request.headers.get("content-length", "")
    size, chunks = int(declared) if declared.isdigit() else 0, []
    if size <= most:
        size = 0
        async with asyncio.timeout(limits.deadline_s):  # for a body that arrives very slowly
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    break
                chunks.append(chunk)
    if size > most:
        raise ApiError(413, f"the body is larger than {limits.max_body_kb} KiB; send less", "invalid_request_error")
    try:
        return shape.model_validate_json(b"".join(chunks))
    except ValidationError as error:
        message, param = complaint(error)
        raise ApiError(400, message, "invalid_request_error", param) from None


async def drain(request: Request, limits: ServeConfig) -> bool:
    """Read the rest of the body for a while: closing a connection with an unread body resets it, and the answer is lost.

    Returns: whether the body was read to its end.
    """
    size = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > 4 * limits.max_body_kb * 1024:
                    return False
    except TimeoutError:
        return False
    except (RuntimeError, ClientDisconnect):  # RuntimeError: the body was read before
        pass
    return True
