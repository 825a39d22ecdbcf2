"""The tuning service without Ray: its jobs, its dispatcher and a worker that trains, in one process and one thread.

What is left out is only what carries calls between processes. A test can let a worker or the owner of the jobs die at any step.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from test_tracking import new_database

from ptuning.config import parse_experiment
from ptuning.data.task import load_task
from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel
from ptuning.registry.registry import Registry
from ptuning.tracking.client import artifact_root, tracking_uri
from ptuning.training import dispatched
from ptuning.training.dispatcher import Dispatcher
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack, train
from ptuning.training.messages import Command, Event, event_fields
from ptuning.tuning.group import GROUP
from ptuning.tuning.publication import Publisher
from ptuning.tuning.runner import Runner
from ptuning.tuning.service import Jobs, TuningService

TEMPLATE = {"input": "Text: {text}\nKind:", "target": " {label}"}


class OneCallAtATime(Dispatcher):
    """The runner reads files in a thread. In the actor all calls come to one event loop; here a lock keeps them apart."""

    def __init__(self, slots_per_owner: float) -> None:
        self._lock = threading.RLock()
        super().__init__(slots_per_owner)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def alone(*arguments: Any) -> Any:
            with self._lock:
                return found(*arguments)

        return alone


class Killed(BaseException):
    """A process is gone."""


class World:
    """A storage folder with the processes that own and train its jobs."""

    def __init__(self, folder: Path, base: Base, model: PromptedModel, **tuning: Any) -> None:
        self.base, self.model = base, model
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mlflow.db").exists():
            new_database(folder)
        self.server = parse_experiment(
            {
                "name": "server",
                "model": {"path": base.name},
                "prompt": {"length": 4},
                "data": {"train": "unused.jsonl", **TEMPLATE},
                "train": {
                    "learning_rate": 0.05,
                    "steps": 20,
                    "evaluate_every": 5,
                    "batch_size": 8,
                    "checkpoint_every": 3,
                },
                "compute": {"storage": str(folder)},
                "tuning": {"workers": 1, "slots": 8, **tuning},
            }
        )
        self.heard: list[Event] = []
        self.begin()

    def begin(self) -> None:
        """A new process owns the jobs; what an earlier one had in memory is lost."""
        most = self.server.tuning.slots_per_key
        self.dispatcher = OneCallAtATime(most or math.inf)
        uri = tracking_uri(self.server)
        registry = Registry(uri)
        self.registry = registry
        self.jobs = Jobs(self.server, f"{self.server.compute.storage}/tuning")
        publisher = Publisher(registry, artifact_root(uri, self.server.compute.storage))
        self.runner = Runner(self.jobs, publisher, self.dispatcher, lambda experiment, base: None)
        self.service = TuningService(self.jobs, registry, publisher, self.dispatcher, self.runner.begin, self.runner.estimate)
        self.taken = self.recorded = 0
        self.recorded_at = -math.inf
        self.runner.recover()

    def upload(self, rows: Sequence[dict[str, Any]], owner: str = "local") -> str:
        content = "\n".join(map(json.dumps, rows)).encode()
        return self.jobs.files.create(owner, "rows.jsonl", "fine-tune", [content]).id

    def create(self, file: str, owner: str = "local", admin: bool = False, **body: Any) -> str:
        """A job on rows of the toy task, as one soft prompt unless `body` says otherwise; returns its id."""
        supervised = {
            "template": TEMPLATE,
            "hyperparameters": {"learning_rate_multiplier": 1.0, **body.pop("hyperparameters", {})},
        }
        method = {"type": "supervised", "supervised": supervised | body.pop("supervised", {})}
        asked = {"model": self.service._base, "training_file": file, "seed": 1, "method": method} | body
        return str(self.service.create(owner, admin, asked)["id"])

    def look(self) -> None:
        """What the owner of the jobs does now and then."""
        now = time.monotonic()
        events = self.dispatcher.take(self.recorded)
        self.taken += len(events)
        self.runner.hear(events)
        with self.jobs.lock:
            self.jobs.flush()
        self.recorded, self.recorded_at = self.taken, now

    def work(self, hook: Callable[[], None] = lambda: None, until: Callable[[], bool] | None = None) -> None:
        """Train until all jobs have ended, or `until` something. `hook` is called between two steps; it may raise Killed."""
        until = until or self.ended
        deadline = time.monotonic() + 120
        self.dispatcher.register_group(GROUP, self.server.tuning.slots)
        self.pack = pack = Pack(
            self.model,
            self.base,
            Workers.current(),
            lambda experiment: load_task(experiment, self.base),
            num_slots=self.server.tuning.slots,
            has_news=lambda: True,
            recorded_until=lambda: self.recorded_at,
        )

        def report(event: Event) -> None:
            self.heard.append(event)
            self.dispatcher.put([event_fields(event)])

        def source(free: int) -> list[Command] | None:
            assert time.monotonic() < deadline, [record.status for record in self.jobs.records.values()]
            self.look()
            hook()
            orders = self.dispatcher.orders(GROUP) or []
            if not orders and until():
                pack.slots.clear()
                return None
            if not orders and not pack.slots:
                time.sleep(0.01)
            return [dispatched._command(each) for each in orders]

        train(pack, source, report)
        self.look()

    def ended(self) -> bool:
        return all(record.ended or record.status == "paused" for record in self.jobs.records.values())

    def job(self, job: str) -> dict[str, Any]:
        return self.service.get(None, job)

    def hash(self, job: str) -> str:
        """What a job's soft prompt is, by its vectors."""
        [trial] = [trial for trial in self.jobs.records[job].trials if trial.status == "finished"]
        assert trial.content_hash
        return trial.content_hash

    def messages(self, job: str) -> list[str]:
        return [event["message"] for event in self.service.events(None, job, None, 1000)["data"][::-1]]
