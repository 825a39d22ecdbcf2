"""Answers on their way: a folder beside the output, with a Parquet file for every block of rows that was answered.

A file counts if its footer can be read, which Parquet writes last: what a killed process leaves of one does not, and its rows
are answered again. So each file says itself which rows are done. Ray Data's own checkpoints (2.60, beta) need two more files
and a renaming per block; they clean up and load in tasks on any node, which a local folder does not have, and every resumed
run asks the cluster for 1 GiB for the actor that filters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from ptuning import storage
from ptuning.errors import RunFailed, UserError
from ptuning.redaction import redact

ROW, VERSION, PREDICTION, PROBABILITIES = "row", "version", "prediction", "probabilities"
FINISH, ERROR, TRUTH = "finish_reason", "error", "truth"

SCHEMA = pa.schema(
    [
        (ROW, pa.int64()),
        (VERSION, pa.string()),
        (PREDICTION, pa.string()),
        (PROBABILITIES, pa.list_(pa.float64())),
        (FINISH, pa.string()),
        (ERROR, pa.string()),
        (TRUTH, pa.list_(pa.string())),
    ]
)
"""The answers of rows. `row` is the number in the table, from 0; `truth` holds the true label or texts, if the row has any."""

ABOUT = "about.json"
"""What is answered, and by whom."""


@dataclass(frozen=True)
class Part:
    """A complete file of answers."""

    path: str
    first: int
    """Its lowest row."""
    rows: int


class Parts:
    """The folder `OUTPUT.parts`."""

    def __init__(self, output: str) -> None:
        self.folder = f"{output}.parts"
        self.filesystem, self.path = storage.resolve(self.folder)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def begun(self) -> dict[str, Any] | None:
        """What was begun here; None if nothing was.

        Raises:
            UserError: the folder is not one of ours.
        """
        if self.filesystem.get_file_info(self.path).type == fs.FileType.NotFound:
            return None
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{ABOUT}") as file:
                about: dict[str, Any] = json.loads(file.read())
            return about
        except (OSError, ValueError):
            if not self._files():
                return None
            raise UserError(f"{redact(self.folder)}: is not a folder of ptuning predict; choose another output") from None

    def begin(self, about: Mapping[str, Any]) -> None:
        """Make the folder."""
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(f"{self.path}/{ABOUT}") as file:
            file.write(json.dumps(about).encode())

    def clean(self) -> NDArray[np.int64]:
        """The rows that were answered, ascending. Files without an end are deleted."""
        found: list[NDArray[np.int64]] = []
        for path in self._files():
            try:
                table = pq.read_table(path, columns=[ROW], filesystem=self.filesystem)
            except (pa.ArrowException, OSError):
                self.filesystem.delete_file(path)
                continue
            found.append(table[ROW].to_numpy())
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def answers(self, rows: int) -> Iterator[dict[str, Any]]:
        """The answers of all rows in the order of the table. In memory are only the files that overlap.

        Raises:
            RunFailed: a row has no answer.
        """
        waiting = sorted(self._parts(), key=lambda part: part.first, reverse=True)
        held: dict[int, dict[str, Any]] = {}
        for row in range(rows):
            while row not in held and waiting and waiting[-1].first <= row:
                table = pq.read_table(waiting.pop().path, filesystem=self.filesystem)
                held |= {each[ROW]: each for each in table.to_pylist() if each[ROW] >= row}
            if row not in held:
                raise RunFailed(f"{redact(self.folder)}: row {row + 1} has no answer; continue with --resume")
            yield held.pop(row)

    def delete(self) -> None:
        """Delete the folder."""
        self.filesystem.delete_dir(self.path)

    def _parts(self) -> Iterator[Part]:
        for path in self._files():
            footer = pq.read_metadata(path, filesystem=self.filesystem)
            if footer.num_rows:
                lowest = min(footer.row_group(at).column(0).statistics.min for at in range(footer.num_row_groups))
                yield Part(path, lowest, footer.num_rows)

    def _files(self) -> list[str]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return [info.path for info in self.filesystem.get_file_info(selector) if info.path.endswith(".parquet")]
