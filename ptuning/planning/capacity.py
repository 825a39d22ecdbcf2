"""What fits where, and how fast: memory and time of training and serving, by arithmetic. No torch, no weights.

Bytes are bytes, GB are 10^9 of them. A rank is one worker, with a GPU or a share of a machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ptuning.model.limits import LOGITS, PAGE, STEP_TOKENS, TOKENS
from ptuning.planning.workload import BaseShape, Machine, RunShape, Trace, Workload
from ptuning.planning.zero3_simulator import (
    Sharing,
    Timeline,
    gather,
    live_numbers,
    node_copies_fit,
    prefetch_numbers,
    share_bytes,
    share_numbers,
)


@dataclass(frozen=True)
class TrainingPlan:
    """Memory of a rank in bytes, and time, of a step with so many slots."""

    slots: int
    reserved: int
    share: int
    """The rank's part of the base, with what stays whole."""
    gathered: int
    activations: int
    step: int
    """Most gathered tensors and activations at once in a step: less than their sum if they peak at different moments."""
    evaluation: int
    """The same of an evaluation, with the keys and values of generated text."""
    soft_prompts: int
    """Soft prompts, the best of each, gradients and two moments of the optimiser, all in fp32."""
    holes: int
    """On a CPU: what the C library's heap may keep between tensors, at most (`HOLES`). GPU memory is handed out by torch, whose
    own holes are part of `reserved`."""
    received: int
    """Bytes that all-gathers bring to a rank per step, its own share included."""
    seconds: float
    """Of a step, at least: the slower of arithmetic and gathering on a GPU, where they overlap, and both on a CPU."""
    flops: int
    bound: Literal["arithmetic", "gathering"]
    node_copy: bool

    @property
    def peak(self) -> int:
        """Most bytes on a rank but for the heap's holes."""
        return self.reserved + self.share + max(self.step, self.evaluation) + self.soft_prompts

    @property
    def needed(self) -> int:
        return self.peak + self.holes

    @property
    def working(self) -> int:
        """Of these, what is taken when the base is there."""
        return self.needed - self.reserved - self.share


HOLES = 1.5
"""Of what a step takes, what glibc's heap keeps in holes at most (measured: 0.5 to 1.4; BENCHMARKS.md)."""

STATES = 8
"""Tensors like a soft prompt in fp32: itself, the best so far, two moments; in a step its gradient, that of all slots in one
tensor, its part of it, and a clipped copy."""


def step_flops(shape: BaseShape, work: Workload) -> int:
    """FLOPs of a step on frozen weights: 2 forward and 2 backward per weight and token. Attention computes the scores again
    in its backward pass: 7 products instead of the forward's 2."""
    looked = work.slots * (work.length**2 + work.rows * work.fed_per_row * (work.length + work.fed_per_row))
    attention = 7 * 2 * shape.layers * shape.attention_width * looked
    read = 4 * (shape.last + (work.compared or shape.vocabulary) * shape.width) * work.predictions
    return 4 * shape.inner * work.positions + attention + read


def sharing(shape: BaseShape, settings: RunShape, machine: Machine) -> Sharing:
    """How `zero.derive_config` spreads a base over such a machine."""
    free = machine.memory - machine.reserved
    whole = shape.numbers * shape.itemsize
    copy = node_copies_fit(whole, machine.ranks, machine.per_node, free)
    share = share_bytes(whole, machine.ranks, machine.per_node if copy else 0)
    live = settings.live or live_numbers(free, share, shape.itemsize)
    return Sharing(
        machine.ranks,
        live,
        prefetch_numbers(shape.numbers, shape.layers, live),
        settings.persistent,
        machine.per_node if copy else 0,
        1 if machine.gpus else 2,
    )


