"""What is known of a client's file beside its bytes."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from typing import Literal

from ptuning.records import restored

Purpose = Literal["fine-tune", "batch", "batch_output", "fine-tune-results"]
Uploaded = Literal["fine-tune", "batch"]
"""Purposes of files that clients send."""

LOCAL = "local"
"""The owner of what is made on a server without keys."""
BATCH_S = 30 * 86400
"""Seconds after which files of batches expire, unless their client says otherwise: as at OpenAI."""
LABEL = 255
"""Maximum characters of a file's name."""


@dataclass(frozen=True)
class FileRecord:
    """A file, as its record holds it."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    """Unix seconds; None: never."""
    rows: int | None = None
    """Rows of a file for training."""
    made_ns: int = 0
    """When it was made: lists are ordered by it."""

    @property
    def stored(self) -> str:
        return stored_name(self.purpose)

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and time.time() >= self.expires_at


def from_json(content: bytes) -> FileRecord:
    """The inverse of `to_json`; keys of later versions are ignored."""
    return restored(FileRecord, json.loads(content))


def to_json(record: FileRecord) -> bytes:
    return json.dumps(asdict(record)).encode()


def stored_name(purpose: Purpose | None) -> str:
    """Name of the content in its folder: readers know the kind of a file by its ending."""
    return "content.csv" if purpose == "fine-tune-results" else "content.jsonl"


def label(filename: str) -> str:
    """The last part of a path, printable: clients may save a file under the name that they are told."""
    last = re.split(r"[/\\]", filename)[-1]
    printable = "".join(character for character in last if character.isprintable())[:LABEL]
    return printable if printable.strip(". ") else "upload"
