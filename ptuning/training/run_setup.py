"""Everything that is checked before anything starts: paths, names, the base, the rows, the room in the context."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ptuning import storage
from ptuning.config import Experiment, ExperimentError, UserError
from ptuning.data import dataset
from ptuning.model.base import Base
from ptuning.redaction import redact, redacted
from ptuning.tracking.tracker import default_uri
from ptuning.training.messages import Task

RUN = "run.json"
"""In a run's folder: its experiment, its status, and in the end its summary."""

FREE = ("search.trials", "search.slots", "search.groups", "search.finalists", "search.seeds")
"""What may differ when a search is resumed."""


def absolute(experiment: Experiment) -> Experiment:
    """The experiment with absolute paths: workers run in folders of their own.

    Raises:
        UserError: the storage cannot hold the tracking store that is to be in it.
    """
    tables = experiment.model_dump()
    for split in ("train", "validation", "test"):
        source = tables["data"][split]
        if source and ":" not in source:
            tables["data"][split] = str(Path(source).expanduser().absolute())
    tables["compute"]["storage"] = _without_credentials(experiment)
    for table, key in (("compute", "storage"), ("prompt", "init_from"), ("model", "path")):
        value = tables[table][key]
        if value and "://" not in value and (key == "storage" or Path(value).expanduser().is_dir()):
            tables[table][key] = str(Path(value).expanduser().absolute())
    if tables["tracking"]["uri"] is None and "://" not in tables["compute"]["storage"]:
        default_uri(tables["compute"]["storage"])  # refused before anything is written
    return Experiment.model_validate(tables)


def _without_credentials(experiment: Experiment) -> str:
    """The storage's address; credentials in it move to the environment, for the processes that this one starts.

    Raises:
        UserError: processes of a cluster, which others have started, would get them in the open.
    """
    place, variables = storage.split_credentials(experiment.compute.storage)
    if variables and (experiment.compute.address or os.environ.get("RAY_ADDRESS")):
        raise UserError(
            f"compute.storage: {redact(experiment.compute.storage)} has a password in it, which would lie open in the cluster; "
            f"set {' and '.join(variables)} in the environment of its nodes instead"
        )
    os.environ |= variables
    return place


def load_task(experiment: Experiment, base: Base) -> Task:
    """The tokenised splits of an experiment.

    Raises:
        UserError: bad rows, or text that cannot fit into the base's context.
    """
    config, length = experiment.data, experiment.prompt.length
    room = base.context - length
    if room < 2:
        raise ExperimentError(
            f"prompt.length: {length} virtual tokens leave no room in the {base.context} positions of {base.name}; lower it"
        )
    if config.max_tokens and config.max_tokens > room:
        raise ExperimentError(
            f"data.max_tokens: {length} virtual tokens and {config.max_tokens} of text exceed the {base.context} positions of "
            f"{base.name}; at most {room}"
        )
    encoder = dataset.Encoder(config, base.tokenizer, min(config.max_tokens or room, room))
    splits = {
        name: dataset.load_split(name, source, encoder)
        for name in ("train", "validation", "test")
        if (source := getattr(config, name))
    }
    return Task(encoder, splits["train"], splits.get("validation"), splits.get("test"))


def describe(task: Task) -> list[str]:
    """What was read, what was cut or dropped, and training rows that stand in other splits."""
    lines = []
    for split in (task.train, task.validation, task.test):
        if split is None:
            continue
        notes = [f"{split.name}: {len(split.lengths)} rows, {int(split.lengths.sum())} tokens"]
        notes += [f"{split.cut} cut to {task.encoder.limit} tokens"] if split.cut else []
        notes += [f"{split.dropped} dropped"] if split.dropped else []
        lines.append(", ".join(notes))
        if split is not task.train and (leaked := dataset.leaked(task.train, split)):
            lines.append(f"warning: {leaked} of the training rows also stand in {split.name}; its metrics flatter")
    return lines


def check_name(experiment: Experiment, folder: str, resume: bool, search: bool = False) -> dict[str, Any] | None:
    """A name is not silently used twice. Returns the summary of a finished run that is to be resumed."""
    kind = "search" if search else "train"
    if not storage.exists(folder, RUN):
        if resume:
            raise UserError(f"{folder}: there is no run to resume; start it without --resume")
        return None
    record = json.loads(storage.read_file(folder, RUN))
    if not resume:
        raise UserError(
            f"{folder}: a run of this name is there ({record['status']}); continue it with --resume, or choose another "
            f"name with name={experiment.name}-2"
        )
    if record.get("kind", "train") != kind:
        raise UserError(
            f"{folder}: was made by ptuning {record.get('kind', 'train')}; resume it with that, or choose another name"
        )
    decisive = ("model", "prompt", "data", "train", *(("search",) if search else ()))
    now, before = redacted(experiment.model_dump(mode="json")), redacted(record["experiment"])
    changed = [
        f"{table}.{key}"
        for table in decisive
        for key, value in now[table].items()
        if before.get(table, {}).get(key) != value and f"{table}.{key}" not in FREE
    ]
    if changed:
        raise UserError(
            f"{folder}: cannot be resumed with another {', '.join(changed)}; undo the change, or choose another name"
        )
    return record["summary"] if record["status"] == "finished" else None


def has_begun(experiment: Experiment) -> bool:
    """Whether there is a run of this name that could be resumed."""
    return storage.exists(storage.join(absolute(experiment).compute.storage, experiment.name), RUN)


def write_run(
    folder: str, experiment: Experiment, status: str, summary: dict[str, Any] | None = None, kind: str = "train"
) -> None:
    record = {"kind": kind, "status": status, "experiment": experiment.model_dump(mode="json"), "summary": summary}
    storage.write_file(folder, RUN, json.dumps(redacted(record), indent=1).encode())
