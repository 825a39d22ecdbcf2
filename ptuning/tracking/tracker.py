"""The only door to MLflow. Training never waits for it, and nothing is lost.

    record -> spool on local disk -> thread -> MLflow

A `Tracker` belongs to the driver of one run. Each record is one line in the spool; a daemon thread ships the lines in
batches and remembers how far it came. MLflow may be slow, down, or absent from start to end: the lines wait, and the
same run resumed, or `ship_leftovers` in a later command, ships them. Shipping twice is harmless: each point carries its
own time and step, and the run is found again by a key of ours, so an answer that got lost never makes a second run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ptuning.config import UserError
from ptuning.redaction import logger, redact, redacted
from ptuning.tracking.outbox import Record, Sent, Spool, locked, write_file

Status = Literal["FINISHED", "FAILED", "KILLED"]

PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds: so long are records gathered before they are shipped, for each run that this process tracks: MLflow's part of a core
does not grow with them. After a failure it doubles up to the longest."""
BATCH_METRICS, BATCH_TEXTS, BATCH_BYTES = 1000, 100, 500_000
"""MLflow 3.17 takes 1000 metrics, 100 params and 100 tags in one call of at most 1 MB (mlflow/utils/validation.py)."""
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 6000, 8000, 250, 36
ARTIFACTS = "mlartifacts"
"""Folder of all artifacts in the storage folder."""
RUN_KEY, PARENT_KEY = "ptuning.run_key", "ptuning.parent_key"

log = logger(__name__)

_open: set[str] = set()
"""Keys of the runs that this process tracks."""

# MLflow reads these when it is imported or called. Set here and not in the thread that imports it, because setenv
# beside the threads of Ray's C++ core is not safe. What the user has set stays, except for pickle.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default sleeps 244 s in one call (utils/request_utils.py); we retry
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # for connecting and for each read; whole seconds only
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # below it a locked database prints a traceback (store/db/utils.py)
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # set_terminated prints two lines
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():
    os.environ.setdefault(_name, _value)
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"


def default_uri(storage: str | Path) -> str:
    """The tracking store in the storage folder: sqlite under an absolute path, since Ray changes the working directory.

    Raises:
        UserError: the storage is no local folder, or one that has no address as a database.
    """
    if "://" in str(storage):
        raise UserError(f"compute.storage: {storage} cannot hold the tracking store; set tracking.uri to an MLflow server")
    folder = Path(storage).expanduser().absolute()
    # SQLAlchemy (2.1) and MLflow (3.17) do not agree on what these mean in the address of a database: it would lie elsewhere.
    unclear = re.search(r"\?|%[0-9A-Fa-f]{2}", str(folder))
    if unclear:
        raise UserError(
            f"compute.storage: {folder} has {unclear[0]!r} in its path, which MLflow's database cannot; choose another folder, "
            "or set tracking.uri to an MLflow server"
        )
    return f"sqlite:///{folder / 'mlflow.db'}"


def default_artifact_root(storage: str | Path) -> str:
    """Where the runs of `default_uri` keep their artifacts."""
    if "://" in str(storage):
        return f"{storage}/{ARTIFACTS}"
    return (Path(storage).expanduser().absolute() / ARTIFACTS).as_uri()


