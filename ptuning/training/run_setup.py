"""The checks before a run starts: paths, names, the base, the rows, the length of the context."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from ptuning import storage
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.compatibility import check_base
from ptuning.paths import SCHEME
from ptuning.redaction import redact, redacted
from ptuning.registry.publish import publish, retrieve
from ptuning.registry.registry import Registry, Version, parse_reference
from ptuning.tracking import client as tracking_client

RUN = "run.json"
"""A file in the run's folder: the experiment, the status and, at the end, the summary."""

FREE = ("search.trials", "search.slots", "search.groups", "search.finalists", "search.seeds")
"""Settings that may change when a search is resumed."""


def check_run_name(
    experiment: Experiment, folder: str, resume: bool, kind: Literal["train", "search"] = "train"
) -> dict[str, Any] | None:
    """Check that a run does not reuse a name unintentionally. Returns the summary of a finished run that is resumed."""
    if not storage.exists(folder, RUN):
        if resume:
            raise UserError(f"{folder}: there is no run to resume; start it without --resume")
        return None
    record = json.loads(storage.read_file(folder, RUN))
    if not resume:
        raise UserError(
            f"{folder}: a run of this name exists ({record['status']}); continue it with --resume, or choose another "
            f"name with name={experiment.name}-2"
        )
    if record.get("kind", "train") != kind:
        raise UserError(
            f"{folder}: was created by ptuning {record.get('kind', 'train')}; resume it with that, or choose another name"
        )
    decisive = ("model", "prompt", "data", "train", *(("search",) if kind == "search" else ()))
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
    return publish(
        Registry(tracking_client.tracking_uri(experiment)),
        name,
        folder,
        run_id,
        tracking_client.default_artifact_root(experiment.compute.storage),
    )


def _is_folder(source: str) -> bool:
    return "/" in source or source.startswith(SCHEME) or Path(source).expanduser().is_dir()
