"""The persistent state of a search: one record per trial, written before the trial starts and updated continuously.

After a crash the search is replayed from it: finished trials are not repeated, others continue from their last checkpoint.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ptuning import storage

FILE = "ledger.json"
PLACES = ("folder", "soft_prompt")
"""Fields with a path, written relative to the search's folder, which may be moved."""
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class TrialRecord:
    """One trial or one finalist."""

    run: str
    """Short name: t000, t001, ... for trials; t000.s1, ... for a finalist's further seeds."""
    key: str
    """Hash of its configuration, seed and budget."""
    values: dict[str, Any]
    folder: str
    finalist: bool = False
    status: Status = "running"
    step: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations: step, values, time_ms."""
    measured: dict[str, float] = field(default_factory=dict)
    soft_prompt: str | None = None
    message: str | None = None


class TrialStore:
    """All records of a search. Safe to use from several threads."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._changed = False
        self._saved_at = 0.0
        self.entries: dict[str, TrialRecord] = {}
        if storage.exists(folder, FILE):
            for record in json.loads(storage.read_file(folder, FILE))["trials"]:
                places = {key: storage.inside(folder, record[key]) for key in PLACES if record[key]}
                self.entries[record["run"]] = TrialRecord(**(record | places))

    def add(self, entry: TrialRecord) -> None:
        """Write a record down; when this returns it is on disk."""
        with self._lock:
            assert entry.run not in self.entries
            self.entries[entry.run] = entry
            self._write()

    def change(self, run: str, change: Callable[[TrialRecord], None]) -> None:
        """Change a record; `save` makes it last."""
        with self._lock:
            change(self.entries[run])
            self._changed = True

    def save(self) -> bool:
        """Write the changes, if there are any; at most some times a second. Returns whether all are written."""
        with self._lock:
            if self._changed and time.monotonic() - self._saved_at > 0.2:
                self._write()
            return not self._changed

    def flush(self) -> None:
        with self._lock:
            self._write()

    def trials(self) -> list[TrialRecord]:
        with self._lock:
            return [entry for entry in self.entries.values() if not entry.finalist]

    def _record(self, entry: TrialRecord) -> dict[str, Any]:
        record = asdict(entry)
        return record | {key: storage.relative(self._folder, record[key]) for key in PLACES if record[key]}

    def _write(self) -> None:
        content = json.dumps({"trials": [self._record(entry) for entry in self.entries.values()]})
        storage.write_file(self._folder, FILE, content.encode())
        self._changed, self._saved_at = False, time.monotonic()
