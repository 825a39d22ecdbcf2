"""A request that does not have the shape of its route -> one sentence that names the parameter. Imports only pydantic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ptuning.serving.neutral import printable, shown
from ptuning.serving.protocol import Shape

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing_size": "an integer of at most 64 bits",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "union_tag_invalid": "of a type among {expected_tags}",
    "union_tag_not_found": "an object with a type",
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a list with at least {min_length} item(s)",
    "too_long": "a list with at most {max_length} items",
    "string_too_short": "a string with at least {min_length} character(s)",
    "string_too_long": "a string with at most {max_length} characters",
    "string_unicode": "a string of valid Unicode",
    "string_pattern_mismatch": "an object whose keys are token ids",
}
"""What is right, by pydantic's type of an error."""


def complaint(error: ValidationError) -> tuple[str, str | None]:
    """The first problem of a request as one sentence, and the parameter it concerns.

    Of the client's values, the sentence contains numbers and truth values only, and names of parameters as printable text.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "value_error" and not problem["loc"]:
        message = problem["msg"].removeprefix("Value error, ")
        return message, message.partition(":")[0]
    if not problem["loc"]:
        return "the body is not a JSON object; send one", None
    param = printable(str(problem["loc"][0]))
    alike = [each for each in problems if each["loc"][:1] == problem["loc"][:1]]
    if {each["type"] for each in alike} == {"missing", "extra_forbidden"}:  # a wrong name, probably
        alike = [each for each in alike if each["type"] == "extra_forbidden"]
    deepest = max(len(_place(each)) for each in alike)
    alike = [each for each in alike if len(_place(each)) == deepest]
    place = _place(alike[0])
    alike = [each for each in alike if _place(each) == place]
    where = ".".join([param, *map(str, place)])
    if own := [each["msg"].removeprefix("Value error, ") for each in alike if each["type"] == "value_error"]:
        return f"{where}.{own[0]}", param
    kinds = {each["type"] for each in alike}
    if kinds == {"missing"}:
        return f"{where}: is missing; send it", param
    if "extra_forbidden" in kinds:
        unknown = [] if len(alike[0]["loc"]) == 1 or place[-1:] == [alike[0]["loc"][-1]] else [str(alike[0]["loc"][-1])]
        return f"{'.'.join([where, *map(printable, unknown)])}: is not supported; remove it", param
    rights = list(dict.fromkeys(_right(each) for each in alike))
    return f"{where}: must be {' or '.join(rights)}{_given(alike[0])}", param


def _place(problem: ErrorDetails) -> Sequence[int | str]:
    """Where a problem is within its parameter: indices and names of fields, without names of classes, which are internal."""
    return [part for part in problem["loc"][1:] if isinstance(part, int) or part in _fields()]


def _right(problem: ErrorDetails) -> str:
    template = _EXPECTED.get(problem["type"])
    if template is None:
        message = problem["msg"]
        return f"right: {message[0].lower()}{message[1:]}"
    context: Mapping[str, Any] = problem.get("ctx", {})
    return template.format(**{name: f"{each:g}" if isinstance(each, float) else each for name, each in context.items()})


def _given(problem: ErrorDetails) -> str:
    value = problem["input"]
    return f", not {shown(value)}" if isinstance(value, bool | int | float) or value is None else ""


def _shapes(owner: type[Shape]) -> list[type[Shape]]:
    return [owner, *(below for each in owner.__subclasses__() for below in _shapes(each))]


@cache
def _fields() -> frozenset[str]:
    """The names of all fields of all shapes."""
    return frozenset(field.alias or name for shape in _shapes(Shape) for name, field in shape.model_fields.items())
