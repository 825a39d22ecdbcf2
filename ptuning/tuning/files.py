"""Files of clients, in the storage: inputs of jobs and batches, and what these write.

    <storage>/tuning/files/<id>/content.jsonl      the bytes (results of jobs: content.csv)
    <storage>/tuning/files/<id>/file.json          the record, written last: without it the file does not exist

A file never changes. Its record holds who owns it: a key sees its own files, and an owner of None all of them. The name that
a client gives is only a label.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Sequence
from typing import IO, get_args

from ptuning import storage
from ptuning.errors import UserError
from ptuning.tuning.file_check import FileError, TrainingLines
from ptuning.tuning.file_record import BATCH_S, FileRecord, Purpose, Uploaded, from_json, label, stored_name, to_json
from ptuning.tuning.ids import new_id

LEFTOVER_S = 86400.0
"""Age in seconds of a folder without a record at which it counts as left over from a process that was killed."""
BLOCK = 1 << 20
"""Bytes that are read or written at once."""

_ID = re.compile(r"file-[A-Za-z0-9]{24}")
_RECORD = "file.json"


class UnknownFile(UserError):
    """No such file, or it is another owner's, or it has expired."""


class QuotaExceeded(UserError):
    """The file, or all files of its owner together, would be too large."""


class FileStore:
    """The files of a storage folder. Any number of processes may use it at once; all methods are thread-safe."""

    def __init__(self, root: str, file_bytes: int | None = None, owner_bytes: int | None = None) -> None:
        """`root`: `<storage>/tuning`; `file_bytes`: the largest file of a client; `owner_bytes`: the most of all files that one
        owner has sent."""
        self._folder = storage.join(root, "files")
        self._file_bytes = file_bytes
        self._owner_bytes = owner_bytes
        self._known: dict[str, FileRecord] = {}
        self._lock = threading.Lock()

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin(self, owner: str, filename: str, purpose: Uploaded | None = None, *, declared: int = 0) -> Upload:
        """A file of a client, to be written block by block. `purpose`: if it is known already; `declared`: the bytes that are
        announced.

        Raises:
            QuotaExceeded: it would be too large.
        """
        room = self._room(owner)
        if declared > room[0]:
            raise QuotaExceeded(room[1])
        return Upload(self, owner, filename, purpose, room)

    def create(
        self, owner: str, filename: str, purpose: Uploaded, chunks: Iterable[bytes], expires_after: int | None = None
    ) -> FileRecord:
        """A file of a client. `expires_after`: seconds.

        Raises:
            FileError: a line is wrong.
            QuotaExceeded: it would be too large.
        """
        upload = self.begin(owner, filename, purpose)
        try:
            for chunk in chunks:
                upload.write(chunk)
            return upload.finish(purpose, expires_after)
        except BaseException:
            upload.discard()
            raise

    def write_result(
        self,
        owner: str,
        filename: str,
        purpose: Purpose,
        chunks: bytes | Iterable[bytes],
        *,
        file_id: str | None = None,
        expires_after: int | None = None,
    ) -> FileRecord:
        """A file that the server writes, without limits. With `file_id` the same one is written however often this is called:
        for writers that may be killed in between."""
        out = _Writer(self, owner, filename, stored_name(purpose), file_id)
        try:
            for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
                out.write(chunk)
            return out.commit(purpose, expires_after)
        except BaseException:
            out.discard()
            raise

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, file_id: str, owner: str | None) -> FileRecord:
        """The record of a file. `owner` None: of all owners.

        Raises:
            UnknownFile: there is none that this owner may see.
        """
        record = self._read(file_id) if _ID.fullmatch(file_id) else None
        if record is None or owner not in (None, record.owner):
            raise UnknownFile("there is no such file; GET /v1/files lists those of your key")
        return record

    def open(self, file_id: str, owner: str | None) -> IO[bytes]:
        """The bytes of a file.

        Raises:
            UnknownFile: as `get`.
            StorageError: its bytes cannot be read.
        """
        record = self.get(file_id, owner)
        try:
            return storage.open_file(self._place(record.id), record.stored)
        except OSError as error:
            raise storage.StorageError(f"{record.id}: cannot be read ({error}); check the storage") from None

    def data_source(self, file_id: str, owner: str | None) -> str:
        """The path or address of the bytes of a file, as the tables of an experiment take it.

        Raises:
            UnknownFile: as `get`.
        """
        record = self.get(file_id, owner)
        return storage.join(self._place(record.id), record.stored)

    def list(self, owner: str | None, purpose: str | None = None) -> Sequence[FileRecord]:
        """The files of an owner (None: all), the newest first."""
        found = [record for record in self._all() if owner in (None, record.owner) and purpose in (None, record.purpose)]
        return sorted(found, key=lambda record: record.made_ns, reverse=True)

    def delete(self, file_id: str, owner: str | None) -> None:
        """Raises:
        UnknownFile: as `get`.
        """
        self._delete(self.get(file_id, owner).id)

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _place(self, file_id: str) -> str:
        return storage.join(self._folder, file_id)

    def _all(self) -> Iterable[FileRecord]:
        names = [name for name in storage.list_names(self._folder) if _ID.fullmatch(name)]
        with self._lock:
            for gone in self._known.keys() - set(names):
                del self._known[gone]
        for name in names:
            record = self._read(name, there=True)
            if record is not None:
                yield record
            elif (written := storage.modified(self._place(name))) and written < time.time() - LEFTOVER_S:
                storage.delete_folder(self._place(name))

    def _read(self, file_id: str, there: bool = False) -> FileRecord | None:
        """The record of a file that has not expired; one that has is removed. `there`: its folder was just seen."""
        with self._lock:
            record = self._known.get(file_id) if there else None  # a record never changes, but another process may delete it
        place = self._place(file_id)
        if record is None:
            if not storage.exists(place, _RECORD):
                return None
            try:
                record = from_json(storage.read_file(place, _RECORD))
            except storage.StorageError:  # deleted meanwhile
                return None
        if record.expired:
            self._delete(file_id)
            return None
        with self._lock:
            self._known[file_id] = record
        return record

    def _delete(self, file_id: str) -> None:
        with self._lock:
            self._known.pop(file_id, None)
        place = self._place(file_id)
        storage.delete_file(place, _RECORD)
        storage.delete_folder(place)

    def _room(self, owner: str) -> tuple[int, str]:
        """Bytes that a further file of an owner may have, and the sentence for one that is larger."""
        most = self._file_bytes if self._file_bytes is not None else 2**63
        message = f"the file is larger than {most >> 20} MB; split it"
        if self._owner_bytes is None:
            return most, message
        used = sum(record.bytes for record in self._all() if record.owner == owner and record.purpose in get_args(Uploaded))
        left = max(0, self._owner_bytes - used)
        if left < most:
            message = (
                f"the files of this key would be larger than {self._owner_bytes >> 20} MB together ({used >> 20} MB are used); "
                "delete some of them first"
            )
        return min(most, left), message

    def _add(self, record: FileRecord) -> None:
        storage.write_file(self._place(record.id), _RECORD, to_json(record))
        with self._lock:
            self._known[record.id] = record


