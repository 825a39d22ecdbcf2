"""Events on their way from the first worker to the driver. Imports nothing heavy: the actor's process starts in a second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

Fields = Mapping[str, Any]
"""An event as plain data."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Keeps events until the driver takes them."""

    def __init__(self) -> None:
        self._events: list[Fields] = []

    def put(self, events: list[Fields]) -> None:
        self._events += events

    def take(self) -> list[Fields]:
        events, self._events = self._events, []
        return events


class Post:
    """Sends events to a mailbox, several at a time, without waiting for them to arrive.

    Raises:
        RayActorError: the mailbox has gone; noticed when the next events are sent.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._waiting: list[Fields] = []
        self._sent_at = 0.0
        self._last: Any = None

    def send(self, event: Fields, *, now: bool) -> None:
        """Hand over one event; unless `now`, it may wait a moment for others."""
        self._waiting.append(event)
        if now or time.monotonic() - self._sent_at > 0.2:
            self._dispatch()

    def flush(self) -> None:
        """Wait until everything has arrived."""
        self._dispatch()
        if self._last is not None:
            ray.get(self._last)

    def _dispatch(self) -> None:
        if self._last is not None and ray.wait([self._last], timeout=0)[0]:
            ray.get(self._last)  # raises if nobody reads any more: training on would be in vain
        if self._waiting:
            self._last = self._mailbox.put.remote(self._waiting)
            self._waiting, self._sent_at = [], time.monotonic()
