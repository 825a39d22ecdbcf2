"""The log of changes of a registry: a server that follows it reads what has changed, not what exists.

MLflow (3.17) has no index over the times of changes: asking for what changed last costs 0.4 s for 100,000 names. But it numbers
the versions of a registered model under a primary key. So every change that ptuning makes appends a version to one registered
model, `LOG` (not a valid name of a soft prompt), and what came after a number is found by that key. It works on every SQL store
and through MLflow's server.

An entry is written after its change, so a reader of the entry finds the change made. A process that dies in between, other
programs, and earlier versions of ptuning change without an entry: `listing` notices that later.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ptuning.errors import TrackingError
from ptuning.redaction import logger
from ptuning.tracking.client import asking

log = logger(__name__)

LOG = "ptuning~changes"
NAME, WHAT = "ptuning.changed", "ptuning.what"
DESCRIPTION = "What has changed among the soft prompts, in order. Written by ptuning only: servers follow it."
TRIES = 8
"""MLflow gives up numbering a version after three collisions (CREATE_MODEL_VERSION_RETRIES)."""
PAGE = 500

What = Literal["created", "changed"]
"""created: a version was added to a name; changed: anything else of it, its champion for example."""


@dataclass(frozen=True)
class Change:
    """One entry."""

    number: int
    name: str
    what: What


class ChangeLog:
    """The log in one MLflow. `client`: an `MlflowClient` of the registry at `uri`."""

    def __init__(self, uri: str, client: Any) -> None:
        self._uri = uri
        self._client = client

    def append(self, name: str, what: What) -> None:
        """Note a change that was made. If MLflow does not take it, servers notice the change later."""
        for attempt in range(TRIES):
            try:
                with asking(self._uri):
                    # No scheme that MLflow knows: nothing is behind it.
                    self._client.create_model_version(
                        LOG, f"ptuning:/{name}", await_creation_for=0, tags={NAME: name, WHAT: what}
                    )
                return
            except TrackingError as error:
                try:
                    if error.code == "RESOURCE_DOES_NOT_EXIST":
                        self._create()
                except TrackingError as reason:
                    error = reason
                if attempt == TRIES - 1:
                    log.warning("%s: servers will notice its change later: %s", name, error)
            time.sleep(random.uniform(0, 0.01 * 2**attempt))

    def last(self) -> int:
        """Number of the last entry; 0: there is none.

        Raises:
            TrackingError: MLflow does not respond.
        """
        found = self._search(f"name = '{LOG}'", 1, ["version_number DESC"])
        return int(found[0].version) if found else 0

    def after(self, number: int) -> Iterator[Change]:
        """The entries after a number, in order.

        Raises:
            TrackingError: MLflow does not respond.
        """
        while True:
            found = self._search(f"name = '{LOG}' and version_number > {number}", PAGE, ["version_number ASC"])
            for entry in found:
                number = int(entry.version)
                yield Change(number, entry.tags.get(NAME, ""), "created" if entry.tags.get(WHAT) == "created" else "changed")
            if len(found) < PAGE:
                return

    def _search(self, condition: str, most: int, order: list[str]) -> list[Any]:
        with asking(self._uri):
            return list(self._client.search_model_versions(condition, max_results=most, order_by=order))

    def _create(self) -> None:
        try:
            with asking(self._uri):
                self._client.create_registered_model(LOG, {"ptuning.log": "changes"}, DESCRIPTION)
        except TrackingError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
