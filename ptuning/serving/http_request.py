"""Reading a request: its key, its body, and errors in OpenAI's format.

Bodies are read and parsed here and not by FastAPI: their size is limited while they arrive, they are not converted to Python
objects that JSON cannot represent (lone surrogates, NaN), and an error is one sentence that names the parameter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ptuning.errors import TrackingError, UserError
from ptuning.inference.types import AnswerFailed, EngineBusy, EngineStopped
from ptuning.redaction import logger, placeless
from ptuning.serving import neutral, proxy
from ptuning.serving.answers import ErrorBody, ErrorDetail
from ptuning.serving.auth import Caller, Scope, caller_of
from ptuning.serving.batch_objects import BatchRequest
from ptuning.serving.brought import UnknownModel
from ptuning.serving.complaints import complaint
from ptuning.serving.protocol import ChatRequest, ClassifyRequest, CompletionRequest
from ptuning.serving.response_items import ResponsesRequest
from ptuning.serving.tuning_objects import JobRequest
from ptuning.settings.running import ServeConfig

log = logger(__name__)

Asked = TypeVar("Asked", bound=BaseModel)

BUSY, REFUSED = proxy.BUSY.decode(), proxy.REFUSED.decode()

DRAIN_S = 1.0
"""Seconds to read the rest of a refused body."""


NEUTRAL: Mapping[type[BaseModel], Mapping[str, neutral.Values]] = {
    CompletionRequest: neutral.COMPLETION,
    ChatRequest: neutral.CHAT,
    ClassifyRequest: neutral.CLASSIFY,
    ResponsesRequest: neutral.RESPONSES,
    JobRequest: neutral.JOB,
    BatchRequest: {},
}
"""What each request may contain without effect."""

_DUTIES: Mapping[Scope, str] = {"inference": "ask", "tuning": "tune", "admin": "administrate"}

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")


def request_id() -> str:
    """The id of the request that is being answered, for the log."""
    return REQUEST_ID.get()


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


_CODES = {401: "invalid_api_key", 404: "unknown_url", 413: "body_too_large", 429: "rate_limit_exceeded"}

_PARAMETERS = frozenset(name for shape in NEUTRAL for name in (*shape.model_fields, *NEUTRAL[shape]))


def as_api_error(error: Exception) -> ApiError:
    """Any error as the client sees it: never the text of an exception that was not written for users."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return invalid(error)
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "invalid_request_error", "model", code="model_not_found")
    if isinstance(error, UserError):
        return _of_users(error)
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
        message = "the request cannot be answered; change it"
        if error.status_code == 405:
            message = "this route does not support this method; see /openapi.json for all routes"
        return ApiError(error.status_code, message, "invalid_request_error", **_named(error.headers))
    log.error("request %s failed", request_id(), exc_info=None if isinstance(error, AnswerFailed) else error)
    message = placeless(str(error)) if isinstance(error, AnswerFailed) else "something went wrong here; see the server's log"
    return ApiError(500, message, "server_error", x_should_retry="false")


def _of_users(error: UserError) -> ApiError:
    if isinstance(error, TrackingError):  # its text names the registry's address
        message = "the registry does not respond, so this soft prompt cannot be brought; ask again in a moment"
        return ApiError(503, message, "server_error", retry_after="5")
    message = placeless(str(error))
    param = message.partition(":")[0]
    return ApiError(400, message, "invalid_request_error", param if param in _PARAMETERS else None)


def _named(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers as `ApiError` takes them."""
    return {name.replace("-", "_"): value for name, value in (headers or {}).items()}


def authorize(request: Request, keys: dict[str, Scope], wanted: Scope) -> Caller:
    """Who sent a request. One without a key of this scope is refused."""
    caller = caller_of(request.headers.get("authorization"), keys)
    if caller is None:
        message = "the API key is missing or unknown; send Authorization: Bearer KEY"
        raise ApiError(401, message, "authentication_error", www_authenticate="Bearer")
    if not caller.may(wanted):
        may, must = _DUTIES[caller.scope], _DUTIES[wanted]
        raise ApiError(403, f"this API key may {may} but not {must}; use one with the scope {wanted}", "permission_error")
    return caller


def invalid(error: ValidationError) -> ApiError:
    """The body does not have the shape of its route."""
    message, param = complaint(error)
    return ApiError(400, message, "invalid_request_error", param)


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
        raise too_large(limits)
    return parse_body(b"".join(chunks), shape)


def too_large(limits: ServeConfig) -> ApiError:
    """The body exceeds the limit."""
    return ApiError(413, f"the body is larger than {limits.max_body_kb} KiB; send less", "invalid_request_error")


def parse_body(content: bytes, shape: type[Asked]) -> Asked:
    """The parameters in a body.

    Raises:
        ApiError: it does not have this shape.
    """
    try:
        parsed = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON ({error}); send a JSON object", "invalid_request_error") from None
    try:
        known = [field.alias or name for name, field in shape.model_fields.items()]
        return shape.model_validate(neutral.without_neutral(parsed, NEUTRAL.get(shape, {}), known))
    except neutral.NotNeutral as error:
        raise ApiError(400, str(error), "invalid_request_error", error.param.partition(".")[0]) from None
    except ValidationError as error:
        raise invalid(error) from None


def unknown_route(path: str, routes: Mapping[str, str]) -> ApiError:
    """There is no route of this path. `routes`: path -> method."""
    parts = [part for part in path.split("/") if part]
    tails = ["/".join(parts[at:]) for at in range(len(parts))]
    meant = next((route for tail in tails for route in routes if tail and route.removeprefix("/v1/") == tail), None)
    if meant and path != meant:
        message = f"there is no such route; {routes[meant]} {meant} is meant: the client's base_url must end with /v1, once"
    else:
        listed = [route for route in routes if route.startswith("/v1/") and "{" not in route and "admin" not in route]
        message = f"there is no such route; the routes are {', '.join(listed)}; see /openapi.json for all"
    return ApiError(404, message, "invalid_request_error")


async def drain(request: Request, most: int, seconds: float = DRAIN_S) -> bool:
    """Read the rest of the body for a while: closing a connection with an unread body resets it, and the answer is lost.

    `most`: bytes. Returns: whether the body was read to its end.
    """
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    return False
    except TimeoutError:
        return False
    except (RuntimeError, ClientDisconnect):  # RuntimeError: the body was read before
        pass
    return True


async def refuse(request: Request, error: Exception, most: int, seconds: float = DRAIN_S) -> Response:
    """The response to a request with a body that is refused. `most`, `seconds`: as `drain`."""
    response = as_api_error(error).response()
    if not await drain(request, most, seconds):
        # Closed explicitly instead of by the keep-alive timer: bytes that arrive after the answer stop that timer for good
        # (uvicorn 0.54, data_received), and the client could keep the connection open for ever.
        response.headers["connection"] = "close"
    return response