class Training:
    """Plans of training one base on one machine, for any number of slots."""

    def __init__(self, shape: BaseShape, settings: RunShape, machine: Machine, training: Trace, evaluation: Trace) -> None:
        self.shape, self.settings, self.machine = shape, settings, machine
        self._evaluation = evaluation
        self.sharing = sharing(shape, settings, machine)
        self._one, self._two = training(self.work(1)), training(self.work(2))
        self._sizes = self._one.sizes

    def work(self, slots: int) -> Workload:
        settings = self.settings
        return Workload(
            slots, settings.length, settings.rows(self.machine.ranks), settings.tokens, settings.targets, settings.compared
        )

    def plan(self, slots: int) -> TrainingPlan:
        """Memory and time of a step with so many slots."""
        shape, settings, machine = self.shape, self.settings, self.machine
        timeline = self._one.with_slots(self._two, slots)
        sharded = settings.stage == 3 and machine.ranks > 1
        spread = self.sharing if sharded else replace(self.sharing, workers=1)
        found = gather(timeline, spread, shape.itemsize)
        passes = settings.passes(machine.ranks)
        share = 0 if settings.offload else share_numbers(self._sizes, spread) * shape.itemsize
        flops = passes * step_flops(shape, self.work(slots))
        received = passes * found.received
        group = spread.per_node or machine.ranks
        times = {"arithmetic": flops / machine.flops, "gathering": received * (group - 1) / group / machine.bandwidth}
        bound: Any = max(times, key=lambda name: times[name])
        return TrainingPlan(
            slots,
            machine.reserved,
            share + shape.buffers,
            found.gathered,
            timeline.peak,
            found.peak,
            self._evaluated(slots, spread),
            slots * settings.length * shape.width * 4 * STATES,
            0 if machine.gpus else int(HOLES * found.peak),
            received,
            times[bound] if machine.gpus else sum(times.values()),
            flops,
            bound,
            bool(sharded and spread.per_node),
        )

    def _evaluated(self, slots: int, spread: Sharing) -> int:
        """Passes are cut to the same size whatever the number of slots, until one row of each is more than that."""
        settings, shape = self.settings, self.shape
        slots = slots if slots * settings.tokens > TOKENS // 2 else 1
        fitting = min(TOKENS // (slots * settings.tokens), LOGITS // (slots * settings.targets * shape.vocabulary))
        peak = gather(self._pass(slots, max(1, fitting), settings.targets), spread, shape.itemsize).peak
        if settings.new_tokens:
            rows = max(1, TOKENS // (settings.tokens + settings.new_tokens))
            positions = rows * (settings.length + settings.tokens + settings.new_tokens)
            # transformers' cache grows by concatenation, one layer at a time.
            cache = positions * shape.token_numbers * shape.itemsize * (shape.layers + 1) // shape.layers
            peak = max(peak, cache + gather(self._pass(1, rows, 1), spread, shape.itemsize).peak)
        return peak

    def _pass(self, slots: int, rows: int, targets: int) -> Timeline:
        """A pass without gradients."""
        work = Workload(1, self.settings.length, rows, self.settings.tokens, targets)
        one = self._evaluation(work)
        return one.with_slots(self._evaluation(replace(work, slots=2)), slots) if slots > 1 else one

    def most_slots(self, limit: int) -> int:
        """So many fit, `limit` at most; 0 if not even one does."""
        return _most(limit, lambda slots: self.plan(slots).needed <= self.machine.memory)

    def most_slots_in(self, room: int, limit: int) -> int:
        """So many fit into `room` bytes beside a base that is there already."""
        return _most(limit, lambda slots: self.plan(slots).working <= room)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, if all smaller ones do."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class ServingPlan:
    """One replica: memory in bytes, and requests. A replica holds the whole base on one rank."""

    reserved: int
    weights: int
    cache: int
    """Keys and values, as `serve.cache_mb` sets them."""
    bank: int
    """Rows of the bank of soft prompts: it starts with 1,024 and doubles."""
    step: int
    """Activations of a step of 1,024 tokens."""
    room: int
    """Bytes that the cache could have; negative if the replica does not fit."""
    running: int
    """Requests of `length + tokens + new` positions that the cache holds at once."""
    most_running: int
    """The same if the cache takes all the room."""

    @property
    def peak(self) -> int:
        return self.reserved + self.weights + self.cache + self.bank + self.step


def plan_serving(
    shape: BaseShape,
    settings: RunShape,
    machine: Machine,
    evaluation: Trace,
    *,
    cache: int,
    running: int,
    resident: int,
    new: int,
) -> ServingPlan:
    """A replica that answers up to `new` tokens, with `resident` soft prompts, each of which is asked at the moment."""
    positions = settings.tokens
    # A step's tokens may be many requests' prefills or one's; logits are computed for every running request.
    rows = max(1, STEP_TOKENS // positions)
    step = evaluation(Workload(1, settings.length, rows, positions + 1, 1)).peak
    step += running * shape.vocabulary * (shape.itemsize + 4 + 4)
    vectors = 1024
    while vectors < resident * settings.length:
        vectors *= 2
    bank = vectors * shape.width * shape.itemsize
    room = machine.memory - machine.reserved - shape.bytes - bank - step
    page = PAGE * shape.token_numbers * shape.itemsize
    shared = settings.length // PAGE  # whole pages of a soft prompt are there once
    each = -(-(settings.length - shared * PAGE + positions + new) // PAGE)

    def fitting(size: int) -> int:
        return max(0, (size // page - resident * shared) // each)

    return ServingPlan(
        machine.reserved, shape.bytes, cache, bank, step, room, min(running, fitting(cache)), fitting(max(0, room))
    )
