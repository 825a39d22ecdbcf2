"""The routes of batches. What they answer is in the storage; a runner elsewhere does the work (`tuning.batch_runner`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from ptuning.redaction import logger
from ptuning.serving.auth import Caller
from ptuning.serving.batch_objects import (
    BatchList,
    BatchObject,
    BatchQuery,
    BatchRequest,
    BatchUsage,
    CachedDetails,
    Errors,
    LineError,
    RequestCounts,
)
from ptuning.serving.http_request import ApiError, authorize, read_body, refuse
from ptuning.serving.paging import page, query_of
from ptuning.serving.replies import json_response
from ptuning.serving.service import Service
from ptuning.tuning.batch_store import BatchRecord, BatchStore, UnknownBatch
from ptuning.tuning.files import FileStore, UnknownFile

log = logger(__name__)

Wake = Callable[[], Awaitable[None]]
"""Tells the runner that there is something new, and starts it if it does not run."""
MOST_OPEN = 100
"""Batches of one owner that have not ended."""
AGAIN_S = 5.0
"""Seconds after which a client that looks at a batch has the runner started again, if it does not run."""

WAKE_S = 60.0
"""Seconds in which a runner starts and answers."""


class BatchRoutes:
    """The routes of one replica."""

    def __init__(self, service: Service, store: BatchStore, files: FileStore, wake: Wake | None) -> None:
        """`wake` None: nothing runs batches here."""
        self._service = service
        self._store = store
        self._files = files
        self._wake = wake
        self._woken = 0.0
        self._waking: set[asyncio.Task[None]] = set()

    async def create(self, request: Request) -> Response:
        try:
            return await self._create(request)
        except Exception as error:  # any error must become a response in OpenAI's format
            return await refuse(request, error, 4 * self._service.limits.max_body_kb * 1024)

    async def _create(self, request: Request) -> Response:
        caller = self._caller(request)
        asked = await read_body(request, BatchRequest, self._service.limits)
        try:
            file = await asyncio.to_thread(self._files.get, asked.input_file_id, caller.sees)
        except UnknownFile as error:
            raise ApiError(400, f"input_file_id: {error}", "invalid_request_error", "input_file_id", code="not_found") from None
        if file.purpose != "batch":
            message = f"input_file_id: the file has the purpose {file.purpose}; upload it with the purpose batch"
            raise ApiError(400, message, "invalid_request_error", "input_file_id")
        if await asyncio.to_thread(self._count_open, file.owner) >= MOST_OPEN:
            message = f"{MOST_OPEN} batches of this key have not ended; wait for one of them"
            raise ApiError(429, message, "rate_limit_error", code="too_many_batches", x_should_retry="false")
        expires = asked.output_expires_after.seconds if asked.output_expires_after else None
        record = await asyncio.to_thread(self._store.create, file.owner, asked.endpoint, file.id, asked.metadata, expires)
        self._call(at_once=True)
        return json_response(_object(record))

    async def batches(self, request: Request) -> Response:
        caller = self._caller(request)
        asked = query_of(request.query_params, BatchQuery)
        items, more = page(await asyncio.to_thread(self._store.list, caller.sees), asked.after, asked.limit)
        data = [_object(record) for record in items]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return json_response(BatchList(data=data, first_id=first, last_id=last, has_more=more))

    async def batch(self, batch_id: str, request: Request) -> Response:
        caller = self._caller(request)
        return json_response(_object(await self._known(batch_id, caller)))

    async def cancel(self, batch_id: str, request: Request) -> Response:
        caller = self._caller(request)
        record = await self._known(batch_id, caller)
        if record.ended or record.status == "finalizing":
            message = f"the batch is {record.status}; it cannot be cancelled any more"
            raise ApiError(400, message, "invalid_request_error", "batch_id")
        await asyncio.to_thread(self._store.cancel, batch_id)
        self._call(at_once=True)
        return json_response(_object(await self._known(batch_id, caller)))

    def _count_open(self, owner: str) -> int:
        return sum(record.owner == owner for record in self._store.open())

    def _caller(self, request: Request) -> Caller:
        if self._service.draining:
            raise ApiError(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
        return authorize(request, self._service.keys, "tuning")

    async def _known(self, batch_id: str, caller: Caller) -> BatchRecord:
        try:
            record = await asyncio.to_thread(self._store.get, batch_id, caller.sees)
        except UnknownBatch as error:
            raise ApiError(404, str(error), "invalid_request_error", "batch_id", code="not_found") from None
        if not record.ended:
            self._call()
        return record

    def _call(self, at_once: bool = False) -> None:
        """Wake the runner, without waiting for it: the batch is in the storage, so it is not lost if that fails."""
        now = time.monotonic()
        if self._wake is None or (not at_once and now - self._woken < AGAIN_S):
            return
        self._woken = now
        task = asyncio.create_task(self._woken_by(self._wake))
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    async def _woken_by(self, wake: Wake) -> None:
        try:
            await asyncio.wait_for(wake(), WAKE_S)
        except Exception as error:  # Ray raises many types; the next look at the batch tries again
            log.warning("the runner of batches was not reached: %s", type(error).__name__)


def _object(record: BatchRecord) -> BatchObject:
    spent = record.spent
    errors = [LineError(code=e.code, message=e.message, param=e.param, line=e.line) for e in record.errors]
    return BatchObject(
        **{name: getattr(record, name) for name in BatchObject.model_fields if hasattr(record, name) and name not in _MADE},
        errors=Errors(data=errors) if errors else None,
        output_file_id=record.output_file_id if record.has_output else None,
        error_file_id=record.error_file_id if record.has_errors else None,
        request_counts=RequestCounts(total=record.total, completed=record.completed, failed=record.failed),
        usage=BatchUsage(
            input_tokens=spent.input_tokens,
            input_tokens_details=CachedDetails(cached_tokens=spent.cached_tokens),
            output_tokens=spent.output_tokens,
            total_tokens=spent.input_tokens + spent.output_tokens,
        ),
    )


_MADE = ("errors", "output_file_id", "error_file_id")
