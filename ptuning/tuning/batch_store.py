"""Batches in the storage. Every change of a batch is written before it counts.

<storage>/tuning/batches/<id>/batch.json        the record; only the runner changes it after it was made
<storage>/tuning/batches/<id>/cancel            there: its client has cancelled it
<storage>/tuning/batches/<id>/parts/<n>.jsonl   finished lines, each in exactly one part
<storage>/tuning/batches-open/<id>              there: it has not ended
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ptuning import storage
from ptuning.errors import UserError
from ptuning.records import restored
from ptuning.tuning.ids import new_id

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/classify"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED = ("failed", "completed", "expired", "cancelled")
WINDOW_S = 24 * 3600
"""Seconds of the completion window 24h."""

_ID = re.compile(r"batch_[A-Za-z0-9]{24}")
_RECORD, _CANCEL, _PARTS = "batch.json", "cancel", "parts"


class UnknownBatch(UserError):
    """No such batch, or it is another owner's."""


@dataclass(frozen=True)
class Spent:
    """Tokens of all lines together."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )


@dataclass(frozen=True)
class BatchError:
    """What is wrong with a line of the input."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class BatchRecord:
    """A batch, as its record holds it. Times are Unix seconds; None: not yet."""

    id: str
    owner: str
    endpoint: Endpoint
    input_file_id: str
    created_at: int
    expires_at: int
    output_file_id: str
    """Of the file that is written at its end, if it has lines."""
    error_file_id: str
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None
    """After which its files expire; None: the usual time."""
    status: Status = "validating"
    model: str | None = None
    """If all lines ask the same."""
    errors: list[BatchError] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    spent: Spent = Spent()
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    made_ns: int = 0
    """When it was made: lists are ordered by it."""
    has_output: bool = False
    has_errors: bool = False

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def moved(self, status: Status, **more: Any) -> BatchRecord:
        """In another status, since now."""
        changes: dict[str, Any] = {"status": status, f"{status}_at": int(time.time())}
        return replace(self, **changes | more)


@dataclass(frozen=True)
class LineResult:
    """A finished line."""

    line: int
    """From 1."""
    ok: bool
    output: str
    """The line of the output or error file."""
    spent: Spent = Spent()


class BatchStore:
    """The batches of a storage folder. Any number of processes may read; one runner changes them."""

    def __init__(self, root: str) -> None:
        """`root`: `<storage>/tuning`."""
        self._folder = storage.join(root, "batches")
        self._open = storage.join(root, "batches-open")
        self._ended: dict[str, BatchRecord] = {}
        """Records that change no more."""

    def create(
        self,
        owner: str,
        endpoint: Endpoint,
        input_file_id: str,
        metadata: dict[str, str] | None = None,
        output_seconds: int | None = None,
    ) -> BatchRecord:
        now = int(time.time())
        record = BatchRecord(
            new_id("batch", "_"),
            owner,
            endpoint,
            input_file_id,
            now,
            now + WINDOW_S,
            new_id("file"),
            new_id("file"),
            metadata,
            output_seconds,
            made_ns=time.time_ns(),
        )
        storage.write_file(self._open, record.id, b"")  # first: a record that is not listed as open would never run
        self.save(record)
        return record

    def save(self, record: BatchRecord) -> None:
        """Write a record. Of one that has ended, what only its runner needed is removed."""
        storage.write_file(self._place(record.id), _RECORD, json.dumps(asdict(record)).encode())
        if record.ended:
            self._clear(record.id)

    def get(self, batch_id: str, owner: str | None) -> BatchRecord:
        """A batch, as its client sees it. `owner` None: of all owners.

        Raises:
            UnknownBatch: there is none that this owner may see.
        """
        record = self.read(batch_id) if _ID.fullmatch(batch_id) else None
        if record is None or owner not in (None, record.owner):
            raise UnknownBatch("there is no such batch; GET /v1/batches lists those of your key")
        if not record.ended and record.status != "finalizing" and record.cancelling_at is None and self.is_cancelled(batch_id):
            return replace(record, status="cancelling")
        return record

    def read(self, batch_id: str) -> BatchRecord | None:
        """A record; None: there is none."""
        if batch_id in self._ended:
            return self._ended[batch_id]
        place = self._place(batch_id)
        record = _parsed(storage.read_file(place, _RECORD)) if storage.exists(place, _RECORD) else None
        if record is not None and record.ended:
            self._ended[batch_id] = record
        return record

    def open(self) -> Sequence[BatchRecord]:
        """The batches that have not ended, the oldest first."""
        found = [record for name in storage.list_names(self._open) if _ID.fullmatch(name) and (record := self.read(name))]
        return sorted((record for record in found if not record.ended), key=lambda record: record.made_ns)

    def clear(self) -> None:
        """Remove what a runner has left that was killed when a batch had just ended. Only a runner may call it."""
        for name in storage.list_names(self._open):
            record = self.read(name) if _ID.fullmatch(name) else None
            if record is not None and record.ended:
                self._clear(name)

    @property
    def has_open(self) -> bool:
        return bool(storage.list_names(self._open))

    def cancel(self, batch_id: str) -> None:
        """Have the runner end a batch."""
        storage.write_file(self._place(batch_id), _CANCEL, b"")

    def is_cancelled(self, batch_id: str) -> bool:
        return storage.exists(self._place(batch_id), _CANCEL)

    def write_part(self, batch_id: str, number: int, results: Sequence[LineResult]) -> None:
        """Write finished lines. A part of this number is replaced, as a whole."""
        lines = [json.dumps(asdict(result)) for result in results]
        storage.write_file(self._parts(batch_id), f"{number:06d}.jsonl", "\n".join(lines).encode())

    def parts(self, batch_id: str) -> Iterator[tuple[int, list[LineResult]]]:
        """Every part with its number, in their order."""
        for name in storage.list_names(self._parts(batch_id)):
            if re.fullmatch(r"\d{6}\.jsonl", name):
                content = storage.read_file(self._parts(batch_id), name)
                rows: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
                yield int(name[:6]), [restored(LineResult, row | {"spent": restored(Spent, row["spent"])}) for row in rows]

    def list(self, owner: str | None) -> Sequence[BatchRecord]:
        """The batches of an owner (None: all), the newest first."""
        found = []
        for name in storage.list_names(self._folder):
            record = self.read(name) if _ID.fullmatch(name) else None
            if record is not None and owner in (None, record.owner):
                found.append(record)
        return sorted(found, key=lambda record: record.made_ns, reverse=True)

    def _clear(self, batch_id: str) -> None:
        storage.delete_folder(self._parts(batch_id))
        storage.delete_file(self._open, batch_id)

    def _place(self, batch_id: str) -> str:
        return storage.join(self._folder, batch_id)

    def _parts(self, batch_id: str) -> str:
        return storage.join(self._place(batch_id), _PARTS)


def _parsed(content: bytes) -> BatchRecord:
    values: dict[str, Any] = json.loads(content)
    errors = [restored(BatchError, error) for error in values["errors"]]
    return restored(BatchRecord, values | {"errors": errors, "spent": restored(Spent, values["spent"])})
