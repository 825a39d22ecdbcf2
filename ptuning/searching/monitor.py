"""The driver's monitor of a search: takes what the workers report to the store, the tracker and the screen."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from ptuning import tracing
from ptuning.config import Experiment
from ptuning.model.base import Base
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.tracking.tracker import Status, Tracker
from ptuning.training.messages import Evaluated, Event, Failed, Fields, Finished, read_event
from ptuning.training.run_metrics import RunMetrics
from ptuning.training.run_tracking import Recorder, open_tracker

Show = Callable[[list[TrialRecord]], None]
ENDED: dict[str, Status] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "KILLED"}


class SearchMonitor:
    """Follows the dispatcher in a thread."""

    def __init__(
        self,
        experiment: Experiment,
        base: Base,
        dispatcher: Any,
        store: TrialStore,
        tracker: Tracker,
        show: Show,
        say: Callable[[str], None],
    ) -> None:
        self._experiment = experiment
        self._dispatcher = dispatcher
        self._store = store
        self._tracker = tracker
        self._show = show
        self._say = say
        self.parent = Recorder(tracker, base=base)
        """What the parent run reached: the winner's test."""
        self._children: dict[str, tuple[Tracker, Recorder]] = {}
        self._began = time.time()
        self._times: dict[str, tuple[float, float]] = {}
        """When each run began and when it was last heard of, for the trace."""
        self._exported = RunMetrics()
        self._closing = ThreadPoolExecutor(1)
        self._unsent: list[Any] = []
        self._afterwards: deque[tuple[str, Callable[[TrialRecord], None]]] = deque()
        self._stopped = threading.Event()
        self.trouble: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="ptuning-search", daemon=True)
        self._thread.start()

    def wait(self, done: Callable[[], bool], alive: Callable[[], bool], most_s: float = math.inf) -> None:
        """Wait until `done`, until nothing is `alive`, or for `most_s` seconds."""
        until = time.monotonic() + most_s
        while not done() and alive() and self.trouble is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.trouble:
            raise self.trouble

    @property
    def hang(self) -> str | None:
        """Which worker hung last, if none has trained since."""
        return self.parent.hang

    def stop(self, deadline_s: float) -> int:
        """Take what is left, end the children's runs; returns how many records could not be sent."""
        self._stopped.set()
        self._thread.join()
        self._store.flush()
        for run in list(self._children):
            self._close(run)
        if tracing.enabled():
            tracing.send(self._trace())
            tracing.flush()
        until = time.monotonic() + deadline_s
        return sum(each.result(max(0.1, until - time.monotonic()) + 30) for each in self._unsent)

    def _trace(self) -> tracing.Span:
        """The whole search, and its trials and finalists in it. Their own values are in MLflow."""
        parts = []
        for run, (began, ended) in self._times.items():
            entry = self._store.entries[run]
            last = entry.results[-1]["values"] if entry.results else {}
            values = {"ptuning.status": entry.status, "ptuning.step": entry.step} | {
                f"ptuning.{key}": value for key, value in last.items()
            }
            parts.append(tracing.Span(run, began, ended, values, failed=entry.status == "failed"))
        name = self._experiment.name
        values = {"ptuning.run": name, "ptuning.mlflow_run": self._tracker.run_id}
        return tracing.Span(f"search {name}", self._began, time.time(), values, parts, failed=self.trouble is not None)

    def then(self, run: str, change: Callable[[TrialRecord], None]) -> None:
        """Change a record once everything has been taken that the workers have reported so far: a trial that Tune has stopped
        must not be on disk as stopped before the result that it was stopped for."""
        self._afterwards.append((run, change))

    def _follow(self) -> None:
        last = False
        taken = recorded = 0
        try:
            while not last:
                last = self._stopped.wait(0.25)
                many = len(self._afterwards)
                events = ray.get(self._dispatcher.take.remote(recorded))
                for fields in events:
                    self._take(fields)
                taken += len(events)
                for _ in range(many):
                    self._store.change(*self._afterwards.popleft())
                if self._store.save():
                    recorded = taken
                self._show(list(self._store.entries.values()))
        except Exception as error:  # the main thread raises it
            self.trouble = error

    def _take(self, fields: Fields) -> None:
        self._exported.progress()
        if fields["run"] == self._experiment.name:
            if fields["kind"] != "attached":
                warning = self.parent(read_event(fields))
                if warning:
                    self._say(f"warning: {warning}")
            return
        run = fields["run"].partition("-")[0]  # a trial's later stays have a suffix
        if fields["kind"] == "attached":
            self._store.change(run, lambda entry: _attached(entry, **fields["details"]))
            return
        event = read_event(fields)
        at = event.time_ms / 1000
        self._times[run] = self._times.get(run, (at, at))[0], at
        self._store.change(run, lambda entry: _changed(entry, event))
        self._child(run)(event)
        if isinstance(event, (Finished, Failed)):
            self._store.flush()
            self._close(run)

    def _child(self, run: str) -> Recorder:
        if run not in self._children:
            entry = self._store.entries[run]
            name = self._experiment.name
            tracker = open_tracker(self._experiment, f"{name}-{run}", f"{name}/trials/{run}", self._tracker.run_key)
            tracker.params(entry.values)
            tracker.tags(
                {"ptuning.trial": run, "ptuning.trial_key": entry.key, "ptuning.finalist": str(entry.finalist).lower()}
            )
            if entry.origin:
                tracker.tags({"ptuning.clone_of": entry.origin})
            # A picture takes a quarter of a second of the core that the trials train on; MLflow draws a trial's curves itself.
            self._children[run] = tracker, Recorder(tracker, pictures=entry.finalist)
        return self._children[run][1]

    def _close(self, run: str) -> None:
        tracker, _ = self._children.pop(run)
        tracker.tags({"ptuning.state": self._store.entries[run].status})
        tracker.finish(ENDED[self._store.entries[run].status])
        self._unsent.append(self._closing.submit(tracker.close, 20))


def _attached(entry: TrialRecord, folder: str, values: dict[str, Any]) -> None:
    if entry.folder != folder:  # a later stay: goes on from another trial's checkpoint
        entry.results = []
    entry.folder, entry.values = folder, values


def _changed(entry: TrialRecord, event: Event) -> None:
    entry.step = event.step
    match event:
        case Evaluated() if event.step > max((each["step"] for each in entry.results), default=0):
            entry.results.append({"step": event.step, "values": event.values, "time_ms": event.time_ms, "best": event.best})
        case Failed():
            entry.status, entry.message = "failed", event.message
        case Finished():
            if not (event.early and entry.status == "stopped"):
                entry.status = "finished"
            entry.measured, entry.soft_prompt = event.values, event.soft_prompt
            if event.values and not entry.results:  # it went on from another one's last checkpoint and had only to end
                best = {name.removeprefix("validation_"): value for name, value in event.values.items()}
                entry.results = [{"step": event.step, "values": best, "time_ms": event.time_ms}]
