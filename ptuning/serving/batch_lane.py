"""Lines of batches in a replica: behind clients that wait.

A line starts when no client has waited for a moment, at first alone, then with more beside it as the moment lasts: the step of
the engine that a new client has to wait for is a short one. A client that comes takes the place of the lines that are being
answered: they leave the engine before its next step, and start again later. Only if clients wait all the time, a line starts
now and then nevertheless, alone, so that batches come to their end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

QUIET_S = 0.05
"""Seconds without a waiting client after which lines start."""
MORE_S = 0.1
"""Seconds after which a further line may be answered at once."""
STARVED_S = 1.0
"""Seconds without any line after which one starts although clients wait."""
LOOK_S = 0.01
"""Seconds between two looks of a line that waits."""

Result = TypeVar("Result")


class BatchLane:
    """The lines of one replica. All methods are called in the event loop of its requests."""

    def __init__(self, places: int) -> None:
        """`places`: lines that are answered at once."""
        self.places = places
        self._clients = 0
        self._quiet_since = 0.0
        self._ended = 0.0
        """When a line was last answered."""
        self._running: dict[asyncio.Task[object], bool] = {}
        """Lines that are being answered; True: although clients wait."""

    def enter(self) -> bool:
        """A client waits, until `leave`. Returns True, to be kept until then."""
        self._clients += 1
        for task, alone in self._running.items():
            if not alone:
                task.cancel()
        return True

    def leave(self) -> None:
        """A client waits no longer."""
        self._clients -= 1
        self._quiet_since = time.monotonic()

    async def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Answer a line, when it is its turn. `work` may be cancelled and begun again."""
        while True:
            alone = await self._turn()
            task: asyncio.Task[Result] = asyncio.ensure_future(_awaited(work))
            self._running[task] = alone
            try:
                await asyncio.wait({task})
            finally:
                task.cancel()  # if this line itself is cancelled
                del self._running[task]
            if not task.cancelled():
                self._ended = time.monotonic()
                return task.result()

    async def _turn(self) -> bool:
        """Wait for a place. True: although clients wait."""
        waited = time.monotonic()
        while True:
            now = time.monotonic()
            quiet = now - self._quiet_since - QUIET_S
            if not self._clients and quiet >= 0 and len(self._running) < min(self.places, 1 + int(quiet / MORE_S)):
                return False
            if self._clients and not self._running and now - max(waited, self._ended) >= STARVED_S:
                return True
            await asyncio.sleep(LOOK_S)


async def _awaited(work: Callable[[], Awaitable[Result]]) -> Result:
    return await work()
