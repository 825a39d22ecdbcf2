"""The routes of tuning jobs. Replicas only pass on what is asked to the actor that owns the jobs."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ptuning.serving.auth import Caller
from ptuning.serving.http_request import ApiError, authorize, read_body, refuse
from ptuning.serving.paging import query_of
from ptuning.serving.service import Service
from ptuning.serving.tuning_objects import JobQuery, JobRequest
from ptuning.tuning.job_store import ID

Ask = Callable[[str, str | None, Mapping[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
"""Asks the actor: a method of `TuningService`, the owner whose jobs are seen (None: all), its arguments. Returns a status and
the answer. May raise ConnectionError: the actor is starting."""

OFF = "this server takes no jobs; ask who runs it to set tuning.workers"
UNKNOWN = "there is no such job; GET /v1/fine_tuning/jobs lists those of your key"
STARTING = "the tuning service is starting; ask again in a moment"
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


class TuningRoutes:
    """The routes of one replica. `ask` None: the server takes no jobs."""

    def __init__(self, service: Service, ask: Ask | None) -> None:
        self._service = service
        self._ask = ask

    async def create(self, request: Request) -> Response:
        """Start a job."""
        try:
            caller = self._caller(request)
            body = await read_body(request, JobRequest, self._service.limits)
            given = body.model_dump(exclude_none=True)
            return await self._answer("create", caller.owner, admin=caller.sees is None, body=given)
        except Exception as error:  # any error must become a response in OpenAI's format
            return await refuse(request, error, 4 * self._service.limits.max_body_kb << 10)

    async def jobs(self, request: Request) -> Response:
        """Jobs, the newest first. `metadata[key]=value` filters; `metadata=null`: those without any."""
        caller = self._caller(request)
        query = request.query_params
        wanted = {found[1]: value for name, value in query.items() if (found := _METADATA.fullmatch(name))}
        none = query.get("metadata") == "null"
        known = {name: value for name, value in query.items() if name != "metadata" and not _METADATA.fullmatch(name)}
        asked = query_of(known, JobQuery)
        return await self._answer("list", caller.sees, after=asked.after, limit=asked.limit, metadata=wanted or None, none=none)

    async def job(self, job_id: str, request: Request) -> Response:
        return await self._about("get", job_id, request)

    async def cancel(self, job_id: str, request: Request) -> Response:
        """End a job. Its published checkpoints stay."""
        return await self._about("cancel", job_id, request)

    async def pause(self, job_id: str, request: Request) -> Response:
        """Save a checkpoint and free the job's slots."""
        return await self._about("pause", job_id, request)

    async def resume(self, job_id: str, request: Request) -> Response:
        """Queue a paused job again."""
        return await self._about("resume", job_id, request)

    async def events(self, job_id: str, request: Request) -> Response:
        """What happened to a job, the newest first."""
        return await self._listed("events", job_id, request, 20)

    async def checkpoints(self, job_id: str, request: Request) -> Response:
        """The checkpoints of a job that can be asked, the newest first."""
        return await self._listed("checkpoints", job_id, request, 10)

    async def _about(self, what: str, job: str, request: Request, **more: Any) -> Response:
        caller = self._caller(request)
        if not ID.fullmatch(job):
            raise ApiError(404, UNKNOWN, "invalid_request_error", code="job_not_found")
        return await self._answer(what, caller.sees, job=job, **more)

    async def _listed(self, what: str, job: str, request: Request, usual: int) -> Response:
        asked = query_of({"limit": str(usual)} | dict(request.query_params), JobQuery)
        return await self._about(what, job, request, after=asked.after, limit=asked.limit)

    def _caller(self, request: Request) -> Caller:
        caller = authorize(request, self._service.keys, "tuning")
        if self._service.draining:
            raise ApiError(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
        if self._ask is None:
            raise ApiError(404, OFF, "invalid_request_error", code="tuning_off")
        return caller

    async def _answer(self, what: str, owner: str | None, **arguments: Any) -> Response:
        assert self._ask
        try:
            status, answer = await self._ask(what, owner, arguments)
        except ConnectionError:
            status, answer = 503, {"message": STARTING}
        if status == 200:
            return JSONResponse(answer)
        kinds = {429: "rate_limit_error", 503: "server_error"}
        headers = {"retry_after": "2"} if status == 503 else {}
        if status == 429:
            headers = {"x_should_retry": "false"}
        kind = kinds.get(status, "invalid_request_error")
        raise ApiError(status, answer["message"], kind, answer.get("param"), code=answer.get("code"), **headers)
