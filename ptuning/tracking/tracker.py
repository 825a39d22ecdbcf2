"""Records a run in MLflow. Training never waits for MLflow, and no record is lost.

    record -> outbox on local disk -> thread -> MLflow

A `Tracker` belongs to the driver of one run. Each record is one line in the outbox; a daemon thread uploads the lines in
batches and stores its progress. If MLflow is slow or down, the lines wait; the resumed run, or `ship_leftovers` in a later
command, uploads them. Uploading twice is harmless: each point has its own time and step, and the MLflow run is found by a key,
so a lost response never creates a second run.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ptuning.errors import UserError
from ptuning.redaction import logger, redact, redacted
from ptuning.tracking.client import reason_of
from ptuning.tracking.outbox import Outbox, Record, locked, write_file
from ptuning.tracking.uploader import BATCH_METRICS, KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH, Uploader

Status = Literal["FINISHED", "FAILED", "KILLED"]

PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between uploads, per tracked run, so that the CPU time for MLflow does not grow with the number of runs. After a
failure it doubles up to the maximum."""

log = logger(__name__)

_open: set[str] = set()
"""Keys of the runs that this process tracks."""


class Tracker:
    """One MLflow run. A second `Tracker` on the same outbox continues the run.

    A record costs one write to the local disk, regardless of MLflow (`OSError` if that disk is full).
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: str | None,
        outbox: Path,
        run_name: str,
        parent: str | None = None,
    ) -> None:
        """Open or continue the outbox and start uploading.

        Args:
            artifact_root: where a new MLflow experiment keeps artifacts; ignored for a server, which decides itself.
            parent: `run_key` of the run that this one belongs to, in the same experiment.

        Raises:
            UserError: another process writes this outbox.
        """
        outbox.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        if not self._held.enter_context(locked(outbox / "writer.lock", seconds=2)):  # ship_leftovers holds it for a short time
            raise UserError(f"run {run_name}: another process is writing {outbox}; wait for it or choose another name")
        remote = uri.startswith(("http://", "https://"))
        self._outbox = Outbox.create(outbox, uri, experiment, None if remote else artifact_root, run_name, parent)
        self.run_key: str = self._outbox.about["run_key"]
        self._shipment = Uploader(self._outbox, uri)
        self._secret = (uri, redact(uri))
        self._last_step: dict[str, int] = {}
        self._tables: list[dict[str, str]] = []
        for record in self._outbox.replay():
            if record["kind"] == "metrics":
                self._last_step.update(dict.fromkeys(record["values"], record["step"]))
            self._tables += record.get("tables", [])
        self._changed = threading.Condition()
        self._end = self._outbox.size()
        self._sent = self._outbox.sent(uri).offset
        self._hurry = self._stop = False
        self._record({"kind": "start"})
        _open.add(self.run_key)
        self._thread = threading.Thread(target=self._ship, name=f"tracking {run_name}", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has responded."""
        return self._shipment.run_id

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; nested tables become dotted keys. Parameters are immutable in MLflow: a value that differs from the
        first one becomes a tag `ptuning.changed.<key>`."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _flat(values)}
        self._texts("params", texts, PARAM_LENGTH)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._texts("tags", values, TAG_LENGTH)

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int | None = None) -> None:
        """Log points at a step. The steps of a metric only increase: a point at or below the last step is a repetition after a
        restart from a checkpoint, and is dropped."""
        points = {_safe(name): float(value) for name, value in values.items()}
        new = {key: value for key, value in points.items() if step > self._last_step.get(key, -1)}
        self._last_step.update(dict.fromkeys(new, step))
        for some in _chunks(new, BATCH_METRICS):
            self._record({"kind": "metrics", "step": step, "values": some}, timestamp_ms)

    def dataset(
        self, name: str, source: str, fingerprint: str, context: Literal["training", "validation", "test"], rows: int
    ) -> None:
        """Log a split as input of the run."""
        facts = {"name": name, "source": source, "fingerprint": fingerprint, "context": context, "rows": rows}
        self._record({"kind": "dataset", **facts})

    def artifact_bytes(self, name: str, content: bytes) -> None:
        """Upload bytes as the file `name` (slashes create folders). An existing file is replaced."""
        path = self._outbox.files / _inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        folder = str(PurePosixPath(name).parent)
        kept = str(path.relative_to(self._outbox.folder))  # relative: the outbox may be moved before the upload
        self._record({"kind": "artifact", "path": kept, "folder": "" if folder == "." else folder}, sync=True)

    def text(self, name: str, content: str) -> None:
        """Upload text as a file."""
        self.artifact_bytes(name, content.replace(*self._secret).encode())

    def json(self, name: str, content: object) -> None:
        """Upload plain data as a JSON file."""
        self.text(name, json.dumps(redacted(content), indent=2, ensure_ascii=False, default=str))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Upload a table in the format of `MlflowClient.log_table`: MLflow shows it and `mlflow.load_table` reads it.

        `log_table` itself appends to an existing table, so uploading twice would duplicate the rows.
        """
        name = name if name.endswith(".json") else f"{name}.json"
        data = [[None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in rows]
        self.text(name, json.dumps({"columns": list(columns), "data": data}, ensure_ascii=False, default=str))
        entry = {"path": name, "type": "table"}
        if entry not in self._tables:
            self._tables.append(entry)
            tag = {"mlflow.loggedArtifacts": json.dumps(self._tables)}
            self._record({"kind": "tags", "values": tag, "tables": [entry]})

    def finish(self, status: Status) -> None:
        """Record the end of the run. Must be the last record; `close` waits for MLflow."""
        self._record({"kind": "finish", "status": status}, sync=True)

    def flush(self, deadline_s: float) -> int:
        """Wait until everything is uploaded, at most `deadline_s` seconds. Returns the number of records that are left on
        disk."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._sent >= self._end, deadline_s)
        return self._outbox.unsent(self._sent)

    def close(self, deadline_s: float) -> int:
        """`flush`, then stop. Records that are not uploaded stay on disk for `ship_leftovers`."""
        unsent = self.flush(deadline_s)
        _open.discard(self.run_key)
        with self._changed:
            self._stop = self._shipment.stop = True
            self._changed.notify_all()
        if not unsent:
            self._thread.join()  # it is idle; until it ends it holds shipping.lock
        self._held.close()
        return unsent

    def _texts(self, kind: str, values: Mapping[str, str], longest: int) -> None:
        texts = {}
        for name, value in values.items():
            text = redact(value)  # before it is truncated
            if len(text) > longest:
                self.json(f"long_values/{_safe(name).replace('/', '_')}.json", {name: text})
                text = f"{text[: longest - 60]} [... {len(text)} characters, whole in long_values]"
            texts[_safe(name)] = text
        for some in _chunks(texts, 10):  # ten values of maximum length, escaped, still fit into a batch
            self._record({"kind": kind, "values": some})

    def _record(self, record: Record, timestamp_ms: int | None = None, sync: bool = False) -> None:
        record["time"] = timestamp_ms if timestamp_ms is not None else time.time_ns() // 1_000_000
        line = json.dumps(redacted(record)) + "\n"
        with self._changed:
            idle = self._sent >= self._end
            self._end = self._outbox.append(line.encode(), sync)
            if idle:  # a busy thread need not be woken
                self._changed.notify_all()

    def _ship(self) -> None:
        pause, complaint = PAUSE, ""
        while True:
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stop or self._sent < self._end)
                if self._changed.wait_for(lambda: self._stop or self._hurry, max(pause, PAUSE * len(_open))):
                    pause, self._hurry = PAUSE, False
                if self._stop:
                    return
            try:
                # Broad, because the reaction to every error of MLflow is the same: retry later.
                for offset in self._shipment.ship():
                    with self._changed:
                        self._sent = offset
                        self._changed.notify_all()
            except Exception as error:
                pause = min(2 * pause, LONGEST_PAUSE)
                if complaint != (complaint := reason_of(error)):  # log each error once, not at every retry
                    log.warning("MLflow (%s): %s; records wait in %s", self._secret[1], complaint, self._outbox.folder)
            else:
                pause, complaint = PAUSE, ""


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chunks(values: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    items = list(values.items())
    for start in range(0, len(items), size):
        yield dict(items[start : start + size])


def _safe(key: str) -> str:
    """The key in a form that MLflow accepts (mlflow/utils/validation.py), with as few changes as possible."""
    return re.sub(r"[^\w.\- :/]", "_", key)[:KEY_LENGTH]


def _inside(name: str) -> str:
    """Check that a name stays inside its folder.

    Raises:
        ValueError: it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is outside the run's artifacts; use a relative name")
    return name
