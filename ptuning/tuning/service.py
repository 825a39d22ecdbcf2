"""The jobs of a server: what clients ask of them, and where each of them is.

Every change is in the storage before it is answered. What only this process knows is how far the slots are; they begin again
from their checkpoints.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import TrackingError, UserError
from ptuning.model.soft_prompt import public_base
from ptuning.redaction import logger
from ptuning.registry.names import find_tuned, is_tuned_name
from ptuning.registry.publish import check_not_base, retrieve
from ptuning.registry.registry import Registry, RegistryError, Version, check_name
from ptuning.training.messages import Fields, Leaving
from ptuning.tuning.files import FileStore, UnknownFile
from ptuning.tuning.ids import new_id
from ptuning.tuning.job_store import JobStore, Progress
from ptuning.tuning.jobs import JobRecord, Status, now
from ptuning.tuning.publication import Publisher
from ptuning.tuning.request import JobRefused, check, method_of
from ptuning.tuning.results import event

log = logger(__name__)


class UnknownJob(UserError):
    """No such job, or it is another owner's."""


class TooManyJobs(UserError):
    """The owner has as many open jobs as a key may have."""


class Slots(Protocol):
    """The dispatcher, as jobs see it."""

    def enter(self, order: Fields) -> None: ...

    def leave(self, run: str, how: Leaving) -> Any: ...

    def requeue(self, run: str) -> None: ...

    def limit(self, most: float) -> None: ...

    def training(self) -> list[str]: ...

    def waiting(self) -> list[str]: ...


class Jobs:
    """All jobs, in memory and in the storage. `lock` guards them; everything that changes one holds it."""

    def __init__(self, server: Experiment, root: str) -> None:
        self.server = server
        self.store = JobStore(root)
        self.files = FileStore(root)
        self.lock = threading.RLock()
        self.records: dict[str, JobRecord] = {record.id: record for record in self.store.records()}
        self._progress: dict[str, Progress] = {}
        self._changed: set[str] = set()

    def get(self, job: str, owner: str | None) -> JobRecord:
        """A job. `owner` None: of all owners.

        Raises:
            UnknownJob: there is none that this owner may see.
        """
        record = self.records.get(job)
        if record is None or owner not in (None, record.owner):
            raise UnknownJob("there is no such job; GET /v1/fine_tuning/jobs lists those of your key")
        return record

    def progress(self, record: JobRecord) -> Progress:
        """What happened to a job. That of open jobs stays in memory."""
        if record.id in self._progress:
            return self._progress[record.id]
        found = self.store.progress(record.id)
        if not record.ended:
            self._progress[record.id] = found
        return found

    def tell(self, record: JobRecord, message: str, **more: Any) -> None:
        """Add an event."""
        self.progress(record).events.append(event(message, **more))
        self._changed.add(record.id)

    def touch(self, record: JobRecord) -> None:
        """A job has changed; `flush` writes it."""
        self._changed.add(record.id)

    def save(self, record: JobRecord) -> None:
        """Write a job now.

        Raises:
            OSError: the storage cannot be written.
        """
        self.store.write(record, self.progress(record))
        self._changed.discard(record.id)
        if record.ended:
            self._progress.pop(record.id, None)

    def flush(self) -> None:
        """Write all that has changed.

        Raises:
            OSError: the storage cannot be written.
        """
        for job in list(self._changed):
            self.save(self.records[job])

    def move(self, record: JobRecord, status: Status, message: str, **more: Any) -> None:
        """Bring a job to another state, in the storage before this returns."""
        record.status = status
        if record.ended:
            record.finished_at = now()
        self.tell(record, message, **more)
        self.save(record)


