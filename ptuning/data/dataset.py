"""Tokenised splits, cached on disk.

`load_split` runs the `Encoder` over a whole split once and stores the result as a memory-mapped Arrow file. The key of the file
is a hash of everything that determines it: the texts, the template, the limit and the tokenizer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from ptuning.data.cache import cache_folder, quiet
from ptuning.data.conversations import ChatRows
from ptuning.data.encoder import Encoder, UnusableRow
from ptuning.data.readers import Columns
from ptuning.data.sources import REFERENCES, ROW, Texts, place_of, read_source, shown
from ptuning.errors import DataError
from ptuning.model.fingerprint import json_hash
from ptuning.model.packing import TokenShares, TurnsRow

_COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "target_ids": List(Value("int32")),
        "label": Value("int32"),
        "text": Value("string"),
        "target_text": Value("string"),
        "references": List(Value("string")),
        "length": Value("int32"),
        "cut": Value("bool"),
        "blank": Value("bool"),
        "earlier": List(Value("int32")),
        "teacher_ids": List(Value("int32")),
    }
)


@dataclass(frozen=True, eq=False)
class Teaching:
    """Distributions of a teacher. For a row that it was not asked about they are NaN, or None."""

    labels: NDArray[np.float64] | None = None
    """`[rows, L]` log-probabilities of the labels."""
    tokens: list[TokenShares | None] | None = None
    """Without labels, of each row: the most likely tokens at each token of the target."""


class Answer(NamedTuple):
    """A teacher's answer to a row."""

    label: int
    """-1 without labels."""
    ids: list[int]
    """With the end token, unless it was cut off."""
    text: str


