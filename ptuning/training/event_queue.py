"""A queue of events from the first worker to the driver, which returns the number of events on its disk. A checkpoint contains
the others, so that nothing is lost when the driver dies. Only light imports, so that the actor's process starts within a
second.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from ptuning.training.messages import Fields


class EventBuffer:
    """Keeps events until the driver takes them. All senders' events are counted together, in the order of their arrival."""

    def __init__(self) -> None:
        self._events: list[Fields] = []
        self._arrived = self._recorded = 0

    def put(self, events: list[Fields]) -> tuple[int, int]:
        """Returns how many have arrived so far, these included, and how many of all the driver has recorded."""
        self._events += events
        self._arrived += len(events)
        return self._arrived, self._recorded

    def take(self, recorded: int) -> list[Fields]:
        """What is new; `recorded`: how many of all that were taken so far lie on the driver's disk."""
        self._recorded = recorded
        events, self._events = self._events, []
        return events


@ray.remote(num_cpus=0)
class EventQueue(EventBuffer):
    """A buffer in a process of its own."""


class EventSender:
    """Sends events to a queue, several at a time, in order, without waiting for them to arrive.

    There is one sending on its way at a time: actors with `async` methods, as a dispatcher's, take several in any order (Ray
    2.60, actor.py: allow_out_of_order_execution).

    Raises:
        RayActorError: the queue was lost; noticed when the next events are sent.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._waiting: list[Fields] = []
        self._sent_at = 0.0
        self._sent: deque[tuple[float, Any]] = deque()
        """When, and the queue's answer, which may not be there yet."""
        self._arrived: deque[tuple[float, int]] = deque()
        """When, and how many have to be recorded before those that were sent then are."""
        self._recorded_until = -math.inf

    def send(self, event: Fields, *, now: bool) -> None:
        """Hand over one event; unless `now`, it may wait a moment for others."""
        self._waiting.append(event)
        if now:
            self._arrive()
        if now or (time.monotonic() - self._sent_at > 0.2 and self._all_arrived()):
            self._dispatch()

    def flush(self) -> None:
        """Wait until everything has arrived."""
        self._arrive()
        self._dispatch()
        self._arrive()

    def recorded_until(self) -> float:
        """The monotonic time before which everything that was handed over has come to the driver's disk, as far as is known:
        the answer to a later sending tells."""
        while self._sent and ray.wait([self._sent[0][1]], timeout=0)[0]:
            sent_at, answer = self._sent.popleft()
            arrived, recorded = ray.get(answer)  # raises if the queue was lost: continuing to train would be useless
            self._arrived.append((sent_at, arrived))
            while self._arrived and self._arrived[0][1] <= recorded:
                self._recorded_until, _ = self._arrived.popleft()
        return self._recorded_until

    def _all_arrived(self) -> bool:
        self.recorded_until()
        return not self._sent

    def _arrive(self) -> None:
        """Wait until what is on its way has arrived."""
        if self._sent:
            ray.get(self._sent[-1][1])

    def _dispatch(self) -> None:
        self.recorded_until()
        if self._waiting:
            self._sent_at = time.monotonic()
            self._sent.append((self._sent_at, self._queue.put.remote(self._waiting)))
            self._waiting = []
