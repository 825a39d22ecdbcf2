"""A local database of MLflow, before MLflow opens it: each way in which it cannot be used is one sentence.

MLflow itself (3.17) takes seconds to import, prints a traceback for a file that is not a database, and waits for a lock
without a message. What is read here: the number of the schema, which MLflow compares with its own, and whether an experiment
was deleted.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ptuning.errors import TrackingError

PATIENCE = 10.0
"""Seconds to wait for a lock. MLflow's own calls hold it for milliseconds."""


DATABASE = "DATABASE"
"""Code of a `TrackingError` about a database file that cannot be used."""


def check_database(path: Path, write: bool = False) -> None:
    """Check that the installed MLflow can use a database that exists; `write`: also that it can be written now.

    Raises:
        TrackingError: it cannot; the message gives the reason and the fix.
    """
    if not path.is_file():
        raise TrackingError(f"{path}: is not a file; move it away, or choose another storage folder", DATABASE)
    try:
        with closing(
            sqlite3.connect(f"{path.as_uri()}?mode={'rw' if write else 'ro'}", uri=True, timeout=PATIENCE)
        ) as database:
            if write:
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
            found = _versions(database)
    except sqlite3.OperationalError as error:
        raise TrackingError(f"{path}: {_fix(str(error))}", DATABASE) from None
    except sqlite3.DatabaseError as error:
        raise TrackingError(
            f"{path}: is not an SQLite database of MLflow ({error}); move it away or restore it from a backup", DATABASE
        ) from None
    _check_schema(path, found)


def deleted_experiment(path: Path, name: str) -> str | None:
    """The id of an experiment of this name that was deleted in MLflow; None if it was not."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
            question = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
            found = database.execute(question, (name,)).fetchall()
    except sqlite3.DatabaseError:  # another schema: MLflow itself reports it
        return None
    return next((str(number) for number, stage in found if stage == "deleted"), None)


def _versions(database: sqlite3.Connection) -> list[str]:
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "alembic_version" not in tables:
        if not tables:
            return []  # MLflow creates its tables
        raise sqlite3.DatabaseError("it has no table alembic_version")
    return [version for (version,) in database.execute("SELECT version_num FROM alembic_version")]


def _fix(reason: str) -> str:
    if "locked" in reason:
        return "is locked by another program; end that program (a backup, a viewer, a killed run), and start again"
    if "readonly" in reason or "unable to open" in reason:
        return "cannot be written; correct its permissions and those of its folder, or choose another storage folder"
    return f"cannot be used ({reason}); restore it from a backup, or choose another storage folder"


def _check_schema(path: Path, found: list[str]) -> None:
    known = _schemas()
    if not known or not found or found == [_newest(known)]:
        return
    if all(version in known for version in found):
        raise TrackingError(
            f"{path}: was written by an older MLflow; make a copy of it, then upgrade it with: mlflow db upgrade sqlite:///{path}",
            DATABASE,
        )
    raise TrackingError(
        f"{path}: was written by a newer MLflow than the one that is installed here; install the same version on all machines "
        "that use it, or choose another storage folder",
        DATABASE,
    )


@cache
def _schemas() -> dict[str, str]:
    """Schema -> the one before it, from the migrations of the installed MLflow, which is not imported."""
    spec = find_spec("mlflow")
    folder = Path(spec.origin or "").parent / "store" / "db_migrations" / "versions" if spec else Path()
    found = {}
    for file in folder.glob("*.py") if spec else ():
        text = file.read_text(encoding="utf-8")
        own, before = (re.search(rf"^{name} = (.*)$", text, re.MULTILINE) for name in ("revision", "down_revision"))
        if own and before:
            found[own[1].strip("\"'")] = before[1].strip("\"'")
    return found


def _newest(known: dict[str, str]) -> str:
    return next(version for version in known if version not in known.values())
