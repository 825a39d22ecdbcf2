"""The outbox of a run: its records on the local disk until they are uploaded. Independent of MLflow.

<outbox>/run.json       ptuning's run key, and the data to create the MLflow run
<outbox>/events.jsonl   the records
<outbox>/sent.json      the position up to which records are uploaded
<outbox>/files/         artifacts given as bytes
<outbox>/refused.jsonl  records that MLflow refuses permanently, with the reason
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ptuning.redaction import redact

Record = dict[str, Any]


class Sent(NamedTuple):
    """The upload progress of an outbox to one MLflow."""

    uri: str
    run_id: str | None = None
    offset: int = 0


class Outbox:
    """A run on local disk. One process writes it (`writer.lock`), and one at a time uploads it (`shipping.lock`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.events = folder / "events.jsonl"
        self.about: Record = json.loads((folder / "run.json").read_text())

    @classmethod
    def create(
        cls, folder: Path, uri: str, experiment: str, artifact_root: str | None, run_name: str, parent: str | None
    ) -> Outbox:
        path = folder / "run.json"
        about: Record = {"run_key": uuid.uuid4().hex, "experiment": experiment, "artifact_root": artifact_root}
        about |= {"run_name": run_name, "parent": parent, "time": time.time_ns() // 1_000_000}
        if path.exists():
            about = json.loads(path.read_text())
        about |= {"uri": address(folder, uri), "artifact_root": artifact_root}
        write_file(path, json.dumps(about).encode())
        (folder / "events.jsonl").touch()
        return cls(folder)

    def append(self, line: bytes, sync: bool) -> int:
        """Append one line, completely or (if the disk is full) not at all. Returns the new size.

        The file is opened for each line and unbuffered (some 20 microseconds), so a killed process loses nothing.
        """
        with self.events.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
            return file.tell()

    def read(self, offset: int) -> Iterator[tuple[Record, int, int]]:
        """The records from a byte offset on, each with its length and end offset, without an incomplete last line."""
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    record = {"kind": "broken"}
                yield record, len(line), offset

    def replay(self) -> Iterator[Record]:
        """All records. Afterwards, an incomplete last line is removed."""
        whole = 0
        for record, size, _ in self.read(0):
            yield record
            whole += size
        os.truncate(self.events, whole)

    def size(self) -> int:
        return self.events.stat().st_size

    def unsent(self, offset: int) -> int:
        return sum(1 for _ in self.read(offset))

    def finished(self) -> bool:
        """True if the last record is a finish. It is a short line, so only the end of the file is read."""
        with self.events.open("rb") as file:
            file.seek(max(0, self.size() - 200))
            return b'{"kind": "finish"' in file.read().rstrip(b"\n").rpartition(b"\n")[2]

    def belongs_to(self, uri: str) -> bool:
        """True if the run is tracked in this MLflow."""
        return self.about["uri"] in (address(self.folder, uri), redact(uri))

    def sent(self, uri: str) -> Sent:
        """The upload progress to this MLflow. If unknown, 0: uploading again is harmless."""
        here = address(self.folder, uri)
        try:
            sent = Sent(**json.loads((self.folder / "sent.json").read_text()))
        except (OSError, ValueError, TypeError):
            return Sent(here)
        return sent._replace(uri=here) if sent.uri in (here, redact(uri)) and sent.offset <= self.size() else Sent(here)

    def save_sent(self, sent: Sent) -> None:
        write_file(self.folder / "sent.json", json.dumps(sent._asdict()).encode(), sync=False)


def address(folder: Path, uri: str) -> str:
    """The address of an MLflow in the records of an outbox: a database in a folder above it is named by the way to it, so both
    may be moved together."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:////") and folder.absolute().is_relative_to(path.parent):
        return f"sqlite:{os.path.relpath(path, folder.absolute())}"
    return redact(uri)


@contextmanager
def locked(path: Path, seconds: float = 0) -> Iterator[bool]:
    """Hold a lock that is released when the process ends; yields False if another process holds it for `seconds`."""
    lock = FileLock(path, timeout=seconds, thread_local=False)  # may be released by another thread
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write_file(path: Path, content: bytes, sync: bool = True) -> None:
    """Replace a file atomically."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    fresh.replace(path)
