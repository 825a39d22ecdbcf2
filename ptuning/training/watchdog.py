"""Detects hung workers. Ray Train monitors processes, not threads: without this, a worker that sleeps, waits for a lost disk,
or waits for such a worker in a collective would block the run until torch's timeout of half an hour.

Every worker has a watchdog: a thread that expects a heartbeat from the training thread at every pass of the base. At half of
the limit it reports the stack position of that thread to the driver, at the limit it ends the process. Then Ray Train restarts
all workers from the newest checkpoint. A stopped process cannot report; then the other workers do.

Loading a base and tokenising rows may take any time, but not without activity: there the watchdog checks the processor time and
the bytes that the process reads and writes.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import PurePath

import psutil

from ptuning.training.messages import StuckReport

LEAST, TIMES = 60.0, 20.0
"""The limit: this many seconds, or this many times the longest interval between two heartbeats, whichever is longer."""
FIRST, SIGNS = 600.0, 10
"""Limit in seconds for each of the first heartbeats, before an interval is known."""
IDLE, PATIENCE = 600.0, 10.0
"""Limit for inactivity while a step may take any time: this many seconds, or this many times a configured limit."""
WORK, BYTES = 0.02, 1 << 16
"""Activity: this fraction of a core, or this many bytes read or written per second. Ray's own threads stay below."""
GRACE = 2.0
"""Seconds in which the last report reaches the driver."""
HUNG = 75
"""Exit code of a worker that its watchdog has ended."""
WAITING = ("/torch/distributed/", "/deepspeed/comm/", "/ptuning/training/distributed.py")
"""Stack positions of a thread that waits for other workers."""


class Watchdog:
    """Watches the thread that creates it, from the first heartbeat on."""

    def __init__(self, tell: Callable[[StuckReport], None], limit_s: float | None = None) -> None:
        """`tell` receives the watchdog's reports, in the watchdog's thread. `limit_s` replaces the measured limit."""
        self._tell = tell
        self._limit = limit_s
        self._watched = threading.get_ident()
        self._signs = 0
        self._resting = True
        self._longest = 0.0
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="ptuning-watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """A heartbeat."""
        self._signs += 1
        self._resting = False

    def expect_idle(self) -> None:
        """Start something that may take any time: until the next heartbeat only activity is required."""
        self._resting = True

    def end(self) -> None:
        self._ended.set()

    @property
    def limit(self) -> float:
        """Maximum seconds without a heartbeat."""
        if self._limit is not None:
            return self._limit
        measured = max(LEAST, TIMES * self._longest)
        return measured if self._signs >= SIGNS else max(FIRST, measured)

    def _watch(self) -> None:
        # Counted by the watchdog's own sleeps, so that time in which the whole process was stopped (such as on a suspended
        # machine) does not count.
        silence, seen, told, resting, worked = 0.0, 0, False, True, _worked()
        while True:
            limit = self.limit if not resting else IDLE if self._limit is None else PATIENCE * self._limit
            tick = min(1.0, limit / 10)
            began = time.monotonic()
            if self._ended.wait(tick):
                return
            slept = min(time.monotonic() - began, 2 * tick)
            before, worked = worked, _worked()
            rested, resting = resting, self._resting
            if self._signs != seen or rested != resting or (resting and _works(before, worked, slept)):
                self._longest = max(self._longest, 0.0 if rested or resting else silence + slept)
                silence, seen, told = 0.0, self._signs, False
                continue
            silence += slept
            if silence >= limit / 2 and not told:
                told = True
                self._tell(self._report(silence, last=False))
            if silence >= limit:
                report = self._report(silence, last=True)
                if resting and report.waits:  # for another worker, which may take its time; if that one hangs, it is ended
                    continue
                self._tell(report)
                time.sleep(GRACE)
                os._exit(HUNG)

    def _report(self, silence: float, last: bool) -> StuckReport:
        stack = traceback.extract_stack(sys._current_frames().get(self._watched))
        waits = any(part in frame.filename for frame in stack for part in WAITING)
        where = f"{stack[-1].name} ({PurePath(stack[-1].filename).name}:{stack[-1].lineno})" if stack else "its end"
        return StuckReport(round(silence, 1), where, worker_location(), waits, last)


def worker_location() -> str:
    """The name of this process in reports."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _worked() -> tuple[float, int]:
    """Processor seconds of this process so far, and the bytes that it has read and written."""
    counters = getattr(psutil.Process(), "io_counters", None)  # not on macOS
    moved = counters() if counters else None
    return time.process_time(), moved.read_chars + moved.write_chars if moved else 0


def _works(before: tuple[float, int], after: tuple[float, int], seconds: float) -> bool:
    return after[0] - before[0] >= WORK * seconds or after[1] - before[1] >= BYTES * seconds


def diagnose(places: list[str], reports: dict[int, StuckReport]) -> str:
    """One sentence that names the hung worker. `places`: the name of each worker, by rank; `reports`: their last reports."""
    seconds = max(report.seconds for report in reports.values())
    silent = [f"worker {rank} ({place}) does not respond" for rank, place in enumerate(places) if rank not in reports]
    stuck = [
        f"worker {rank} ({report.place}) is stuck in {report.where}"
        for rank, report in sorted(reports.items())
        if not report.waits
    ]
    found = silent + stuck or [f"all {len(places)} workers wait for each other"]
    return f"no progress for {seconds:.0f} s: {', '.join(found)}; all workers restart from the newest checkpoint"
