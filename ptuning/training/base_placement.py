"""Decides `zero.stage = "auto"` for a run, in the driver, before its workers start. All workers get the same table [zero]."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ptuning.cluster.node_memory import WorkerMemory, worker_memory
from ptuning.config import Experiment
from ptuning.data.task import Task
from ptuning.errors import BaseError
from ptuning.model.base import Base
from ptuning.planning.placement import decided, describe, place
from ptuning.planning.rates import CPU, GB, GPU, gpu_rate
from ptuning.planning.workload import Machine, RunShape
from ptuning.redaction import logger
from ptuning.settings.training import ZeroConfig

log = logger(__name__)


def place_base(
    experiment: Experiment,
    base: Base,
    task: Task,
    scaling: Any,
    *,
    slots: int = 1,
    groups: int = 1,
    before: dict[str, Any] | None = None,
) -> tuple[ZeroConfig, str]:
    """The table [zero] for the workers of each of `groups` groups, for steps with `slots` slots, and a line for people.

    `before`: what this run decided when it was started, as `record` keeps it. It is kept for the same number of workers.
    """
    zero = experiment.zero
    workers = _least(scaling)
    if before and before["workers"] == workers and zero.stage == "auto":
        return ZeroConfig.model_validate(before["zero"]), before["line"]
    if zero.stage != "auto":
        return zero, ""
    if workers == 1 and not zero.offload:
        found, line = zero.model_copy(update={"stage": 0}), ""
    else:
        found, line = _planned(experiment, base, task, scaling, slots, groups)
    if before and before["workers"] != workers and before["zero"]["stage"] != found.stage:
        was = "whole on every worker" if before["zero"]["stage"] == 0 else "partitioned"
        line = f"{line or 'base: whole'}; it was {was} with {before['workers']} workers"
    return found, line


def record(zero: ZeroConfig, line: str, scaling: Any) -> dict[str, Any]:
    """What `place_base` needs when the run is resumed."""
    return {"zero": zero.model_dump(mode="json"), "line": line, "workers": _least(scaling)}


def _least(scaling: Any) -> int:
    workers = scaling.num_workers
    return int(workers[0] if isinstance(workers, tuple) else workers)


def _planned(experiment: Experiment, base: Base, task: Task, scaling: Any, slots: int, groups: int) -> tuple[ZeroConfig, str]:
    from ptuning.planning.meta_model import MetaModel  # the code of models: 2 s that a run with one worker does not need

    workers = _least(scaling)
    partitioned = experiment.zero.model_copy(update={"stage": 3})
    memory = worker_memory(workers, scaling.resources_per_worker, groups)
    if memory is None:
        return partitioned, f"base: partitioned over {workers} workers, because a node does not tell its memory"
    try:
        meta_model = MetaModel(
            base.config,
            _dtype(base, experiment, scaling.use_gpu),
            checkpoint_gradients=experiment.train.gradient_checkpointing,
            quantization=base.stored_in,
        )
    except BaseError as error:
        log.warning("the memory of %s cannot be planned: %s", base.name, error)
        return partitioned, f"base: partitioned over {workers} workers, because its memory cannot be planned"
    settings = RunShape.of_rows(experiment, task.train.lengths.tolist(), task.train.target_lengths.tolist())
    machine = _machine(workers, memory, scaling.use_gpu)
    way = place(
        meta_model.shape,
        replace(settings, stage="auto"),
        machine,
        meta_model.training,
        meta_model.evaluation,
        slots,
    )
    return decided(experiment.zero, way), describe(meta_model.shape, way, machine)


def _machine(workers: int, memory: WorkerMemory, gpus: bool) -> Machine:
    if not gpus:
        return Machine(workers, memory.smallest, workers, CPU["bandwidth_gb"] * GB, CPU["tflops"] * 1e12, False)
    rate = gpu_rate(memory.per_node, workers > memory.per_node)
    inside = gpu_rate(memory.per_node, nodes=False)
    return Machine(workers, memory.smallest, memory.per_node, rate * GB, GPU["tflops"] * 1e12, True, inside * GB)


def _dtype(base: Base, experiment: Experiment, gpus: bool) -> torch.dtype:
    """The dtype of the workers. The driver may be on a machine without GPUs, whose processor does not compute in bfloat16."""
    found = base.dtype(experiment.model.dtype)
    return torch.bfloat16 if gpus and experiment.model.dtype == "auto" and base.stored_small else found
