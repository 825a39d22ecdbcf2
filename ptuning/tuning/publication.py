"""A job's soft prompts in the registry: its checkpoints as versions of a name of their own, its result as a version of its
suffix. Everything may be repeated after a crash: what is published already is found by its content."""

from __future__ import annotations

from ptuning import storage
from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.registry.names import OWNER, SERVED_AS, tuned_name
from ptuning.registry.promotions import delete
from ptuning.registry.publish import publish
from ptuning.registry.registry import Reference, Registry, RegistryError, Version, parse_reference
from ptuning.tuning.jobs import Checkpoint, JobRecord

KEPT = 3
"""Checkpoints of a job that can be asked. Older ones are withdrawn."""

log = logger(__name__)


class Publisher:
    """Publishes for the jobs of one server."""

    def __init__(self, registry: Registry, artifact_root: str | None) -> None:
        self._registry = registry
        self._artifact_root = artifact_root

    def checkpoint(self, record: JobRecord, checkpoint: Checkpoint, folder: str) -> str:
        """Publish a checkpoint; returns its version. `folder`: of its soft prompt.

        Raises:
            UserError: it cannot be published, or MLflow does not respond.
        """
        served_as = tuned_name(record.base, record.suffix, record.code, checkpoint.step)
        return str(self._publish(record, record.checkpoints_name, folder, None, served_as))

    def result(self, record: JobRecord, folder: str, run_id: str | None) -> str:
        """Publish the result of a job; returns its version.

        Raises:
            UserError: as `checkpoint`.
        """
        return str(self._publish(record, record.result_name, folder, run_id, record.served_as))

    def withdraw(self, checkpoint: Checkpoint, folder: str) -> None:
        """Delete a checkpoint from the registry and from the job's folder. One that was promoted stays."""
        assert checkpoint.version
        reference = parse_reference(checkpoint.version)
        try:
            delete(self._registry, Reference(reference.name, reference.version))
        except RegistryError as error:
            log.info("%s stays: %s", checkpoint.version, error)
        storage.delete_folder(folder)

    def owner_of(self, name: str) -> str | None:
        """Who has published under a name; "" if others than jobs have, None if it is free."""
        versions = self._registry.versions(name)
        return next((version.tags.get(OWNER, "") for version in versions), None)

    def _publish(self, record: JobRecord, name: str, folder: str, run_id: str | None, served_as: str) -> Version:
        tags = {SERVED_AS: served_as, OWNER: record.owner, "ptuning.job": record.id}
        return publish(self._registry, name, folder, run_id, self._artifact_root, tags)


def repeatable(error: UserError) -> bool:
    """Whether publishing may succeed later: MLflow does not respond."""
    return getattr(error, "code", None) is not None
