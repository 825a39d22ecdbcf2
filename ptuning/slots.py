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
    if isinstance(search.slots, int):
        most = min(search.slots, search.trials)
        _check_memory(pack, experiment, most)
        return most
    best, rate, size = 1, 0.0, 1
    while size <= min(MOST, search.trials):
        before = _peak()
        seconds = _seconds(pack, experiment, size)
        if size / seconds < GAIN * rate:
            break
        best, rate = size, size / seconds
        # This doubling added so many bytes; the next one adds twice as many.
        if size > 1 and 2 * _most(pack, _peak() - before) > _room(pack):
            break
        size *= 2
    return best


def _check_memory(pack: Pack, experiment: Experiment, slots: int) -> None:
    """From what the second soft prompt takes in a step, whether so many fit."""
    if slots <= 2:
        return
    _seconds(pack, experiment, 1)
    before = _peak()
    _seconds(pack, experiment, 2)
    each, room = _most(pack, _peak() - before), _room(pack)
    if each * (slots - 2) > room:
        fitting = 2 + room // each
        raise UserError(f"search.slots: {slots} do not fit into memory, {fitting} would; lower it or set data.max_tokens")


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


def _most(pack: Pack, value: int) -> int:
    return int(max(pack.workers.gather(value)))


def _room(pack: Pack) -> int:
    """Bytes that each worker may still take; those of one machine share its memory."""
    return int(min(pack.workers.gather(_available()))) // (1 if torch.cuda.is_available() else pack.workers.size)


def _peak() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available() -> int:
    """Bytes that this worker may still take."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
