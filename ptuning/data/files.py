"""Where the rows of a split are: a file, a folder, a pattern or an address becomes a list of local files.

Files at addresses are copied once into the cache of `datasets`.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import lzma
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import fs

from ptuning import storage
from ptuning.data.download import fetch_object, fetch_url
from ptuning.errors import DataError, suggest
from ptuning.paths import locate
from ptuning.redaction import first_line, redact
from ptuning.row_files import KNOWN, chosen, kind_of, local_files

BUILTIN = Path(__file__).parent.parent / "builtin" / "tasks"


UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)
"""What reading a file raises that is broken, or was cut off."""


@dataclass(frozen=True)
class DataFile:
    """A file of rows on this machine."""

    name: str
    """As messages name it."""
    path: Path
    kind: str
    """One of `KINDS`."""
    compression: str | None = None

    def open(self) -> IO[bytes]:
        """The bytes of the file, decompressed.

        Raises:
            UNREADABLE: it cannot be read, also later while reading.
        """
        if self.compression is None:
            return self.path.open("rb")
        if self.compression == "zip":
            return _only_member(self.path)
        if self.compression == "xz":  # which pyarrow (25.0) does not decompress
            return lzma.open(self.path)
        stream: IO[bytes] = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(self.path)), self.compression))
        return stream

    def hash(self) -> str:
        """SHA-256 of the bytes."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror}); make it readable") from None


def _only_member(path: Path) -> IO[bytes]:
    """The file in a zip archive of one file, as `DataFrame.to_csv("train.csv.zip")` writes it."""
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            raise zipfile.BadZipFile(f"it contains {len(members)} files, not one")
        try:
            return archive.open(members[0])
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in a way that Python cannot unpack
            raise zipfile.BadZipFile(str(error).lower()) from None


def find_files(source: str) -> list[DataFile]:
    """The files of a source that is not on the Hub, in the order of their names.

    Raises:
        DataError: there are none, or they cannot be reached.
    """
    if source.startswith("builtin:"):
        known = {f"builtin:{path.parent.name}/{path.stem}": path for path in sorted(BUILTIN.glob("*/*.jsonl"))}
        if source not in known:
            raise DataError(f"{source}: no such built-in split; use one of {', '.join(known)}")
        return [DataFile(source, known[source], ".jsonl")]
    if source.startswith(("https://", "http://")):
        path, name = fetch_url(source)
        return [_file(redact(source), path, name)]
    if "://" in source:
        return _stored_files(source)
    return _local_files(source)


def _file(shown: str, path: Path, name: str) -> DataFile:
    known = kind_of(name)
    if known is None:
        raise DataError(f"{shown}: unknown file type; {'unpack it first' if name.lower().endswith('.zip') else KNOWN}")
    return DataFile(shown, path, *known)


def _local_files(source: str) -> list[DataFile]:
    path, found = locate(source), local_files(source)
    if found == [path]:
        return [_file(source, path, path.name)]
    if found:
        below = source.rstrip("/") if path.is_dir() else None
        return [_file(f"{below}/{file.name}" if below else str(file), file, file.name) for file in found]
    _file(source, path, path.name)
    there = {file.name: str(file) for file in sorted(path.parent.glob("*")) if kind_of(file.name)}
    fix = suggest(
        path.name, there, "correct the path", alike=0.85, shown=there.__getitem__
    )  # do not suggest x-train.csv for x-test.csv
    raise DataError(f"{source}: no such file in {Path.cwd()}; {fix}")


def _stored_files(source: str) -> list[DataFile]:
    """Files of an object store: one, all of a folder, or those that match a pattern."""
    shown = redact(source)
    try:
        system, path = storage.resolve(source)
        if glob.has_magic(path):
            fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
            selector = fs.FileSelector(fixed, recursive=True, allow_not_found=True)
            found = [info for info in system.get_file_info(selector) if fnmatch.fnmatchcase(info.path, path)]
        else:
            info = system.get_file_info(path)
            found = [info]
            if info.type == fs.FileType.Directory:
                listed = [each for each in system.get_file_info(fs.FileSelector(path)) if each.type == fs.FileType.File]
                rows = chosen(shown, sorted(each.base_name for each in listed))
                found = [each for each in listed if each.base_name in rows]
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({first_line(error)}); check the address and the credentials") from None
    files = sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: str(info.path))
    if not files:
        raise DataError(f"{shown}: no such file; correct the address")
    scheme = source.partition("://")[0]
    return [_file(f"{scheme}://{info.path}", fetch_object(system, info, scheme), info.base_name) for info in files]
