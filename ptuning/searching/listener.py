"""The driver's end of interventions: takes the instructions that come while a search runs, and follows them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ptuning import storage
from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.searching.interventions import Instructions, check_running, clone_values, find_trial
from ptuning.searching.space import key_of, trial_tables
from ptuning.searching.trial import inherit
from ptuning.searching.trial_store import Intervention, TrialRecord, TrialStore

log = logger(__name__)

EVERY_S = 1.0
"""Seconds between two looks."""


class Listener:
    """Looks for instructions in a thread. What it has done is in the ledger before the instruction is removed."""

    def __init__(
        self,
        folder: str,
        tables: dict[str, Any],
        store: TrialStore,
        withdraw: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        """`tables`: the experiment of the trials; `withdraw`: takes a run out of its slot, or keeps it from getting one."""
        self._folder = folder
        self._tables = tables
        self._store = store
        self._withdraw = withdraw
        self._say = say
        self._instructions = Instructions(folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="ptuning-interventions", daemon=True)

    def start(self) -> None:
        """Take at once what was told before, then listen."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _listen(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            for told in self._instructions.pending():
                if all(told.id != done.id for done in self._store.interventions):  # else its driver was killed here
                    self._take(told)
                self._instructions.remove(told)
        except (OSError, ValueError, storage.StorageError) as error:  # they are still there at the next look
            log.warning("%s: the instructions cannot be read: %s", self._folder, error)

    def _take(self, told: Intervention) -> None:
        try:
            follow = {"stop": self._stop, "clone": self._clone, "extend": self._extend}[told.action]
            answer = follow(told)
        except UserError as error:
            answer = f"refused: {error}"
            self._store.intervene(replace(told, taken=False, answer=str(error)))
        self._say(f"{told.by}: {answer}")

    def _stop(self, told: Intervention) -> str:
        with self._store.lock:
            entry = find_trial(self._store, str(told.trial))
            check_running(entry)
            answer = f"{entry.run} is stopped at step {entry.step}; its best soft prompt is kept"
            stopped = replace(entry, status="stopped", message=f"stopped by {told.by}")
            self._store.intervene(replace(told, taken=True, answer=answer), stopped)
        self._withdraw(entry.run)
        return answer

    def _clone(self, told: Intervention) -> str:
        with self._store.lock:
            self._check_open("clone")
            origin = find_trial(self._store, str(told.trial))
            if origin.finalist:
                raise UserError(f"clone: {origin.run} is a finalist; clone its trial {origin.run.partition('.')[0]}")
            values = clone_values(self._tables, origin, told)
            run = self._store.next_name()
            entry = TrialRecord(run, key_of(trial_tables(self._tables, run, values)), values, self._place(run))
            changes = ", ".join(f"{key}={value}" for key, value in told.changes.items())
            entry.origin = origin.run
            answer = f"{run} is a clone of {origin.run} with {changes}"
            if told.warm:
                step = self._inherit(origin, entry)
                entry.key, entry.warm = f"{entry.key}-{origin.run}-{step}", True
                answer += f", from its step {step}"
            if any(entry.key == other.key for other in self._store.trials()):
                raise UserError("clone: there is a trial with these settings already; change another one")
            self._store.intervene(replace(told, taken=True, answer=answer), entry)
        return f"{answer}; it starts in the next free slot"

    def _inherit(self, origin: TrialRecord, entry: TrialRecord) -> int:
        """Give the clone the newest checkpoint of its origin. Returns its step."""
        for _ in range(3):  # it may be replaced by a newer one at this moment
            place = storage.join(origin.folder, "checkpoints")
            names = storage.list_folders(place)
            if not names:
                break
            try:
                files = storage.read_folder(storage.join(place, names[-1]))
            except storage.StorageError:
                time.sleep(0.1)
                continue
            return inherit(files, entry.folder)
        every = self._tables["train"]["checkpoint_every"]
        raise UserError(
            f"--warm: {origin.run} has no checkpoint yet, there is one every {every} steps; wait, or leave --warm out"
        )

    def _extend(self, told: Intervention) -> str:
        with self._store.lock:
            self._check_open("extend")
            answer = f"{told.more} more trial{'s' if told.more > 1 else ''}"
            self._store.intervene(replace(told, taken=True, answer=answer))
        return answer

    def _check_open(self, what: str) -> None:
        if self._store.complete:
            raise UserError(f"{what}: the trials have ended, and the finalists are trained; start another search")

    def _place(self, run: str) -> str:
        return storage.join(self._folder, "trials", run)
