"""Memory and time of training and serving, by arithmetic. Without torch and weights.

1 GB is 10^9 bytes. A rank is one worker, with one GPU or a part of a machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ptuning.model.limits import LOGITS, PAGE, STEP_TOKENS, TOKENS, scored_tokens
from ptuning.planning.workload import BaseShape, Machine, RunShape, Trace, Workload
from ptuning.planning.zero3_simulator import (
    Sharing,
    Timeline,
    gather,
    live_numbers,
    node_copies_fit,
    nodes_are_even,
    prefetch_numbers,
    share_bytes,
    share_numbers,
)


@dataclass(frozen=True)
class TrainingPlan:
    """Memory of a rank in bytes, and time, for a step with `slots` slots."""

    slots: int
    reserved: int
    share: int
    """The rank's part of the base, including tensors that are not partitioned."""
    gathered: int
    activations: int
    step: int
    """Peak of gathered tensors plus activations in a step: less than the sum of their peaks if these differ in time."""
    evaluation: int
    """The same for an evaluation, with the keys and values of generated text."""
    soft_prompts: int
    """Soft prompts, the best version of each, gradients and two optimiser moments, all in fp32."""
    holes: int
    """On a CPU: the maximum fragmentation of the C library's heap (`HOLES`). On a GPU torch allocates the memory, and its
    fragmentation is part of `reserved`."""
    received: int
    """Bytes that a rank receives by all-gathers per step, its own part included."""
    seconds: float
    """Lower bound of a step: the maximum of arithmetic and gathering on a GPU, where they overlap; their sum on a CPU."""
    flops: int
    bound: Literal["arithmetic", "gathering"]
    node_copy: bool

    @property
    def peak(self) -> int:
        """Peak bytes on a rank without the fragmentation of the heap."""
        return self.reserved + self.share + max(self.step, self.evaluation) + self.soft_prompts

    @property
    def needed(self) -> int:
        return self.peak + self.holes

    @property
    def working(self) -> int:
        """Of these, the bytes in use after the base is loaded."""
        return self.needed - self.reserved - self.share


MOST_RESIDENT = 10**7
"""More soft prompts than this are not counted."""
HOLES = 1.5
"""Maximum fragmentation of glibc's heap, relative to the memory of a step (measured: 0.5 to 1.4; BENCHMARKS.md)."""

STATES = 9
"""Number of fp32 tensors of the size of a soft prompt: itself, its average, the best version, two moments; in a step its
gradient, its part of the tensor with the gradients of all slots, a copy of that part, and a clipped copy."""


def step_flops(shape: BaseShape, work: Workload, recompute: bool = False) -> int:
    """FLOPs of a step on frozen weights: 2 forward and 2 backward per weight and token. Attention computes the scores again
    in its backward pass: 7 products instead of the forward's 2. `recompute`: the layers run forward once more."""
    own = 0 if work.kv else work.length**2
    looked = work.slots * (own + work.rows * work.fed_per_row * (work.length + work.fed_per_row))
    layers = 6 if recompute else 4
    attention = (9 if recompute else 7) * 2 * shape.layers * shape.attention_width * looked
    read = (layers * shape.last + 4 * (work.compared or shape.vocabulary) * shape.width) * work.predictions
    return layers * shape.inner * work.positions + attention + read


