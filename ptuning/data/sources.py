"""Sources of rows: a file, the Hugging Face Hub or a built-in task, each converted to a memory-mapped Arrow file of texts.

Only the fields of the template are read, and all values are converted to text. So the same rows give the same fingerprint and
the same tokens in every file format. Text files are parsed here and not by the builders of `datasets`: those guess types (5.2:
"2020-01-01" becomes a timestamp, "NA" in a CSV null, "007" the number 7.0), and do not report the line of an invalid byte. The
key of a converted file is the hash of its source.

Files are read line by line and Arrow files are memory-mapped, so rows never have to fit into memory. That is why there is no
streaming mode: a stream reaches step n only through all rows before it, while a mapped file is read in any order, so a run
resumes at any step at once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features
from datasets.exceptions import DatasetsError

from ptuning.errors import UserError, suggest
from ptuning.model.fingerprint import json_hash
from ptuning.paths import locate
from ptuning.settings.fields import NAME

FORMAT = 2
"""Incremented when the same source would be stored or tokenised differently; older cache files are then ignored."""

LINE_LIMIT = 10_000_000
"""Lines of a text file must be shorter than this, in bytes."""

BUILTIN = Path(__file__).parent.parent / "builtin" / "tasks"

Row = tuple[str, Mapping[str, Any]]
"""The location of a row, for error messages, and its values."""


class DataError(UserError):
    """A split cannot be used. The message names the file, the row or line, and the fix."""


@dataclass(frozen=True)
class Texts:
    """The rows of a split before they are tokenised."""

    rows: Dataset
    """One text column per field and, if requested, `references` (list of texts, or null)."""
    fingerprint: str
    """SHA-256 of the texts in order. It does not depend on the file format."""


class RowReader(Protocol):
    """Makes texts of rows that are more than texts, such as conversations."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Further columns that it reads, and that the source has."""

    @property
    def key(self) -> list[Any]:
        """Everything that determines the texts of a row."""

    def texts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The texts of a row.

        Raises:
            DataError: it cannot be read.
        """


def read_source(source: str, fields: Sequence[str], references: bool, chat: RowReader | None = None) -> Texts:
    """The named fields of all rows of a source and, if requested, their `references` (null for rows without any). `chat`: makes
    the fields of a row from its columns.

    Raises:
        DataError: the source is missing, unreadable, broken or empty, or a row lacks a field.
    """
    columns = sorted(set(fields))
    rows, identity = _open(source, sorted({*chat.columns, *chat.optional}) if chat else columns)
    stem = json_hash([FORMAT, identity, columns, references, *(chat.key if chat else ())])[:32]
    folder = cache_folder()
    # The fingerprint of the content is part of the file name: no second file is needed that could be missing.
    found = next(folder.glob(f"{stem}-*.arrow"), None)
    if found is None:
        schema = pa.schema([(column, pa.string()) for column in columns])
        if references:
            schema = schema.append(pa.field("references", pa.list_(pa.string())))
        found = _write(folder, stem, source, _checked(rows, columns, references, chat), schema)
    return Texts(Dataset.from_file(str(found)), found.stem.rpartition("-")[2])


def first_row(source: str) -> Mapping[str, Any]:
    """The first row of a source, with all its columns; empty if there is none.

    Raises:
        DataError: the source is missing, unreadable or broken.
    """
    rows, _ = _open(source, None)
    return next((row for _, row in rows), {})


def _open(source: str, columns: list[str] | None) -> tuple[Iterator[Row], str]:
    """The rows of a source with these columns (None: all), and what identifies its content."""
    if source.startswith("hub:"):
        hub = _load_from_hub(source)
        return _hub_rows(hub, source, columns), hub._fingerprint
    path = _local_path(source)
    return _READERS[path.suffix.lower()](path, source, columns), _file_hash(path, source)


def texts_of(row: Mapping[str, object], fields: Iterable[str]) -> dict[str, str]:
    """The row's fields as texts; numbers and booleans are formatted by `str`.

    Raises:
        DataError: a field is missing, null or not a single value. The message does not name the row.
    """
    texts = {}
    for field in fields:
        if field not in row:
            raise _missing(field, row)
        value = row[field]
        if value is None or value != value:  # NaN is what a missing number looks like after pandas
            raise DataError(f"the field '{field}' is null; fill it or remove the row")
        if isinstance(value, list | dict | bytes):
            raise DataError(f"the field '{field}' is a {type(value).__name__}, not a text; write it as text")
        texts[field] = str(value)
    return texts


def cache_folder() -> Path:
    """The folder of the Arrow files: inside the cache of `datasets` (HF_DATASETS_CACHE)."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ptuning"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be created ({error.strerror}); set HF_DATASETS_CACHE to a writable folder") from None
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars of `datasets`: the command line has its own."""
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def _local_path(source: str) -> Path:
    if source.startswith("builtin:"):
        known = {f"builtin:{path.parent.name}/{path.stem}": path for path in sorted(BUILTIN.glob("*/*.jsonl"))}
        if source not in known:
            raise DataError(f"{source}: no such built-in split; use one of {', '.join(known)}")
        return known[source]
    path = locate(source)
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{source}: unknown file type; give a .jsonl, .csv or .parquet file, or hub:org/name:split")
    if path.is_dir():
        raise DataError(f"{source}: is a folder; give one file per split")
    if not path.exists():
        there = {file.name: str(file) for file in sorted(path.parent.glob("*")) if file.suffix.lower() in _READERS}
        fix = suggest(
            path.name, there, "correct the path", alike=0.85, shown=there.__getitem__
        )  # do not suggest x-train.csv for x-test.csv
        raise DataError(f"{source}: no such file in {Path.cwd()}; {fix}")
    return path


def _file_hash(path: Path, source: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); make it readable") from None


def _missing(field: str, known: Iterable[str]) -> DataError:
    names = ", ".join(f"'{name}'" for name in sorted(known)) or "none"
    return DataError(f"the field '{field}' is missing (found: {names}); correct the data or the template")


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1. Anything but plain UTF-8 text is refused."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT):
            number += 1
            place = f"{source}, line {number}"
            if len(line) == LINE_LIMIT:
                raise DataError(f"{place}: is longer than {LINE_LIMIT // 1_000_000} MB; write one row per line")
            if b"\0" in line:
                raise DataError(f"{place}: contains a NUL byte; save the file as UTF-8 text")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: is not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None


def _place(source: str, row: int, line: int) -> str:
    return f"{source}, row {row}" + (f" (line {line})" if line != row else "")


def _jsonl_rows(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    count = 0
    for number, line in _lines(path, source):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: is not a JSON object; write one object per line")
        count += 1
        yield _place(source, count, number), row


def _csv_rows(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(max(LINE_LIMIT, csv.field_size_limit()))
    reader = csv.reader((line for _, line in _lines(path, source)), strict=True)
    try:
        header = next(reader, [])
        twins = sorted({name for name in header if header.count(name) > 1})
        if twins:
            raise DataError(f"{source}, line 1: the column '{twins[0]}' occurs twice; rename one")
        count, line = 0, reader.line_num + 1
        for record in reader:
            if record:
                count += 1
                place = _place(source, count, line)
                if len(record) != len(header):
                    raise DataError(
                        f"{place}: has {len(record)} values for {len(header)} columns; put texts with commas in quotes"
                    )
                yield place, dict(zip(header, record, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: is not valid CSV ({error}); check the quotes") from None


def _parquet_rows(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:

            def read(names: list[str]) -> Iterator[pa.Table | pa.RecordBatch]:
                return iter(file.iter_batches(1000, columns=names))

            yield from _arrow_rows(read, file.schema_arrow, source, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: is not a readable Parquet file ({_first_line(error)}); write it again") from None


def _hub_rows(rows: Dataset, source: str, columns: list[str] | None) -> Iterator[Row]:
    def read(names: list[str]) -> Iterator[pa.Table | pa.RecordBatch]:
        return iter(rows.select_columns(names).with_format("arrow").iter(1000))

    return _arrow_rows(read, rows.features.arrow_schema, source, columns)


def _arrow_rows(
    read: Callable[[list[str]], Iterator[pa.Table | pa.RecordBatch]], schema: pa.Schema, source: str, columns: list[str] | None
) -> Iterator[Row]:
    """Rows of a columnar source. Class indices (ClassLabel) are replaced by the class names."""
    columns = schema.names if columns is None else columns
    lacking = [column for column in columns if column not in schema.names]
    if lacking:
        raise DataError(f"{source}: {_missing(lacking[0], schema.names)}")
    names = [name for name in [*columns, "references"] if name in schema.names]
    features = Features.from_arrow_schema(pa.schema([schema.field(name) for name in names], schema.metadata))
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    count = 0
    for table in read(names):
        for row in table.to_pylist():
            count += 1
            for name, texts in classes.items():
                if row.get(name) is not None and row[name] >= 0:
                    row[name] = texts[row[name]]
            yield f"{source}, row {count}", row


_READERS: dict[str, Callable[[Path, str, list[str] | None], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _load_from_hub(source: str) -> Dataset:
    name, _, split = source.removeprefix("hub:").partition(":")
    parts = name.split("/")
    if not split or len(parts) > 3 or not all(NAME.fullmatch(part) for part in parts):
        raise DataError(f"{source}: is not a valid data set of the Hub; write hub:org/name:split or hub:org/name/config:split")
    config = parts[2] if len(parts) == 3 else None
    try:
        with quiet():
            # No code from the Hub is run: datasets 4 and later has no loading scripts and opens no pickle.
            return datasets.load_dataset("/".join(parts[:2]), config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{source}: cannot be loaded ({_first_line(error)}); check name, split and network, or give a file"
        ) from None


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).partition("\n")[0]).strip().rstrip(".")[:200] or type(error).__name__


def _references(row: Mapping[str, Any]) -> list[str] | None:
    value = row.get("references")
    if value is None or isinstance(value, str):
        return [value] if value else None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError("the field 'references' is not a list of texts; write it as a list of texts")
    return value or None


def _checked(
    rows: Iterator[Row], columns: list[str], references: bool, chat: RowReader | None = None
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The texts of every row, and the bytes to hash. Errors name the row."""
    for place, row in rows:
        try:
            texts: dict[str, Any] = chat.texts(row) if chat else texts_of(row, columns)
            if references:
                texts["references"] = _references(row)
            yield texts, json.dumps(list(texts.values()), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{place}: contains a lone surrogate (half a character); remove it") from None
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def _write(folder: Path, stem: str, source: str, rows: Iterator[tuple[dict[str, Any], bytes]], schema: pa.Schema) -> Path:
    """Store the texts as an Arrow file and return its path. Several processes may do this at the same time.

    The file is renamed when it is complete; a later process replaces it with an identical one.
    """
    digest = hashlib.sha256(json.dumps(schema.names).encode())
    batch: list[dict[str, Any]] = []
    count = held = 0
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch, Path(scratch, "rows.arrow").open("wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for texts, content in rows:
                    digest.update(content)
                    batch.append(texts)
                    count, held = count + 1, held + len(content)
                    if len(batch) == 1000 or held > 1 << 26:
                        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                        batch, held = [], 0
                if batch:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            if not count:
                raise DataError(f"{source}: is empty; give a split with at least one row")
            file.flush()  # before the rename: another process may read it immediately
            os.fsync(file.fileno())
            return Path(file.name).rename(folder / f"{stem}-{digest.hexdigest()}.arrow")
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise DataError(f"{folder}: cannot be written ({reason}); set HF_DATASETS_CACHE to a folder with space") from None
