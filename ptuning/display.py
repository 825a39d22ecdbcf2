"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere. All on stderr: stdout carries the result."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table

from ptuning.config import Experiment
from ptuning.prediction.result import Answered
from ptuning.redaction import redact
from ptuning.searching.space import INIT, LENGTH, RATE, best_result
from ptuning.searching.trial_store import TrialRecord
from ptuning.training.messages import Evaluated, Event, Failed, Finished, Loaded, Loading, Started, Stepped

EVERY = 10.0
"""Seconds between plain lines where there is no terminal."""


class Display:
    """Shows the events of one training run."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._waiting = waiting(self._console) if self._console.is_terminal else None
        self._last_line = 0.0
        self._steps = self._reached = 0
        self._evaluated = ""

    def say(self, line: str) -> None:
        self._console.print(redact(line), style="yellow" if line.startswith("warning") else None, markup=False, soft_wrap=True)
        if self._console.is_terminal and not (self._progress or self._waiting):
            self._waiting = waiting(self._console)

    def __call__(self, event: Event) -> None:
        match event:
            case Loading():
                self.say(f"loading the base: {event.share:.0%}")
            case Loaded():
                self._loaded(event)
            case Started():
                self._begin(event)
            case Stepped():
                self._advance(event)
            case Evaluated():
                self._evaluation(event)
            case Finished() | Failed():
                self.close()

    def close(self) -> None:
        for each in (self._progress, self._waiting):
            if each:
                each.stop()
        self._progress = self._waiting = None

    def _loaded(self, event: Loaded) -> None:
        held = ", ".join(f"{share.held / share.whole:.0%}" for share in event.shares)
        way = "shared prefix" if event.shared_prefix else "plain concatenation"
        workers = f"{event.workers} worker{'s' if event.workers > 1 else ''}"
        self.say(f"base loaded by {workers} ({held} of it each), {event.dtype}, {way}")

    def _begin(self, event: Started) -> None:
        self._steps, self._reached = event.steps, event.step
        if event.step:
            self.say(f"resumed at step {event.step} of {self._steps}")
        if self._console.is_terminal:
            self.close()
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.add_task(event.run, total=self._steps, completed=event.step, numbers="")
            self._progress.start()

    def _advance(self, event: Stepped) -> None:
        if event.step <= self._reached or not self._steps:
            return  # reported again, in case nobody had recorded it (`Slot.unrecorded_events`)
        self._reached = event.step
        numbers = f"loss {event.values['loss']:.4f}  {event.values['tokens_per_second']:,.0f} tokens/s{self._evaluated}"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=event.step, numbers=numbers)
        elif time.monotonic() - self._last_line > EVERY:
            self._last_line = time.monotonic()
            self.say(f"step {event.step}/{self._steps}  {numbers}")

    def _evaluation(self, event: Evaluated) -> None:
        shown = [name for name in event.values if name != "perplexity"]
        numbers = "  ".join(f"{name} {event.values[name]:.4f}" for name in shown)
        if "accuracy" in event.values:
            self._evaluated = f"  accuracy {event.values['accuracy']:.3f}"
        best = "  (best so far)" if event.best else ""
        self.say(f"step {event.step}/{self._steps}  validation: {numbers}{best}")


def waiting(console: Console) -> Progress:
    """A spinner and the seconds that have passed, until it is stopped: libraries are imported, workers start."""
    shown = Progress(SpinnerColumn(), TimeElapsedColumn(), console=console, transient=True)
    shown.add_task("", total=None)
    shown.start()
    return shown


class RowsDisplay:
    """Shows how far a table is: rows, rows per second, time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = waiting(self._console) if self._console.is_terminal else None
        self._loaded = False
        self._last_line = time.monotonic()

    def say(self, line: str) -> None:
        self._console.print(redact(line), markup=False, soft_wrap=True)

    def __call__(self, state: Answered, rows: int) -> None:
        if not state.loaded:
            return
        speed = state.rows / state.seconds if state.seconds else 0.0
        if self._console.is_terminal:
            self._show(state, rows, f"{speed:,.0f} rows/s")
        elif state.rows and time.monotonic() - self._last_line > EVERY:
            self._last_line = time.monotonic()
            left = f", {(rows - state.rows) / speed:,.0f} s left" if speed else ""
            self.say(f"{state.rows} of {rows} rows, {speed:,.0f} per second{left}")

    def _show(self, state: Answered, rows: int, numbers: str) -> None:
        if not self._loaded:
            self.close()
            self._loaded = True
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task("", total=rows, numbers="")
            self._progress.start()
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=state.rows, numbers=numbers)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


class SearchDisplay:
    """Shows a search: a live table on a terminal, a line per evaluation and end elsewhere."""

    def __init__(self, experiment: Experiment) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._experiment = experiment
        self._live: Live | Progress | None = waiting(self._console) if self._console.is_terminal else None
        self._told: dict[str, tuple[int, str]] = {}

    def say(self, line: str) -> None:
        self._console.print(line, style="yellow" if line.startswith("warning") else None, markup=False, soft_wrap=True)

    def __call__(self, entries: list[TrialRecord]) -> None:
        if self._console.is_terminal:
            if not entries:
                return
            if not isinstance(self._live, Live):
                self.close()
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(self._table(entries))
            return
        for entry in entries:
            now = (len(entry.results), entry.status)
            if now != self._told.get(entry.run, (0, "running")):
                self._told[entry.run] = now
                self.say("  ".join([entry.run, *self._cells(entry)]))

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _cells(self, entry: TrialRecord) -> list[str]:
        metric = self._experiment.metric
        steps = self._experiment.train.steps  # 0: left to `train.epochs`
        best = best_result(self._experiment, entry.results, entry.values[LENGTH])
        values = entry.values
        found = f"{metric} {best['values'][metric]:.4f}" if best else "-"
        return [
            f"length {values[LENGTH]}",
            f"lr {values[RATE]:.3g}",
            str(values[INIT]),
            f"step {entry.step}" + (f"/{steps}" if steps else ""),
            found,
            entry.status if not entry.message else f"failed: {entry.message}",
        ]

    def _table(self, entries: list[TrialRecord]) -> Group:
        """Those in training, then the newest of the others, as many as the screen has room for; a bar for the whole."""
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "length", "lr", "init", "step", "validation", "state"):
            table.add_column(column)
        room = max(5, self._console.height - 6)
        order = sorted(entries, key=lambda entry: entry.status != "running")
        for entry in sorted(order[:room], key=lambda entry: entry.run):
            table.add_row(entry.run, *self._cells(entry))
        total = max(self._experiment.search.trials, len(entries))
        ended = sum(entry.status != "running" for entry in entries)
        return Group(table, ProgressBar(total=total, completed=ended, width=60), f"{ended} of {total} ended")
