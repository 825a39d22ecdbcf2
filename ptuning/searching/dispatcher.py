"""Tune's trials in front of the dispatcher: each of a trial's stays in a slot is a run of its own.

    trial -- attach --> dispatcher -- orders --> first worker of a group
    trial <-- results -- dispatcher <-- events -- first worker; the driver takes all events

`TrialDispatcher` is the logic; `DispatcherActor` is the actor. Imports nothing heavy: the actor's process starts in a second.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Literal

import ray

from ptuning.training.dispatcher import Dispatcher, DispatcherService

if TYPE_CHECKING:
    from ptuning.training.messages import Fields

FOR_TRIALS = ("evaluation", "finished", "failed")
"""Events that a trial hears of."""
RELEASED: Fields = {"kind": "released", "run": "", "step": 0, "values": {}, "details": {}}


class TrialDispatcher(Dispatcher):
    """Which trial trains in which group. A trial has a key of ours; each of its stays in a slot is a run of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, Fields] = {}
        self._trials: dict[str, str] = {}
        """Trial of each run."""
        self._results: dict[str, list[Fields]] = {}
        self._reported: dict[str, int] = {}
        self._withdrawn: set[str] = set()

    def register(self, trial: str, key: str, folder: str, results: list[Fields]) -> None:
        """Before a trial starts: its key, the folder of its checkpoints, and what is known of it from before."""
        self._known[trial] = {"key": key, "folder": folder, "stays": 0, "run": None}
        self._results[trial] = list(results)
        self._reported[trial] = max((each["step"] for each in results), default=0)

    def begin(self, trial: str) -> tuple[str, str]:
        """Run name and folder of a trial's next stay. A trial that comes again (PBT) gives up the stay before."""
        known = self._known[trial]
        if known["run"]:
            self.leave(known["run"], "drop")
        self._results.setdefault(trial, [])
        run, folder = known["key"], known["folder"]
        if known["stays"]:
            suffix = uuid.uuid4().hex[:6]
            run, folder = f"{run}-{suffix}", f"{folder}/{suffix}"
            self._results[trial], self._reported[trial] = [], 0
        known["stays"] += 1
        known["run"] = run
        self._trials[run] = trial
        return run, folder

    def is_current(self, trial: str, run: str) -> bool:
        """True if `run` is the trial's current assignment; results of earlier assignments are dropped."""
        return bool(self._known[trial]["run"] == run)

    def attach(self, trial: str, run: str, folder: str, experiment: Fields, values: Fields) -> None:
        """Ask for a slot."""
        if trial in self._withdrawn:
            self._results.pop(trial, None)
            return
        self._results.setdefault(trial, [])
        self._events.put([{"kind": "attached", "run": run, "step": 0, "details": {"folder": folder, "values": values}}])
        self.enter({"run": run, "folder": folder, "experiment": experiment})

    def release(self, trial: str, keep: bool = True) -> Literal["", "queue", "slot"]:
        """The trial is over; if it still trains, its slot becomes free, with its best soft prompt saved if `keep`.

        Returns where it was on its way, "" if it had come to its own end.
        """
        self._results.pop(trial, None)
        run = self._known.get(trial, {}).get("run")
        return self.leave(run, "finish" if keep else "drop") if run else ""

    def withdraw(self, trial: str) -> Literal["", "queue", "slot"]:
        """The trial is stopped by a person, perhaps before it has asked for a slot; else as `release`."""
        self._withdrawn.add(trial)
        return self.release(trial)

    def heard(self, event: Fields) -> None:
        trial = self._trials[event["run"]]
        if event["kind"] not in FOR_TRIALS:
            return
        if event["kind"] == "evaluation":
            if event["step"] <= self._reported.get(trial, 0):
                return  # repeated after a restart from a checkpoint
            self._reported[trial] = event["step"]
        self._results.setdefault(trial, []).append(event)

    def results(self, trial: str) -> list[Fields]:
        """What a trial has not heard yet; the last is that it was released, or that no worker will answer."""
        if trial not in self._results:
            return [RELEASED]
        found, self._results[trial] = self._results[trial], []
        if not found and self.broken:
            return [{"kind": "failed", "run": "", "step": 0, "values": {}, "details": {"message": self.broken}}]
        return found

    def has_results(self, trial: str) -> bool:
        return self.broken is not None or trial not in self._results or bool(self._results[trial])


@ray.remote(num_cpus=0)
class DispatcherActor(DispatcherService[TrialDispatcher]):
    """The dispatcher in a process of its own."""

    def __init__(self) -> None:
        super().__init__(TrialDispatcher())

    async def register(self, trial: str, key: str, folder: str, results: list[Fields]) -> None:
        await self._tell(lambda dispatcher: dispatcher.register(trial, key, folder, results))

    async def begin(self, trial: str) -> tuple[str, str]:
        return await self._tell(lambda dispatcher: dispatcher.begin(trial))

    async def attach(self, trial: str, run: str, folder: str, experiment: Fields, values: Fields) -> None:
        await self._tell(lambda dispatcher: dispatcher.attach(trial, run, folder, experiment, values))

    async def release(self, trial: str, keep: bool) -> Literal["", "queue", "slot"]:
        return await self._tell(lambda dispatcher: dispatcher.release(trial, keep))

    async def withdraw(self, trial: str) -> Literal["", "queue", "slot"]:
        return await self._tell(lambda dispatcher: dispatcher.withdraw(trial))

    async def results(self, trial: str, run: str) -> list[Fields]:
        dispatcher = self._dispatcher
        await self._wait(lambda: not dispatcher.is_current(trial, run) or dispatcher.has_results(trial))
        return dispatcher.results(trial) if dispatcher.is_current(trial, run) else [RELEASED]
