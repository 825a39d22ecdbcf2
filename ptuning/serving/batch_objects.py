"""Batches as clients see them, and requests for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ptuning.serving.protocol import Shape
from ptuning.serving.tuning_objects import Metadata
from ptuning.tuning.batch_store import Endpoint, Status


class ExpiresAfter(Shape):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class BatchRequest(Shape):
    input_file_id: Annotated[str, Field(max_length=100)]
    """A file with the purpose `batch`: one request per line."""
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    """Default: 30 days."""


class BatchQuery(Shape):
    """Parameters of the list."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class LineError(Shape):
    code: str
    message: str
    param: str | None
    line: int | None


class Errors(Shape):
    object: Literal["list"] = "list"
    data: list[LineError]


class RequestCounts(Shape):
    total: int
    completed: int
    failed: int


class CachedDetails(Shape):
    cached_tokens: int


class ReasoningDetails(Shape):
    reasoning_tokens: Literal[0] = 0


class BatchUsage(Shape):
    input_tokens: int
    input_tokens_details: CachedDetails
    output_tokens: int
    output_tokens_details: ReasoningDetails = ReasoningDetails()
    total_tokens: int


class BatchObject(Shape):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    model: str | None
    """If all lines ask the same one."""
    errors: Errors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: Metadata | None


class BatchList(Shape):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
