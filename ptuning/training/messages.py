"""What the loop of training is given, and what it tells: data that drivers and workers share.

No code of models is imported here, nor by anything else that a driver needs: its command starts 2 s sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptuning.config import Experiment


@dataclass(frozen=True)
class StartRun:
    """One soft prompt to be trained, and the storage folder of its checkpoints and its result."""

    experiment: Experiment
    folder: str


@dataclass(frozen=True)
class StopRun:
    """A run that leaves before its end: with its best soft prompt saved, or without a trace."""

    run: str
    keep: bool


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, as plain data."""

    kind: Literal["loading", "loaded", "stuck", "broken", "start", "step", "evaluation", "finished", "failed"]
    run: str
    step: int
    values: dict[str, float] = field(default_factory=dict)
    time_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    details: dict[str, Any] = field(default_factory=dict)


Command = StartRun | StopRun

Source = Callable[[int], Sequence[Command] | None]
"""Given the number of free slots, what changes now (the same on all workers); None: there will be no more."""

Report = Callable[[Event], None]
