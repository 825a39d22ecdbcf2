"""The client of MLflow: addresses, errors, the local database, artifacts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptuning import environment
from ptuning.config import Experiment
from ptuning.errors import TrackingError, UserError
from ptuning.redaction import redact
from ptuning.tracking.database import check_database, deleted_experiment
from ptuning.tracking.outbox import locked

ARTIFACTS = "mlartifacts"
"""Folder of all artifacts inside the storage folder."""

URI, NAME = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
"""MLflow's variables. Its user name and password (MLFLOW_TRACKING_USERNAME, ...) are read by MLflow itself."""

environment.apply("mlflow")


def default_uri(storage: str | Path) -> str:
    """The tracking store in the storage folder: SQLite with an absolute path, since Ray changes the working directory.

    Raises:
        UserError: the storage is not a local folder, or its path cannot be the address of a database.
    """
    if "://" in str(storage):
        raise UserError(f"compute.storage: {storage} cannot hold the tracking store; set tracking.uri to an MLflow server")
    folder = Path(storage).expanduser().absolute()
    # SQLAlchemy (2.1) and MLflow (3.17) interpret these differently in the address of a database, so its path would differ.
    unclear = re.search(r"\?|%[0-9A-Fa-f]{2}", str(folder))
    if unclear:
        raise UserError(
            f"compute.storage: {folder} has {unclear[0]!r} in its path, which MLflow does not support; choose another folder, "
            "or set tracking.uri to an MLflow server"
        )
    return f"sqlite:///{folder / 'mlflow.db'}"


def tracking_uri(experiment: Experiment) -> str:
    """Where an experiment is tracked: `tracking.uri`, else MLFLOW_TRACKING_URI, else the database in its storage folder.

    Raises:
        UserError: as `default_uri`, or MLflow cannot write to that address.
    """
    return named_uri(experiment.tracking.uri) or default_uri(experiment.compute.storage)


def named_uri(written: str | None, name: str = "tracking.uri") -> str | None:
    """The address that was given, with an absolute path: by `written` (the setting or option `name`), else by
    MLFLOW_TRACKING_URI; None if there is none.

    Raises:
        UserError: it is a folder of files, which MLflow no longer writes.
    """
    if not written:
        written, name = os.environ.get(URI, "").strip() or None, URI
    if written is None:
        return None
    if written.startswith("sqlite:"):
        path = written.removeprefix("sqlite:").removeprefix("//").removeprefix("/")
        return f"sqlite:///{Path(path).expanduser().absolute()}" if path and path != ":memory:" else written
    if written.startswith("file:") or ("://" not in written and not written.startswith(("databricks", "uc:"))):
        raise UserError(
            f"{name}: {redact(written)} is a folder of files, to which MLflow no longer writes (3.13); give a database, "
            "sqlite:////folder/mlflow.db, or a server, http://host:port"
        )
    return written


def experiment_name(experiment: Experiment) -> str:
    """The MLflow experiment of the runs: `tracking.experiment`, else MLFLOW_EXPERIMENT_NAME, else "ptuning"."""
    return experiment.tracking.experiment or os.environ.get(NAME, "").strip() or "ptuning"


def obeyed(experiment: Experiment) -> str | None:
    """A line about the variables of MLflow that decide where this experiment is tracked; None if none does."""
    given = {
        name: os.environ.get(name, "").strip()
        for name, setting in ((URI, experiment.tracking.uri), (NAME, experiment.tracking.experiment))
        if setting is None
    }
    said = [f"{name}={redact(value)}" for name, value in given.items() if value]
    return f"tracking: as {' and '.join(said)} says" if said else None


def check_tracking(experiment: Experiment) -> None:
    """Check what would keep the records of a run out of MLflow for good. A server that does not respond does not: records
    wait for it. Takes milliseconds for a local database, and imports no MLflow.

    Raises:
        UserError: the database cannot be used, or the experiment was deleted.
    """
    uri, name = tracking_uri(experiment), experiment_name(experiment)
    path = database(uri)
    if path is not None and path.exists():
        check_database(path, write=True)
    if path is not None:
        deleted = deleted_experiment(path, name)
    else:
        deleted = _deleted_there(uri, name) if uri.startswith(("http://", "https://")) else _deleted_in_database(uri, name)
    if deleted:
        raise was_deleted(uri, name, deleted)


def was_deleted(uri: str, name: str, number: str) -> UserError:
    """The error for an experiment that was deleted in MLflow, which accepts no run of it."""
    return UserError(
        f"tracking.experiment: the MLflow experiment {name!r} was deleted; restore it with: MLFLOW_TRACKING_URI={redact(uri)} "
        f"mlflow experiments restore --experiment-id {number}, or choose another name"
    )


