"""What people tell a search: stop a trial, clone one with other settings, try more. It goes through the search's folder:

    <storage>/<name>/instructions/<id>.json     written by `ptuning search NAME stop|clone|extend`, taken by the driver
    <storage>/<name>/ledger.json                who told it what, and what became of it: `TrialStore.interventions`

So it reaches a driver on any machine, and one that is interrupted takes it when it is resumed.
"""

from __future__ import annotations

import getpass
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ptuning import storage
from ptuning.config import Experiment, ExperimentError, parse_experiment, parse_value
from ptuning.errors import UserError, suggest
from ptuning.records import restored
from ptuning.searching.space import INIT, KIND, LENGTH, RATE, trial_tables
from ptuning.searching.trial_store import Action, Intervention, TrialRecord, TrialStore
from ptuning.settings.search import SEARCHABLE, is_whole
from ptuning.training import lease
from ptuning.training.run_record import read_run

SETTINGS = (LENGTH, RATE, INIT, KIND, *(f"{table}.{name}" for table, fields in SEARCHABLE.items() for name in fields))
"""What a clone may change: what a search may vary."""
FOLDER = "instructions"


def parse(action: Action, words: Sequence[str], *, warm: bool = False, by: str | None = None) -> Intervention:
    """An instruction from its words: the trial of "stop"; the trial and key=value ... of "clone"; +N of "extend".

    Raises:
        UserError: a word is missing, wrong, or one too much.
    """
    if action == "extend":
        if len(words) != 1 or not words[0].removeprefix("+").isdecimal() or int(words[0]) < 1:
            raise UserError("extend: give the number of further trials, such as extend +8")
        return instruct(action, more=int(words[0]), warm=warm, by=by)
    trial, *changes = words or [""]
    if not trial or "=" in trial:
        raise UserError(f"{action}: the trial is missing; write {action} t003")
    if action == "stop" and changes:
        raise UserError(f"stop: takes one trial; leave {' '.join(changes)} out")
    return instruct(action, trial=trial, changes=dict(map(_change, changes)), warm=warm, by=by)


def instruct(
    action: Action,
    *,
    trial: str | None = None,
    changes: Mapping[str, Any] | None = None,
    warm: bool = False,
    more: int = 0,
    by: str | None = None,
) -> Intervention:
    """An instruction. `by`: who gives it; default: the user of this process.

    Raises:
        UserError: something is missing, wrong, or does not belong to the action.
    """
    changes = changes or {}
    if warm and action != "clone":
        raise UserError("--warm: is for clone; leave it out")
    if action == "extend":
        if more < 1 or trial is not None or changes:
            raise UserError("extend: takes the number of further trials, and nothing else")
    elif trial is None:
        raise UserError(f"{action}: the trial is missing; give one, such as t003")
    elif more or (action == "stop" and changes):
        raise UserError(f"{action}: takes {'one trial' if action == 'stop' else 'a trial and changes'}, and nothing else")
    known = {key: _whole(key, value) for key, value in changes.items()}
    return Intervention(uuid.uuid4().hex, action, by or _user(), time.time(), trial, known, warm, more)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return "unknown"


def _change(text: str) -> tuple[str, Any]:
    key, equals, written = text.partition("=")
    if not equals:
        raise UserError(f"clone: {text!r} is not a change; write key=value, such as train.learning_rate=0.1")
    return key, parse_value(written)


def _whole(key: str, value: Any) -> Any:
    """The value of a setting: 8.0 virtual tokens are 8."""
    if key not in SETTINGS:
        fix = suggest(key, SETTINGS, f"use one of {', '.join(SETTINGS)}")
        raise UserError(f"clone: {key!r} is not a searchable setting; {fix}")
    if key == RATE and not isinstance(value, int | float):  # the trials of a search are compared by it
        raise UserError(f"clone: {RATE}: {value!r} is not a number; give one, such as 0.1")
    whole = isinstance(value, float) and (key == LENGTH or is_whole(key)) and value == int(value)
    return int(value) if whole else value