def provenance() -> dict[str, str]:
    """What ran: versions, platform, command line and, in a git work tree, the commit. Imports none of the libraries."""
    facts = {
        "command": redact(shlex.join(sys.argv)),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for library in ("ptuning", "torch", "transformers", "deepspeed", "ray", "datasets", "mlflow"):
        try:
            facts[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        facts["git_commit"] = commit
        changed = _git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        facts["git_dirty"] = str(bool(changed)).lower()
    return facts


def _git(*arguments: str) -> str:
    """What git answers about the working folder; nothing where there is no repository.

    The repository may be anybody's, and its settings name commands that `git status` would run: they are switched off.
    """
    known = _run_git("config", "--null", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process|required)$")
    settings = {"core.fsmonitor": "false", "core.hooksPath": os.devnull} | {name: "" for name in known.split("\0") if name}
    # For what a partial clone lacks git would ask its remote, by a command of the remote's.
    given = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    environment = {"GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1", "GIT_CONFIG_COUNT": str(given + len(settings))}
    for number, (name, value) in enumerate(settings.items(), given):
        environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return _run_git(*arguments, **environment).strip()


def _run_git(*arguments: str, **environment: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, env=os.environ | environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


class Tracker:
    """One MLflow run. Created again on the same spool it continues that run.

    A record costs one write to the local disk, whatever MLflow does (`OSError` if that disk is full).
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: str | None,
        spool: Path,
        run_name: str,
        parent: str | None = None,
    ) -> None:
        """Open or continue the spool and start shipping.

        Args:
            artifact_root: where a new MLflow experiment keeps artifacts; ignored for a server, which decides itself.
            parent: `run_key` of the run that this one belongs to, in the same experiment.

        Raises:
            UserError: another process writes this spool.
        """
        spool.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        if not self._held.enter_context(locked(spool / "writer.lock", seconds=2)):  # ship_leftovers holds it shortly
            raise UserError(f"run {run_name}: another process is writing {spool}; wait for it or choose another name")
        remote = uri.startswith(("http://", "https://"))
        self._spool = Spool.create(spool, uri, experiment, None if remote else artifact_root, run_name, parent)
        self.run_key: str = self._spool.about["run_key"]
        self._shipment = _Shipment(self._spool, uri)
        self._secret = (uri, redact(uri))
        self._last_step: dict[str, int] = {}
        self._tables: list[dict[str, str]] = []
        for record in self._spool.replay():
            if record["kind"] == "metrics":
                self._last_step.update(dict.fromkeys(record["values"], record["step"]))
            self._tables += record.get("tables", [])
        self._changed = threading.Condition()
        self._end = self._spool.size()
        self._sent = self._spool.sent(uri).offset
        self._hurry = self._stop = False
        self._record({"kind": "start"})
        _open.add(self.run_key)
        self._thread = threading.Thread(target=self._ship, name=f"tracking {run_name}", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as MLflow did not answer."""
        return self._shipment.run_id

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; nested tables become dotted keys. MLflow never changes a parameter: a value that differs from
        the first one becomes a tag `ptuning.changed.<key>`."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _flat(values)}
        self._texts("params", texts, PARAM_LENGTH)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._texts("tags", values, TAG_LENGTH)

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int | None = None) -> None:
        """Log points at a step. The steps of one metric only rise: a point at or below its last step is what a run
        repeats after a restart from its checkpoint, and is dropped."""
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
        """Upload bytes as the file `name` (slashes make folders). The same name again replaces it."""
        path = self._spool.files / _inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        folder = str(PurePosixPath(name).parent)
        kept = str(path.relative_to(self._spool.folder))  # relative: the spool may be moved before it is shipped
        self._record({"kind": "artifact", "path": kept, "folder": "" if folder == "." else folder}, sync=True)

    def text(self, name: str, content: str) -> None:
        """Upload text as a file."""
        self.artifact_bytes(name, content.replace(*self._secret).encode())

    def json(self, name: str, content: object) -> None:
        """Upload plain data as a JSON file."""
        self.text(name, json.dumps(redacted(content), indent=2, ensure_ascii=False, default=str))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Upload a table as `MlflowClient.log_table` would: MLflow shows it and `mlflow.load_table` reads it.

        Not by `log_table` itself: that appends to what is there, so that shipping twice would double the rows.
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
        """The run has ended. Call it last; `close` waits for MLflow."""
        self._record({"kind": "finish", "status": status}, sync=True)

    def flush(self, deadline_s: float) -> int:
        """Wait until everything is shipped, at most `deadline_s` seconds. Returns how many records wait on disk."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._sent >= self._end, deadline_s)
        return self._spool.unsent(self._sent)

    def close(self, deadline_s: float) -> int:
        """`flush`, then stop. Records that still wait stay on disk for `ship_leftovers`."""
        unsent = self.flush(deadline_s)
        _open.discard(self.run_key)
        with self._changed:
            self._stop = self._shipment.stop = True
            self._changed.notify_all()
        if not unsent:
            self._thread.join()  # it has nothing to do; until it is gone it holds shipping.lock
        self._held.close()
        return unsent

    def _texts(self, kind: str, values: Mapping[str, str], longest: int) -> None:
        texts = {}
        for name, value in values.items():
            text = redact(value)  # before it is cut
            if len(text) > longest:
                self.json(f"long_values/{_safe(name).replace('/', '_')}.json", {name: text})
                text = f"{text[: longest - 60]} [... {len(text)} characters, whole in long_values]"
            texts[_safe(name)] = text
        for some in _chunks(texts, 10):  # ten of the longest, escaped, still fit a batch
            self._record({"kind": kind, "values": some})

    def _record(self, record: Record, timestamp_ms: int | None = None, sync: bool = False) -> None:
        record["time"] = timestamp_ms if timestamp_ms is not None else time.time_ns() // 1_000_000
        line = json.dumps(redacted(record)) + "\n"
        with self._changed:
            idle = self._sent >= self._end
            self._end = self._spool.append(line.encode(), sync)
            if idle:  # a thread that already has work would wake for nothing
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
                # Broad, because whatever goes wrong between here and MLflow has one answer: later.
                for offset in self._shipment.ship():
                    with self._changed:
                        self._sent = offset
                        self._changed.notify_all()
            except Exception as error:
                pause = min(2 * pause, LONGEST_PAUSE)
                if complaint != (complaint := _reason(error)):  # each trouble once, not at every try
                    log.warning("MLflow (%s): %s; records wait in %s", self._secret[1], complaint, self._spool.folder)
            else:
                pause, complaint = PAUSE, ""


def ship_leftovers(folder: Path, uri: str) -> int:
    """Ship what earlier runs left in their spools under `folder`, in one pass. Returns how many records still wait.

    A run whose process died without a word is closed as KILLED. Runs that somebody writes at this moment, and runs that
    were tracked elsewhere, are left alone. Takes as long as MLflow takes: call it in a thread.
    """
    found = [Spool(path.parent) for path in folder.rglob("events.jsonl") if path.with_name("run.json").exists()]
    spools = sorted(found, key=lambda spool: int(spool.about["time"]))  # parents before their children
    waiting, down = 0, False
    for spool in spools:
        if spool.about["uri"] != redact(uri):
            continue
        with locked(spool.folder / "writer.lock") as abandoned:
            if not abandoned:
                continue
            if not spool.finished():
                list(spool.replay())  # cuts a torn last line
                finish = {"kind": "finish", "status": "KILLED", "time": int(spool.events.stat().st_mtime * 1000)}
                spool.append(f"{json.dumps(finish)}\n".encode(), sync=True)
        try:
            if spool.sent(uri).offset < spool.size() and not down:
                deque(_Shipment(spool, uri).ship(), maxlen=0)
        except Exception as error:  # as in Tracker._ship: the next command tries again
            log.warning("MLflow (%s): %s; records wait in %s", redact(uri), _reason(error), spool.folder)
            down = True
        waiting += spool.unsent(spool.sent(uri).offset)
    return waiting


class _RunGone(Exception):
    """The run was deleted in MLflow, or its database was replaced."""


class _Refused(Exception):
    """Sending this record again would not help."""


class _Shipment:
    """Brings one spool to MLflow."""

    def __init__(self, spool: Spool, uri: str) -> None:
        self.spool = spool
        self.uri = uri
        self.run_id = spool.sent(uri).run_id
        self.stop = False
        self._params: dict[str, str] | None = None
        self._store: tuple[str | None, Any] | None = None

    def ship(self) -> Iterator[int]:
        """Ship all there is, batch by batch, and yield the offset reached.

        Raises:
            Exception: whatever stands between us and MLflow; call it again later.
        """
        with locked(self.spool.folder / "shipping.lock") as mine:
            if not mine:
                raise ConnectionError("another process is shipping this run")
            sent = self.spool.sent(self.uri)
            if sent.run_id is None:
                sent = sent._replace(run_id=self._find_or_create_run(), offset=0)
                self.spool.save_sent(sent)
            self.run_id = sent.run_id
            yield sent.offset
            for batch, offset in self._batches(sent.offset):
                if self.stop:
                    return
                try:
                    self._send(batch)
                except _RunGone:
                    self.run_id = self._params = None
                    self.spool.save_sent(Sent(sent.uri))
                    raise
                self.spool.save_sent(sent._replace(offset=offset))
                yield offset

    def _batches(self, offset: int) -> Iterator[tuple[list[Record], int]]:
        """Neighbouring metrics, params and tags as long as they fit one call; anything else alone."""
        room = {"metrics": BATCH_METRICS, "params": BATCH_TEXTS, "tags": BATCH_TEXTS, "bytes": BATCH_BYTES}
        batch: list[Record] = []
        left = dict(room)
        for record, size, after in self.spool.read(offset):
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
        """Send a batch. If MLflow refuses it for good, halve it until the refused record is alone, and put it aside."""
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
            reason, folder = _reason(error), self.spool.folder
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
                self._upload(self.spool.folder / first["path"], first["folder"])
            case "finish":
                self._client.set_terminated(self.run_id, first["status"], first["time"])
                self._delete_twins()
            case kind:
                raise _Refused(f"no record of the kind {kind!r} is known")

    def _log_batch(self, batch: list[Record]) -> None:
        entities = _mlflow().entities
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
        entities = _mlflow().entities
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
        # Not log_artifacts: that of some stores starts a thread pool, and Python waits for its threads when it exits.
        if not path.exists():
            raise _Refused(f"{path} is gone")
        self._artifacts.log_artifact(str(path), folder or None)

    def _find_or_create_run(self) -> str:
        about = self.spool.about
        found = self._runs(about["run_key"])
        if found:
            return found[0]
        tags = {RUN_KEY: about["run_key"]}
        if about["parent"]:
            parents = self._runs(about["parent"], deleted=True)
            if not parents:
                raise ConnectionError("the parent run is not there yet")
            tags |= {PARENT_KEY: about["parent"], "mlflow.parentRunId": parents[0]}
        run = self._client.create_run(self._experiment_id, about["time"], tags, about["run_name"])
        return str(run.info.run_id)

    def _delete_twins(self) -> None:
        """A create_run that timed out here may still have happened there, later than we looked for it."""
        for run_id in self._runs(self.spool.about["run_key"]):
            if run_id != self.run_id:
                self._client.delete_run(run_id)

    def _runs(self, run_key: str, deleted: bool = False) -> list[str]:
        """Ids of the runs with our key, oldest first."""
        views = _mlflow().entities.ViewType
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
        except _mlflow().MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    @cached_property
    def _client(self) -> Any:
        return connect(self.uri)

    @property
    def _artifacts(self) -> Any:
        if self._store is None or self._store[0] != self.run_id:  # the run may be made again
            self._store = self.run_id, artifacts(self._client, str(self.run_id))
        return self._store[1]

    @cached_property
    def _experiment_id(self) -> str:
        return experiment_id(self._client, self.spool.about["experiment"], self.spool.about["artifact_root"])


OFFLINE = "OFFLINE"


class TrackingError(UserError):
    """MLflow did not answer (`code` is OFFLINE), or said no (`code` is its own, such as RESOURCE_DOES_NOT_EXIST)."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def connect(uri: str) -> Any:
    """An `MlflowClient` for runs and registry; a local database is created if it is not there."""
    mlflow = _mlflow()
    if path := database(uri):
        _create_database(path)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def database(uri: str) -> Path | None:
    """The file of a local database; None for a server."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:////") else None


@contextmanager
def asking(uri: str) -> Iterator[None]:
    """Around calls of a client: whatever goes wrong with MLflow becomes a `TrackingError` of one sentence."""
    exceptions = _mlflow().exceptions
    try:
        yield
    except (exceptions.MlflowException, OSError) as error:  # requests' errors are OSErrors, and wrapped in MlflowException
        reason = _reason(error)
        if isinstance(error, OSError) or " failed with exception " in reason:
            raise TrackingError(f"MLflow ({redact(uri)}) does not answer; is it running? ({reason[-160:]})", OFFLINE) from None
        raise TrackingError(f"MLflow ({redact(uri)}): {reason}", str(error.error_code)) from None


def artifacts(client: Any, run_id: str) -> Any:
    """MLflow's store of a run's files (`ArtifactRepository`).

    MLflow notes where the files of a run lie as a whole path. The files of the database in a storage folder lie beside it:
    they are looked for there wherever the folder is by now, moved, copied, or mounted elsewhere.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = client.tracking_uri
    return get_artifact_repository(artifact_place(client, run_id), tracking_uri=uri, registry_uri=uri)


def artifact_place(client: Any, run_id: str) -> str:
    """Where the files of a run lie."""
    noted = str(client.get_run(run_id).info.artifact_uri)
    before, now = _artifact_roots(client)
    return now + noted.removeprefix(before) if before and noted.startswith(f"{before}/") else noted


def _artifact_roots(client: Any) -> tuple[str, str]:
    """The folder of artifacts as the database in a storage folder has noted it when it was made, and as it is now; nothing for
    all other stores."""
    path = database(client.tracking_uri)
    first = client.get_experiment_by_name("Default") if path else None  # made with the database
    root, _, number = first.artifact_location.rpartition("/") if first else ("", "", "")
    if path is None or number != "0" or not root.endswith(f"/{ARTIFACTS}"):
        return "", ""
    return root, default_artifact_root(path.parent)


def experiment_id(client: Any, name: str, artifact_root: str | None) -> str:
    """Id of the MLflow experiment of this name, which is created if it is not there."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        before, now = _artifact_roots(client)
        artifact_root = before if before and artifact_root == now else artifact_root  # as all of this database: `artifacts`
        try:
            return str(client.create_experiment(name, artifact_root))
        except _mlflow().MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another process was faster
    return str(experiment.experiment_id)


def _mlflow() -> Any:
    # Imported when the shipping thread first needs it: 1.2 to 5 s that neither a command nor training should wait for.
    import mlflow

    return mlflow


def _is_final(error: Exception) -> bool:
    """True if sending again would not help: what MLflow calls invalid, or an upload the server will not take."""
    if isinstance(error, _Refused):
        return True
    if getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
        return True
    return getattr(getattr(error, "response", None), "status_code", None) in (400, 413, 415)


def _reason(error: Exception) -> str:
    return redact(str(error)).strip().partition("\n")[0][:400] or type(error).__name__


def _create_database(path: Path) -> None:
    """Create MLflow's sqlite database whole or not at all.

    MLflow 3.17 migrates a new database in place and without a lock (store/tracking/sqlalchemy_store.py calls
    _initialize_tables, not _safe_initialize_tables). Two processes break each other, and one that ends within these
    seconds leaves a database that no later one can open. So one process makes it under another name, and renames it.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock"), seconds=300) as mine:
        if not mine:
            raise ConnectionError(f"another process is creating {path}")
        if path.exists():
            return
        fresh = path.with_name(f"{path.name}.new")
        fresh.unlink(missing_ok=True)
        store: Any = SqlAlchemyStore
        store(f"sqlite:///{fresh}", default_artifact_root(path.parent)).engine.dispose()
        fresh.replace(path)


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
    """A key that MLflow takes (mlflow/utils/validation.py), as near to ours as possible."""
    return re.sub(r"[^\w.\- :/]", "_", key)[:KEY_LENGTH]


def _inside(name: str) -> str:
    """The name, if it stays inside the folder it will be put in.

    Raises:
        ValueError: it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the run's artifacts; use a relative name")
    return name
