"""Sources of rows: files, data sets of the Hub and built-in tasks, converted to a memory-mapped Arrow file of texts.

Only the fields of the template are read, and all values are converted to text. So the same rows give the same fingerprint and
the same tokens in every file format. Text files are parsed here and not by the builders of `datasets`: those guess types (5.2:
"2020-01-01" becomes a timestamp, "NA" in a CSV null, "007" the number 7.0), and do not report the line of an invalid byte. The
key of a converted file is the hash of its source.

Rows never have to fit into memory: files are read row by row, and Arrow files are memory-mapped. That is why there is no
streaming mode: a stream reaches step n only through all rows before it, while a mapped file is read in any order, so a run
resumes at any step at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.exceptions import DatasetsError

from ptuning.data.cache import cache_folder, quiet
from ptuning.data.files import DataFile, find_files
from ptuning.data.json_rows import Row
from ptuning.data.readers import SEPARATORS, Columns, class_names, file_rows, hub_rows, separator
from ptuning.data.row import answers, look_up, missing, root, texts_of
from ptuning.errors import DataError
from ptuning.model.fingerprint import json_hash
from ptuning.redaction import first_line
from ptuning.settings.fields import NAME

FORMAT = 4
"""Incremented when the same source would be stored or tokenised differently; older cache files are then ignored."""

REFERENCES = "\ue000references"
"""Column of all correct answers, or null. No column of a file has this name."""
ROW = "\ue000row"
"""Column of the number of a row in the source, from 0, where it is not the row's place in the split."""


@dataclass(frozen=True)
class Texts:
    """The rows of a split before they are tokenised."""

    rows: Dataset
    """One text column per field; `REFERENCES` (list of texts, or null) for free text; `ROW` in a part of a source."""
    fingerprint: str
    """SHA-256 of the texts in order. It does not depend on the file format."""
    notes: tuple[str, ...] = ()
    """What was found out about the files: their number, the separator."""


def _inferred() -> None:
    """The schema of files whose values have no declared types."""


@dataclass(frozen=True)
class Part:
    """One file or data set of a source."""

    identity: Callable[[], Any]
    """What determines its rows, as JSON. Of a file it is a hash of all its bytes."""
    rows: Callable[[], Iterator[Row]]
    note: str | None = None
    schema: Callable[[], pa.Schema | None] = _inferred
    """The declared types of its columns, of those that are read as they are; None: there are none."""


def read_source(source: str | Sequence[str], columns: Columns) -> Texts:
    """The named fields of all rows of a source.

    Raises:
        DataError: the source is missing, unreadable, broken or empty, or a row lacks a field.
    """
    parts = source_parts(source, columns)
    answered = [columns.free, columns.references, columns.target] if columns.free else [columns.target]
    made = columns.chat.key if columns.chat else None
    key = [FORMAT, [part.identity() for part in parts], columns.names, sorted(columns.defaults.items()), answered, made]
    names = [*columns.names, *(["references"] if columns.free else [])]
    schema = _schema(columns)
    rows = chain.from_iterable(part.rows() for part in parts)
    found = stored(json_hash(key)[:32], shown(source), names, schema, lambda: _checked(rows, columns, shown(source)))
    notes = [part.note for part in parts if part.note]
    if len(parts) > 1:
        notes.insert(0, f"{len(parts)} files")
    return Texts(Dataset.from_file(str(found)), found.stem.rpartition("-")[2], tuple(dict.fromkeys(notes)))


def first_row(source: str | Sequence[str], known: Sequence[str] = ()) -> Mapping[str, Any]:
    """The first row of a source, with all its columns; empty if there is none. `known`: names of columns that it may have.

    Raises:
        DataError: the source is missing, unreadable or broken.
    """
    parts = source_parts(source, Columns(tuple(known), whole=True))
    return next((row for _, row in chain.from_iterable(part.rows() for part in parts)), {})


def place_of(source: str | Sequence[str], columns: Columns, index: int) -> str:
    """The location of a row, for an error message. The source is read again up to it."""
    rows = chain.from_iterable(part.rows() for part in source_parts(source, columns))
    return next(islice(rows, index, None), (f"{shown(source)}, row {index + 1}", {}))[0]


def shown(source: str | Sequence[str]) -> str:
    """A source as messages name it."""
    return source if isinstance(source, str) else ", ".join(source)


def source_parts(source: str | Sequence[str], columns: Columns) -> list[Part]:
    """The files or data sets of a source, in order.

    Raises:
        DataError: there are none, or they cannot be reached.
    """
    listed = [source] if isinstance(source, str) else source
    return [part for each in listed for part in _parts_of(each, columns)]


