"""The routes of files. An upload goes to the storage as it arrives; its size has limits of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from ptuning.redaction import logger
from ptuning.serving.auth import Caller, is_loopback
from ptuning.serving.file_objects import FileDeleted, FileForm, FileList, FileObject, FileQuery
from ptuning.serving.http_request import ApiError, as_api_error, authorize, invalid, refuse
from ptuning.serving.paging import page, query_of
from ptuning.serving.replies import json_response
from ptuning.serving.service import Service
from ptuning.serving.upload_form import FormError, UploadForm, boundary_of
from ptuning.tuning.file_check import FileError
from ptuning.tuning.file_record import FileRecord
from ptuning.tuning.files import BLOCK, FileStore, QuotaExceeded, UnknownFile, Upload

log = logger(__name__)

BYTES = "application/octet-stream"
"""Media type of a file's content."""
FORM_BYTES = 64 << 10
"""Bytes of a form besides the file, at most."""
DRAIN_S = 10.0
"""Seconds to read the rest of a refused upload."""


class FileRoutes:
    """The routes of one replica."""

    def __init__(self, service: Service, store: FileStore) -> None:
        self._service = service
        self._store = store
        self._most = service.tuning.file_mb << 20

    async def create(self, request: Request) -> Response:
        """Take a file: a form with the fields `purpose` and `file`."""
        caller: Caller | None = None
        try:
            caller = self._caller(request)
            return await self._create(request, caller)
        except Exception as error:  # any error must become a response in OpenAI's format
            most, seconds = (2 * self._most, DRAIN_S) if caller else (FORM_BYTES, 1.0)
            return await refuse(request, _refusal(error), most, seconds)

    async def files(self, request: Request) -> Response:
        caller = self._caller(request)
        asked = query_of(request.query_params, FileQuery)
        found = list(await asyncio.to_thread(self._store.list, caller.sees, asked.purpose))
        items, more = page(found if asked.order == "desc" else found[::-1], asked.after, asked.limit)
        data = [_object(record) for record in items]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return json_response(FileList(data=data, first_id=first, last_id=last, has_more=more))

    async def file(self, file_id: str, request: Request) -> Response:
        caller = self._caller(request)
        return json_response(_object(await self._known(file_id, caller)))

    async def content(self, file_id: str, request: Request) -> Response:
        caller = self._caller(request)
        record = await self._known(file_id, caller)
        stream = await asyncio.to_thread(self._store.open, file_id, caller.sees)

        async def blocks() -> AsyncIterator[bytes]:
            with stream:
                while block := await asyncio.to_thread(stream.read, BLOCK):
                    yield block

        # A page of this address must not run what a client has sent.
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        headers["content-length"] = str(record.bytes)
        return StreamingResponse(blocks(), media_type=BYTES, headers=headers)

    async def delete(self, file_id: str, request: Request) -> Response:
        caller = self._caller(request)
        record = await self._known(file_id, caller)
        await asyncio.to_thread(self._store.delete, record.id, caller.sees)
        return json_response(FileDeleted(id=record.id))

    def _caller(self, request: Request) -> Caller:
        if self._service.draining:
            raise ApiError(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
        return authorize(request, self._service.keys, "tuning")

    async def _known(self, file_id: str, caller: Caller) -> FileRecord:
        try:
            return await asyncio.to_thread(self._store.get, file_id, caller.sees)
        except UnknownFile as error:
            raise _refusal(error) from None

    async def _create(self, request: Request, caller: Caller) -> Response:
        self._check_origin(request)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "the body must not be compressed; leave Content-Encoding out", "invalid_request_error")
        boundary = boundary_of(request.headers.get("content-type", ""))
        if boundary is None:
            message = "the body must be a form (multipart/form-data) with the fields purpose and file"
            raise ApiError(415, f"{message}; set Content-Type", "invalid_request_error")
        declared = request.headers.get("content-length", "")
        size = max(0, int(declared) - FORM_BYTES) if declared.isdigit() and len(declared) < 16 else 0

        def begin(filename: str, fields: Mapping[str, str]) -> Upload:
            purpose = _fields(fields).purpose if "purpose" in fields else None
            return self._store.begin(caller.owner, filename, purpose, declared=size)

        if size > self._most:
            raise QuotaExceeded(f"the file is larger than {self._most >> 20} MB; split it")
        form = UploadForm(boundary, begin)
        try:
            record = await self._receive(request, form)
        except BaseException:
            if form.upload is not None:
                await asyncio.to_thread(form.upload.discard)
            raise
        log.info("a file of %d bytes was stored as %s", record.bytes, record.id)
        return json_response(_object(record))

    async def _receive(self, request: Request, form: UploadForm) -> FileRecord:
        stream = request.stream()
        waiting: list[bytes] = []
        size = 0
        while True:
            async with asyncio.timeout(self._service.limits.deadline_s):  # for a body that arrives very slowly
                chunk = await anext(stream, None)
            if chunk:
                waiting.append(chunk)
                size += len(chunk)
            if size >= BLOCK or (chunk is None and waiting):
                await asyncio.to_thread(form.write, b"".join(waiting))
                waiting, size = [], 0
            if chunk is None:
                break
        upload = form.end()
        asked = _fields(form.fields)
        return await asyncio.to_thread(upload.finish, asked.purpose, asked.seconds)

    def _check_origin(self, request: Request) -> None:
        """A web page can send forms to a local server without permission (CORS). Without keys, only a page of this server may.

        A page of another name that leads to this address (DNS rebinding) is not a page of this server.
        """
        origin = request.headers.get("origin")
        if origin is None or self._service.keys:
            return
        try:
            place = urlsplit(origin)
            own = place.netloc == request.headers.get("host")
            own &= is_loopback(place.hostname or "") or not is_loopback(self._service.limits.host)
        except ValueError:
            own = False
        if not own:
            raise ApiError(403, "web pages of other servers cannot send files; use an API client", "permission_error")


def _fields(given: Mapping[str, str]) -> FileForm:
    try:
        asked = FileForm.model_validate_strings(given)
    except ValidationError as error:
        raise invalid(error) from None
    if (asked.anchor is None) != (asked.seconds is None):
        raise FormError("expires_after: needs both anchor and seconds; send both, or leave it out")
    return asked


def _object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, UnknownFile):
        return ApiError(404, str(error), "invalid_request_error", "file_id", code="not_found")
    if isinstance(error, QuotaExceeded):
        return ApiError(413, str(error), "invalid_request_error", "file", code="file_too_large")
    if isinstance(error, FileError):
        return ApiError(400, str(error), "invalid_request_error", "file", code="invalid_file")
    if isinstance(error, FormError):
        return ApiError(400, str(error), "invalid_request_error", str(error).partition(":")[0] if ":" in str(error) else None)
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        log.error("a file could not be written: %s", type(error).__name__ if error.errno is None else error.strerror)
        return ApiError(503, "the file could not be stored; see the server's log", "server_error", x_should_retry="false")
    return as_api_error(error)
