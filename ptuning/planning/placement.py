"""Where the base is during training: whole on every worker, or partitioned, with what memory allows to gather less.

The weights never change, so a worker that keeps a tensor never has to gather it again. `zero.stage = "auto"` is decided here,
once, by the same arithmetic that `ptuning plan` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ptuning.planning.capacity import Training, TrainingPlan
from ptuning.planning.workload import BaseShape, Machine, RunShape, Trace
from ptuning.planning.zero3_simulator import nodes_are_even
from ptuning.settings.training import ZeroConfig

FILLED = 0.9
"""Part of a worker's memory that the decision may fill: the arithmetic does not see everything (fragments, workspaces)."""
PARTS = 64
"""Steps in which the tensors that are kept whole are counted."""
LAYERS = 3
"""Layers that may be gathered at once beside tensors that are kept."""


def place(
    shape: BaseShape, settings: RunShape, machine: Machine, training: Trace, evaluation: Trace, slots: int = 1
) -> RunShape:
    """The settings with a decided stage, for steps with `slots` slots.

    In this order: the whole base on every worker; partitioned, where the fastest is taken of: as many tensors whole on every
    worker as fit, the same with a copy of the base per node, and neither. The last one is the result also where nothing fits.
    """
    if settings.stage != "auto":
        return settings
    if settings.offload:
        return replace(settings, stage=3)
    if machine.ranks == 1:
        return replace(settings, stage=0)

    def plan(way: RunShape) -> TrainingPlan:
        return Training(shape, way, machine, training, evaluation).plan(slots)

    def fits(way: RunShape) -> bool:
        return plan(way).needed <= FILLED * machine.memory

    whole = replace(settings, stage=0)
    if fits(whole):
        return whole
    plain = replace(settings, stage=3, copies=False)
    ways = [*_with_tensors_kept(shape, plain, machine, fits), plain]
    return min(ways, key=lambda way: plan(way).seconds)


def _with_tensors_kept(
    shape: BaseShape, plain: RunShape, machine: Machine, fits: Callable[[RunShape], bool]
) -> Iterator[RunShape]:
    """The ways that fit: without and with a copy per node, each with as many tensors kept whole as fit besides."""
    live = plain.live or max(10_000_000, LAYERS * shape.units // shape.layers)
    for copies in (False, True) if nodes_are_even(machine.ranks, machine.per_node) else (False,):
        ways = [replace(plain, live=live, copies=copies, whole=part * shape.units // PARTS) for part in range(PARTS + 1)]
        low, high = -1, PARTS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(ways[middle]) else (low, middle - 1)
        if low > 0 or (low == 0 and copies):
            yield ways[low]


def decided(zero: ZeroConfig, way: RunShape) -> ZeroConfig:
    """The table [zero] of an experiment with what was decided."""
    return zero.model_copy(
        update={
            "stage": way.stage,
            "live_parameters": way.live,
            "persistent_parameters": way.whole,
            "node_copies": way.copies,
        }
    )


def describe(shape: BaseShape, way: RunShape, machine: Machine) -> str:
    """One line for people."""
    if way.stage == 0:
        return f"base: whole on each of {machine.ranks} workers, nothing is gathered" if machine.ranks > 1 else "base: whole"
    line = f"base: partitioned over {machine.ranks} workers"
    if way.offload:
        line += ", in CPU memory"
    if way.whole:
        line += f"; each keeps {way.whole / shape.units:.0%} of it whole"
    if way.copies:
        line += "; a copy on each node"
    return line
