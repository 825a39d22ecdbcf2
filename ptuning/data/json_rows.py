"""Rows of a JSON file: one object per line, an array of objects, objects over several lines, an object that contains the rows
in one list, as {"data": [...]}, or a table as `DataFrame.to_json()` writes it, such as {"text": {"0": ...}} or {"text": [...]}.

Files may be larger than the memory: at most `LINE_LIMIT` characters, one row, are decoded at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any

from ptuning.data.json_text import JsonText, not_an_object
from ptuning.data.row import root
from ptuning.data.text_lines import LINE_LIMIT, decoded, place, too_long
from ptuning.errors import DataError

Row = tuple[str, Mapping[str, Any]]
"""The location of a row, for error messages, and its values."""


def json_rows(stream: IO[bytes], source: str, names: Collection[str]) -> Iterator[Row]:
    """The rows of a JSON file. `names`: the fields that are wanted; an object that contains one of them is a row.

    Raises:
        DataError: the file is broken, at its line.
    """
    number, line = 0, b""
    while line := stream.readline(LINE_LIMIT):
        number += 1
        if line.removeprefix(codecs.BOM_UTF8).strip():
            break
    if not line:
        return
    whole = len(line) < LINE_LIMIT
    text = decoded(line, source, number) if whole else line[:100].decode(errors="replace").lstrip("\ufeff")
    first = _object(text) if whole else None
    if first is not None:
        yield from _lines(stream, source, number, first, names)
    elif text.lstrip()[:1] == "[":
        yield from _array(JsonText(stream, line, source, number), source)
    elif text.lstrip()[:1] == "{" and (not whole or text.rstrip()[-1:] in "{[,:"):
        yield from _objects(JsonText(stream, line, source, number), source, names)
    else:
        raise not_an_object(source, number) if whole else too_long(source, number)


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _lines(stream: IO[bytes], source: str, number: int, first: dict[str, Any], names: Collection[str]) -> Iterator[Row]:
    """The rows of a file with one object per line. `number`: of the line of the first one."""
    begin, count = number, 1
    while line := stream.readline(LINE_LIMIT):
        number += 1
        if len(line) == LINE_LIMIT:
            raise too_long(source, number)
        text = decoded(line, source, number)
        if not text.strip():
            continue
        if count == 1:
            yield place(source, 1, begin), first
        row = _object(text)
        if row is None:
            raise not_an_object(source, number)
        count += 1
        yield place(source, count, number), row
    if count > 1:
        return
    rows = _rows_inside(first, source, names)
    if rows is None:
        yield place(source, 1, begin), first
    yield from ((f"{source}, row {at}", row) for at, row in enumerate(rows or (), 1))


def _rows_inside(only: Mapping[str, Any], source: str, names: Collection[str]) -> list[dict[str, Any]] | None:
    """The rows in an object that is not a row itself."""
    if rows := _of_columns(only):
        return rows
    if _is_row(only, names):
        return None
    lists = {key: value for key, value in only.items() if _is_list_of_rows(value)}
    if len(lists) > 1:
        raise _several(source, list(lists))
    return next(iter(lists.values()), None)


def _of_columns(only: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table that is one object: its columns, each a list, or an object with the same numbers of the rows as keys;
    the names of its columns beside its values; or its rows by their numbers."""
    columns = list(only.values())
    if columns and all(isinstance(column, list) and column for column in columns):
        return _of_lists(only)
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return None
    numbers = list(columns[0])
    if all(key.isdecimal() for key in only) and not any(key.isdecimal() for key in numbers):
        return columns if all(list(row) == numbers for row in columns) else None
    if not all(key.isdecimal() for key in numbers) or any(list(column) != numbers for column in columns):
        return None
    return [{name: column[key] for name, column in only.items()} for key in numbers]


def _of_lists(only: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    names, values = only.get("columns"), only.get("data")
    if names and values and set(only) <= {"columns", "data", "index"}:
        whole = all(isinstance(row, list) and len(row) == len(names) for row in values)
        return [dict(zip(names, row, strict=True)) for row in values] if whole else None
    if len({len(column) for column in only.values()}) > 1 or any(
        isinstance(each, dict) for column in only.values() for each in column
    ):
        return None
    return [dict(zip(only, row, strict=True)) for row in zip(*only.values(), strict=True)]


def _is_row(keys: Collection[str], names: Collection[str]) -> bool:
    return any(root(name, keys) is not None for name in names)


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _several(source: str, keys: list[str]) -> DataError:
    listed = ", ".join(f"'{key}'" for key in keys)
    return DataError(f"{source}: contains several lists of rows ({listed}); write each to a file of its own")


def _array(text: JsonText, source: str) -> Iterator[Row]:
    for count, (line, row) in enumerate(text.elements(), 1):
        if not isinstance(row, dict):
            raise not_an_object(source, line)
        yield place(source, count, line), row
    if text.peek():
        raise text.invalid("text after the end of the array")


def _objects(text: JsonText, source: str, names: Collection[str]) -> Iterator[Row]:
    """The rows of a file with an object over several lines: it is the first row, or contains the rows in a list."""
    line, count = text.line, 0
    members: dict[str, Any] = {}
    rows: str | None = None
    text.take("{")
    for key in text.members():
        if text.peek() != "[" or _is_row([*members, key], names):
            members[key] = text.value()
            continue
        others: list[Any] = []
        for at, element in text.elements():
            if others or not isinstance(element, dict):
                others.append(element)
                continue
            if rows not in (None, key):
                raise _several(source, [str(rows), key])
            rows, count = key, count + 1
            yield place(source, count, at), element
        if others and rows == key:
            raise DataError(f"{source}: the list '{key}' contains something else than objects; write one object per row")
        members[key] = others
    if rows is None and (found := _of_columns(members)) and not text.peek():
        yield from ((f"{source}, row {at}", row) for at, row in enumerate(found, 1))
    elif rows is None:
        yield place(source, 1, line), members
        yield from _further(text, source)
    elif text.peek():
        raise text.invalid("text after the end of the object")


def _further(text: JsonText, source: str) -> Iterator[Row]:
    count = 1
    while text.peek():
        line, row = text.line, text.value()
        if not isinstance(row, dict):
            raise not_an_object(source, line)
        count += 1
        yield place(source, count, line), row