def _deleted_there(uri: str, name: str) -> str | None:
    """The id of a deleted experiment on a server; None if there is none, or if the server does not respond."""
    import requests

    user, password = (os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            {"experiment_name": name},
            auth=(user, password or "") if user else None,
            headers={"authorization": f"Bearer {token}"} if token else None,
            timeout=3,
        )
        found = answer.json().get("experiment", {})
    except (OSError, ValueError, AttributeError):  # requests' errors are OSErrors
        return None
    return str(found["experiment_id"]) if found.get("lifecycle_stage") == "deleted" else None


def _deleted_in_database(uri: str, name: str) -> str | None:
    """The same for the database of a server, named directly."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 3} if uri.startswith("postgresql") else {})
        with engine.connect() as database:
            question = sqlalchemy.text("SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = :name")
            found = database.execute(question, {"name": name}).first()
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError):  # MLflow itself reports it
        return None
    return str(found[0]) if found and found[1] == "deleted" else None


def artifact_root(uri: str, storage: str | Path) -> str:
    """Where new MLflow experiments keep files: beside a local database, so that both move together; else in the storage."""
    path = database(uri)
    return default_artifact_root(path.parent if path else storage)


def default_artifact_root(storage: str | Path) -> str:
    """The artifact folder of runs in `default_uri`."""
    if "://" in str(storage):
        return f"{storage}/{ARTIFACTS}"
    return (Path(storage).expanduser().absolute() / ARTIFACTS).as_uri()


OFFLINE = "OFFLINE"


def connect(uri: str) -> Any:
    """An `MlflowClient` for runs and registry; a missing local database is created."""
    if path := database(uri):
        if path.exists():
            check_database(path)
        _create_database(path)
    mlflow = load_mlflow()
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def database(uri: str) -> Path | None:
    """The file of a local database; None for a server."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:////") else None


@contextmanager
def asking(uri: str) -> Iterator[None]:
    """Wraps calls of a client: every error of MLflow becomes a `TrackingError` of one sentence."""
    exceptions = load_mlflow().exceptions
    try:
        yield
    except (exceptions.MlflowException, OSError) as error:  # requests' errors are OSErrors, and wrapped in MlflowException
        reason = reason_of(error)
        if isinstance(error, OSError) or " failed with exception " in reason:
            raise TrackingError(f"MLflow ({redact(uri)}) does not respond; is it running? ({reason[-160:]})", OFFLINE) from None
        raise TrackingError(f"MLflow ({redact(uri)}): {reason}", str(error.error_code)) from None


def artifacts(client: Any, run_id: str) -> Any:
    """MLflow's store of a run's files (`ArtifactRepository`).

    MLflow stores the absolute path of a run's files. For the database in a storage folder, the files are next to it, so they
    are found even if the folder was moved, copied, or mounted elsewhere.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = client.tracking_uri
    return get_artifact_repository(artifact_place(client, run_id), tracking_uri=uri, registry_uri=uri)


def artifact_place(client: Any, run_id: str) -> str:
    """The location of the files of a run."""
    noted = str(client.get_run(run_id).info.artifact_uri)
    before, now = _artifact_roots(client)
    return now + noted.removeprefix(before) if before and noted.startswith(f"{before}/") else noted


def _artifact_roots(client: Any) -> tuple[str, str]:
    """The artifact folder that the database in a storage folder recorded at its creation, and the current one; empty for all
    other stores."""
    path = database(client.tracking_uri)
    try:
        first = client.get_experiment("0") if path else None  # created with the database, perhaps renamed or deleted since
    except load_mlflow().MlflowException:
        first = None
    root, _, number = first.artifact_location.rpartition("/") if first else ("", "", "")
    if path is None or number != "0" or not root.endswith(f"/{ARTIFACTS}"):
        return "", ""
    return root, default_artifact_root(path.parent)


def experiment_id(client: Any, name: str, artifact_root: str | None) -> str:
    """Id of the MLflow experiment of this name; it is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        before, now = _artifact_roots(client)
        artifact_root = (
            before if before and artifact_root == now else artifact_root
        )  # the same as for the whole database, see `artifacts`
        try:
            return str(client.create_experiment(name, artifact_root))
        except load_mlflow().MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment.lifecycle_stage == "deleted":
        raise was_deleted(client.tracking_uri, name, experiment.experiment_id)
    return str(experiment.experiment_id)


def load_mlflow() -> Any:
    # Imported when the uploading thread first needs it: it takes 1.2 to 5 s, which neither a command nor training should wait
    # for.
    import mlflow

    return mlflow


def reason_of(error: Exception) -> str:
    return redact(str(error)).strip().partition("\n")[0][:400] or type(error).__name__


def _create_database(path: Path) -> None:
    """Create MLflow's SQLite database atomically.

    MLflow 3.17 migrates a new database in place and without a lock (store/tracking/sqlalchemy_store.py calls
    _initialize_tables, not _safe_initialize_tables). Two processes at a time break it, and a process that ends during these
    seconds leaves a database that cannot be opened. So one process creates it under another name, and renames it.
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
