"""The values that a template names, taken from a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ptuning.errors import DataError, suggest
from ptuning.settings.template import in_braces

_STEP = re.compile(r"[.\[]")
_INDEX = re.compile(r"\[(-?\d+|[^\[\]]+)\]")

NO_DEFAULTS: Mapping[str, str] = {}


class _Missing(Exception):
    """No such key or index. `args`: where, and what is there instead."""


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """A column, or a value inside one: "answers.text[0]". A column of exactly this name comes first, and longer names of
    columns come before shorter ones.

    Raises:
        KeyError: there is none.
    """
    if name in row:  # almost always, and this is asked for every field of every row
        return row[name]
    try:
        return _inside(row, name)
    except _Missing:
        raise KeyError(name) from None


def root(name: str, columns: Iterable[str]) -> str | None:
    """The column that `look_up` begins with, or None."""
    known = set(columns)
    return next((part for part in _beginnings(name) if part in known), None)


def _beginnings(name: str) -> Iterable[str]:
    """The name, then what is in front of each dot and bracket, the longest first."""
    yield name
    yield from (name[: found.start()] for found in reversed(list(_STEP.finditer(name))) if found.start())


def _inside(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        for part in _beginnings(path):
            if part in value:
                try:
                    return _follow(value[part], path[len(part) :])
                except _Missing:
                    continue
    raise _Missing(path)


def _follow(value: Any, rest: str) -> Any:
    """What is at the end of a path that begins with a dot or a bracket."""
    if not rest:
        return value
    if isinstance(value, list) and (index := re.match(r"\.(\d+)", rest)):
        rest = f"[{index[1]}]{rest[index.end() :]}"
    if rest[0] == "." and len(rest) > 1:
        return _inside(value, rest[1:])
    step = _INDEX.match(rest)
    if step is None:
        raise _Missing(rest)
    key: Any = step[1]
    if isinstance(value, Mapping):
        key = key.strip("'\"") if key not in value else key
        if key in value:
            return _follow(value[key], rest[step.end() :])
    elif isinstance(value, list) and re.fullmatch(r"-?\d+", key) and -len(value) <= int(key) < len(value):
        return _follow(value[int(key)], rest[step.end() :])
    raise _Missing(rest)


def texts_of(row: Mapping[str, object], fields: Iterable[str], defaults: Mapping[str, str] = NO_DEFAULTS) -> dict[str, str]:
    """The row's fields as texts; numbers and truth values are formatted by `str`.

    `defaults` stand in for values that are missing, null or empty.

    Raises:
        DataError: a required field is missing, null or not a single value. The message does not name the row.
    """
    texts = {}
    for field in fields:
        try:
            value = look_up(row, field)
        except KeyError:
            if field not in defaults:
                raise missing(field, row) from None
            value = None
        if value is None or value != value or (value == "" and field in defaults):
            # NaN is what a missing number looks like after pandas, and CSV has no null
            if field not in defaults:
                raise DataError(f"the field '{field}' is null; fill it or remove the row")
            value = defaults[field]
        if isinstance(value, list | dict | bytes):
            raise DataError(f"the field '{field}' is a {type(value).__name__}, not a text; {_inner(field, value)}")
        texts[field] = str(value)
    return texts


def _inner(field: str, value: object) -> str:
    """How to name a text inside a list or a table."""
    if isinstance(value, list) and value and not isinstance(value[0], list | dict | bytes):
        return f"write it as text, or name one value: {in_braces(f'{field}[0]')}"
    if isinstance(value, dict):
        inner = next((key for key, each in value.items() if isinstance(each, str | int | float)), None)
        if isinstance(inner, str):
            return f"write it as text, or name one value: {in_braces(f'{field}.{inner}')}"
    return "write it as text"


def missing(field: str, known: Iterable[str]) -> DataError:
    there = sorted(name for name in known if isinstance(name, str))
    names = ", ".join(f"'{name}'" for name in there) or "none"
    fix = suggest(field, there, "correct the data or the template", alike=0.8, shown=in_braces)
    return DataError(f"the field '{field}' is missing (found: {names}); {fix}")


def answers(row: Mapping[str, Any], column: str) -> list[str] | None:
    """All correct answers of a row: a text or a list of texts; None if it has none.

    Raises:
        DataError: the column has another form.
    """
    try:
        value = look_up(row, column)
    except KeyError:
        return None
    if value is None or isinstance(value, str):
        return [value] if value else None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"the field '{column}' is not a list of texts; write it as a list of texts")
    return value or None
