"""What is asked about jobs, and the answers: an HTTP status with the body, or with the fields of an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ptuning.errors import TrackingError, UserError
from ptuning.redaction import logger, placeless
from ptuning.tuning.request import JobRefused
from ptuning.tuning.service import TooManyJobs, TuningService, UnknownJob

log = logger(__name__)

STARTING = "the tuning service is starting; ask again in a moment"

Answer = tuple[int, dict[str, Any]]
"""HTTP status, and the answer's body or the fields of an error."""


class AskedJobs(Protocol):
    """What can be asked about jobs. `owner` None: the jobs of all owners."""

    async def create_job(self, owner: str, admin: bool, body: Mapping[str, Any]) -> Answer: ...

    async def list_jobs(
        self, owner: str | None, after: str | None, limit: int, metadata: Mapping[str, str] | None, none: bool
    ) -> Answer: ...

    async def get_job(self, owner: str | None, job: str) -> Answer: ...

    async def cancel_job(self, owner: str | None, job: str) -> Answer: ...

    async def pause_job(self, owner: str | None, job: str) -> Answer: ...

    async def resume_job(self, owner: str | None, job: str) -> Answer: ...

    async def events_of(self, owner: str | None, job: str, after: str | None, limit: int) -> Answer: ...

    async def checkpoints_of(self, owner: str | None, job: str, after: str | None, limit: int) -> Answer: ...


class JobAnswers:
    """Answers from a service, each in a thread."""

    def __init__(self, service: TuningService | None = None) -> None:
        """`service` None: it comes later."""
        self._service = service
        self._unavailable: str | None = None
        """Why there will be no service."""

    async def create_job(self, owner: str, admin: bool, body: Mapping[str, Any]) -> Answer:
        return await self._answered(lambda service: service.create(owner, admin, body))

    async def list_jobs(
        self, owner: str | None, after: str | None, limit: int, metadata: Mapping[str, str] | None, none: bool
    ) -> Answer:
        return await self._answered(lambda service: service.list(owner, after, limit, metadata, none))

    async def get_job(self, owner: str | None, job: str) -> Answer:
        return await self._answered(lambda service: service.get(owner, job))

    async def cancel_job(self, owner: str | None, job: str) -> Answer:
        return await self._answered(lambda service: service.cancel(owner, job))

    async def pause_job(self, owner: str | None, job: str) -> Answer:
        return await self._answered(lambda service: service.pause(owner, job))

    async def resume_job(self, owner: str | None, job: str) -> Answer:
        return await self._answered(lambda service: service.resume(owner, job))

    async def events_of(self, owner: str | None, job: str, after: str | None, limit: int) -> Answer:
        return await self._answered(lambda service: service.events(owner, job, after, limit))

    async def checkpoints_of(self, owner: str | None, job: str, after: str | None, limit: int) -> Answer:
        return await self._answered(lambda service: service.checkpoints(owner, job, after, limit))

    async def _answered(self, call: Callable[[TuningService], dict[str, Any]]) -> Answer:
        service = self._service
        if service is None:
            return 503, {"message": self._unavailable or STARTING}
        return await asyncio.to_thread(_answer, service, call)


def _answer(service: TuningService, call: Callable[[TuningService], dict[str, Any]]) -> Answer:
    try:
        return 200, call(service)
    except UnknownJob as error:
        return 404, {"message": str(error), "code": "job_not_found"}
    except TooManyJobs as error:
        return 429, {"message": str(error), "code": "too_many_jobs"}
    except JobRefused as error:
        return 400, {"message": placeless(str(error)), "param": error.param, "code": error.code}
    except TrackingError as error:
        return 503, {"message": placeless(str(error))}
    except UserError as error:
        return 400, {"message": placeless(str(error))}
    except OSError as error:
        log.warning("the storage failed: %s", error)
        return 503, {"message": "the storage cannot be written at the moment; ask again later"}
