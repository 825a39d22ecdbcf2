"""The paths of an experiment, made valid for processes in other folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.paths import is_path
from ptuning.redaction import redact
from ptuning.tracking.client import default_uri, experiment_name, named_uri


def absolute(experiment: Experiment) -> Experiment:
    """The experiment with absolute paths: workers run in other folders.

    Raises:
        UserError: the storage cannot contain the tracking store.
    """
    tables = experiment.model_dump()
    for split, source in experiment.data.sources():
        tables["data"][split] = absolute_source(source)
    chat_template = experiment.data.chat_template_file
    if chat_template and is_path(chat_template):
        tables["data"]["chat_template"] = str(Path(chat_template).expanduser().absolute())
    tables["compute"]["storage"] = without_credentials(
        experiment.compute.storage, "compute.storage", experiment.compute.address
    )
    for table, key in (("compute", "storage"), ("prompt", "init_from"), ("model", "path")):
        value = tables[table][key]
        if value and "://" not in value and (key == "storage" or Path(value).expanduser().is_dir()):
            tables[table][key] = str(Path(value).expanduser().absolute())
    # Pinned, because the processes of a cluster have variables of their own.
    tables["tracking"] = {"uri": named_uri(experiment.tracking.uri), "experiment": experiment_name(experiment)}
    if tables["tracking"]["uri"] is None and "://" not in tables["compute"]["storage"]:
        default_uri(tables["compute"]["storage"])  # refused before anything is written
    return Experiment.model_validate(tables)


def absolute_source(source: str | Sequence[str]) -> list[str]:
    """A source of rows with absolute paths."""
    listed = [source] if isinstance(source, str) else source
    return [str(Path(each).expanduser().absolute()) if is_path(each) else each for each in listed]


def without_credentials(place: str, name: str, address: str | None) -> str:
    """An address of an object store without credentials. They are moved to the environment of the processes that this one
    starts. `name`: where it was given; `address`: of the cluster.

    Raises:
        UserError: the processes belong to an existing cluster, which would expose the credentials.
    """
    plain, variables = storage.split_credentials(place)
    if variables and (address or os.environ.get("RAY_ADDRESS")):
        raise UserError(
            f"{name}: {redact(place)} contains a password, which the cluster would expose; set {' and '.join(variables)} in "
            "the environment of its nodes instead"
        )
    os.environ |= variables
    return plain
