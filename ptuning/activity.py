"""What runs in a storage folder: runs, searches and jobs of the tuning service, and how far they are. It only reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ptuning import storage
from ptuning.errors import UserError
from ptuning.searching.trial_store import TrialStore
from ptuning.training import lease
from ptuning.training.run_record import read_run
from ptuning.tuning.job_store import JobStore

EVERY = 2.0
"""Seconds between two looks."""
SILENT = 3
"""Looks in a row without a renewal after which the driver of a run on another machine counts as lost."""


@dataclass(frozen=True)
class Activity:
    """A run, a search or a job of the tuning service."""

    kind: str
    name: str
    state: str
    progress: str = ""
    best: str = ""


class Watcher:
    """Looks at a storage folder again and again."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._beats: dict[str, tuple[int, int]] = {}
        """Of each run: renewals of its lease, and in how many looks they have not changed."""

    def look(self) -> list[Activity]:
        """What runs, and what has ended without a result, before what is finished.

        Raises:
            UserError: the storage cannot be read.
        """
        found = [*self._runs(), *self._jobs()]
        return sorted(found, key=lambda each: (each.state == "finished", each.kind, each.name))

    def _runs(self) -> Iterator[Activity]:
        for name in storage.list_names(self._folder):
            place = storage.join(self._folder, name)
            record = read_run(place)
            if record is None:
                continue
            state = self._state(place) if record["status"] == "running" else record["status"]
            if record["kind"] == "search":
                yield Activity("search", name, state, *_search(place, record))
            else:
                yield Activity("run", name, state, *_run(place, record))

    def _state(self, place: str) -> str:
        """Of a run that has not ended: whether a driver is there."""
        held = lease.renewals(place)
        if held is None or held[1] is False:
            return "interrupted"
        before, silent = self._beats.get(place, (-1, 0))
        silent = silent + 1 if before == held[0] else 0
        self._beats[place] = held[0], silent
        late = held[1] is None and silent * EVERY > lease.BEAT * SILENT
        return "interrupted" if late else "running"

    def _jobs(self) -> Iterator[Activity]:
        for job in JobStore(storage.join(self._folder, "tuning")).records():
            steps, done = sum(trial.steps for trial in job.trials), sum(trial.step for trial in job.trials)
            best = job.checkpoints[-1].metrics if job.checkpoints else {}
            yield Activity(
                "job",
                f"{job.id} {job.suffix}".strip(),
                "finished" if job.status == "succeeded" else job.status,
                f"{done} of {steps} steps" if steps else "",
                _metric(best, job.metric),
            )


def _run(place: str, record: dict[str, Any]) -> tuple[str, str]:
    """How far a run is, and its best metric so far: of its summary, or of its newest checkpoint."""
    train = record["experiment"]["train"]
    if summary := record.get("summary"):
        return f"{summary['steps']} of {train['steps']} steps", _metric(summary["metrics"], None)
    state = _checkpoint(place)
    return f"{state.get('step', 0)} of {train['steps']} steps", _metric(state.get("best") or {}, None)


def _search(place: str, record: dict[str, Any]) -> tuple[str, str]:
    """How many trials have ended, and the metric of the best one."""
    store = TrialStore(place)
    trials = store.trials()
    ended = sum(trial.status != "running" for trial in trials)
    many = record["experiment"]["search"]["trials"] + store.added()
    results = [each["values"] for trial in trials for each in trial.results]
    best: dict[str, float] = max(results, key=lambda values: values.get("accuracy", -values.get("loss", 0.0)), default={})
    if record.get("summary"):
        best = record["summary"]["metrics"]
    return f"{ended} of {max(many, len(trials))} trials", _metric(best, None)


def _checkpoint(place: str) -> dict[str, Any]:
    folder = storage.join(place, "checkpoints")
    for name in reversed(storage.list_folders(folder)):
        try:
            state: dict[str, Any] = json.loads(storage.read_file(storage.join(folder, name), "state.json"))
            return state
        except (UserError, OSError, ValueError):  # it was replaced by a newer one at this moment
            continue
    return {}


def _metric(values: dict[str, float], name: str | None) -> str:
    for key in (name, "test_accuracy", "validation_accuracy", "accuracy", "test_loss", "validation_loss", "loss"):
        if key and key in values:
            return f"{key.replace('_', ' ')} {values[key]:.3f}"
    return ""
