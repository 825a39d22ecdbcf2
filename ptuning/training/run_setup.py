"""The checks before a run starts: paths, names, the base, the rows, the length of the context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ptuning import storage
from ptuning.config import PLACES, Experiment
from ptuning.data.task import Task
from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.compatibility import check_base
from ptuning.model.fingerprint import json_hash
from ptuning.paths import SCHEME
from ptuning.redaction import redact, redacted
from ptuning.registry.publish import publish, retrieve
from ptuning.registry.registry import ARTIFACT, Registry, Version, parse_reference
from ptuning.tracking import client as tracking_client
from ptuning.training.run_record import RUN, read_run

EARLIER = {"data.special_tokens": "tokens"}
"""What settings that are missing in an older record did, where it is not today's default."""

FREE = ("search.trials", "search.slots", "search.groups", "search.finalists", "search.seeds")
"""Settings that may change when a search is resumed."""


def check_run_name(
    experiment: Experiment,
    folder: str,
    resume: bool,
    kind: Literal["train", "search"] = "train",
    contents: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """Check that a run does not reuse a name unintentionally. Returns the summary of a finished run that is resumed.

    A run is the same wherever its base and its rows are. So a place that differs from the record is accepted, but if there is
    one, a finished run is recognised only by its `contents` (see `run_contents`), and those of any run have to be the same.
    """
    record = read_run(folder)
    if record is None:
        if resume:
            raise UserError(f"{folder}: there is no run to resume; start it without --resume")
        return None
    if not resume:
        raise UserError(
            f"{folder}: a run of this name exists ({record['status']}); continue it with --resume, or choose another "
            f"name with name={experiment.name}-2"
        )
    if record.get("kind", "train") != kind:
        raise UserError(
            f"{folder}: was created by ptuning {record.get('kind', 'train')}; resume it with that, or choose another name"
        )
    known: dict[str, str] | None = record.get("contents")
    changed = _changed(experiment, record["experiment"], kind)
    places = {key for key in changed if key in PLACES} if known else set()
    _refuse({key: sides for key, sides in changed.items() if key not in places}, experiment, folder, record)
    if known and contents:
        others = {key for key in {*known, *contents} if known.get(key) != contents.get(key)}
        _refuse({key: changed.get(key, ()) or ("other content",) for key in others}, experiment, folder, record)
    if record["status"] != "finished" or (places and not contents):
        return None
    summary: dict[str, Any] = record["summary"]
    return summary


def run_contents(experiment: Experiment, base: Base, task: Task) -> dict[str, str]:
    """What is at the places that an experiment names (`PLACES`), as hashes."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    found = {f"data.{name}": split.fingerprint for name, split in splits.items() if split}
    found["model.path"] = json_hash(base.fingerprint.parts())
    if experiment.prompt.init_from:
        found["prompt.init_from"] = soft_prompt.load(experiment.prompt.init_from).card.content_hash
    return found


def _changed(experiment: Experiment, recorded: dict[str, Any], kind: str) -> dict[str, tuple[str, ...]]:
    """The decisive settings that differ from a record, with their values before and now."""
    now, before = redacted(experiment.model_dump(mode="json")), redacted(recorded)
    found: dict[str, tuple[str, ...]] = {}
    for table in ("model", "prompt", "data", "train", *(("search",) if kind == "search" else ())):
        fields = type(getattr(experiment, table)).model_fields
        for key, value in now[table].items():
            usual = EARLIER.get(f"{table}.{key}", fields[key].get_default(call_default_factory=True))
            old = before.get(table, {}).get(key, json.loads(json.dumps(usual, default=str)))
            if old != value and f"{table}.{key}" not in FREE:
                found[f"{table}.{key}"] = (f"{_shown(old)} before", f"{_shown(value)} now")
    return found


def _refuse(changed: Mapping[str, tuple[str, ...]], experiment: Experiment, folder: str, record: dict[str, Any]) -> None:
    """Raises:
    UserError: something has changed; the message tells how to go on.
    """
    if not changed:
        return
    named = ", ".join(f"{key} ({', '.join(sides)})" for key, sides in changed.items())
    other = f"start another run with name={experiment.name}-2"
    made = storage.join(folder, ARTIFACT)
    if record["status"] == "finished" and storage.exists(made, storage.MANIFEST):
        other += f' (from its soft prompt with prompt.init="soft-prompt" prompt.init_from={made})'
    raise UserError(f"{folder}: cannot be resumed with another {named}; undo the change, or {other}")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def write_run(
    folder: str,
    experiment: Experiment,
    status: str,
    summary: dict[str, Any] | None = None,
    kind: str = "train",
    contents: Mapping[str, str] | None = None,
    placement: Mapping[str, Any] | None = None,
) -> None:
    """`placement`: what was decided about the base (`base_placement.record`)."""
    if summary:  # read wherever the folder is then
        summary = summary | {ARTIFACT: storage.relative(folder, summary[ARTIFACT])}
    record = {"kind": kind, "status": status, "experiment": experiment.model_dump(mode="json"), "summary": summary}
    record |= {"contents": dict(contents)} if contents else {}
    record |= {"placement": dict(placement)} if placement else {}
    storage.write_file(folder, RUN, json.dumps(redacted(record), indent=1).encode())


def placement_of(folder: str) -> dict[str, Any] | None:
    """What an earlier start of the run has decided about its base."""
    return (read_run(folder) or {}).get("placement")


def pin_parent(experiment: Experiment, folder: str) -> Experiment:
    """The experiment with `prompt.init_from` replaced by a folder inside the run's folder if it is a reference such as
    "name@champion", or an address that contains a password.

    So workers need neither MLflow nor passwords, and a resumed run starts from the same parent even if the alias has moved.
    """
    source = experiment.prompt.init_from
    if source is None or (_is_folder(source) and redact(source) == source):
        return experiment
    kept = hashlib.sha256(redact(source).encode()).hexdigest()[:16] if _is_folder(source) else str(parse_reference(source))
    prompt = experiment.prompt.model_copy(update={"init_from": storage.join(folder, "parent", kept)})
    return experiment.model_copy(update={"prompt": prompt})


def bring_parent(written: Experiment, pinned: Experiment, base: Base) -> None:
    """Copy the parent from the registry to the folder of `pin_parent`, unless an earlier start of this run did, and check it.

    Raises:
        UserError: no such soft prompt, MLflow does not respond, or it was made for another base.
    """
    source, folder = written.prompt.init_from, pinned.prompt.init_from
    if source is None or folder is None:
        return
    if source != folder and not storage.exists(folder, storage.MANIFEST):
        storage.write_folder(folder, _parent_files(written, source))
    check_base(soft_prompt.load(folder), source, base)


def _parent_files(written: Experiment, source: str) -> dict[str, bytes]:
    if _is_folder(source):
        soft_prompt.load(source)
        return soft_prompt.without_passwords(storage.read_folder(source))
    registry = Registry(tracking_client.tracking_uri(written))
    return retrieve(registry, registry.find(source))[1]


def publish_run(experiment: Experiment, name: str, folder: str, run_id: str | None) -> Version:
    """Publish the result of a run in the MLflow that tracks the run.

    Raises:
        UserError: as `publish`.
    """
    uri = tracking_client.tracking_uri(experiment)
    return publish(Registry(uri), name, folder, run_id, tracking_client.artifact_root(uri, experiment.compute.storage))


def _is_folder(source: str) -> bool:
    return "/" in source or source.startswith(SCHEME) or Path(source).expanduser().is_dir()
