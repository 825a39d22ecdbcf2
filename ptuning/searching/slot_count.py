"""The number of soft prompts that train side by side: limited by memory, and by the throughput that more slots still add."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

import psutil
import torch

from ptuning.config import Experiment
from ptuning.errors import BaseError, UserError
from ptuning.model.limits import MOST_SLOTS
from ptuning.planning.capacity import Training
from ptuning.planning.meta_model import MetaModel
from ptuning.planning.workload import Machine, RunShape
from ptuning.redaction import logger
from ptuning.searching.space import INIT, KIND, LENGTH, kinds, trial_tables
from ptuning.training.loop import Pack, step
from ptuning.training.messages import StartRun

log = logger(__name__)

GAIN = 1.1
"""Doubling the slots must raise the throughput at least by this factor."""


def count_slots(pack: Pack, experiment: Experiment) -> int:
    """`search.slots`, or the result of a short measurement; the same on all workers.

    Raises:
        UserError: the slots do not fit into memory.
    """
    search = experiment.search
    wanted = search.slots if isinstance(search.slots, int) else MOST_SLOTS
    most = min(wanted, search.trials)
    fitting = _fitting(pack, experiment, most)
    if isinstance(search.slots, int):
        if fitting < most:
            raise UserError(f"search.slots: {most} do not fit into memory, {fitting} would; lower it or set data.max_tokens")
        return most
    best, rate, size = 1, 0.0, 1
    while size <= max(1, fitting):
        seconds = _measured(pack, experiment, size)
        if size / seconds < GAIN * rate:
            break
        best, rate, size = size, size / seconds, 2 * size
    return best


def _fitting(pack: Pack, experiment: Experiment, limit: int) -> int:
    """Slots that fit beside the base, by the arithmetic of `ptuning plan`, with the longest soft prompts of the search. A base
    that cannot be replayed gets the slots that the experiment asks for: an estimate is too high to refuse them."""
    wanted = isinstance(experiment.search.slots, int)
    split = pack.load_task(experiment).train
    size = pack.workers.size
    settings = RunShape.of_rows(experiment, split.lengths.tolist(), split.target_lengths.tolist())
    settings = replace(settings, length=max(experiment.search.length), kinds=kinds(experiment))
    # The model that is there may be sharded, its meta_model is whole.
    dtype = next(pack.model.parameters()).dtype
    try:
        meta_model = MetaModel(pack.base.config, dtype, checkpoint_gradients=experiment.train.gradient_checkpointing)
    except BaseError as error:  # the same on all workers
        log.warning("the memory of slots is unknown: %s", error)
        return limit if wanted else 1
    room = min(pack.workers.all_gather(_room(size)))
    machine = Machine(size, room, int(os.environ.get("LOCAL_WORLD_SIZE", size)), 1.0, 1.0, torch.cuda.is_available())
    training = Training(meta_model.shape, settings, machine, meta_model.training, meta_model.evaluation)
    most = training.most_slots_in(room, limit)
    if meta_model.estimated and wanted and most < limit:
        log.warning("search.slots: %d may not fit into memory: an estimate for this base is %d", limit, most)
        most = limit
    return int(pack.workers.broadcast(most))


def _seconds(pack: Pack, experiment: Experiment, size: int) -> float:
    """Seconds of a step with `size` of the longest soft prompts, measured on the first worker."""
    tables = experiment.model_dump(mode="json")
    longest = max(experiment.search.length)
    for number in range(size):
        chosen = {KIND: min(kinds(experiment)), LENGTH: longest, INIT: "vocabulary"}  # embedding, which takes longer, or kv
        measured = trial_tables(tables, f"measure-{number}", chosen)
        pack.attach(StartRun(Experiment.model_validate(measured), "/nonexistent/ptuning"))
    step(pack, lambda event: None)
    seconds = []
    for _ in range(3):  # the best of them: what else the machine does only adds to it
        began = time.perf_counter()
        step(pack, lambda event: None)
        seconds.append(time.perf_counter() - began)
    pack.slots.clear()
    pack.news_pending = True
    return float(pack.workers.broadcast(min(seconds)))


def _measured(pack: Pack, experiment: Experiment, size: int) -> float:
    """`_seconds`; infinite if the GPU has too little memory, so that the last size is taken that fitted.

    Several workers wait for each other inside a step: there, an error of one ends the attempt of all.
    """
    try:
        return _seconds(pack, experiment, size)
    except torch.OutOfMemoryError:
        if size == 1 or pack.workers.size > 1:
            raise
    pack.slots.clear()
    pack.news_pending = True
    log.warning("search.slots: %d do not fit into the GPU's memory", size)
    return math.inf


def _room(workers: int) -> int:
    """Bytes that this worker may still take; those of one machine share its memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the allocator keeps from loading the base is not in use
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", workers))