def _parts_of(source: str, columns: Columns) -> Iterator[Part]:
    if source.startswith("hub:"):
        hub = _load_from_hub(source)
        named = class_names(hub.features.arrow_schema, columns)
        yield Part(
            identity=lambda: [hub._fingerprint, named],
            rows=lambda: hub_rows(hub, source, columns),
            schema=lambda: _without(hub.features.arrow_schema, named),
        )
        return
    for file in find_files(source):
        yield _file_part(file, columns)


def _file_part(file: DataFile, columns: Columns) -> Part:
    between = separator(file, columns)
    note = None
    if between not in (None, "\t" if file.kind == ".tsv" else ","):
        note = f"{Path(file.name).name}: columns are separated by {SEPARATORS.get(between, repr(between))}"
    named: list[str] = []
    schema: pa.Schema | None = None
    if file.kind == ".parquet":
        with suppress(pa.ArrowException, OSError, ValueError):  # reading reports it
            declared = pq.read_schema(file.path)
            named = class_names(declared, columns)
            schema = _without(declared, named)
    return Part(
        identity=lambda: [file.hash(), file.kind, between, named],
        rows=lambda: file_rows(file, columns, between),
        note=note,
        schema=lambda: schema,
    )


def _without(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in names])


def _schema(columns: Columns) -> pa.Schema:
    schema = pa.schema([(column, pa.string()) for column in columns.names])
    return schema.append(pa.field(REFERENCES, pa.list_(pa.string()))) if columns.free else schema


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
            f"{source}: cannot be loaded ({first_line(error)}); check name, split and network, or give a file"
        ) from None


Stored = tuple[dict[str, Any], bytes]
"""The texts of a row by column, and the bytes that are hashed."""


def _checked(rows: Iterable[Row], columns: Columns, source: str) -> Iterator[Stored]:
    """The texts of every row. Errors name the row."""
    found = columns.references is None
    row: Mapping[str, Any] | None = None
    for place, row in rows:
        found = found or root(str(columns.references), row) is not None
        try:
            yield _texts(row, columns)
        except UnicodeEncodeError:
            raise DataError(f"{place}: contains a lone surrogate (half a character); remove it") from None
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    if not found and row is not None:
        raise DataError(f"{source}: {missing(str(columns.references), row)}")


def _texts(row: Any, columns: Columns) -> Stored:
    if columns.chat:
        found = answers(row, columns.references) if columns.references else None
        return _with_answers(columns.chat.texts(row), found, columns)
    listed = None
    if columns.free and len(columns.target) == 1:
        (name,) = columns.target
        try:
            value = look_up(row, name)
        except KeyError:
            value = None
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            listed, row = value, {**row, name: value[0]}
    texts: dict[str, Any] = texts_of(row, columns.names, columns.defaults)
    if columns.target and not any(texts[name].strip() or name in columns.defaults for name in columns.target):
        raise DataError(f"the field '{columns.target[0]}' is empty; fill it or remove the row")
    return _with_answers(texts, answers(row, columns.references) if columns.references else listed, columns)


def _with_answers(texts: dict[str, Any], found: list[str] | None, columns: Columns) -> Stored:
    if not columns.free:
        return texts, stored_bytes(list(texts.values()))
    return {**texts, REFERENCES: found}, stored_bytes([*texts.values(), found])


def stored_bytes(values: Sequence[Any]) -> bytes:
    """The part of a row in the fingerprint."""
    return json.dumps(values, ensure_ascii=False).encode()


def stored(stem: str, source: str, names: Sequence[str], schema: pa.Schema, rows: Callable[[], Iterator[Stored]]) -> Path:
    """The Arrow file of some rows: from the cache, or written now. Several processes may do this at the same time.

    The fingerprint of the content is part of the file name: no second file is needed that could be missing.
    """
    folder = cache_folder()
    found = next(folder.glob(f"{stem}-*.arrow"), None)
    return found or _write(folder, stem, source, rows(), schema, names)


def _write(folder: Path, stem: str, source: str, rows: Iterator[Stored], schema: pa.Schema, names: Sequence[str]) -> Path:
    """Store the texts as an Arrow file and return its path.

    The file is renamed when it is complete; a later process replaces it with an identical one.
    """
    digest = hashlib.sha256(json.dumps(names).encode())
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
        reason = error.strerror or first_line(error)
        raise DataError(f"{folder}: cannot be written ({reason}); set HF_DATASETS_CACHE to a folder with space") from None
