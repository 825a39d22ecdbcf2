"""How many soft prompts train side by side: as many as memory holds, until more no longer trains more in the same time."""

from __future__ import annotations

import resource
import time

import psutil
import torch

from ptuning.config import Experiment, UserError
from ptuning.space import LENGTH, trial_tables
from ptuning.train import Assignment, Pack, step

MOST = 32
GAIN = 1.1
"""Twice the slots must train at least this much more per second."""


def count_slots(pack: Pack, experiment: Experiment) -> int:
    """`search.slots`, or what a short measurement says; the same on all workers.

    Raises:
        UserError: so many slots do not fit into memory.
    """
    search = experiment.search
    wanted = search.slots if isinstance(search.slots, int) else None
    most = min(wanted or MOST, search.trials)
    best, rate, size = 1, 0.0, 1
    while True:
        before = _peak(pack)
        seconds = _seconds(pack, experiment, size)
        # The last doubling added `grown` bytes per worker; the next one adds twice that. Unknown after the first.
        grown = max(pack.workers.gather(_peak(pack) - before))
        room = min(pack.workers.gather(_available()))
        if wanted is None and size / seconds < GAIN * rate:
            break
        best, rate = size, size / seconds
        if size >= most:
            break
        following = min(2 * size, most)
        if size > 1 and grown * 2 * (following - size) / size > room:
            if wanted:
                raise UserError(f"search.slots: {wanted} do not fit into memory, about {best} would; lower it")
            break
        size = following
    return min(wanted, most) if wanted else int(pack.workers.from_first(best))


def _seconds(pack: Pack, experiment: Experiment, size: int) -> float:
    """Seconds of a step with so many of the longest soft prompts, on all workers the first one's."""
    tables = experiment.model_dump(mode="json")
    longest = max(experiment.search.length)
    for number in range(size):
        measured = trial_tables(tables, f"measure-{number}", {LENGTH: longest, "prompt.init": "vocabulary"})
        pack.attach(Assignment(Experiment.model_validate(measured), "/nonexistent/ptuning"))
    step(pack, lambda event: None)
    began = time.perf_counter()
    step(pack, lambda event: None)
    seconds = time.perf_counter() - began
    pack.slots.clear()
    pack.called = True
    return float(pack.workers.from_first(seconds))


def _peak(pack: Pack) -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available() -> int:
    """Bytes that this worker may still take."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