class TuningService:
    """What clients ask of jobs."""

    def __init__(
        self,
        jobs: Jobs,
        registry: Registry,
        publisher: Publisher,
        slots: Slots,
        begin: Callable[[JobRecord], None],
        estimate: Callable[[JobRecord], int | None],
    ) -> None:
        """`begin`: lets a job go on that has just been made or resumed; `estimate`: when it will end."""
        self.jobs = jobs
        self._registry = registry
        self._publisher = publisher
        self._slots = slots
        self._begin = begin
        self._estimate = estimate
        self._base = public_base(jobs.server.model.path)

    def create(self, owner: str, admin: bool, body: Mapping[str, Any]) -> dict[str, Any]:
        """A new job.

        Raises:
            JobRefused, TooManyJobs: it cannot be taken.
        """
        jobs = self.jobs
        self._check_file(owner, admin, body["training_file"], "training_file")
        if body.get("validation_file"):
            self._check_file(owner, admin, body["validation_file"], "validation_file")
        method = method_of(body)
        seed = body.get("seed")
        record = JobRecord(
            id=new_id("ftjob"),
            owner=owner,
            created_at=now(),
            model=body["model"],
            base=self._base,
            training_file=body["training_file"],
            validation_file=body.get("validation_file"),
            suffix=body.get("suffix") or "",
            seed=random.randrange(2**31) if seed is None else seed,
            metadata=body.get("metadata"),
            method=method,
            hyperparameters={
                key: method["supervised"]["hyperparameters"][key]
                for key in ("batch_size", "learning_rate_multiplier", "n_epochs")
            },
        )
        parent = self._parent(record)
        if parent:
            record.parent = "parent"
            given = method["supervised"]["hyperparameters"]
            given.setdefault("prompt_length", int(parent.number("length") or 0))
            given.setdefault("prompt_kind", parent.tag("kind") or "embedding")
        self._check_suffix(record, admin)
        check(record, jobs.server)
        if parent:
            self._keep_parent(record, parent)
        with jobs.lock:
            open_jobs = [each for each in jobs.records.values() if each.owner == owner and not each.ended]
            most = jobs.server.tuning.jobs_per_key
            if len(open_jobs) >= most:
                raise TooManyJobs(
                    f"this key has {len(open_jobs)} jobs that have not ended, and at most {most} are allowed; wait"
                )
            if not admin:
                self._check_reserved(record)
            jobs.records[record.id] = record
            try:
                jobs.tell(record, f"Created fine-tuning job: {record.id}")
                jobs.move(record, "validating_files", f"Validating training file: {record.training_file}")
            except BaseException:
                del jobs.records[record.id]
                raise
            answer = record.wire()
        self._begin(record)
        return answer

    def list(
        self, owner: str | None, after: str | None, limit: int, metadata: Mapping[str, str] | None, none: bool
    ) -> dict[str, Any]:
        """The jobs of an owner, the newest first. `metadata`: what they must have; `none`: they must have none."""
        with self.jobs.lock:
            found = [record for record in reversed(self.jobs.records.values()) if owner in (None, record.owner)]
            found = [record for record in found if not none or not record.metadata]
            wanted = (metadata or {}).items()
            found = [record for record in found if all((record.metadata or {}).get(key) == value for key, value in wanted)]
            return page([record.wire(self._estimate(record)) for record in found], after, limit)

    def get(self, owner: str | None, job: str) -> dict[str, Any]:
        with self.jobs.lock:
            record = self.jobs.get(job, owner)
            return record.wire(self._estimate(record))

    def events(self, owner: str | None, job: str, after: str | None, limit: int) -> dict[str, Any]:
        with self.jobs.lock:
            found = self.jobs.progress(self.jobs.get(job, owner)).events
            return page(found[::-1], after, limit)

    def checkpoints(self, owner: str | None, job: str, after: str | None, limit: int) -> dict[str, Any]:
        """The checkpoints of a job that can be asked, the newest first."""
        with self.jobs.lock:
            record = self.jobs.get(job, owner)
            there = [each for each in reversed(record.checkpoints) if each.version and not each.withdrawn]
            found = page([record.checkpoint_wire(each) for each in there], after, limit)
        data = found["data"]
        return found | {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}

    def cancel(self, owner: str | None, job: str) -> dict[str, Any]:
        """Raises:
        JobRefused: it has ended.
        """
        return self._stop(owner, job, "cancelled", "drop", "The job was cancelled")

    def pause(self, owner: str | None, job: str) -> dict[str, Any]:
        """Save a checkpoint and free the slots.

        Raises:
            JobRefused: it has ended, or is paused.
        """
        return self._stop(owner, job, "paused", "pause", "The job was paused")

    def resume(self, owner: str | None, job: str) -> dict[str, Any]:
        """Queue a paused job again.

        Raises:
            JobRefused: it is not paused.
        """
        with self.jobs.lock:
            record = self.jobs.get(job, owner)
            if record.status != "paused":
                raise JobRefused(f"the job is {record.status}; only a paused one can be resumed", code="invalid_state")
            self.jobs.move(record, "queued" if record.trials else "validating_files", "The job was resumed")
            answer = record.wire()
        self._begin(record)
        return answer

    def _stop(self, owner: str | None, job: str, status: Status, how: Leaving, message: str) -> dict[str, Any]:
        with self.jobs.lock:
            record = self.jobs.get(job, owner)
            if record.ended or record.status == status:
                raise JobRefused(f"the job is already {record.status}; nothing was changed", code="invalid_state")
            if record.trials and all(trial.status != "open" for trial in record.trials):
                raise JobRefused("the job is trained, and its result is being published; wait for it", code="invalid_state")
            self.jobs.move(record, status, message)
            for trial in record.trials:
                self._slots.leave(trial.run, how)
            return record.wire()

    def _check_file(self, owner: str, admin: bool, file: str, param: str) -> None:
        try:
            found = self.jobs.files.get(file, None if admin else owner)
        except UnknownFile as error:
            raise JobRefused(f"{param}: {error}", param, "file_not_found") from None
        if found.purpose != "fine-tune":
            raise JobRefused(
                f"{param}: has the purpose {found.purpose}; upload it with the purpose fine-tune", param, "invalid_file"
            )

    def _check_suffix(self, record: JobRecord, admin: bool) -> None:
        name = record.result_name
        try:
            check_name(name)
            check_not_base(name, self.jobs.server.model.path)
        except RegistryError as error:
            raise JobRefused(f"suffix: {error}", "suffix") from None
        if admin:
            return
        published = self._publisher.owner_of(name)
        if published not in (None, record.owner):
            raise JobRefused(f"suffix: the name {name} belongs to others; choose another one", "suffix", "name_taken")

    def _check_reserved(self, record: JobRecord) -> None:
        """Two owners' jobs must not end under one name."""
        for other in self.jobs.records.values():
            if (
                other.owner != record.owner
                and not other.ended
                and record.result_name in (other.result_name, other.checkpoints_name)
            ):
                raise JobRefused(
                    f"suffix: the name {record.suffix} belongs to others; choose another one", "suffix", "name_taken"
                )

    def _parent(self, record: JobRecord) -> Version | None:
        """The soft prompt that a job begins with; None: the base."""
        if record.model in (self._base, self.jobs.server.model.path):
            return None
        try:
            return (
                find_tuned(self._registry, record.model) if is_tuned_name(record.model) else self._registry.find(record.model)
            )
        except TrackingError:
            raise
        except RegistryError:
            raise JobRefused(
                f"model: there is no such base or soft prompt here; write {self._base}, or name:3 of a soft prompt",
                "model",
                "model_not_found",
            ) from None

    def _keep_parent(self, record: JobRecord, version: Version) -> None:
        """Copy the parent into the job's folder: workers need no registry, and the version may be deleted meanwhile."""
        _, files = retrieve(self._registry, version)
        storage.write_folder(storage.join(self.jobs.store.folder(record.id), "parent"), files)


def page(found: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A page of a list, as OpenAI's client reads it.

    Raises:
        JobRefused: `after` is not in the list.
    """
    if after is not None:
        place = next((place for place, each in enumerate(found) if each["id"] == after), None)
        if place is None:
            raise JobRefused("after: is not an id of this list; leave it out", "after")
        found = found[place + 1 :]
    return {"object": "list", "data": found[:limit], "has_more": len(found) > limit}
