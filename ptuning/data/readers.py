"""Rows of a file, with their places: text formats are parsed line by line, columnar ones batch by batch."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, List

from ptuning.data.files import UNREADABLE, DataFile
from ptuning.data.json_rows import Row, json_rows
from ptuning.data.row import missing, root
from ptuning.data.text_lines import LINE_LIMIT, place, text_lines
from ptuning.errors import DataError
from ptuning.redaction import first_line
from ptuning.settings.data import AUTO, Template
from ptuning.settings.label_values import canonical
from ptuning.settings.template import template_fields

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class RowReader(Protocol):
    """Makes texts of rows that are more than texts, such as conversations."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Further columns that it reads, and that the source has."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it makes."""

    @property
    def key(self) -> list[Any]:
        """Everything that determines the texts of a row."""

    def texts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The texts of a row.

        Raises:
            DataError: it cannot be read.
        """


@dataclass(frozen=True)
class Columns:
    """What is read of a row."""

    names: tuple[str, ...]
    """Fields of the template, sorted."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Text in place of a field that is missing, null or empty."""
    target: tuple[str, ...] = ()
    """Fields of the target. It must not be empty. Free text may be a list: the first text is trained on, all are correct."""
    free: bool = False
    """The target is free text: all correct answers are kept."""
    references: str | None = None
    """Column with further correct answers."""
    labels: tuple[str, ...] = ()
    """Canonical values that the target may have, if they are known."""
    chat: RowReader | None = None
    """Makes the fields from other columns."""
    whole: bool = False
    """All columns are read; `names` are those that the source may have."""

    @staticmethod
    def of(names: Iterable[str]) -> Columns:
        return Columns(tuple(sorted(set(names))))

    @staticmethod
    def of_template(
        template: Template, references: str | None = None, chat: RowReader | None = None, answered: bool = True
    ) -> Columns:
        """What a template reads. `references`: a column with further correct answers to free text; `chat`: makes the fields of
        a conversation; `answered`: also the target."""
        if not answered:
            asked = Columns(chat.fields, chat=chat) if chat else Columns.of(template_fields(template.input))
            return replace(asked, defaults=template.defaults)
        if chat:
            return Columns(chat.fields, free=template.labels is None, references=references, chat=chat)
        target = tuple(template_fields(template.target))
        values = [value for value, _ in template.label_values or ()] or list(template.labels or ())
        return Columns(
            names=tuple(sorted({*template_fields(template.input), *target})),
            defaults=template.defaults,
            target=target,
            free=template.labels is None,
            references=references,
            labels=tuple(map(canonical, values)) if template.labels != AUTO else (),
        )

    @property
    def every(self) -> list[str]:
        """The columns, and the values inside columns, that are read."""
        names = (*self.chat.columns, *self.chat.optional) if self.chat else self.names
        return [*names, *([self.references] if self.references else [])]

    @property
    def required(self) -> list[str]:
        if self.whole:
            return []
        return [name for name in (self.chat.columns if self.chat else self.names) if name not in self.defaults]

    def roots(self, known: Iterable[str]) -> list[str]:
        """The columns that contain the fields.

        Raises:
            DataError: a required field is not in any.
        """
        there = list(known)
        found: dict[str, None] = {}
        for name in [*self.required, *self.every]:
            column = root(name, there)
            if column is not None:
                found[column] = None
            elif name in self.required:
                raise missing(name, there)
        return list(found)


def file_rows(file: DataFile, columns: Columns, between: str | None) -> Iterator[Row]:
    """The rows of a file. `between`: its `separator`.

    Raises:
        DataError: it is broken.
    """
    try:
        if file.kind == ".parquet":
            yield from _parquet_rows(file, columns)
        elif file.kind == ".arrow":
            yield from _ipc_rows(file, columns)
        else:
            with file.open() as stream:
                if file.kind in (".csv", ".tsv"):
                    yield from _csv_rows(stream, file.name, between or ",")
                else:
                    yield from json_rows(stream, file.name, columns.every)
    except UNREADABLE as error:
        if file.compression is None:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{file.name}: cannot be read ({reason}); make it readable") from None
        raise DataError(f"{file.name}: is not a readable {file.compression} file ({error}); compress it again") from None


def separator(file: DataFile, columns: Columns) -> str | None:
    """The character between the columns of a CSV or TSV file, by its first line; None for other kinds.

    It is the one whose columns contain the fields of the template. If there is none, the usual one of the kind: then reading
    names the columns.
    """
    if file.kind not in (".csv", ".tsv"):
        return None
    usual = "\t" if file.kind == ".tsv" else ","
    try:
        with file.open() as stream:
            line = next((text for _, text in text_lines(stream, file.name)), "")
    except (DataError, *UNREADABLE):
        return usual  # reading reports it
    declared = re.fullmatch(r"sep=(.)\r?\n?", line)  # Excel
    if declared:
        return declared[1]
    for each in sorted(SEPARATORS, key=lambda character: character != usual):
        header = _header(line, each)
        try:
            found = columns.roots(header)
        except DataError:
            continue
        if found or each == usual and len(header) > 1:
            return each
    return usual


