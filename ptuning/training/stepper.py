"""One optimiser update of all slots on one worker: the passes over its rows, the sum over the workers, the update.

A GPU must not wait for the host. So a thread prepares the next step while this one computes (which rows, their tokens, how they
are packed, learning rates), everything a step reads goes to the device in one copy, and everything the host has to know (losses
and norms of gradients) comes back in one.

Shapes: K starts of all slots, P rows of each, N of all, H width.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptuning.model.packed_batch import PackedBatch, PlacedBatch
from ptuning.model.packing import kv_slots, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.transfer import Parcel, moved
from ptuning.training.distributed import Workers
from ptuning.training.optimizer import LARGEST, Together
from ptuning.training.passes import Part, divide
from ptuning.training.slot import Slot, learning_rate
from ptuning.training.starts import Start, lower_scales


class Member(NamedTuple):
    """A start, and where it is before a step."""

    slot: Slot
    start: Start
    step: int
    updates: int
    scale: float


@dataclass(frozen=True)
class Outcome:
    """What a step has come to, by slot and start: losses, and norms of the gradients before clipping; not finite where it
    failed. The starts have moved already."""

    losses: list[list[float]]
    norms: list[list[float]]
    tokens: int
    """Tokens that this worker has computed."""
    news: bool
    """The first worker has news."""


@dataclass(frozen=True)
class _Pass:
    plan: PackedBatch
    starts: list[int]
    """Whose rows it has."""
    placed: PlacedBatch
    weights: Tensor
    """`[M + M']` factors of the losses of all predictions."""
    owners: Tensor
    """`[M + M']` the start of each."""


class _Plan:
    """Everything that a step needs to know before it begins, on the host."""

    def __init__(self, stepper: Stepper, together: Together, members: Sequence[Member]) -> None:
        self.members = members
        self._cascades = stepper.model.cascades
        self.packed: list[PackedBatch] = []
        self.starts: list[list[int]] = []
        """Whose rows each pass has."""
        tensors: list[Tensor] = []
        rows = {id(each.slot): each.slot.order.batch(each.step) for each in members}
        totals = [
            (int(each.slot.task.train.target_lengths[rows[id(each.slot)]].sum()), len(rows[id(each.slot)])) for each in members
        ]
        lengths, objectives = [len(each.start.vectors) for each in members], [each.slot.objective for each in members]
        for own in _divided(stepper.workers, members, rows):
            starts = [start for start, _ in own]
            batches = [[members[start].slot.task.train.row(int(row)) for row in part] for start, part in own]
            kv = kv_slots([members[start].start.vectors for start in starts])
            shares = [members[start].slot.shares(part) for start, part in own]
            plan = pack_targets(
                [lengths[start] for start in starts], batches, [objectives[start] for start in starts], kv, shares
            )
            parts = [
                members[start].slot.weights(many, part, batch, totals[start])
                for (start, part), many, batch in zip(own, plan.per_slot, batches, strict=True)
            ]
            kinds = [[text for text, _ in parts], [choices for _, choices in parts]]
            owners = [np.repeat(starts, [len(part) for part in kind]) for kind in kinds]
            self.packed.append(plan)
            self.starts.append(starts)
            tensors += plan.parts(self._cascades)
            tensors += [torch.from_numpy(np.concatenate([*kinds[0], *kinds[1]])), torch.from_numpy(np.concatenate(owners))]
        limits = [each.slot.config.clip or LARGEST for each in members]
        tensors += [torch.tensor(limits), torch.tensor([each.scale for each in members])]
        rates = [learning_rate(each.slot.config, each.step) for each in members]
        tensors += together.numbers([each.updates + 1 for each in members], rates)
        self._parcel = Parcel(tensors, stepper.device)

    @property
    def tokens(self) -> int:
        return sum(plan.positions for plan in self.packed)

    def send(self) -> tuple[list[_Pass], Tensor, Tensor, list[Tensor]]:
        """On the device: the passes, limits and scales of the starts, and what their optimisers need."""
        tensors = iter(self._parcel.send())
        passes = [
            _Pass(plan, starts, plan.read_from(tensors, self._cascades), next(tensors), next(tensors))
            for plan, starts in zip(self.packed, self.starts, strict=True)
        ]
        return passes, next(tensors), next(tensors), list(tensors)


class Stepper:
    """Steps of all slots. Every worker takes the same."""

    def __init__(self, model: PromptedModel, workers: Workers) -> None:
        self.model = model
        self.workers = workers
        self._together: Together | None = None
        self._next: Future[_Plan] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.base.device

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "ptuning-plan")

    def step(self, slots: Sequence[Slot], has_news: Callable[[], bool]) -> Outcome:
        """One update of every slot, on the global batch that the workers share."""
        members = _members(slots)
        starts = [each.start for each in members]
        together = self._joined(starts)
        plan = self._plan(together, members)
        passes, limits, scales, numbers = plan.send()
        self._prepare_next(together, members)
        scaled = any(start.scale != 1 for start in starts)
        while True:
            losses = self._backward(together, passes, scales)
            gradients, losses, news = self._reduce(together, losses, has_news)
            gradients, norms = together.clipped(together.unscaled(gradients, scales) if scaled else gradients, limits)
            if not scaled:  # before the host waits for the results: a start that has failed leaves anyway
                together.update(gradients, numbers)
            found = torch.cat([losses, norms, news] if news is not None else [losses, norms]).tolist()
            results = found[: len(starts)], found[len(starts) : 2 * len(starts)]
            if not scaled or not lower_scales(starts, *results):
                break
            scales = moved([torch.tensor([start.scale for start in starts])], self.device)[0]
        if scaled:
            together.update(gradients, numbers)
        sizes = [len(slot.starts) for slot in slots]
        told = bool(found[-1]) if news is not None else has_news()
        return Outcome(_split(results[0], sizes), _split(results[1], sizes), plan.tokens, told)

    def rehearse(self, slots: Sequence[Slot]) -> None:
        """The passes of the next step on this worker alone, without its update. A partitioned base needs all workers.

        Raises:
            torch.OutOfMemoryError: they do not fit into this worker's memory.
        """
        members = _members(slots)
        together = self._joined([each.start for each in members])
        passes, _, scales, _ = self._plan(together, members).send()
        self._backward(together, passes, scales)
        together.forget_gradients()

    def _joined(self, starts: Sequence[Start]) -> Together:
        """The tensor of these starts."""
        known = self._together
        if known is None or len(starts) != len(known.starts) or any(map(operator.is_not, starts, known.starts)):
            known = self._together = Together(starts)
        return known

    def _plan(self, together: Together, members: Sequence[Member]) -> _Plan:
        """The plan of the step that begins."""
        if self._next is not None:
            plan, self._next = self._next.result(), None
            if plan.members == members:  # slots and starts are compared by identity
                return plan
        return _Plan(self, together, members)

    def _prepare_next(self, together: Together, members: Sequence[Member]) -> None:
        """Let a thread plan the next step, if it will be of the same starts. On a CPU it would compete with the pass."""
        if self.device.type != "cpu" and all(each.step + 1 < each.slot.config.steps for each in members):
            after = [each._replace(step=each.step + 1, updates=each.updates + 1) for each in members]
            self._next = self._thread.submit(_Plan, self, together, after)

    def _backward(self, together: Together, passes: Sequence[_Pass], scales: Tensor) -> Tensor:
        """Leave the gradients of this worker's rows in the vectors, times `scales` [K]; returns the losses `[K]`."""
        together.forget_gradients()
        losses = torch.zeros(len(scales), device=self.device)
        for each in passes:
            nll = self.model(together.soft_prompts(each.starts), each.plan, each.placed)
            # The starts' losses share no term: each keeps its own gradient.
            own = torch.zeros_like(losses).index_add(0, each.owners, nll * each.weights)
            own.backward(scales)
            losses += own.detach()
        return losses

    def _reduce(
        self, together: Together, losses: Tensor, has_news: Callable[[], bool]
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The sums over the workers, with one collective: gradients of each block, losses `[K]`, and, with several workers,
        whether the first one has news."""
        gradients = together.gradients()
        if self.workers.size == 1:
            return gradients, losses, None
        [news] = moved([torch.tensor([float(self.workers.is_main and has_news())])], losses.device)
        flat = self.workers.all_reduce(torch.cat([*(each.flatten() for each in gradients), losses, news]))
        *whole, losses, news = flat.split([*(each.numel() for each in gradients), len(losses), 1])
        return [part.view_as(each) for part, each in zip(whole, gradients, strict=True)], losses, news


def _members(slots: Sequence[Slot]) -> list[Member]:
    return [Member(slot, start, slot.step, start.updates, start.scale) for slot in slots for start in slot.starts]


def _split(values: list[float], sizes: Sequence[int]) -> list[list[float]]:
    ends = list(itertools.accumulate(sizes))
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _divided(workers: Workers, members: Sequence[Member], rows: dict[int, NDArray[np.int64]]) -> list[list[Part]]:
    """This worker's passes. `rows`: the global batch by the id of the slot.

    Where a slot has several starts, a pass takes so few rows that together they take the memory of one.
    """
    largest = max(math.ceil(len(batch) / workers.size) for batch in rows.values())
    limit = min(each.slot.config.micro_batch_size or largest for each in members)
    return divide([rows[id(each.slot)] for each in members], limit * len(rows), workers.rank, workers.size)
