"""The first look at a table: how many rows, which columns of which types, which soft prompts they name.

Nothing has started yet: a broken line is found here, and not after an hour. Rows are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from ptuning.data.json_rows import Row
from ptuning.data.readers import Columns
from ptuning.data.sources import shown, source_parts
from ptuning.errors import DataError, suggest
from ptuning.model.fingerprint import json_hash

CHUNK = 1000
"""Rows whose types are found at once."""
MOST_NAMES = 1000
"""More different values in the column of soft prompts are a mistake."""


@dataclass(frozen=True)
class Survey:
    """A table before it is answered."""

    source: str | Sequence[str]
    columns: Columns
    """How it is read."""
    parts: tuple[int, ...]
    """Rows of each file or data set."""
    identity: str
    """Hash of what determines the rows."""
    schema: pa.Schema
    """All columns, as they are written again."""
    as_json: frozenset[str]
    """Columns whose values have several types: they are written as text."""
    first: Mapping[str, Any]
    """The first row."""
    named: Mapping[str, int] = field(default_factory=dict)
    """The soft prompts that the rows name, and the first row (from 1) of each; "" where a row names none."""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(self.parts)

    @property
    def place(self) -> str:
        """The table as messages name it."""
        return shown(self.source)

    def as_table(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Rows in the columns of the table."""
        return pa.table([self._array(rows, each) for each in self.schema], self.schema)

    def _array(self, rows: Sequence[Mapping[str, Any]], column: pa.Field) -> pa.Array:
        values = (row.get(column.name) for row in rows)
        if column.name in self.as_json:
            return pa.array([None if value is None else as_text(value) for value in values], pa.string())
        return pa.array(list(values), column.type)


def as_text(value: Any) -> str:
    """A value of any type as text: a text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def survey(
    source: str | Sequence[str],
    columns: Columns,
    model_column: str | None = None,
    look: Callable[[int], None] = lambda rows: None,
) -> Survey:
    """Read a table once.

    Args:
        columns: how it is read; its `names` are the fields that are wanted.
        model_column: the column with the names of soft prompts.
        look: receives the number of rows so far, now and then.

    Raises:
        DataError: the table is missing, unreadable, broken or empty, or has no such column.
    """
    parts = source_parts(source, columns)
    types, names = _Types(), _Names(shown(source), model_column)
    counts: list[int] = []
    first: Mapping[str, Any] = {}
    for part in parts:
        declared, before = part.schema(), sum(counts)
        counts.append(0)
        rows = part.rows()
        while chunk := list(islice(rows, CHUNK)):
            first = first or chunk[0][1]
            names.add(chunk, before + counts[-1])
            types.add([row for _, row in chunk], declared)
            counts[-1] += len(chunk)
            look(before + counts[-1])
    if not sum(counts):
        raise DataError(f"{shown(source)}: is empty; give a table with at least one row")
    schema, as_json = types.found()
    if model_column is not None and model_column not in schema.names:
        fix = suggest(model_column, schema.names, "correct --model-column")
        raise DataError(f"{shown(source)}: has no column '{model_column}' (found: {', '.join(schema.names)}); {fix}")
    return Survey(
        source=source,
        columns=columns,
        parts=tuple(counts),
        identity=json_hash([[part.identity() for part in parts], sorted(columns.names)]),
        schema=schema,
        as_json=as_json,
        first=first,
        named=names.first,
        notes=tuple(dict.fromkeys(part.note for part in parts if part.note)),
    )


def name_of(row: Mapping[str, Any], column: str) -> str:
    """The soft prompt that a row names; "" if it names none.

    Raises:
        DataError: it is not a text.
    """
    value = row.get(column)
    if value is None or value != value:  # NaN is what a missing value looks like after pandas
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"the column '{column}' contains {value!r}, which is not the name of a soft prompt; write name or name:3"
        )
    return value.strip()


class _Names:
    """The soft prompts that rows name."""

    def __init__(self, source: str, column: str | None) -> None:
        self._source, self._column = source, column
        self.first: dict[str, int] = {}

    def add(self, rows: Sequence[Row], before: int) -> None:
        if self._column is None:
            return
        for number, (place, row) in enumerate(rows, before + 1):
            try:
                self.first.setdefault(name_of(row, self._column), number)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
        if len(self.first) > MOST_NAMES:
            raise DataError(
                f"{self._source}: the column '{self._column}' has more than {MOST_NAMES} different values; give the one with "
                "the names of soft prompts"
            )


class _Types:
    """The types of columns, of all rows so far."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}
        """None: several types that have none in common."""

    def add(self, rows: Sequence[Mapping[str, Any]], declared: pa.Schema | None) -> None:
        for name in dict.fromkeys(key for row in rows for key in row):
            if self._types.get(name, pa.null()) is None:
                continue
            given = declared.field(name).type if declared is not None and name in declared.names else None
            try:
                found = given or pa.array([row.get(name) for row in rows]).type
                self._types[name] = _together(self._types.get(name, pa.null()), found)
            except _UNLIKE:
                self._types[name] = None

    def found(self) -> tuple[pa.Schema, frozenset[str]]:
        """All columns, and those that have several types."""
        mixed = frozenset(name for name, kind in self._types.items() if kind is None)
        plain = {name: pa.string() if kind is None or pa.types.is_null(kind) else kind for name, kind in self._types.items()}
        return pa.schema(list(plain.items())), mixed


_UNLIKE = (pa.ArrowException, TypeError, ValueError, OverflowError)


def _together(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of the values of both.

    Raises:
        ArrowException: there is none.
    """
    if one == other:
        return one
    both = [pa.schema([("x", one)]), pa.schema([("x", other)])]
    return pa.unify_schemas(both, promote_options="permissive").field("x").type
