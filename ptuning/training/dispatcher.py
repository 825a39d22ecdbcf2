"""Between runs that wait and the slots of worker groups: who waits, who trains where, what was measured.

    enter, leave -- dispatcher -- orders --> first worker of a group
    driver  <-- events -- dispatcher <-- events -- first worker

`Dispatcher` is the logic, plain and quick; `DispatcherService` is what an actor answers, whose callers may wait;
`DispatcherClient` is the first worker's end. A search puts Tune in front of it, the tuning service its jobs.
Imports nothing heavy: an actor's process starts in a second.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import ray

from ptuning.training.event_queue import EventBuffer, EventSender

if TYPE_CHECKING:
    from ptuning.training.messages import Fields, Leaving

Answer = TypeVar("Answer")

ENDS = ("finished", "failed")
"""Events after which a run needs no slot."""


class Dispatcher:
    """Which run trains in which group.

    A run that enters is an order: its name `run`, its `folder`, its `experiment` as plain tables and, in a service for several
    owners, its `owner`. Further fields are for the workers.
    """

    def __init__(self, slots_per_owner: float = math.inf) -> None:
        self.closed = False
        self.broken: str | None = None
        """Why no worker will ever answer again."""
        self.places: dict[int, int] = {}
        self._slots_per_owner = slots_per_owner
        self._most = math.inf
        """Runs that train at a time, in all groups."""
        self._waiting: list[Fields] = []
        self._training: dict[str, tuple[int, Fields]] = {}
        self._lives: dict[int, str] = {}
        self._orders: dict[int, list[Fields]] = {}
        self._events = EventBuffer()

    def enter(self, order: Fields) -> None:
        """A run asks for a slot. One that has or wants a slot already is not doubled."""
        if order["run"] in self._training or order["run"] in self.waiting():
            return
        self._waiting.append(order)
        self._place()

    def leave(self, run: str, how: Leaving) -> Literal["", "queue", "slot"]:
        """A run leaves; if it trains, its slot becomes free as its `Leaving` says.

        Returns where it was on its way, "" if it had come to its own end.
        """
        waiting = len(self._waiting)
        self._waiting = [order for order in self._waiting if order["run"] != run]
        found = self._training.pop(run, None)
        if found is None:
            return "queue" if len(self._waiting) < waiting else ""
        group, order = found
        unheard = {"attach": order} in self._orders[group]  # the group has not heard of it yet
        if unheard:
            self._orders[group].remove({"attach": order})
        else:
            self._orders[group].append({"run": run, "leave": how})
        self._place()
        return "queue" if unheard else "slot"

    def requeue(self, run: str) -> None:
        """A run that trains saves a checkpoint and waits again, after all others."""
        found = self._training.get(run)
        if found:
            self.leave(run, "pause")
            self.enter(found[1])

    def limit(self, most: float) -> None:
        """At most this many runs train at a time; those that are too many wait again."""
        self._most = most
        for run in list(self._training)[int(min(most, len(self._training))) :]:
            self.requeue(run)
        self._place()

    def register_group(self, group: int, places: int) -> str:
        """A group of workers is there, for the first time or again after a failure: it has no slots taken. Returns which of its
        lives this is. A random name: workers whose dispatcher was started again may still ask the new one."""
        self.places[group] = places
        self._lives[group] = uuid.uuid4().hex
        mine = [order for at, order in self._training.values() if at == group]
        self._orders[group] = [{"attach": order} for order in mine]
        self._place()
        return self._lives[group]

    def remove_group(self, group: int) -> None:
        """A group has ended; its runs wait again, before all others."""
        mine = [run for run, (at, _) in self._training.items() if at == group]
        self._waiting[:0] = [self._training.pop(run)[1] for run in mine]
        for known in (self.places, self._lives, self._orders):
            known.pop(group, None)
        self._place()

    def is_current_group(self, group: int, life: str) -> bool:
        """Whether this is the group's present life: who was killed still waits here for orders, and must not get those of the
        next."""
        return self._lives.get(group) == life

    def _place(self) -> None:
        """Give waiting runs to free places, to the group with the most similar lengths: first those of the owner that holds the
        fewest slots, then first come, first served."""
        while open_groups := [group for group in self.places if self._free(group) > 0 and len(self._training) < self._most]:
            held = Counter(order.get("owner") for _, order in self._training.values())
            allowed = [order for order in self._waiting if held[order.get("owner")] < self._slots_per_owner]
            if not allowed:
                return
            order = min(allowed, key=lambda each: held[each.get("owner")])  # the first of the least
            self._waiting.remove(order)
            group = min(open_groups, key=lambda each: (self._distance(each, _length(order)), -self._free(each)))
            self._training[order["run"]] = group, order
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
        """Events of the workers, all for the driver. Returns what `EventBuffer.put` does."""
        for event in events:
            if event["run"] in self._training:
                self.heard(event)
                if event["kind"] in ENDS:
                    group, order = self._training.pop(event["run"])
                    if {"attach": order} in self._orders[group]:  # it ended in an earlier stay, before it was to leave
                        self._orders[group].remove({"attach": order})
        self._place()
        return self._events.put(events)

    def heard(self, event: Fields) -> None:
        """An event of a run that trains."""

    def training(self) -> list[str]:
        """The runs that have a slot."""
        return list(self._training)

    def waiting(self) -> list[str]:
        """The runs that wait for one."""
        return [order["run"] for order in self._waiting]

    def busy(self) -> bool:
        """Whether any run trains or waits for a slot."""
        return bool(self._training or self._waiting)

    def take(self, recorded: int) -> list[Fields]:
        """What the driver has not heard yet, as `EventBuffer.take`."""
        return self._events.take(recorded)


def _length(order: Fields) -> int:
    return int(order["experiment"]["prompt"]["length"])


Kept = TypeVar("Kept", bound=Dispatcher)


class DispatcherService(Generic[Kept]):
    """What an actor answers that holds a dispatcher. Calls that ask for news may wait for some time."""

    def __init__(self, dispatcher: Kept) -> None:
        self._dispatcher = dispatcher
        self._news = asyncio.Condition()

    async def register_group(self, group: int, places: int) -> str:
        return await self._tell(lambda dispatcher: dispatcher.register_group(group, places))

    async def put(self, events: list[Fields]) -> tuple[int, int]:
        return await self._tell(lambda dispatcher: dispatcher.put(events))

    async def take(self, recorded: int) -> list[Fields]:
        return await self._tell(lambda dispatcher: dispatcher.take(recorded))

    async def busy(self) -> bool:
        return await self._tell(lambda dispatcher: dispatcher.busy())

    async def orders(self, group: int, life: str) -> list[Fields] | None:
        dispatcher = self._dispatcher
        await self._wait(lambda: not dispatcher.is_current_group(group, life) or dispatcher.waiting_orders(group))
        return dispatcher.orders(group) if dispatcher.is_current_group(group, life) else None

    async def joined(self, groups: int) -> dict[int, int]:
        """Slots of the groups, once `groups` groups have joined; fewer after a timeout."""
        await self._wait(lambda: len(self._dispatcher.places) >= groups or self._dispatcher.broken is not None)
        return self._dispatcher.places

    async def close(self, broken: str | None = None) -> None:
        """No more orders; `broken`: why no worker will ever answer again."""
        async with self._news:
            self._dispatcher.closed, self._dispatcher.broken = True, broken
            self._news.notify_all()

    async def _tell(self, change: Callable[[Kept], Answer]) -> Answer:
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
        self._life = ""
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
