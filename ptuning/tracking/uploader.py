"""Uploads the outbox of a run to MLflow in batches. Uploading twice is harmless."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ptuning.redaction import logger, redact
from ptuning.tracking.client import artifacts, connect, database, default_artifact_root, experiment_id, load_mlflow, reason_of
from ptuning.tracking.outbox import Outbox, Record, Sent, locked

log = logger(__name__)

BATCH_METRICS, BATCH_TEXTS, BATCH_BYTES = 1000, 100, 500_000
"""MLflow 3.17 accepts 1000 metrics, 100 params and 100 tags in one call of at most 1 MB (mlflow/utils/validation.py)."""

PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 6000, 8000, 250, 36

RUN_KEY, PARENT_KEY = "ptuning.run_key", "ptuning.parent_key"


def ship_leftovers(folder: Path, uri: str) -> int:
    """Upload what earlier runs left in their outboxes under `folder`, in one pass. Returns the number of records that are left.

    A run whose process was killed is closed as KILLED. Runs that are being written, and runs that were tracked elsewhere, are
    skipped. The duration depends on MLflow: call it in a thread.
    """
    found = [Outbox(path.parent) for path in folder.rglob("events.jsonl") if path.with_name("run.json").exists()]
    outboxes = sorted(found, key=lambda outbox: int(outbox.about["time"]))  # parents before their children
    waiting, down = 0, False
    for outbox in outboxes:
        if not outbox.belongs_to(uri):
            continue
        with locked(outbox.folder / "writer.lock") as abandoned:
            if not abandoned:
                continue
            if not outbox.finished():
                list(outbox.replay())  # removes an incomplete last line
                finish = {"kind": "finish", "status": "KILLED", "time": int(outbox.events.stat().st_mtime * 1000)}
                outbox.append(f"{json.dumps(finish)}\n".encode(), sync=True)
        try:
            if outbox.sent(uri).offset < outbox.size() and not down:
                deque(Uploader(outbox, uri).ship(), maxlen=0)
        except Exception as error:  # as in Tracker._ship: the next command tries again
            log.warning("MLflow (%s): %s; records wait in %s", redact(uri), reason_of(error), outbox.folder)
            down = True
        waiting += outbox.unsent(outbox.sent(uri).offset)
    return waiting


class _RunGone(Exception):
    """The run was deleted in MLflow, or its database was replaced."""


class _Refused(Exception):
    """MLflow refuses this record permanently."""


class Uploader:
    """Uploads one outbox to MLflow."""

    def __init__(self, outbox: Outbox, uri: str) -> None:
        self.outbox = outbox
        self.uri = uri
        self.run_id = outbox.sent(uri).run_id
        self.stop = False
        self._params: dict[str, str] | None = None
        self._store: tuple[str | None, Any] | None = None

    def ship(self) -> Iterator[int]:
        """Upload all records, batch by batch, and yield the offset reached.

        Raises:
            Exception: any error of the connection to MLflow; retry later.
        """
        with locked(self.outbox.folder / "shipping.lock") as mine:
            if not mine:
                raise ConnectionError("another process is shipping this run")
            sent = self.outbox.sent(self.uri)
            if sent.run_id is None:
                sent = sent._replace(run_id=self._find_or_create_run(), offset=0)
                self.outbox.save_sent(sent)
            self.run_id = sent.run_id
            yield sent.offset
            for batch, offset in self._batches(sent.offset):
                if self.stop:
                    return
                try:
                    self._send(batch)
                except _RunGone:
                    self.run_id = self._params = None
                    self.outbox.save_sent(Sent(sent.uri))
                    raise
                self.outbox.save_sent(sent._replace(offset=offset))
                yield offset

    def _batches(self, offset: int) -> Iterator[tuple[list[Record], int]]:
        """Batches: consecutive metrics, params and tags that fit into one call; any other record alone."""
        room = {"metrics": BATCH_METRICS, "params": BATCH_TEXTS, "tags": BATCH_TEXTS, "bytes": BATCH_BYTES}
        batch: list[Record] = []
        left = dict(room)
        for record, size, after in self.outbox.read(offset):
            kind, count = record["kind"], len(record.get("values", ()))
            if batch and (kind not in left or left[kind] < count or left["bytes"] < size):
                yield batch, offset
                batch, left = [], dict(room)
            offset = after
            if kind not in left:
                yield [record], offset
                continue
            batch.append(record)
            left[kind] -= count
            left["bytes"] -= size
        if batch:
            yield batch, offset

    def _send(self, batch: list[Record]) -> None:
        """Send a batch. If MLflow refuses it permanently, split it in halves until the refused record is alone, and set it
        aside."""
        try:
            self._log(batch)
        except Exception as error:
            if not _is_final(error):
                raise
            if not self._run_is_there():
                raise _RunGone("the run was deleted there; it is sent again as a new run") from error
            if len(batch) > 1:
                self._send(batch[: len(batch) // 2])
                self._send(batch[len(batch) // 2 :])
                return
            reason, folder = reason_of(error), self.outbox.folder
            log.warning("MLflow (%s) refuses a record: %s; see refused.jsonl in %s", redact(self.uri), reason, folder)
            with (folder / "refused.jsonl").open("a") as file:
                file.write(json.dumps({"reason": reason, "record": batch[0]}) + "\n")

    def _log(self, batch: list[Record]) -> None:
        first = batch[0]
        match first["kind"]:
            case "metrics" | "params" | "tags":
                self._log_batch(batch)
            case "start":
                self._client.update_run(self.run_id, status="RUNNING")
            case "dataset":
                self._log_dataset(first)
            case "artifact":
                self._upload(self.outbox.folder / first["path"], first["folder"])
            case "finish":
                self._client.set_terminated(self.run_id, first["status"], first["time"])
                self._delete_twins()
            case kind:
                raise _Refused(f"no record of the kind {kind!r} is known")

    def _log_batch(self, batch: list[Record]) -> None:
        entities = load_mlflow().entities
        points: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in batch:
            values = record["values"]
            if record["kind"] == "metrics":
                points += [entities.Metric(key, value, record["time"], record["step"]) for key, value in values.items()]
            elif record["kind"] == "tags":
                tags |= values
            else:
                if self._params is None:
                    self._params = dict(self._client.get_run(self.run_id).data.params)
                for key, value in values.items():
                    if self._params.setdefault(key, value) == value:
                        params[key] = value
                    else:
                        tags[f"ptuning.changed.{key}"[:KEY_LENGTH]] = value
        self._client.log_batch(
            self.run_id,
            metrics=points,
            params=[entities.Param(*item) for item in params.items()],
            tags=[entities.RunTag(*item) for item in tags.items()],
            synchronous=True,
        )

    def _log_dataset(self, record: Record) -> None:
        entities = load_mlflow().entities
        source, hub = record["source"], record["source"].startswith("hub:")
        dataset = entities.Dataset(
            name=record["name"][:500],
            digest=record["fingerprint"].removeprefix("sha256:")[:DIGEST_LENGTH],
            source_type="hf" if hub else "local",
            source=json.dumps({"path": source.split(":")[1], "source": source} if hub else {"uri": source}),
            profile=json.dumps({"num_rows": record["rows"], "fingerprint": record["fingerprint"]}),
        )
        tag = entities.InputTag("mlflow.data.context", record["context"])
        self._client.log_inputs(self.run_id, [entities.DatasetInput(dataset, [tag])])

    def _upload(self, path: Path, folder: str) -> None:
        # Not log_artifacts: in some stores it starts a thread pool, and Python waits for its threads at exit.
        if not path.exists():
            raise _Refused(f"{path} no longer exists")
        self._artifacts.log_artifact(str(path), folder or None)

    def _find_or_create_run(self) -> str:
        about = self.outbox.about
        found = self._runs(about["run_key"])
        if found:
            return found[0]
        tags = {RUN_KEY: about["run_key"]}
        if about["parent"]:
            parents = self._runs(about["parent"], deleted=True)
            if not parents:
                raise ConnectionError("the parent run does not exist yet")
            tags |= {PARENT_KEY: about["parent"], "mlflow.parentRunId": parents[0]}
        run = self._client.create_run(self._experiment_id, about["time"], tags, about["run_name"])
        return str(run.info.run_id)

    def _delete_twins(self) -> None:
        """A create_run that timed out here may still have been executed there, after the search for it."""
        for run_id in self._runs(self.outbox.about["run_key"]):
            if run_id != self.run_id:
                self._client.delete_run(run_id)

    def _runs(self, run_key: str, deleted: bool = False) -> list[str]:
        """Ids of the runs with this run key, oldest first."""
        views = load_mlflow().entities.ViewType
        found = self._client.search_runs(
            [self._experiment_id],
            f"tags.`{RUN_KEY}` = '{run_key}'",
            run_view_type=views.ALL if deleted else views.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
        return [str(run.info.run_id) for run in found]

    def _run_is_there(self) -> bool:
        try:
            return bool(self._client.get_run(self.run_id).info.lifecycle_stage == "active")
        except load_mlflow().MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    @cached_property
    def _client(self) -> Any:
        return connect(self.uri)

    @property
    def _artifacts(self) -> Any:
        if self._store is None or self._store[0] != self.run_id:  # the run may be created again
            self._store = self.run_id, artifacts(self._client, str(self.run_id))
        return self._store[1]

    @cached_property
    def _experiment_id(self) -> str:
        path = database(self.uri)  # its folder may have been moved since the outbox was written
        root = default_artifact_root(path.parent) if path else self.outbox.about["artifact_root"]
        return experiment_id(self._client, self.outbox.about["experiment"], root)


def _is_final(error: Exception) -> bool:
    """True if retrying is useless: MLflow calls the record invalid, or the server refuses the upload."""
    if isinstance(error, _Refused):
        return True
    if getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
        return True
    return getattr(getattr(error, "response", None), "status_code", None) in (400, 413, 415)
