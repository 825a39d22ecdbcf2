"""The FastAPI application: routes and middleware."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning.serving import answers
from ptuning.serving.admin_routes import AdminRoutes, Inspected, Moved, PromoteRequest, RollbackRequest
from ptuning.serving.api import Api
from ptuning.serving.batch_objects import BatchList, BatchObject, BatchQuery, BatchRequest
from ptuning.serving.batch_routes import BatchRoutes, Wake
from ptuning.serving.body_pacing import Paced
from ptuning.serving.file_objects import UPLOAD, FileDeleted, FileList, FileObject, FileQuery
from ptuning.serving.file_routes import BYTES, FileRoutes
from ptuning.serving.http_request import NEUTRAL, REQUEST_ID, ApiError, as_api_error, unknown_route
from ptuning.serving.neutral import described
from ptuning.serving.page_routes import add_page
from ptuning.serving.paging import parameters_of
from ptuning.serving.protocol import ChatRequest, ClassifyRequest, CompletionRequest
from ptuning.serving.request_record import Recorded
from ptuning.serving.response_items import ResponsesRequest
from ptuning.serving.search_objects import SearchDetails, SearchInstruction, SearchIntervention, SearchList
from ptuning.serving.search_routes import SearchRoutes
from ptuning.serving.service import Service
from ptuning.serving.status import ReloadedAnswer, Replicas, Status
from ptuning.serving.tuning_objects import METADATA, Job, JobCheckpointList, JobEventList, JobList, JobQuery, JobRequest
from ptuning.serving.tuning_routes import TuningRoutes
from ptuning.tuning.answers import AskedJobs
from ptuning.tuning.batch_store import BatchStore
from ptuning.tuning.files import FileStore

ID = b"x-request-id"
_PRINTABLE = re.compile(rb"[\w.:/+=@-]{1,128}")

BEARER = {"type": "http", "scheme": "bearer", "description": "An API key. A server without keys answers without one."}


def build_app(
    service: Service, replicas: Replicas | None = None, jobs: AskedJobs | None = None, wake: Wake | None = None
) -> FastAPI:
    """The application over a service. `replicas`: how all of them are reached; None: there is one. `jobs`: who is
    asked about jobs, `wake`: how the runner of batches is reached; None: there is none."""
    app = FastAPI(title="ptuning", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    api, status = Api(service), Status(service, replicas)
    shapes: list[type[BaseModel]] = [answers.CompletionChunk, answers.ChatChunk, answers.ResponseEvent]
    locked: dict[str, Any] = {"security": [{"bearer": []}]}

    def post(
        path: str, handler: Callable[..., Any], shape: type[BaseModel], answer: type[BaseModel], *chunks: type[BaseModel]
    ) -> None:
        shapes.append(shape)
        schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        good = {"model": answer} | ({"content": answers.events(*chunks)} if chunks else {})
        app.post(path, responses={200: good, **_errors()}, openapi_extra=body | locked)(handler)

    def get(
        path: str,
        handler: Callable[..., Any],
        answer: type[BaseModel] | str,
        query: type[BaseModel] | None = None,
        *filters: dict[str, Any],
    ) -> None:
        """`answer`: its shape, or the media type of bytes."""
        plain = {"content": {answer: {"schema": {"type": "string"}}}} if isinstance(answer, str) else {"model": answer}
        parameters = {"parameters": [*parameters_of(query), *filters]} if query else {}
        app.get(
            path,
            responses={200: plain, **_errors()},
            openapi_extra=parameters | locked,
            response_class=Response if isinstance(answer, str) else JSONResponse,
        )(handler)

    def act(path: str, handler: Callable[..., Any], answer: type[BaseModel]) -> None:
        app.post(path, responses={200: {"model": answer}, **_errors()}, openapi_extra=locked)(handler)

    post("/v1/completions", api.completions, CompletionRequest, answers.Completion, answers.CompletionChunk)
    post("/v1/chat/completions", api.chat, ChatRequest, answers.ChatCompletion, answers.ChatChunk)
    post("/v1/responses", api.responses, ResponsesRequest, answers.ResponseObject, answers.ResponseEvent)
    post("/v1/classify", api.classify, ClassifyRequest, answers.Classification)
    store = FileStore(service.storage, service.tuning.file_mb << 20, service.tuning.files_mb_per_key << 20)
    files, batches = FileRoutes(service, store), BatchRoutes(service, BatchStore(service.storage), store, wake)
    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD}}}}
    app.post("/v1/files", responses={200: {"model": FileObject}, **_errors()}, openapi_extra=form | locked)(files.create)
    get("/v1/files", files.files, FileList, FileQuery)
    get("/v1/files/{file_id}", files.file, FileObject)
    get("/v1/files/{file_id}/content", files.content, BYTES)
    app.delete("/v1/files/{file_id}", responses={200: {"model": FileDeleted}, **_errors()}, openapi_extra=locked)(files.delete)
    tuning, place = TuningRoutes(service, jobs), "/v1/fine_tuning/jobs"
    post(place, tuning.create, JobRequest, Job)
    get(place, tuning.jobs, JobList, JobQuery, METADATA)
    get(f"{place}/{{job_id}}", tuning.job, Job)
    get(f"{place}/{{job_id}}/events", tuning.events, JobEventList, JobQuery)
    get(f"{place}/{{job_id}}/checkpoints", tuning.checkpoints, JobCheckpointList, JobQuery)
    act(f"{place}/{{job_id}}/cancel", tuning.cancel, Job)
    act(f"{place}/{{job_id}}/pause", tuning.pause, Job)
    act(f"{place}/{{job_id}}/resume", tuning.resume, Job)
    post("/v1/batches", batches.create, BatchRequest, BatchObject)
    get("/v1/batches", batches.batches, BatchList, BatchQuery)
    get("/v1/batches/{batch_id}", batches.batch, BatchObject)
    act("/v1/batches/{batch_id}/cancel", batches.cancel, BatchObject)
    get("/v1/models", status.models, answers.Models)
    get("/v1/models/{name:path}", status.model, answers.Model)
    admin = AdminRoutes(service, status.look)
    post("/v1/admin/promote", admin.promote, PromoteRequest, Moved)
    post("/v1/admin/rollback", admin.rollback, RollbackRequest, Moved)
    get("/v1/admin/prompts/{name}", admin.prompt, Inspected)
    searching = SearchRoutes(service)
    get("/v1/admin/searches", searching.searches, SearchList)
    get("/v1/admin/searches/{name}", searching.search, SearchDetails)
    post("/v1/admin/searches/{name}", searching.tell, SearchInstruction, SearchIntervention)
    act("/v1/admin/reload", status.reload, ReloadedAnswer)
    get("/metrics", status.metrics, "text/plain")
    state = {"content": {"application/json": {"schema": {"type": "object"}}}}
    app.get("/livez", responses={503: {"description": "must be replaced", **state}})(status.livez)
    for path in ("/readyz", "/health"):
        app.get(path, responses={503: {"description": "not yet", **state}})(status.readyz)
    add_page(app, service.limits, service.keys)
    routes: dict[str, str] = {route.path: min(route.methods) for route in app.routes if hasattr(route, "methods")}  # type: ignore[attr-defined]

    app.add_middleware(Recorded, service=service)
    app.add_middleware(_Identified)
    if service.limits.cors_origins and service.keys:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.limits.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
        )

    app.add_middleware(Paced)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            return unknown_route(request.url.path, routes).response()
        return as_api_error(error).response()

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(Exception, refuse)
    _describe(app, shapes)
    return app


def _describe(app: FastAPI, shapes: Sequence[type[BaseModel]]) -> None:
    """Let the application's OpenAPI document contain the key and these shapes."""
    described_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = described_by_fastapi()
        components = document.setdefault("components", {})
        components["securitySchemes"] = {"bearer": BEARER}
        schemas = components.setdefault("schemas", {})
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's; here every parameter of an address may be any text
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for shape in shapes:
            schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
            if shape in NEUTRAL:
                schema["properties"] = described(NEUTRAL[shape]) | schema["properties"]
            schemas |= schema.pop("$defs", {}) | {shape.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents


def _errors() -> dict[int | str, dict[str, Any]]:
    return {status: {"model": answers.ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)}


class _Identified:
    """Gives every request an id: the one of its header `x-request-id`, which Serve's proxy adds to request and answer, or a new
    one. It is in the log. HEAD is answered as GET, without a body; 405 names HEAD, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(ID)
        own = given if given and _PRINTABLE.fullmatch(given) else uuid.uuid4().hex.encode()
        REQUEST_ID.set(own.decode())
        head = scope["method"] == "HEAD"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                if given is None:
                    headers.append((ID, own))
                if message["status"] == 405:
                    headers = [
                        (name, value + b", HEAD" if name == b"allow" and b"GET" in value else value) for name, value in headers
                    ]
                message = {**message, "headers": headers}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"} if head else scope, receive, answer)
