"""Between the trials of a search and the slots of its worker groups: who waits, who trains where, what was measured.

    trial -- attach --> dispatcher -- orders --> first worker of a group
    trial <-- results -- dispatcher <-- events -- first worker; the driver takes all events

`Dispatcher` is the logic, plain and quick; `DispatcherActor` is the actor, whose callers may wait; `DispatcherClient` is
the first worker's end.
Imports nothing heavy: the actor's process starts in a second.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray

from ptuning.training.event_queue import EventBuffer, EventSender

if TYPE_CHECKING:
    from ptuning.training.messages import Fields

Answer = TypeVar("Answer")

FOR_TRIALS = ("evaluation", "finished", "failed")
"""Events that a trial hears of."""
RELEASED: Fields = {"kind": "released", "run": "", "step": 0, "values": {}, "details": {}}


class Dispatcher:
    """Which trial trains in which group. A trial has a key of ours; each of its stays in a slot is a run of its own."""

    def __init__(self) -> None:
        self.closed = False
        self.broken: str | None = None
        """Why no worker will ever answer again."""
        self.places: dict[int, int] = {}
        self._known: dict[str, Fields] = {}
        self._waiting: list[Fields] = []
        self._training: dict[str, tuple[int, Fields]] = {}
        self._lives: dict[int, int] = {}
        self._orders: dict[int, list[Fields]] = {}
        self._events = EventBuffer()
        self._results: dict[str, list[Fields]] = {}
        self._reported: dict[str, int] = {}

    def register(self, trial: str, key: str, folder: str, results: list[Fields]) -> None:
        """Before a trial starts: its key, the folder of its checkpoints, and what is known of it from before."""
        self._known[trial] = {"key": key, "folder": folder, "stays": 0}
        self._results[trial] = list(results)
        self._reported[trial] = max((each["step"] for each in results), default=0)

    def begin(self, trial: str) -> tuple[str, str]:
        """Run name and folder of a trial's next stay. A trial that comes again (PBT) gives up the stay before."""
        known = self._known[trial]
        self._leave(trial, keep=False)
        self._results.setdefault(trial, [])
        run, folder = known["key"], known["folder"]
        if known["stays"]:
            suffix = uuid.uuid4().hex[:6]
            run, folder = f"{run}-{suffix}", f"{folder}/{suffix}"
            self._results[trial], self._reported[trial] = [], 0
        known["stays"] += 1
        known["run"] = run
        return run, folder

    def is_current(self, trial: str, run: str) -> bool:
        """True if `run` is the trial's current assignment; results of earlier assignments are dropped."""
        return bool(self._known[trial]["run"] == run)

    def attach(self, trial: str, run: str, folder: str, experiment: Fields, values: Fields) -> None:
        """Ask for a slot."""
        self._waiting.append({"trial": trial, "run": run, "folder": folder, "experiment": experiment})
        self._results.setdefault(trial, [])
        self._events.put([{"kind": "attached", "run": run, "step": 0, "details": {"folder": folder, "values": values}}])
        self._place()

    def release(self, trial: str, keep: bool = True) -> Literal["", "queue", "slot"]:
        """The trial is over; if it still trains, its slot becomes free, with its best soft prompt saved if `keep`.

        Returns where it was on its way, "" if it had come to its own end.
        """
        self._results.pop(trial, None)
        return self._leave(trial, keep)

    def _leave(self, trial: str, keep: bool) -> Literal["", "queue", "slot"]:
        waiting = len(self._waiting)
        self._waiting = [order for order in self._waiting if order["trial"] != trial]
        found = self._training.pop(trial, None)
        if found is None:
            return "queue" if len(self._waiting) < waiting else ""
        group, order = found
        unheard = {"attach": order} in self._orders[group]  # the group has not heard of it yet
        if unheard:
            self._orders[group].remove({"attach": order})
        else:
            self._orders[group].append({"run": order["run"], "keep": keep})
        self._place()
        return "queue" if unheard else "slot"

    def register_group(self, group: int, places: int) -> int:
        """A group of workers is there, for the first time or again after a failure: it has no slots taken. Returns which of its
        lives this is."""
        self.places[group] = places
        self._lives[group] = self._lives.get(group, 0) + 1
        mine = [order for at, order in self._training.values() if at == group]
        self._orders[group] = [{"attach": order} for order in mine]
        self._place()
        return self._lives[group]

    def is_current_group(self, group: int, life: int) -> bool:
        """Whether this is the group's present life: who was killed still waits here for orders, and must not get those of the
        next."""
        return self._lives[group] == life

    def _place(self) -> None:
        """Give waiting trials to free places: first come, first served, to the group with the most similar lengths."""
        while self._waiting:
            open_groups = [group for group in self.places if self._free(group) > 0]
            if not open_groups:
                return
            order = self._waiting.pop(0)
            group = min(open_groups, key=lambda each: (self._distance(each, _length(order)), -self._free(each)))
            self._training[order["trial"]] = group, order
            self._orders[group].append({"attach": order})

    def _free(self, group: int) -> int:
        return self.places[group] - sum(at == group for at, _ in self._training.values())

    def _distance(self, group: int, length: int) -> float:
        there = [_length(order) for at, order in self._training.values() if at == group]
        return abs(sum(there) / len(there) - length) if there else 0.0

    def orders(self, group: int) -> list[Fields] | None:
        """What is new for a group; None: there will be no more."""
        orders, self._orders[group] = self._orders.get(group, []), []
        if self.closed:
            return None
        return orders

    def waiting_orders(self, group: int) -> bool:
        return self.closed or bool(self._orders.get(group))

    def put(self, events: list[Fields]) -> tuple[int, int]:
        """Events of the workers: all for the driver, some for a trial. Returns what `EventBuffer.put` does."""
        by_run = {order["run"]: trial for trial, (_, order) in self._training.items()}
        for event in events:
            trial = by_run.get(event["run"])
            if trial is None or event["kind"] not in FOR_TRIALS:
                continue
            if event["kind"] == "evaluation":
                if event["step"] <= self._reported.get(trial, 0):
                    continue  # repeated after a restart from a checkpoint
                self._reported[trial] = event["step"]
            else:
                del self._training[trial]
                del by_run[event["run"]]
            self._results.setdefault(trial, []).append(event)
        self._place()
        return self._events.put(events)

    def results(self, trial: str) -> list[Fields]:
        """What a trial has not heard yet; the last is that it was released, or that no worker will answer."""
        if trial not in self._results:
            return [RELEASED]
        found, self._results[trial] = self._results[trial], []
        if not found and self.broken:
            return [{"kind": "failed", "run": "", "step": 0, "values": {}, "details": {"message": self.broken}}]
        return found

    def busy(self) -> bool:
        """Whether any trial trains or waits for a slot."""
        return bool(self._training or self._waiting)

    def has_results(self, trial: str) -> bool:
        return self.broken is not None or trial not in self._results or bool(self._results[trial])

    def take(self, recorded: int) -> list[Fields]:
        """What the driver has not heard yet, as `EventBuffer.take`."""
        return self._events.take(recorded)


