"""Folders that are written atomically, on a disk or in an object store.

A folder is written under a temporary name, synced and renamed; `manifest.json` with the SHA-256 of every file is written last.
An object store cannot rename: there a folder without a manifest counts as missing. Reading checks every hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit, urlunsplit

from pyarrow import fs

from ptuning.errors import UserError
from ptuning.paths import locate
from ptuning.redaction import redact

MANIFEST = "manifest.json"

GOOGLE = re.compile(r"gc?s://")
RETRY = 30
"""Seconds for which Google's client repeats a call. Its default (Arrow 25.0) is 15 minutes, also without any credentials."""

LEAST = 20_000_000
"""Free bytes that a run needs at its beginning: for the tracking store, checkpoints and records."""


class StorageError(UserError):
    """A folder is missing, incomplete, damaged, or cannot be written."""


def resolve(storage: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder or URI (`s3://...`), and the path in it. Local paths become absolute."""
    try:
        if GOOGLE.match(storage) and "retry_limit_seconds=" not in storage:
            storage += f"{'&' if '?' in storage else '?'}retry_limit_seconds={RETRY}"
        if "://" in storage:
            return fs.FileSystem.from_uri(storage)
    except (OSError, ValueError) as error:
        reason = redact(str(error))
        raise StorageError(f"{redact(storage)}: cannot be opened ({reason}); give a folder or s3://bucket/folder") from None
    return fs.LocalFileSystem(), str(locate(storage).absolute())


def split_credentials(storage: str) -> tuple[str, dict[str, str]]:
    """The address of an object store without credentials, and the credentials as the environment variables of its client."""
    parts = urlsplit(storage) if storage.startswith("s3://") and "@" in storage else None
    if parts is None or parts.username is None:
        return storage, {}
    given = {"AWS_ACCESS_KEY_ID": parts.username, "AWS_SECRET_ACCESS_KEY": parts.password or ""}
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    return urlunsplit(place), {name: unquote(value) for name, value in given.items()}


def is_local(storage: str) -> bool:
    return isinstance(resolve(storage)[0], fs.LocalFileSystem)


def join(storage: str, *parts: str) -> str:
    """A folder below a storage folder or URI."""
    return "/".join([storage.rstrip("/"), *parts])


def relative(folder: str, place: str) -> str:
    """A place in a folder without the folder's own path, for records that are read wherever the folder is then."""
    return place.removeprefix(f"{folder.rstrip('/')}/")


def inside(folder: str, place: str) -> str:
    """The inverse of `relative`. The path in a record of an earlier version is absolute: what follows the folder's name
    counts."""
    if place.startswith("/") or "://" in place:
        place = place.rpartition(f"/{folder.rstrip('/').rpartition('/')[2]}/")[2]
    return join(folder, place)


def check_writable(storage: str) -> None:
    """Check that folders can be written here, and that the disk is not full. In an object store a small file is written and
    deleted; on a disk nothing is.

    Raises:
        StorageError: the storage cannot be written.
    """
    system, path = resolve(storage)
    reason = _refusal(Path(path)) if isinstance(system, fs.LocalFileSystem) else _probe(system, path)
    if reason:
        raise StorageError(f"compute.storage: {storage} cannot be written ({reason}); choose another folder")


def _refusal(folder: Path) -> str | None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return f"{there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"no permission to write {there}"
    free = shutil.disk_usage(there).free
    return f"its disk has {free / 1e6:.0f} MB free" if free < LEAST else None


def _probe(system: fs.FileSystem, path: str) -> str | None:
    name = f"{path}/.write-{uuid.uuid4().hex}"
    try:
        with system.open_output_stream(name) as out:
            out.write(b"ok")
        system.delete_file(name)
    except OSError as error:
        return _reason(error)
    return None


def write_folder(storage: str, files: Mapping[str, bytes]) -> None:
    """Write a folder with its manifest. An existing folder is replaced.

    Raises:
        OSError: disk full, no permission. A folder that existed before is unchanged.
    """
    system, path = resolve(storage)
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    contents = {**files, MANIFEST: json.dumps({"sha256": manifest}, indent=1).encode()}
    if isinstance(system, fs.LocalFileSystem):
        _write_local(Path(path), contents)
        return
    if system.get_file_info(path).type != fs.FileType.NotFound:
        delete_folder(storage)
    for name, content in contents.items():  # the manifest comes last
        with system.open_output_stream(f"{path}/{name}") as out:
            out.write(content)


def _write_local(path: Path, contents: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        for name, content in contents.items():
            with (temporary / name).open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
        old = path.parent / f".{path.name}.old.{uuid.uuid4().hex}"
        replaced = path.exists()
        if replaced:
            path.rename(old)  # a rename cannot replace a folder that is not empty
        temporary.rename(path)
        _sync_folder(path.parent)
        if replaced:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_folder(storage: str) -> dict[str, bytes]:
    """All files of a folder, each checked against the manifest.

    Raises:
        StorageError: the folder or its manifest is missing, or a file is missing or differs from its hash.
    """
    system, path = resolve(storage)
    files = {}
    for name, digest in _hashes(storage, _read(system, f"{path}/{MANIFEST}", storage)).items():
        if "/" in name or name.startswith("."):
            raise StorageError(f"{storage}: the manifest names {name!r}, which is not a file name; do not use this folder")
        content = _read(system, f"{path}/{name}", storage)
        if hashlib.sha256(content).hexdigest() != digest:
            raise StorageError(f"{storage}: {name} differs from its hash in {MANIFEST}; use another copy of this folder")
        files[name] = content
    return files


def _hashes(storage: str, manifest: bytes) -> dict[str, str]:
    try:
        hashes = json.loads(manifest)["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        hashes = None
    if not isinstance(hashes, dict):
        raise StorageError(f"{storage}: {MANIFEST} is not a valid manifest; use another copy of this folder")
    return hashes


def read_file(storage: str, name: str) -> bytes:
    """One file of a folder, without checking a manifest."""
    system, path = resolve(storage)
    return _read(system, f"{path}/{name}", storage)


def write_file(storage: str, name: str, content: bytes) -> None:
    """Write one file, atomically if the file system can."""
    system, path = resolve(storage)
    if not isinstance(system, fs.LocalFileSystem):
        with system.open_output_stream(f"{path}/{name}") as out:
            out.write(content)
        return
    Path(path).mkdir(parents=True, exist_ok=True)
    temporary = Path(path) / f".{name}.{uuid.uuid4().hex}"
    with temporary.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(Path(path) / name)


class FileWriter:
    """Writes one file of a folder piece by piece. It exists when `commit` has returned, whole and synced."""

    def __init__(self, storage: str, name: str) -> None:
        """Raises:
        OSError: it cannot be written.
        """
        self._system, path = resolve(storage)
        self._path = f"{path}/{name}"
        self._temporary: Path | None = None
        if isinstance(self._system, fs.LocalFileSystem):
            Path(path).mkdir(parents=True, exist_ok=True)
            self._temporary = Path(path) / f".{name}.{uuid.uuid4().hex}"
            self._stream: IO[bytes] = self._temporary.open("wb")
        else:
            self._stream = self._system.open_output_stream(self._path)

    def write(self, block: bytes) -> None:
        """Raises:
        OSError: the disk is full, or the store does not answer.
        """
        self._stream.write(block)

    def commit(self) -> None:
        """Raises:
        OSError: as `write`.
        """
        if self._temporary is None:
            self._stream.close()
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._temporary.rename(self._path)
        _sync_folder(self._temporary.parent)

    def discard(self) -> None:
        """Leave nothing. No effect after `commit`."""
        if self._stream.closed:
            return
        with suppress(OSError):
            self._stream.close()  # in an object store this writes what there is
        with suppress(OSError):
            if self._temporary is not None:
                self._temporary.unlink()
            else:
                self._system.delete_file(self._path)


def open_file(storage: str, name: str) -> IO[bytes]:
    """A stream of the bytes of one file of a folder.

    Raises:
        OSError: it is missing or cannot be read, also later while reading.
    """
    system, path = resolve(storage)
    if isinstance(system, fs.LocalFileSystem):
        return open(f"{path}/{name}", "rb")
    stream: IO[bytes] = io.BufferedReader(system.open_input_file(f"{path}/{name}"))
    return stream


def list_names(storage: str) -> list[str]:
    """Names of the folders and files directly in a folder, sorted; empty if it does not exist."""
    system, path = resolve(storage)
    found = system.get_file_info(fs.FileSelector(path, recursive=False, allow_not_found=True))
    return sorted(info.base_name for info in found)


def modified(storage: str) -> float | None:
    """When the newest file of a folder was written, in Unix seconds; None: it has none."""
    system, path = resolve(storage)
    found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return max((info.mtime.timestamp() for info in found if info.mtime), default=None)


def delete_file(storage: str, name: str) -> None:
    """Delete one file of a folder if it exists."""
    system, path = resolve(storage)
    if exists(storage, name):
        system.delete_file(f"{path}/{name}")


def list_folders(storage: str) -> list[str]:
    """Names of the complete folders below `storage`, sorted; empty if it does not exist."""
    system, path = resolve(storage)
    found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    depth = len(path.split("/")) + 2
    return sorted(
        info.path.split("/")[-2]
        for info in found
        if info.base_name == MANIFEST and len(info.path.split("/")) == depth and not info.path.split("/")[-2].startswith(".")
    )


def exists(storage: str, name: str) -> bool:
    """True if the folder contains a file or folder `name`."""
    system, path = resolve(storage)
    return bool(system.get_file_info(f"{path}/{name}").type != fs.FileType.NotFound)


def delete_folder(storage: str) -> None:
    """Delete a folder. The manifest is deleted first, so that a half-deleted folder counts as missing."""
    system, path = resolve(storage)
    if exists(storage, MANIFEST):
        system.delete_file(f"{path}/{MANIFEST}")
    if system.get_file_info(path).type == fs.FileType.Directory:
        system.delete_dir(path)


def _read(system: fs.FileSystem, path: str, storage: str) -> bytes:
    try:
        with system.open_input_file(path) as stream:
            content: bytes = stream.read()
            return content
    except FileNotFoundError:
        raise StorageError(
            f"{storage}: {path.rsplit('/', 1)[-1]} is missing (the folder is incomplete, or was not written by ptuning); "
            "choose another folder"
        ) from None
    except OSError as error:
        raise StorageError(f"{storage}: cannot be read ({_reason(error)}); check the storage and its permissions") from None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)
