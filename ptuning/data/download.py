"""Copies of remote files in the cache: of an address as long as the server says that it is unchanged, of an object as long as
its size and time are."""

from __future__ import annotations

import base64
import email.message
import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pyarrow import fs

from ptuning.data.cache import cache_folder
from ptuning.errors import DataError
from ptuning.model.fingerprint import json_hash
from ptuning.redaction import redact

LARGEST = 20_000_000_000
"""Maximum bytes of a remote file."""
LONGEST_S = 3600.0
"""Maximum seconds of a copy."""
SILENCE_S = 60.0
"""Seconds without a byte after which a server counts as unreachable."""

_BY_CONTENT = {
    "text/csv": ".csv",
    "text/tab-separated-values": ".tsv",
    "application/json": ".json",
    "application/x-ndjson": ".jsonl",
    "application/jsonl": ".jsonl",
    "application/vnd.apache.parquet": ".parquet",
}
"""Media type -> suffix, for addresses whose path has none."""


def fetch_url(url: str) -> tuple[Path, str]:
    """The local copy of a file at an http address, and the file's name.

    Raises:
        DataError: it cannot be fetched and there is no copy.
    """
    shown = redact(url)
    folder = _folder(url)
    known = _read(folder / "response.json")
    request = _request(url)
    for header, value in (("If-None-Match", known.get("etag")), ("If-Modified-Since", known.get("modified"))):
        if value and (folder / "content").exists():
            request.add_header(header, value)
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as response:
            headers: email.message.Message = response.headers
            size = int(headers["Content-Length"]) if headers["Content-Length"] else None
            _copy(lambda: bytes(response.read(1 << 20)), folder / "content", shown, size)
            name = Path(urlsplit(response.url).path).name or "rows"
    except urllib.error.HTTPError as error:
        if error.code != 304:
            raise DataError(f"{shown}: the server answers {error.code} ({error.reason}); check the address") from None
        return folder / "content", str(known["name"])
    except (OSError, ValueError) as error:  # URLError, a timeout, an address that is not valid
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{shown}: cannot be fetched ({redact(str(reason))}); check the address and the network") from None
    own = Path(urlsplit(url).path).name
    suffix = _BY_CONTENT.get(headers.get_content_type(), "")
    name = next((each for each in (own, name) if Path(each).suffix), name + suffix)
    facts = {"name": name, "etag": headers.get("ETag"), "modified": headers.get("Last-Modified")}
    (folder / "response.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder / "content", name


def fetch_object(system: fs.FileSystem, info: fs.FileInfo, scheme: str) -> Path:
    """The local copy of a file of an object store.

    Raises:
        DataError: it cannot be read.
    """
    shown = f"{scheme}://{info.path}"
    copy = _folder(json_hash([shown, info.size, info.mtime_ns])) / "content"
    if not copy.exists():
        try:
            with system.open_input_stream(info.path, compression=None) as stream:
                _copy(lambda: bytes(stream.read(1 << 20)), copy, shown)
        except OSError as error:
            raise DataError(f"{shown}: cannot be read ({error}); check the address and the credentials") from None
    return copy


def _folder(key: str) -> Path:
    folder = cache_folder() / "downloads" / json_hash([key])[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read(path: Path) -> dict[str, str | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "name" in found else {}


def _request(url: str) -> urllib.request.Request:
    """The request of a file. A user and a password in the address become a header, as in a browser."""
    parts = urlsplit(url)
    request = urllib.request.Request(
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")), headers={"User-Agent": "ptuning"}
    )
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    return request


def _copy(read: Callable[[], bytes], target: Path, shown: str, expected: int | None = None) -> None:
    """Write a stream to a file, which appears when it is complete. `expected`: its size, if the server has sent it."""
    began, size = time.monotonic(), 0
    handle, temporary = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            while block := read():
                size += len(block)
                if size > LARGEST:
                    raise DataError(f"{shown}: is larger than {LARGEST // 10**9} GB; copy it to a disk and give its path")
                if time.monotonic() - began > LONGEST_S:
                    raise DataError(
                        f"{shown}: took longer than {LONGEST_S / 60:.0f} minutes; copy it to a disk and give its path"
                    )
                out.write(block)
        if expected is not None and size != expected:  # http.client reports no early end (3.12, HTTPResponse.read)
            raise DataError(f"{shown}: ended after {size} of {expected} bytes; try again")
        Path(temporary).rename(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
