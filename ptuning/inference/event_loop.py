"""An asyncio event loop in a thread of its own, with named tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


class EventLoop:
    """Runs coroutines for other threads. All methods are thread-safe."""

    def __init__(self, name: str) -> None:
        self._tasks: dict[object, asyncio.Task[Any]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def ask(self, question: Coroutine[Any, Any, Result]) -> Result:
        """Wait for a coroutine, from another thread than that of the loop."""
        return asyncio.run_coroutine_threadsafe(question, self._loop).result()

    def begin(self, key: object, work: Coroutine[Any, Any, Result], ended: Callable[[asyncio.Task[Result]], None]) -> None:
        """Run work; `ended` is called in any case, even if it is cancelled before it begins."""

        def end(task: asyncio.Task[Result]) -> None:
            del self._tasks[key]
            ended(task)

        def begin() -> None:
            self._tasks[key] = task = self._loop.create_task(work)
            task.add_done_callback(end)

        self._loop.call_soon_threadsafe(begin)

    def cancel(self, key: object) -> None:
        """Cancel the work of a key. No effect if it has ended."""

        def cancel() -> None:
            task = self._tasks.get(key)
            if task:
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def cancel_all(self, most_s: float) -> None:
        """Cancel the work of all keys, and wait for its end, at most this many seconds."""
        self.ask(self._cancelled(lambda: self._tasks.values(), most_s))

    def close(self, most_s: float) -> None:
        """Cancel every task of the loop, wait at most this many seconds for them, and end the thread."""
        self.ask(self._cancelled(asyncio.all_tasks, most_s))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancelled(self, which: Callable[[], Iterable[asyncio.Task[Any]]], most_s: float) -> None:
        tasks = set(which()) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=most_s)
