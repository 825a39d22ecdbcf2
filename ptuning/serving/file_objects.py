"""Files as clients see them, and the parameters of their routes. Imports only pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ptuning.serving.protocol import Shape


class FileObject(Shape):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["fine-tune", "batch", "batch_output", "fine-tune-results"]
    status: Literal["processed"] = "processed"
    """A file exists when it was checked."""
    status_details: None = None


class FileList(Shape):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Shape):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileQuery(Shape):
    """Parameters of the list."""

    purpose: str | None = None
    limit: Annotated[int, Field(ge=1, le=10000)] = 10000
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class FileForm(Shape):
    """The fields of an upload besides the file itself."""

    purpose: Literal["fine-tune", "batch"]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=3600, le=2592000)] = None
    """After the upload, when the file expires."""


UPLOAD: dict[str, Any] = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": FileForm.model_json_schema()["properties"] | {"file": {"type": "string", "format": "binary"}},
}
"""The form of an upload, for an OpenAPI document."""
