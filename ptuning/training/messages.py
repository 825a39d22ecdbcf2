"""What the training loop is given and what it reports: data that drivers and workers share.

Nothing here imports the code of models: a driver needs none, and its command starts 2 s sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ptuning.config import Experiment

if TYPE_CHECKING:
    from ptuning.training.metrics import Classification

Fields = dict[str, Any]
"""An event or a command as plain data, as it travels between processes and lies in checkpoints."""


@dataclass(frozen=True)
class StartRun:
    """One soft prompt to be trained, and the storage folder of its checkpoints and its result."""

    experiment: Experiment
    folder: str
    keep_best: bool = False
    """Save the soft prompt of every evaluation that is the best so far."""


Leaving = Literal["finish", "pause", "drop"]
"""How a run leaves its slot before its end. finish: its best soft prompt is saved; pause: a checkpoint is; drop: nothing is."""


@dataclass(frozen=True)
class StopRun:
    """A run that is stopped before its end."""

    run: str
    how: Leaving


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, at one of its steps."""

    kind: ClassVar[str]
    """Its name in plain data."""

    run: str
    step: int
    time_ms: int = field(default_factory=lambda: int(time.time() * 1000), kw_only=True)


@dataclass(frozen=True)
class Loading(Event):
    """A worker loads the base."""

    kind = "loading"
    share: float


@dataclass(frozen=True)
class BaseShare:
    """Bytes of the base that a worker holds."""

    held: int
    whole: int


@dataclass(frozen=True)
class Loaded(Event):
    """All workers of a group have loaded the base."""

    kind = "loaded"
    dtype: str
    shared_prefix: bool
    shares: list[BaseShare]
    """By rank."""
    places: list[str]
    """What to call each worker, by rank."""
    group: int

    @property
    def workers(self) -> int:
        return len(self.shares)


@dataclass(frozen=True)
class StuckReport:
    """What the watchdog of one worker sees."""

    seconds: float
    """Without progress."""
    where: str
    """Function and line in which its training thread stands."""
    place: str
    waits: bool
    """For other workers."""
    last: bool
    """The watchdog ends the process now."""


@dataclass(frozen=True)
class Stuck(Event):
    """A worker makes no progress."""

    kind = "stuck"
    group: int
    rank: int
    report: StuckReport


@dataclass(frozen=True)
class Broken(Event):
    """Workers have failed; Ray Train starts the group again unless they have failed too often."""

    kind = "broken"
    workers: list[str]
    """What Ray Train says of each."""


@dataclass(frozen=True)
class Started(Event):
    """A run trains, from this step on."""

    kind = "start"
    steps: int
    """Those of the whole run."""


@dataclass(frozen=True)
class Stepped(Event):
    """One optimiser update."""

    kind = "step"
    values: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Event):
    """The validation rows were read."""

    kind = "evaluation"
    values: dict[str, float]
    """Metrics of the best start."""
    best: bool = False
    """The best evaluation of the run so far."""
    memory: list[int] = field(default_factory=list)
    """Bytes that each worker uses, by rank."""
    soft_prompt: str | None = None
    """Its folder, if the run keeps its best ones."""


@dataclass(frozen=True)
class Finished(Event):
    """The soft prompt is saved."""

    kind = "finished"
    values: dict[str, float]
    """Metrics with their split, as `test_accuracy`."""
    best_step: int
    early: bool
    """Stopped before its last step."""
    soft_prompt: str
    """Its folder."""
    content_hash: str
    peak_bytes: list[int]
    """Most memory of each worker, by rank."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """Of the test rows."""
    classification: Classification | None = None
    """Table per label, confusion matrix and reliability of the test rows."""
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Failed(Event):
    """The run ended without a result."""

    kind = "failed"
    message: str


EVENTS: Mapping[str, type[Event]] = {
    each.kind: each for each in (Loading, Loaded, Stuck, Broken, Started, Stepped, Evaluated, Finished, Failed)
}
PARTS: Mapping[str, Callable[[Any], Any]] = {
    "shares": lambda shares: [BaseShare(**share) for share in shares],
    "report": lambda report: StuckReport(**report),
}
"""Fields that are dataclasses themselves, and how they are read back."""


def event_fields(event: Event) -> Fields:
    """An event as plain data: kind, run, step, time_ms, values, and under `details` what only its kind has."""
    plain = asdict(event)
    own = {key: plain.pop(key) for key in ("run", "step", "time_ms")}
    return {"kind": event.kind, **own, "values": plain.pop("values", {}), "details": plain}


def read_event(plain: Fields) -> Event:
    """The inverse of `event_fields`.

    Details that this kind does not know are left out: checkpoints of an earlier version may hold some.
    """
    kind = EVENTS[plain["kind"]]
    known = {each.name for each in fields(kind)}
    given = {**plain, **{key: PARTS.get(key, _same)(value) for key, value in plain.get("details", {}).items()}}
    return kind(**{key: value for key, value in given.items() if key in known})


def _same(value: Any) -> Any:
    return value


Command = StartRun | StopRun

Source = Callable[[int], Sequence[Command] | None]
"""Given the number of free slots, what changes now (the same on all workers); None: there will be no more."""

Report = Callable[[Event], None]
