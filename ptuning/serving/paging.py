"""Pages of lists, as OpenAI's clients ask for them: `after` an id, at most `limit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from ptuning.serving.http_request import ApiError, invalid


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)
Query = TypeVar("Query", bound=BaseModel)


def query_of(given: Mapping[str, str], shape: type[Query]) -> Query:
    """The parameters in the address of a request, or some of them."""
    try:
        return shape.model_validate_strings(dict(given))
    except ValidationError as error:
        raise invalid(error) from None


def page(items: Sequence[Item], after: str | None, limit: int) -> tuple[Sequence[Item], bool]:
    """The items of a page, and whether more follow."""
    begin = 0
    if after is not None:
        begin = next((place for place, item in enumerate(items, 1) if item.id == after), -1)
        if begin < 0:
            raise ApiError(
                400, "after: is not an id of this list; send the last id of the page before", "invalid_request_error", "after"
            )
    return items[begin : begin + limit], begin + limit < len(items)


def parameters_of(shape: type[BaseModel]) -> list[dict[str, Any]]:
    """The parameters in the address, for an OpenAPI document."""
    properties = shape.model_json_schema()["properties"]
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()]