def clone_values(tables: Mapping[str, Any], origin: TrialRecord, told: Intervention) -> dict[str, Any]:
    """The configuration of a clone. `tables`: the experiment of the search, as plain tables.

    Raises:
        UserError: it does not differ, or is not valid, or does not fit the checkpoint that it would go on from.
    """
    if tables["search"]["scheduler"] == "pbt":
        raise UserError("clone: pbt changes the settings of its trials itself; stop and extend are for it, too")
    changes = {key: value for key, value in told.changes.items() if origin.values.get(key) != value}
    if not changes:
        raise UserError(f"clone: {origin.run} has these settings; change at least one with key=value")
    values = {**origin.values, **changes}
    try:
        parse_experiment(trial_tables(tables, origin.run, values))
    except ExperimentError as error:
        raise UserError(f"clone: {str(error).removeprefix('experiment: ')}") from None
    kept = [key for key in changes if key.startswith("prompt.") or key == "train.optimizer"]
    if told.warm and kept:
        raise UserError(f"--warm: the checkpoint of {origin.run} fixes {kept[0]}; leave that as it is, or --warm out")
    return values


class Instructions:
    """The instructions of a search that no driver has taken yet."""

    def __init__(self, folder: str) -> None:
        """`folder`: of the search."""
        self._place = storage.join(folder, FOLDER)

    def add(self, told: Intervention) -> None:
        storage.write_file(self._place, f"{told.id}.json", json.dumps(asdict(told)).encode())

    def pending(self) -> list[Intervention]:
        """The oldest first.

        Raises:
            StorageError, OSError: the storage cannot be read.
        """
        names = [name for name in storage.list_names(self._place) if name.endswith(".json") and not name.startswith(".")]
        found = [restored(Intervention, json.loads(storage.read_file(self._place, name))) for name in names]
        return sorted(found, key=lambda told: told.at)

    def remove(self, told: Intervention) -> None:
        storage.delete_file(self._place, f"{told.id}.json")


class SearchFolder:
    """A search as another process sees it."""

    def __init__(self, folder: str, record: Mapping[str, Any] | None = None) -> None:
        """`record`: of its run, if it was read already.

        Raises:
            UserError: there is no search in this folder.
        """
        self._folder = folder
        record = record or read_run(folder)
        if record is None:
            raise UserError(f"{folder}: there is no search; give the name of one, and its storage folder with --storage")
        if record.get("kind") != "search":
            raise UserError(f"{folder}: is a training run; trials are stopped, cloned and added in a search")
        self.status: str = record["status"]
        """Of its record: a search whose driver was killed is "running"; see `driven`."""
        self.experiment: Experiment = parse_experiment(record["experiment"], folder)

    @property
    def driven(self) -> bool:
        """False: it is interrupted. One on another machine is only known by its lease, which it may have left."""
        held = lease.renewals(self._folder)
        return held is not None and held[1] is not False

    def trials(self) -> TrialStore:
        """Its trials, and what people told it, as they are now."""
        return TrialStore(self._folder)

    def pending(self) -> list[Intervention]:
        """What no driver has taken yet."""
        return Instructions(self._folder).pending()

    def tell(self, told: Intervention) -> None:
        """Leave an instruction for the driver.

        Raises:
            UserError: the search is finished, or the instruction cannot be followed, as far as the ledger says.
        """
        if self.status == "finished":
            raise UserError(f"{self._folder}: the search is finished; start another one")
        if told.trial is not None:
            origin = find_trial(self.trials(), told.trial)
            if told.action == "stop":
                check_running(origin)
            else:
                clone_values(self.experiment.model_dump(mode="json"), origin, told)
        Instructions(self._folder).add(told)

    def outcome(self, told: Intervention) -> Intervention | None:
        """What became of an instruction; None: no driver has taken it yet."""
        done = [each for each in self.trials().interventions if each.id == told.id]
        return done[0] if done else None


def searches(folder: str) -> Iterator[tuple[str, SearchFolder]]:
    """The searches in a storage folder, by name.

    Raises:
        StorageError, OSError: the storage cannot be read.
    """
    for name in storage.list_names(folder):
        place = storage.join(folder, name)
        record = read_run(place)
        if record and record.get("kind") == "search":
            yield name, SearchFolder(place, record)


def find_trial(store: TrialStore, run: str) -> TrialRecord:
    """Raises:
    UserError: there is no such trial.
    """
    if run not in store.entries:
        known = ", ".join(store.entries) or "none yet"
        raise UserError(f"{run!r} is not a trial of this search; {suggest(run, store.entries, f'it has {known}')}")
    return store.entries[run]


def check_running(entry: TrialRecord) -> None:
    """Raises:
    UserError: the trial has ended.
    """
    if entry.status != "running":
        raise UserError(f"stop: {entry.run} has ended already ({entry.status})")