def _header(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True, delimiter=separator), [])
    except csv.Error:
        return []


def _csv_rows(stream: IO[bytes], source: str, between: str) -> Iterator[Row]:
    csv.field_size_limit(max(LINE_LIMIT, csv.field_size_limit()))
    lines = text_lines(stream, source)
    reader = csv.reader((line for _, line in lines), strict=True, delimiter=between)
    try:
        header = next(reader, [])
        if re.fullmatch(r"sep=.?", between.join(header)):
            header = next(reader, [])
        twins = sorted({name for name in header if header.count(name) > 1})
        if twins:
            raise DataError(f"{source}, line {reader.line_num}: the column '{twins[0]}' occurs twice; rename one")
        count, line = 0, reader.line_num + 1
        for record in reader:
            if record:
                count += 1
                where = place(source, count, line)
                if len(record) != len(header):
                    words = SEPARATORS.get(between, repr(between))
                    raise DataError(
                        f"{where}: has {len(record)} values for {len(header)} columns; put texts with {words} in quotes"
                    )
                yield where, dict(zip(header, record, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: is not valid CSV ({error}); check the quotes") from None


def _parquet_rows(file: DataFile, columns: Columns) -> Iterator[Row]:
    try:
        with pq.ParquetFile(file.path) as opened:

            def read(names: list[str]) -> Iterator[pa.Table | pa.RecordBatch]:
                return iter(opened.iter_batches(1000, columns=names))

            yield from _arrow_rows(read, opened.schema_arrow, file.name, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: is not a readable Parquet file ({first_line(error)}); write it again") from None


def _ipc_rows(file: DataFile, columns: Columns) -> Iterator[Row]:
    """A file that `datasets` or Arrow has written."""
    try:
        with pa.memory_map(str(file.path)) as source:
            if source.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(source)
                batches = (opened.get_batch(at) for at in range(opened.num_record_batches))
            else:
                source.seek(0)
                opened = pa.ipc.open_stream(source)
                batches = iter(opened)
            yield from _arrow_rows(lambda names: (batch.select(names) for batch in batches), opened.schema, file.name, columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: is not a readable Arrow file ({first_line(error)}); write it again") from None


def hub_rows(rows: Dataset, source: str, columns: Columns) -> Iterator[Row]:
    def read(names: list[str]) -> Iterator[pa.Table | pa.RecordBatch]:
        return iter(rows.select_columns(names).with_format("arrow").iter(1000))

    return _arrow_rows(read, rows.features.arrow_schema, source, columns)


def _arrow_rows(
    read: Callable[[list[str]], Iterator[pa.Table | pa.RecordBatch]], schema: pa.Schema, source: str, columns: Columns
) -> Iterator[Row]:
    """Rows of a columnar source. Class indices (ClassLabel) are replaced by the class names."""
    try:
        names = schema.names if columns.whole else columns.roots(schema.names)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    features = Features.from_arrow_schema(pa.schema([schema.field(name) for name in names], schema.metadata))
    named = {name: feature for name, feature in features.items() if _has_classes(feature, columns)}
    count = 0
    for table in read(names):
        for row in table.to_pylist():
            count += 1
            for name, feature in named.items():
                row[name] = _with_names(row.get(name), feature)
            yield f"{source}, row {count}", row


def class_names(schema: pa.Schema, columns: Columns) -> list[str]:
    """The columns whose class indices are replaced by names."""
    features = Features.from_arrow_schema(schema)
    return sorted(name for name, feature in features.items() if _has_classes(feature, columns))


def _has_classes(feature: Any, columns: Columns) -> bool:
    if isinstance(feature, ClassLabel):
        # Labels that are written as the indices of the classes, such as [0, 1] for neg and pos.
        indices, labels = {str(at) for at in range(len(feature.names))}, set(columns.labels)
        return not labels or not labels <= indices or bool(labels & set(feature.names))
    if isinstance(feature, List):
        return _has_classes(feature.feature, columns)
    return isinstance(feature, dict) and any(_has_classes(each, columns) for each in feature.values())


def _with_names(value: Any, feature: Any) -> Any:
    if isinstance(feature, ClassLabel):
        return feature.names[value] if value is not None and value >= 0 else value
    if isinstance(feature, List) and isinstance(value, list):
        return [_with_names(each, feature.feature) for each in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _with_names(each, feature[key]) for key, each in value.items()}
    return value
