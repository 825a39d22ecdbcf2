"""The trace of a run: start, load, steps by hundred, evaluations, test. Its times are those of the workers' events."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ptuning import tracing
from ptuning.tracing import Span
from ptuning.training.messages import Evaluated, Event, Failed, Finished, Loaded, Loading, Started, Stepped

STEPS = 100
"""Steps that share a span."""


class RunTrace:
    """Takes the events of one run in their order, and sends its trace at the end. Does nothing where traces are off."""

    def __init__(self, name: str, values: tracing.Values) -> None:
        self._name, self._values = name, values
        self._began = self._since = time.time()
        """When the run began, and when what happens now did."""
        self._parts: list[Span] = []
        self._steps: tuple[int, int] | None = None
        """First and last step that have no span yet."""
        self._stepped = self._began
        """When the last step ended."""

    def __call__(self, event: Event) -> None:
        if not tracing.enabled():
            return
        at = event.time_ms / 1000
        match event:
            case Loading() if not any(part.name == "start" for part in self._parts):
                self._end("start", at)
            case Loaded():
                self._end("load", at, {"ptuning.workers": event.workers})
            case Started():
                self._end("prepare", at, {"ptuning.step": event.step})
            case Stepped():
                first = self._steps[0] if self._steps else event.step
                self._steps = first, event.step
                if event.step - first + 1 >= STEPS:
                    self._end_steps(at)
                self._stepped = at
            case Evaluated():
                self._end_steps(self._stepped)
                self._end("evaluation", at, {"ptuning.step": event.step, **_named(event.values)})
            case Finished() | Failed():
                self._end_steps(self._stepped)
                self._end("test", at, _named(event.values) if isinstance(event, Finished) else {})

    def send(self, failed: bool) -> None:
        """The run is over."""
        if tracing.enabled():
            tracing.send(Span(self._name, self._began, time.time(), self._values, self._parts, failed))
            tracing.flush()

    def _end(self, name: str, at: float, values: tracing.Values | None = None) -> None:
        self._parts.append(Span(name, self._since, at, values or {}))
        self._since = at

    def _end_steps(self, at: float) -> None:
        if self._steps:
            first, last = self._steps
            self._end("steps", at, {"ptuning.first_step": first, "ptuning.last_step": last})
            self._steps = None


def _named(values: Mapping[str, float]) -> dict[str, float]:
    return {f"ptuning.{name}": value for name, value in values.items()}
