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
from ptuning.training.base_loader import is_partitioned
from ptuning.training.loop import Pack, step
from ptuning.training.messages import StartRun

log = logger(__name__)

GAIN = 1.1
"""Doubling the slots must raise the throughput at least by this factor."""
MARGIN = 1.1
"""Factor for what the allocator cannot use."""


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
        if is_partitioned(pack.model) and not _doubled_fits(pack):
            break
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
        meta_model = MetaModel(
            pack.base.config,
            dtype,
            checkpoint_gradients=experiment.train.gradient_checkpointing,
            quantization=pack.base.stored_in,
        )
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


def _measured(pack: Pack, experiment: Experiment, size: int) -> float:
    """Seconds of a step with `size` of the longest soft prompts, measured on the first worker; infinite if one of the workers
    has too little memory, so that the last size is taken that fitted.

    Raises:
        UserError: not even one fits.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tables = experiment.model_dump(mode="json")
    longest = max(experiment.search.length)
    for number in range(size):
        chosen = {KIND: min(kinds(experiment)), LENGTH: longest, INIT: "vocabulary"}  # embedding, which takes longer, or kv
        measured = trial_tables(tables, f"measure-{number}", chosen)
        pack.attach(StartRun(Experiment.model_validate(measured), "/nonexistent/ptuning"))
    try:
        if all(pack.workers.all_gather(_rehearsed(pack))):
            return _seconds(pack)
    finally:
        pack.slots.clear()
        pack.news_pending = True
    if size == 1:
        raise UserError(
            "search.slots: not even one soft prompt fits into the memory of a worker; lower train.micro_batch_size, or set "
            "train.gradient_checkpointing"
        )
    log.warning("search.slots: %d do not fit into the memory of a worker", size)
    return math.inf


def _rehearsed(pack: Pack) -> bool:
    """Whether the passes of a step fit into this worker's memory. It computes them alone, because workers wait for each other
    inside a step: there, an error of one would end the attempt of all. The passes of a partitioned base need all workers, so
    there the memory that the last size took decides."""
    if is_partitioned(pack.model):
        return True
    try:
        pack.stepper.rehearse(pack.slots)
    except torch.OutOfMemoryError:
        return False
    return True


def _seconds(pack: Pack) -> float:
    if is_partitioned(pack.model):
        step(pack, lambda event: None)  # the others have rehearsed
    seconds = []
    for _ in range(3):  # the best of them: what else the machine does only adds to it
        began = time.perf_counter()
        step(pack, lambda event: None)
        seconds.append(time.perf_counter() - began)
    return float(pack.workers.broadcast(min(seconds)))


def _doubled_fits(pack: Pack) -> bool:
    """Whether twice the slots of the last measurement fit into the memory of every worker, if they take twice the memory."""
    if not torch.cuda.is_available():
        return True  # `_fitting` has asked; another process may take the memory of a CPU at any moment
    needed = int(torch.cuda.max_memory_allocated()) - int(torch.cuda.memory_allocated())
    return all(pack.workers.all_gather(MARGIN * 2 * needed <= _room(pack.workers.size)))


def _room(workers: int) -> int:
    """Bytes that this worker may still take; those of one machine share its memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the allocator keeps from loading the base is not in use
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", workers))
