"""The last good set of a replica on disk, with which it can start without its registry."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptuning import storage
from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.registry.listing import Listed
from ptuning.serving.loading import Entry

log = logger(__name__)

SNAPSHOT = "served.json"
SMALL, EVERY_S = 1000, 60.0
"""Sets of more versions are written at most once in these seconds: it takes a second for 100,000."""
PIECE = 1000
"""Versions that are turned into text at once: other threads wait meanwhile."""


@dataclass(frozen=True)
class Remembered:
    """What was served last."""

    names: dict[str, Listed[Entry]]
    champions: dict[str, Entry]


class Snapshot:
    """The file in the folder of a base."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._written = -EVERY_S

    @property
    def exists(self) -> bool:
        return storage.exists(self._folder, SNAPSHOT)

    def read(self) -> Remembered | None:
        """What was written last; None: nothing, or it is damaged."""
        if not self.exists:
            return None
        try:
            snapshot: dict[str, Any] = json.loads(storage.read_file(self._folder, SNAPSHOT))
            by_name: dict[str, dict[int, Entry]] = {}
            for each in snapshot["versions"]:
                entry = Entry(**each | {"metric": tuple(each["metric"]) if each.get("metric") else None})
                by_name.setdefault(entry.name, {})[entry.version] = entry
            champions = {
                name: by_name[name][int(version.rpartition(":")[2])]
                for name, version in snapshot["champions"].items()
                if int(version.rpartition(":")[2]) in by_name.get(name, {})
            }
            updated = snapshot.get("updated", {})
            names = {
                name: Listed(int(updated.get(name, 0)), champions[name].version if name in champions else None, versions, False)
                for name, versions in by_name.items()
            }
        except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.error("%s/%s is damaged, nothing in it is served: %s", self._folder, SNAPSHOT, error)
            return None
        return Remembered(names, champions)

    def is_due(self, versions: int) -> bool:
        """Whether a changed set of this many versions is to be written."""
        return versions <= SMALL or time.monotonic() > self._written + EVERY_S

    def write(self, champions: Mapping[str, Entry], entries: Sequence[Entry], names: Mapping[str, Listed[Entry]]) -> None:
        """Write a set."""
        self._written = time.monotonic()
        known = {entry.name for entry in entries}
        updated = {name: listed.updated_ms for name, listed in list(names.items()) if name in known}
        parts = [
            f'"champions": {json.dumps({name: str(entry) for name, entry in champions.items()})}',
            f'"updated": {json.dumps(updated)}',
        ]
        pieces = [entries[at : at + PIECE] for at in range(0, len(entries), PIECE)]
        listed = ",\n".join(
            json.dumps([{key: getattr(entry, key) for key in Entry.__slots__} for entry in piece])[1:-1] for piece in pieces
        )
        content = "{" + ",\n".join([*parts, f'"versions": [{listed}]']) + "}"
        try:
            storage.write_file(self._folder, SNAPSHOT, content.encode())
        except OSError as error:  # serve even if the disk is full
            log.error("%s could not be written, a start without the registry would serve an older set: %s", SNAPSHOT, error)