class _Writer:
    """A file that is being written."""

    def __init__(self, store: FileStore, owner: str, filename: str, stored: str, file_id: str | None = None) -> None:
        self.size = 0
        self._store = store
        self._owner = owner
        self._label = label(filename)
        self._id = file_id or new_id("file")
        self._out = storage.FileWriter(store._place(self._id), stored)

    def write(self, block: bytes) -> None:
        self.size += len(block)
        self._out.write(block)

    def commit(self, purpose: Purpose, expires_after: int | None, rows: int | None = None) -> FileRecord:
        self._out.commit()
        now, made_ns = int(time.time()), time.time_ns()
        if expires_after is None and purpose in ("batch", "batch_output"):
            expires_after = BATCH_S
        expires = None if expires_after is None else now + expires_after
        record = FileRecord(self._id, self._owner, self._label, purpose, self.size, now, expires, rows, made_ns)
        self._store._add(record)
        return record

    def discard(self) -> None:
        """Leave nothing of it."""
        self._out.discard()
        place = self._store._place(self._id)
        if not storage.exists(place, _RECORD):
            storage.delete_folder(place)


class Upload:
    """A file of a client that arrives. End it with `finish` or `discard`."""

    def __init__(self, store: FileStore, owner: str, filename: str, purpose: Uploaded | None, room: tuple[int, str]) -> None:
        self._purpose = purpose
        self._room = room
        self._check = TrainingLines()
        self._wrong: FileError | None = None
        """What is wrong with it as a file for training."""
        self._out = _Writer(store, owner, filename, stored_name(purpose))

    def write(self, block: bytes) -> None:
        """Raises:
        FileError: a line is wrong, and the file is known to be for training.
        QuotaExceeded: the file is too large.
        OSError: the storage cannot be written.
        """
        if self._out.size + len(block) > self._room[0]:
            raise QuotaExceeded(self._room[1])
        if self._wrong is None and self._purpose in (None, "fine-tune"):
            try:
                self._check.feed(block)
            except FileError as error:
                if self._purpose is not None:
                    raise
                self._wrong = error
        self._out.write(block)

    def finish(self, purpose: Uploaded, expires_after: int | None = None) -> FileRecord:
        """All of it has come. `expires_after`: seconds.

        Raises:
            FileError: it is empty or, for training, a line is wrong.
        """
        if not self._out.size:
            raise FileError("the file is empty; send one with content")
        if purpose != "fine-tune":
            return self._out.commit(purpose, expires_after)
        if self._wrong is None:
            self._check.end()
        if self._wrong is not None:
            raise self._wrong
        return self._out.commit(purpose, expires_after, self._check.rows)

    def discard(self) -> None:
        """Leave nothing of it."""
        self._out.discard()