@dataclass(frozen=True, eq=False)
class Split:
    """The tokenised rows of one split, memory-mapped."""

    name: str
    """train, validation or test."""
    source: str
    """As written in the experiment."""
    rows: Dataset
    """input_ids, target_ids (with end token), label (-1 without labels), text (the whole rendered input), target_text,
    references (list of texts), length (tokens of input + target), cut, blank (all fields of the input are blank), earlier
    (places in input_ids that are predicted), teacher_ids (the input as a teacher reads it)."""
    lengths: NDArray[np.int32]
    """[rows] tokens of input + target."""
    cut: int
    """Number of rows whose input was truncated."""
    dropped: int
    """Number of training rows that were dropped: without text, or too long even after truncation."""
    fingerprint: str
    """SHA-256 of the texts of all rows in order, dropped rows included; the same for every file format."""
    notes: tuple[str, ...] = ()
    """What was found out about the files."""
    answered: bool = True
    """The rows have answers of their own. Those of a teacher are in `target_ids`, `label` and `target_text` once it has been
    asked."""
    teaching: Teaching | None = None
    """What a teacher says about the rows."""

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> TurnsRow:
        """Token ids of one example: input, target (with the end token) and, of a conversation whose earlier answers are
        predicted, too, their places in the input."""
        source, target, earlier = (column[int(index)].values.to_numpy().tolist() for column in self._ids)
        return (source, target, earlier) if earlier else (source, target)

    def teacher_row(self, index: int) -> list[int]:
        """Token ids of the input as a teacher reads it."""
        ids: list[int] = self._teacher_ids[int(index)].values.to_numpy().tolist()
        return ids

    def taught(self, teaching: Teaching, answers: Mapping[int, Answer]) -> Split:
        """The split with what a teacher says, and its answers to rows without one."""
        if not answers:
            return replace(self, teaching=teaching)
        table = self.rows.with_format("arrow")[:]
        columns = {name: table[name].to_pylist() for name in ("label", "target_ids", "target_text", "references", "length")}
        for row, answer in answers.items():
            columns["label"][row], columns["target_ids"][row], columns["target_text"][row] = answer
            columns["references"][row] = [answer.text.strip()]
            columns["length"][row] += len(answer.ids)
        for name, values in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        rows = Dataset(InMemoryTable(table), DatasetInfo(features=_COLUMNS))
        return replace(self, rows=rows, lengths=np.asarray(columns["length"], dtype=np.int32), teaching=teaching)

    @cached_property
    def target_lengths(self) -> NDArray[np.int32]:
        """[rows] tokens that are predicted, end tokens included."""
        _, target, earlier = (np.asarray(pc.list_value_length(column), dtype=np.int32) for column in self._ids)
        return target + earlier

    @cached_property
    def longest_answer(self) -> int:
        """Tokens of the longest target, or of the longest earlier answer that is predicted; end token included."""
        _, target, earlier = self._ids
        longest = int(pc.max(pc.list_value_length(target)).as_py())
        for places in earlier.combine_chunks().to_pylist() if len(pc.list_flatten(earlier)) else ():
            runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
            longest = max(longest, *map(len, runs))
        return longest

    @cached_property
    def largest_token(self) -> tuple[str, int]:
        """The largest token id of all rows, and the text of a row that contains it."""
        table = self.rows.with_format("arrow")
        largest = {name: pc.max(pc.list_flatten(table[name][:])).as_py() for name in ("input_ids", "target_ids")}
        name, token = max(largest.items(), key=lambda entry: entry[1])
        flat, parents = pc.list_flatten(table[name][:]), pc.list_parent_indices(table[name][:])
        row = self.rows[parents[pc.index(flat, token).as_py()].as_py()]
        return row["text" if name == "input_ids" else "target_text"], token

    def frequent_tokens(self, most: int = 5000, rows: int = 5000) -> list[int]:
        """Tokens of the first rows' inputs, the most frequent first; equally frequent ones by id."""
        counts = Counter(self._ids[0][:rows].combine_chunks().flatten().to_pylist())
        return [token for token, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:most]]

    @cached_property
    def _teacher_ids(self) -> pa.ChunkedArray:
        return self.rows.with_format("arrow")["teacher_ids"][:]

    @cached_property
    def _ids(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
        """The columns of `row`, memory-mapped: a row takes a fifth of the time that it takes through `datasets`."""
        columns = self.rows.with_format("arrow")
        return columns["input_ids"][:], columns["target_ids"][:], columns["earlier"][:]


def load_split(
    name: str,
    source: str | Sequence[str],
    encoder: Encoder,
    chat: ChatRows | None = None,
    *,
    references: str | None = None,
    texts: Texts | None = None,
    answered: bool = True,
) -> Split:
    """Read and tokenise the rows of `source`, or take them from the cache. In "train" unusable rows are dropped and counted.

    Args:
        chat: how its rows become the conversations of the encoder.
        references: column with further correct answers to free text.
        texts: the part of the source's rows that belongs to the split; default: all.
        answered: the rows have targets.

    Raises:
        DataError: the source or one of its rows is invalid.
    """
    columns = Columns.of_template(encoder.template, references, chat, answered)
    texts = texts or read_source(source, columns)
    drop = name == "train"
    key = json_hash([texts.fingerprint, ROW in texts.rows.column_names, encoder.fingerprint, drop, answered])[:32]
    try:
        with quiet():
            rows = texts.rows.map(
                _encode,
                batched=True,
                with_indices=True,
                fn_kwargs={"encoder": encoder, "drop": drop, "answered": answered},
                features=_COLUMNS,
                remove_columns=texts.rows.column_names,
                # An explicit key instead of a pickle of the function: the same in every process and for equal files.
                new_fingerprint=key,
                cache_file_name=str(cache_folder() / f"{key}.arrow"),
                load_from_cache_file=True,
            )
    except _WrongRow as error:
        raise DataError(f"{place_of(source, columns, error.row)}: {error}") from None
    if not len(rows):
        raise DataError(
            f"{shown(source)}: none of its {len(texts.rows)} rows has text that fits into {encoder.limit} tokens; "
            + ("shorten data.teacher" if encoder.teacher else "raise data.max_tokens")
        )
    found = rows.with_format("numpy")
    return Split(
        name=name,
        source=shown(source),
        rows=rows,
        lengths=np.asarray(found["length"][:], dtype=np.int32),
        cut=int(np.sum(found["cut"][:])),
        dropped=len(texts.rows) - len(rows),
        fingerprint=texts.fingerprint,
        notes=texts.notes,
        answered=answered,
    )


class _WrongRow(DataError):
    """A row that cannot be used. `row`: its number in the source, from 0."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def leaked(train: Split, other: Split) -> int:
    """Number of rows of `train` whose input also occurs in `other`."""
    seen = set(_input_hashes(other))
    return sum(digest in seen for digest in _input_hashes(train))


def _encode(
    columns: dict[str, list[Any]], indices: list[int], encoder: Encoder, drop: bool, answered: bool
) -> dict[str, list[Any]]:
    """Text rows -> the columns of `_COLUMNS`, without the dropped rows."""
    references = columns.pop(REFERENCES, [None] * len(indices))
    numbers = columns.pop(ROW, indices)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    encoded: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for at, found in enumerate(encoder.examples(rows, answered)):
        if isinstance(found, DataError):
            if drop and isinstance(found, UnusableRow):
                continue
            raise _WrongRow(str(found), numbers[at]) from None
        row = {
            "input_ids": found.input_ids,
            "target_ids": found.target_ids,
            "label": found.label,
            "text": found.text,
            "target_text": found.target_text,
            "references": references[at] or [found.target_text.lstrip()],
            "length": len(found.input_ids) + len(found.target_ids),
            "cut": found.cut,
            "blank": found.blank,
            "earlier": found.earlier,
            "teacher_ids": found.teacher_ids,
        }
        for name, value in row.items():
            encoded[name].append(value)
    return encoded


def _input_hashes(split: Split) -> Iterator[bytes]:
    for batch in split.rows.select_columns(["text"]).iter(1000):
        for text in batch["text"]:
            yield hashlib.blake2b(text.encode(), digest_size=16).digest()
