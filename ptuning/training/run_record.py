"""The record in a run's folder, for those who only want to know what is there. It imports nothing of models: a command that is
interrupted while torch is imported cannot import it again."""

from __future__ import annotations

import json
from typing import Any

from ptuning import storage
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment

RUN = "run.json"
"""A file in the run's folder: the experiment, the status and, at the end, the summary."""


def has_begun(experiment: Experiment) -> bool:
    """Whether there is a run of this name that could be resumed."""
    return storage.exists(storage.join(absolute(experiment).compute.storage, experiment.name), RUN)


def read_run(folder: str) -> dict[str, Any] | None:
    """The record of a run; None: there is none in this folder.

    Raises:
        StorageError, OSError: the storage cannot be read.
    """
    if not storage.exists(folder, RUN):
        return None
    record: dict[str, Any] = json.loads(storage.read_file(folder, RUN))
    return record
