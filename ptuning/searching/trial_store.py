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
from ptuning.records import restored

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
    origin: str | None = None
    """The trial that it is a clone of."""
    warm: bool = False
    """It went on from its origin's checkpoint: another seed cannot repeat it."""


Action = Literal["stop", "clone", "extend"]


@dataclass(frozen=True)
class Intervention:
    """What a person told the search, and what became of it."""

    id: str
    action: Action
    by: str
    """Who told it."""
    at: float
    """When, in Unix seconds."""
    trial: str | None = None
    """The trial to stop or to clone."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the experiment, and the clone's values where they differ from the trial's."""
    warm: bool = False
    """The clone goes on from the trial's newest checkpoint."""
    more: int = 0
    """Further trials."""
    taken: bool | None = None
    """None: no driver has seen it yet; False: it was refused."""
    answer: str = ""


class TrialStore:
    """All records of a search. Safe to use from several threads."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.lock = threading.RLock()
        """Held by who reads and then adds."""
        self._changed = False
        self._saved_at = 0.0
        self.entries: dict[str, TrialRecord] = {}
        self.interventions: list[Intervention] = []
        self.complete = False
        """There will be no further trials: the finalists are being chosen."""
        if storage.exists(folder, FILE):
            content = json.loads(storage.read_file(folder, FILE))
            self.interventions = [restored(Intervention, fields) for fields in content.get("interventions", [])]
            for record in content["trials"]:
                places = {key: storage.inside(folder, record[key]) for key in PLACES if record[key]}
                self.entries[record["run"]] = restored(TrialRecord, record | places)

    def add(self, entry: TrialRecord) -> None:
        """Write a record down; when this returns it is on disk."""
        with self.lock:
            assert entry.run not in self.entries
            self.entries[entry.run] = entry
            self._write()

    def change(self, run: str, change: Callable[[TrialRecord], None]) -> None:
        """Change a record; `save` makes it last."""
        with self.lock:
            change(self.entries[run])
            self._changed = True

    def intervene(self, done: Intervention, *changed: TrialRecord) -> None:
        """Write an intervention down together with the records that it adds or changes. If that fails, nothing has changed.

        Raises:
            StorageError, OSError: the storage cannot be written.
        """
        with self.lock:
            before = self.entries, self.interventions
            self.entries = self.entries | {entry.run: entry for entry in changed}
            self.interventions = [*self.interventions, done]
            try:
                self._write()
            except BaseException:
                self.entries, self.interventions = before
                raise

    def next_name(self) -> str:
        """The name of a new trial."""
        return f"t{len(self.trials()):03d}"

    def added(self) -> int:
        """Trials that people have added to those of the experiment."""
        with self.lock:
            return sum(each.more + (each.action == "clone") for each in self.interventions if each.taken)

    def save(self) -> bool:
        """Write the changes, if there are any; at most some times a second. Returns whether all are written."""
        with self.lock:
            if self._changed and time.monotonic() - self._saved_at > 0.2:
                self._write()
            return not self._changed

    def flush(self) -> None:
        with self.lock:
            self._write()

    def trials(self) -> list[TrialRecord]:
        with self.lock:
            return [entry for entry in self.entries.values() if not entry.finalist]

    def _record(self, entry: TrialRecord) -> dict[str, Any]:
        record = asdict(entry)
        return record | {key: storage.relative(self._folder, record[key]) for key in PLACES if record[key]}

    def _write(self) -> None:
        content: dict[str, Any] = {"trials": [self._record(entry) for entry in self.entries.values()]}
        if self.interventions:
            content["interventions"] = [asdict(each) for each in self.interventions]
        storage.write_file(self._folder, FILE, json.dumps(content).encode())
        self._changed, self._saved_at = False, time.monotonic()