def _length(order: Fields) -> int:
    return int(order["experiment"]["prompt"]["length"])


@ray.remote(num_cpus=0)
class DispatcherActor:
    """The dispatcher in a process of its own. Calls that ask for news may wait for some time."""

    def __init__(self) -> None:
        self._dispatcher = Dispatcher()
        self._news = asyncio.Condition()

    async def register(self, trial: str, key: str, folder: str, results: list[Fields]) -> None:
        await self._tell(lambda dispatcher: dispatcher.register(trial, key, folder, results))

    async def begin(self, trial: str) -> tuple[str, str]:
        return await self._tell(lambda dispatcher: dispatcher.begin(trial))

    async def attach(self, trial: str, run: str, folder: str, experiment: Fields, values: Fields) -> None:
        await self._tell(lambda dispatcher: dispatcher.attach(trial, run, folder, experiment, values))

    async def release(self, trial: str, keep: bool) -> Literal["", "queue", "slot"]:
        return await self._tell(lambda dispatcher: dispatcher.release(trial, keep))

    async def register_group(self, group: int, places: int) -> int:
        return await self._tell(lambda dispatcher: dispatcher.register_group(group, places))

    async def put(self, events: list[Fields]) -> tuple[int, int]:
        return await self._tell(lambda dispatcher: dispatcher.put(events))

    async def take(self, recorded: int) -> list[Fields]:
        return await self._tell(lambda dispatcher: dispatcher.take(recorded))

    async def busy(self) -> bool:
        return await self._tell(lambda dispatcher: dispatcher.busy())

    async def orders(self, group: int, life: int) -> list[Fields] | None:
        dispatcher = self._dispatcher
        await self._wait(lambda: not dispatcher.is_current_group(group, life) or dispatcher.waiting_orders(group))
        return dispatcher.orders(group) if dispatcher.is_current_group(group, life) else None

    async def results(self, trial: str, run: str) -> list[Fields]:
        dispatcher = self._dispatcher
        await self._wait(lambda: not dispatcher.is_current(trial, run) or dispatcher.has_results(trial))
        return dispatcher.results(trial) if dispatcher.is_current(trial, run) else [RELEASED]

    async def joined(self, groups: int) -> dict[int, int]:
        """Slots of the groups, once `groups` groups have joined; fewer after a timeout."""
        await self._wait(lambda: len(self._dispatcher.places) >= groups or self._dispatcher.broken is not None)
        return self._dispatcher.places

    async def close(self, broken: str | None = None) -> None:
        """No more orders; `broken`: every trial hears that it failed, and why."""
        async with self._news:
            self._dispatcher.closed, self._dispatcher.broken = True, broken
            self._news.notify_all()

    async def _tell(self, change: Callable[[Dispatcher], Answer]) -> Answer:
        """Change the dispatcher, which answers at once, and wake those who wait for news."""
        async with self._news:
            answer = change(self._dispatcher)
            self._news.notify_all()
            return answer

    async def _wait(self, ready: Callable[[], bool], seconds: float = 10.0) -> None:
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(ready), seconds)
            except TimeoutError:
                return


class DispatcherClient(EventSender):
    """The first worker's end: sends events without waiting, and has asked for orders before they are needed."""

    def __init__(self, dispatcher: Any, group: int) -> None:
        super().__init__(dispatcher)
        self._dispatcher = dispatcher
        self._group = group
        self._life = 0
        self._asked: Any = None

    def join(self, places: int) -> None:
        self._life = ray.get(self._dispatcher.register_group.remote(self._group, places))
        self._ask()

    def has_news(self) -> bool:
        """Whether an answer is there, without waiting."""
        return bool(ray.wait([self._asked], timeout=0)[0])

    def orders(self, wait: bool) -> list[Fields] | None:
        """The orders that have arrived; `wait`: nothing else is to be done."""
        if not wait and not self.has_news():
            return []
        found: list[Fields] | None = ray.get(self._asked)
        self._ask()
        return found

    def _ask(self) -> None:
        self._asked = self._dispatcher.orders.remote(self._group, self._life)
