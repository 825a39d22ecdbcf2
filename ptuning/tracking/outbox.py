"""The outbox of a run: its records on the local disk until MLflow has them. Knows nothing of MLflow.

<outbox>/run.json       our run key, and what is needed to create the MLflow run
<outbox>/events.jsonl   the records
<outbox>/sent.json      how far they are shipped
<outbox>/files/         artifacts given as bytes
<outbox>/refused.jsonl  records that MLflow will never take, and why
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
    """How far an outbox is shipped to one MLflow."""

    uri: str
    run_id: str | None = None
    offset: int = 0


class Outbox:
    """A run on local disk. One process writes it (`writer.lock`), one at a time ships it (`shipping.lock`)."""

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
        about["uri"] = redact(uri)
        write_file(path, json.dumps(about).encode())
        (folder / "events.jsonl").touch()
        return cls(folder)

    def append(self, line: bytes, sync: bool) -> int:
        """Write one line and return the new size. All of it or, on a full disk, nothing.

        Unbuffered and opened per line (some 20 microseconds): a process that is killed has lost nothing.
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
        """The records from a byte offset on, each with its length and the offset behind it; not a half-written line."""
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
        """All records; then cuts off a line that a killed machine left half-written."""
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
        """True if the last record is a finish (a short line: reading the end of the file is enough)."""
        with self.events.open("rb") as file:
            file.seek(max(0, self.size() - 200))
            return b'{"kind": "finish"' in file.read().rstrip(b"\n").rpartition(b"\n")[2]

    def sent(self, uri: str) -> Sent:
        """How far it is shipped to this MLflow. Unknown means not at all: shipping again is harmless."""
        try:
            sent = Sent(**json.loads((self.folder / "sent.json").read_text()))
        except (OSError, ValueError, TypeError):
            return Sent(redact(uri))
        return sent if sent.uri == redact(uri) and sent.offset <= self.size() else Sent(redact(uri))

    def save_sent(self, sent: Sent) -> None:
        write_file(self.folder / "sent.json", json.dumps(sent._asdict()).encode(), sync=False)


@contextmanager
def locked(path: Path, seconds: float = 0) -> Iterator[bool]:
    """Hold a lock that dies with the process; yields False if another one holds it for longer than `seconds`."""
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
    """Replace a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    fresh.replace(path)