def sharing(shape: BaseShape, settings: RunShape, machine: Machine) -> Sharing:
    """How `zero.derive_config` partitions a base on such a machine."""
    free = machine.memory - machine.reserved
    whole = shape.units * shape.itemsize
    copy = node_copies_fit(whole, machine.ranks, machine.per_node, free)
    if settings.copies is not None:
        copy = settings.copies and nodes_are_even(machine.ranks, machine.per_node)
    share = share_bytes(whole, machine.ranks, machine.per_node if copy else 0) + settings.whole * shape.itemsize
    live = settings.live or live_numbers(free, share, shape.itemsize)
    return Sharing(
        machine.ranks,
        live,
        prefetch_numbers(shape.units, shape.layers, live),
        settings.persistent,
        machine.per_node if copy else 0,
        1 if machine.gpus else 2,
        settings.whole,
        shape.embedding_at,
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
            slots,
            settings.length,
            settings.rows(self.machine.ranks),
            settings.tokens,
            settings.targets,
            settings.compared,
            settings.kv,
        )

    def plan(self, slots: int) -> TrainingPlan:
        """Memory and time of a step with `slots` slots."""
        shape, settings, machine = self.shape, self.settings, self.machine
        timeline = self._one.with_slots(self._two, slots)
        sharded = settings.stage == 3 and machine.ranks > 1
        spread = self.sharing if sharded else replace(self.sharing, workers=1)
        found = gather(timeline, spread, shape.itemsize)
        passes = settings.passes(machine.ranks)
        share = 0 if settings.offload else share_numbers(self._sizes, spread) * shape.itemsize
        flops = passes * step_flops(shape, self.work(slots), settings.recompute)
        received = passes * found.received
        group = spread.per_node or machine.ranks
        rate = machine.inside if spread.per_node and machine.inside else machine.bandwidth
        times = {"arithmetic": flops / machine.flops, "gathering": received * (group - 1) / group / rate}
        bound: Any = max(times, key=lambda name: times[name])
        return TrainingPlan(
            slots,
            machine.reserved,
            share + shape.buffers,
            found.gathered,
            timeline.peak,
            found.peak,
            self._evaluated(slots, spread),
            slots * settings.length * settings.vector_numbers(shape) * 4 * STATES,
            0 if machine.gpus else int(HOLES * found.peak),
            received,
            times[bound] if machine.gpus else sum(times.values()),
            flops,
            bound,
            bool(sharded and spread.per_node),
        )

    def _evaluated(self, slots: int, spread: Sharing) -> int:
        """Passes have the same size for any number of slots, until one row per slot exceeds that size."""
        settings, shape = self.settings, self.shape
        most = scored_tokens(self.machine.gpus)
        slots = slots if slots * settings.tokens > most // 2 else 1
        fitting = min(most // (slots * settings.tokens), LOGITS // (slots * settings.targets * shape.vocabulary))
        peak = gather(self._pass(slots, max(1, fitting), settings.targets), spread, shape.itemsize).peak
        if settings.new_tokens:
            rows = max(1, TOKENS // (settings.tokens + settings.new_tokens))
            positions = rows * (settings.length + settings.tokens + settings.new_tokens)
            # transformers' cache grows by concatenation, layer by layer.
            cache = positions * shape.cached_numbers * shape.itemsize * (shape.layers + 1) // shape.layers
            peak = max(peak, cache + gather(self._pass(1, rows, 1), spread, shape.itemsize).peak)
        return peak

    def _pass(self, slots: int, rows: int, targets: int) -> Timeline:
        """A pass without gradients."""
        work = Workload(1, self.settings.length, rows, self.settings.tokens, targets, kv=self.settings.kv)
        one = self._evaluation(work)
        return one.with_slots(self._evaluation(replace(work, slots=2)), slots) if slots > 1 else one

    def most_slots(self, limit: int) -> int:
        """The number of slots that fit, at most `limit`; 0 if not even one fits."""
        return _most(limit, lambda slots: self.plan(slots).needed <= self.machine.memory)

    def most_slots_in(self, room: int, limit: int) -> int:
        """The number of slots that fit into `room` bytes if the base is already loaded."""
        return _most(limit, lambda slots: self.plan(slots).working <= room)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, assuming that all smaller ones fit."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class VllmRows:
    """Soft prompts that vLLM serves: it reserves rows for their virtual tokens when it starts."""

    rows: int
    """As set by `serve.rows`."""
    bytes: int
    """Of these rows, on each of the `serve.tensor_parallel` ranks."""
    resident: int
    """Soft prompts of this length that the rows hold."""
    most_rows: int
    """Rows that fit beside the rest; negative if not even the rest fits."""
    most_resident: int


@dataclass(frozen=True)
class ServingPlan:
    """One replica: memory in bytes, and requests. A replica holds the whole base on one rank."""

    reserved: int
    weights: int
    cache: int
    """Keys and values, as set by `serve.cache_mb`."""
    bank: int
    """Rows of the bank of soft prompts: it starts with 1,024 and doubles. Also the keys and values of key-value prefixes."""
    step: int
    """Activations of a step of 1,024 tokens."""
    room: int
    """Bytes available for the cache; negative if the replica does not fit."""
    running: int
    """Number of requests with `length + tokens + new` positions that fit into the cache."""
    most_running: int
    """The same if the cache uses all available memory."""
    resident: int
    """Soft prompts of this kind and length that fit beside the rest, with transformers."""
    at_once: int | None
    """Of these in memory at once under `serve.resident_mb`, the others being read from disk when they are asked; None: no limit
    is set."""
    vllm: VllmRows | None
    """The same with vLLM; None: it does not serve this kind."""

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
    rows: int,
    parallel: int,
    limit: int | None = None,
) -> ServingPlan:
    """A replica that generates up to `new` tokens, with `resident` soft prompts, all in use. `rows`, `parallel`: rows and
    ranks of vLLM. `limit`: bytes of `serve.resident_mb`, which its soft prompts grow up to."""
    positions = settings.tokens
    # The tokens of a step may belong to one prefill or to many; logits are computed for every running request.
    together = max(1, STEP_TOKENS // positions)
    step = evaluation(Workload(1, settings.length, together, positions + 1, 1)).peak
    step += running * shape.vocabulary * (shape.itemsize + 4 + 4)
    kv = "kv" in settings.kinds

    def bank_of(many: int) -> int:
        vectors = 1024
        while vectors < many * settings.length:
            vectors *= 2
        found = vectors * shape.width * shape.itemsize
        if kv:  # beside the pages with the same numbers, which may be dropped
            found += many * settings.length * shape.token_numbers * shape.itemsize
        return found

    at_once = None
    if limit is not None:
        numbers = settings.length * (shape.token_numbers if kv else shape.width)
        at_once = limit // (numbers * shape.itemsize)
        resident = max(1, at_once)
    bank = bank_of(resident)
    beside = machine.memory - machine.reserved - shape.bytes - step
    room = beside - bank
    page = PAGE * max(1, shape.token_numbers) * shape.itemsize  # a state space has no keys and values
    shared = settings.length // PAGE  # whole pages of a soft prompt are stored once
    each = -(-(settings.length - shared * PAGE + positions + new) // PAGE)

    def fitting(size: int) -> int:
        return max(0, (size // page - resident * shared) // each)

    return ServingPlan(
        machine.reserved,
        shape.bytes,
        cache,
        bank,
        step,
        room,
        min(running, fitting(cache)),
        fitting(max(0, room)),
        _most(MOST_RESIDENT, lambda many: bank_of(many) <= beside - cache),
        at_once,
        None if kv else _vllm_rows(shape, settings.length, rows, parallel, beside + shape.bytes - cache),
    )


def _vllm_rows(shape: BaseShape, length: int, rows: int, parallel: int, memory: int) -> VllmRows:
    """`memory`: bytes on each rank for its parts of the base and of the rows."""
    row = shape.width * shape.itemsize / parallel
    most = int((memory - shape.bytes / parallel) // row)
    return VllmRows(rows, int(rows * row), rows // length, most, max(0, most) // length)
