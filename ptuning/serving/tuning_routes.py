"""The routes of tuning jobs. Replicas only pass on what is asked to the actor that owns the jobs."""

from __future__ import annotations

import re

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ptuning.serving.auth import Caller
from ptuning.serving.http_request import ApiError, authorize, read_body, refuse
from ptuning.serving.paging import query_of
from ptuning.serving.service import Service
from ptuning.serving.tuning_objects import JobQuery, JobRequest
from ptuning.tuning.answers import Answer, AskedJobs
from ptuning.tuning.job_store import ID

OFF = "this server takes no jobs; ask who runs it to set tuning.workers"
UNKNOWN = "there is no such job; GET /v1/fine_tuning/jobs lists those of your key"
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


class TuningRoutes:
    """The routes of one replica. `jobs` None: the server takes no jobs."""

    def __init__(self, service: Service, jobs: AskedJobs | None) -> None:
        self._service = service
        self._jobs = jobs

    async def create(self, request: Request) -> Response:
        """Start a job."""
        try:
            caller, jobs = self._caller(request)
            body = await read_body(request, JobRequest, self._service.limits)
            given = body.model_dump(exclude_none=True)
            return _response(await jobs.create_job(caller.owner, caller.sees is None, given))
        except Exception as error:  # any error must become a response in OpenAI's format
            return await refuse(request, error, 4 * self._service.limits.max_body_kb << 10)

    async def jobs(self, request: Request) -> Response:
        """Jobs, the newest first. `metadata[key]=value` filters; `metadata=null`: those without any."""
        caller, jobs = self._caller(request)
        query = request.query_params
        wanted = {found[1]: value for name, value in query.items() if (found := _METADATA.fullmatch(name))}
        none = query.get("metadata") == "null"
        known = {name: value for name, value in query.items() if name != "metadata" and not _METADATA.fullmatch(name)}
        asked = query_of(known, JobQuery)
        return _response(await jobs.list_jobs(caller.sees, asked.after, asked.limit, wanted or None, none))

    async def job(self, job_id: str, request: Request) -> Response:
        owner, jobs = self._about(job_id, request)
        return _response(await jobs.get_job(owner, job_id))

    async def cancel(self, job_id: str, request: Request) -> Response:
        """End a job. Its published checkpoints stay."""
        owner, jobs = self._about(job_id, request)
        return _response(await jobs.cancel_job(owner, job_id))

    async def pause(self, job_id: str, request: Request) -> Response:
        """Save a checkpoint and free the job's slots."""
        owner, jobs = self._about(job_id, request)
        return _response(await jobs.pause_job(owner, job_id))

    async def resume(self, job_id: str, request: Request) -> Response:
        """Queue a paused job again."""
        owner, jobs = self._about(job_id, request)
        return _response(await jobs.resume_job(owner, job_id))

    async def events(self, job_id: str, request: Request) -> Response:
        """What happened to a job, the newest first."""
        asked = _page_of(request, 20)
        owner, jobs = self._about(job_id, request)
        return _response(await jobs.events_of(owner, job_id, asked.after, asked.limit))

    async def checkpoints(self, job_id: str, request: Request) -> Response:
        """The checkpoints of a job that can be asked, the newest first."""
        asked = _page_of(request, 10)
        owner, jobs = self._about(job_id, request)
        return _response(await jobs.checkpoints_of(owner, job_id, asked.after, asked.limit))

    def _about(self, job: str, request: Request) -> tuple[str | None, AskedJobs]:
        """The owner whose jobs are seen, and who is asked about a job."""
        caller, jobs = self._caller(request)
        if not ID.fullmatch(job):
            raise ApiError(404, UNKNOWN, "invalid_request_error", code="job_not_found")
        return caller.sees, jobs

    def _caller(self, request: Request) -> tuple[Caller, AskedJobs]:
        caller = authorize(request, self._service.keys, "tuning")
        if self._service.draining:
            raise ApiError(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
        if self._jobs is None:
            raise ApiError(404, OFF, "invalid_request_error", code="tuning_off")
        return caller, self._jobs


def _page_of(request: Request, usual: int) -> JobQuery:
    return query_of({"limit": str(usual)} | dict(request.query_params), JobQuery)


def _response(answer: Answer) -> Response:
    status, told = answer
    if status == 200:
        return JSONResponse(told)
    kinds = {429: "rate_limit_error", 503: "server_error"}
    headers = {"retry_after": "2"} if status == 503 else {}
    if status == 429:
        headers = {"x_should_retry": "false"}
    kind = kinds.get(status, "invalid_request_error")
    raise ApiError(status, told["message"], kind, told.get("param"), code=told.get("code"), **headers)
