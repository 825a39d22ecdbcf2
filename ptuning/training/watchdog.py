"""Workers that hang. Ray Train looks at processes, not at threads: a worker that sleeps, waits for a disk that is gone, or
waits for such a worker in a collective would be waited for until torch gives up after half an hour.

Every worker has a watchdog: a thread that expects a sign of life from the training thread at every pass of the base. At half
of the limit it tells the driver where its thread stands, at the limit it ends the process: then Ray Train starts all workers
again, from the newest checkpoint. A process that is stopped cannot tell; then the others do.

Loading a base and tokenising rows may take any time, but not without work: there the watchdog looks at the processor time and
at the bytes that the process reads and writes.
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
"""The limit: so many seconds, or so many times the longest time between two signs of life, whichever is longer."""
FIRST, SIGNS = 600.0, 10
"""Seconds that the first signs of life may take each: nothing is known yet."""
IDLE, PATIENCE = 600.0, 10.0
"""The limit for a worker that may take its time and does nothing: so many seconds, or so many times a limit that was set."""
WORK, BYTES = 0.02, 1 << 16
"""What counts as work: this share of a core, or so many bytes read or written in a second. Ray's own threads do less."""
GRACE = 2.0
"""Seconds in which the last words reach the driver."""
HUNG = 75
"""Exit code of a worker that its watchdog has ended."""
WAITING = ("/torch/distributed/", "/deepspeed/comm/")
"""Where a thread stands that waits for other workers."""


class Watchdog:
    """Watches the thread that makes it, from the first sign of life on."""

    def __init__(self, tell: Callable[[StuckReport], None], limit_s: float | None = None) -> None:
        """`tell` takes what the watchdog has to say, in its own thread. `limit_s`: instead of the measured limit."""
        self._tell = tell
        self._limit = limit_s
        self._watched = threading.get_ident()
        self._signs = 0
        self._resting = True
        self._longest = 0.0
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="ptuning-watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """A sign of life."""
        self._signs += 1
        self._resting = False

    def expect_idle(self) -> None:
        """Until the next sign of life nothing but work is expected: something begins that may take any time."""
        self._resting = True

    def end(self) -> None:
        self._ended.set()

    @property
    def limit(self) -> float:
        """Seconds without a sign of life that are too many."""
        if self._limit is not None:
            return self._limit
        measured = max(LEAST, TIMES * self._longest)
        return measured if self._signs >= SIGNS else max(FIRST, measured)

    def _watch(self) -> None:
        # Counted by the watchdog's own sleeps: a process that was stopped as a whole, such as with a suspended machine, is
        # not blamed for it.
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
                if resting and report.waits:  # for another worker, who may take its time; if not, it is ended
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
    """What to call this process."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _worked() -> tuple[float, int]:
    """Processor seconds of this process so far, and bytes that it has read and written."""
    counters = getattr(psutil.Process(), "io_counters", None)  # not on macOS
    moved = counters() if counters else None
    return time.process_time(), moved.read_chars + moved.write_chars if moved else 0


def _works(before: tuple[float, int], after: tuple[float, int], seconds: float) -> bool:
    return after[0] - before[0] >= WORK * seconds or after[1] - before[1] >= BYTES * seconds


def diagnose(places: list[str], reports: dict[int, StuckReport]) -> str:
    """One sentence: which worker is to blame. `places`: what to call each worker, by rank; `reports`: their last words."""
    seconds = max(report.seconds for report in reports.values())
    silent = [f"worker {rank} ({place}) gives no sign of life" for rank, place in enumerate(places) if rank not in reports]
    stuck = [
        f"worker {rank} ({report.place}) is stuck in {report.where}"
        for rank, report in sorted(reports.items())
        if not report.waits
    ]
    found = silent + stuck or [f"all {len(places)} workers wait for each other"]
    return f"no progress for {seconds:.0f} s: {', '.join(found)}; all start again from the newest checkpoint"
