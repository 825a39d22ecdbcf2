"""The FastAPI application: routes and middleware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Send

from ptuning.serving.api import Api
from ptuning.serving.http_request import ApiError, as_api_error
from ptuning.serving.protocol import (
    ChatCompletion,
    ChatRequest,
    Classification,
    ClassifyRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Model,
    Models,
)
from ptuning.serving.service import Service


def build_app(service: Service) -> FastAPI:
    """The application over a service."""
    app = FastAPI(title="ptuning", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    api = Api(service)
    shapes: list[type[BaseModel]] = []

    def post(path: str, handler: Callable[..., Any], shape: type[BaseModel], answer: type[BaseModel]) -> None:
        shapes.append(shape)
        schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        app.post(path, responses={200: {"model": answer}, **_errors()}, openapi_extra=body)(handler)

    post("/v1/completions", api.completions, CompletionRequest, Completion)
    post("/v1/chat/completions", api.chat, ChatRequest, ChatCompletion)
    post("/v1/classify", api.classify, ClassifyRequest, Classification)
    app.get("/v1/models", responses={200: {"model": Models}, **_errors()})(api.models)
    app.get("/v1/models/{name:path}", responses={200: {"model": Model}, **_errors()})(api.model)
    app.post("/v1/admin/reload", responses=_errors())(api.reload)
    app.get("/metrics", responses=_errors())(api.metrics)
    app.get("/livez", responses={503: {"description": "must be replaced"}})(api.livez)
    app.get("/readyz", responses={503: {"description": "not yet"}})(api.readyz)

    app.add_middleware(_Counted, service=service)

    async def refuse(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(Exception, refuse)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for shape in shapes:
            schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {}) | {shape.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents
    return app


def _errors() -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)}


class _Counted:
    """Counts open requests until the last byte of their answer. Requests that a stopping replica refuses do not count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if self._service.draining or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._service.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.open -= 1
