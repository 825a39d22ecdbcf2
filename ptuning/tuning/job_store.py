"""Jobs in the storage, so that they outlive every process.

    <storage>/tuning/jobs/<id>/progress.json    events and learning curves
    <storage>/tuning/jobs/<id>/job.json         the record, written last: without it the job does not exist

One process writes them, the actor that owns the jobs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ptuning import storage
from ptuning.redaction import logger
from ptuning.tuning.jobs import JobRecord

RECORD, PROGRESS = "job.json", "progress.json"
ID = re.compile(r"ftjob-[A-Za-z0-9]{24}")

log = logger(__name__)


@dataclass
class Progress:
    """What happened to a job."""

    events: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI's `fine_tuning.job.event`, the oldest first."""
    curves: list[list[list[float]]] = field(default_factory=list)
    """Of each trial: step and training loss."""
    evaluations: list[list[dict[str, Any]]] = field(default_factory=list)
    """Of each trial: step and metrics on the validation rows."""


class JobStore:
    """The jobs of a storage folder."""

    def __init__(self, root: str) -> None:
        """`root`: `<storage>/tuning`."""
        self._folder = storage.join(root, "jobs")

    def folder(self, job: str) -> str:
        return storage.join(self._folder, job)

    def write(self, record: JobRecord, progress: Progress) -> None:
        """Write a job down; when this returns it is in the storage.

        Raises:
            OSError: it could not be written.
        """
        folder = self.folder(record.id)
        storage.write_file(folder, PROGRESS, json.dumps(progress.__dict__).encode())
        storage.write_file(folder, RECORD, json.dumps(record.as_json()).encode())

    def records(self) -> list[JobRecord]:
        """All jobs, the oldest first. A record that cannot be read is left where it is."""
        found = []
        for name in storage.list_names(self._folder):
            if not ID.fullmatch(name) or not storage.exists(self.folder(name), RECORD):
                continue
            try:
                found.append(JobRecord.read(json.loads(storage.read_file(self.folder(name), RECORD))))
            except (storage.StorageError, ValueError, TypeError, KeyError) as error:
                log.error("the record of %s cannot be read: %s", name, error)
        return sorted(found, key=lambda record: (record.created_at, record.id))

    def progress(self, job: str) -> Progress:
        """What happened to a job."""
        if not storage.exists(self.folder(job), PROGRESS):
            return Progress()
        try:
            return Progress(**json.loads(storage.read_file(self.folder(job), PROGRESS)))
        except (storage.StorageError, ValueError, TypeError) as error:
            log.error("the events of %s cannot be read: %s", job, error)
            return Progress()
