"""The loop without Ray: runs side by side on one worker, and what they report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ptuning.config import Experiment, parse_experiment
from ptuning.data.task import load_task
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack, train
from ptuning.training.messages import Event, StartRun


class Run:
    """Trains experiments side by side and keeps what was reported."""

    def __init__(self, model: PromptedModel, base: Base, folder: Path, places: int = 1) -> None:
        self.pack = Pack(model, base, Workers(), lambda experiment: load_task(experiment, base), places)
        self.folder = folder
        self.events: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda event: None

    def __call__(self, *experiments: Experiment, stop_after: int | None = None) -> Run:
        waiting = list(experiments)

        def source(free: int) -> list[StartRun] | None:
            taken, waiting[:] = waiting[:free], waiting[free:]
            return [StartRun(each, str(self.folder / each.name)) for each in taken] or None

        def report(event: Event) -> None:
            self.events.append(event)
            self.on_event(event)
            if stop_after is not None and event.kind == "step" and event.step == stop_after:
                raise Killed

        train(self.pack, source, report)
        return self

    def of(self, kind: str, run: str | None = None) -> list[Event]:
        return [event for event in self.events if event.kind == kind and run in (None, event.run)]

    def result(self, name: str) -> soft_prompt.SoftPrompt:
        return soft_prompt.load(str(self.folder / name / "soft_prompt"))


class Killed(Exception):
    """The process is gone."""


def experiment(toy_task: SimpleNamespace, **changes: Any) -> Experiment:
    tables = {key: dict(value) if isinstance(value, dict) else value for key, value in toy_task.experiment.items()}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        if name:
            tables.setdefault(table, {})[name] = value
        else:
            tables[key] = value
    return parse_experiment(tables)
