"""The client of MLflow: addresses, errors, the local database, artifacts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptuning import environment
from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.redaction import redact
from ptuning.tracking.outbox import locked

ARTIFACTS = "mlartifacts"
"""Folder of all artifacts inside the storage folder."""

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
    """Where an experiment is tracked.

    Raises:
        UserError: as `default_uri`.
    """
    return experiment.tracking.uri or default_uri(experiment.compute.storage)


def default_artifact_root(storage: str | Path) -> str:
    """The artifact folder of runs in `default_uri`."""
    if "://" in str(storage):
        return f"{storage}/{ARTIFACTS}"
    return (Path(storage).expanduser().absolute() / ARTIFACTS).as_uri()


OFFLINE = "OFFLINE"


class TrackingError(UserError):
    """MLflow did not respond (`code` is OFFLINE) or returned an error (`code` is MLflow's, such as RESOURCE_DOES_NOT_EXIST)."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def connect(uri: str) -> Any:
    """An `MlflowClient` for runs and registry; a missing local database is created."""
    mlflow = load_mlflow()
    if path := database(uri):
        _create_database(path)
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
    first = client.get_experiment_by_name("Default") if path else None  # created with the database
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
