"""The output: all columns of the table in its order, and the answers. Parquet, CSV or JSON lines; whole or absent."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ptuning import storage
from ptuning.data.sources import source_parts
from ptuning.errors import UserError
from ptuning.prediction.parts import ERROR, FINISH, PREDICTION, PROBABILITIES, VERSION
from ptuning.prediction.survey import CHUNK, Survey, as_text
from ptuning.redaction import redact

PROBABILITY = "probability"
KINDS = (".parquet", ".csv", ".jsonl")


def check_output(output: str) -> None:
    """Check that a table can be written there, and that nothing is there.

    Raises:
        UserError: it cannot.
    """
    if not output.lower().endswith(KINDS):
        raise UserError(f"{redact(output)}: is not the name of a table; end it with {', '.join(KINDS)}")
    system, path = storage.resolve(output)
    try:
        there = system.get_file_info(path).type != fs.FileType.NotFound
    except OSError as error:
        raise UserError(f"{redact(output)}: cannot be reached ({redact(str(error))}); check the address") from None
    if there:
        raise UserError(f"{redact(output)}: exists already; choose another output")
    if isinstance(system, fs.LocalFileSystem):
        above = next(folder for folder in Path(path).parents if folder.exists())
        if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
            raise UserError(f"{output}: no permission to write {above}; choose another output")


def answer_columns(labels: Sequence[Sequence[str]], generates: bool, each: bool) -> dict[str, pa.DataType]:
    """The columns that are added. `labels`: of every soft prompt that has some; `generates`: one has none; `each`: the
    probability of every label, too."""
    columns = {PREDICTION: pa.string()}
    if labels:
        columns[PROBABILITY] = pa.float64()
        if each:
            known = dict.fromkeys(label for listed in labels for label in listed)
            columns |= {column_of(label): pa.float64() for label in known}
    if generates:
        columns[FINISH] = pa.string()
    return columns | {VERSION: pa.string(), ERROR: pa.string()}


def column_of(label: str) -> str:
    """The column of a label's probability."""
    return f"{PROBABILITY}_{label}"


def answer_values(answer: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The values of `answer_columns` for an answer. `labels`: of every version that has some."""
    values = {name: answer[name] for name in (PREDICTION, FINISH, VERSION, ERROR)}
    shares = answer[PROBABILITIES]
    if shares:
        values[PROBABILITY] = max(shares)
        values |= {column_of(label): share for label, share in zip(labels[answer[VERSION]], shares, strict=True)}
    return values


def rows_of(survey: Survey) -> Iterator[Mapping[str, Any]]:
    """All rows of the table, in order."""
    for part in source_parts(survey.source, survey.columns):
        yield from (row for _, row in part.rows())


def write_output(output: str, survey: Survey, columns: Mapping[str, pa.DataType], answers: Iterable[Mapping[str, Any]]) -> None:
    """Write the table with the values of the answers, row by row.

    Raises:
        OSError: the disk is full, or the storage does not respond. Nothing is there then.
    """
    added = pa.schema(list(columns.items()))
    rows, given = rows_of(survey), iter(answers)
    with _complete(output) as path, _writer(output)(path, pa.schema([*survey.schema, *added])) as writer:
        while chunk := list(islice(rows, CHUNK)):
            own = survey.as_table(chunk)
            more = pa.Table.from_pylist(list(islice(given, len(chunk))), added)
            writer.write(pa.table([*own.columns, *more.columns], pa.schema([*own.schema, *added])))


class _Writer(Protocol):
    def write(self, table: pa.Table) -> None: ...
    def __enter__(self) -> _Writer: ...
    def __exit__(self, *error: object) -> None: ...


def _writer(output: str) -> Callable[[Path, pa.Schema], _Writer]:
    kind = Path(output.lower()).suffix
    made: dict[str, Any] = {".parquet": _Parquet, ".csv": _Csv, ".jsonl": _JsonLines}
    return made[kind]


class _Parquet:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()


class _Text:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._names = schema.names

    def __exit__(self, *error: object) -> None:
        self._file.close()


class _Csv(_Text):
    """Lists and objects are JSON, missing values are empty."""

    def __enter__(self) -> _Csv:
        self._rows = csv.writer(self._file)
        self._rows.writerow(self._names)
        return self

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._rows.writerow([as_text(value) if isinstance(value, list | dict) else value for value in row.values()])


class _JsonLines(_Text):
    def __enter__(self) -> _JsonLines:
        return self

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


@contextmanager
def _complete(output: str) -> Iterator[Path]:
    """A temporary file, which becomes the output if all goes well."""
    system, path = storage.resolve(output)
    if isinstance(system, fs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="ptuning-") as folder:  # a stream to a store that is closed early is complete there
        temporary = Path(folder, Path(path).name)
        yield temporary
        with temporary.open("rb") as file, system.open_output_stream(path) as out:
            shutil.copyfileobj(file, out, 1 << 22)
