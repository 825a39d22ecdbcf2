"""Simulates which tensors of a partitioned base are gathered when, by DeepSpeed's rules. Arithmetic, without torch.

`meta_model` records the allocations of a pass and when each module needs its tensors. This module replays DeepSpeed's rules for
gathering and releasing tensors on that record, for any number of workers. The same rules determine how much a worker may gather
(`live_numbers`) and whether nodes keep copies (`node_copies_fit`), so `zero` and the plans cannot disagree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Moment:
    """A module starts to need its tensors (fetch) or has used them (release). `peak`: maximum bytes of activations until the
    next moment."""

    kind: Literal["fetch", "release"]
    tensors: tuple[int, ...]
    peak: int
    forward: bool = True


@dataclass(frozen=True)
class Timeline:
    """A pass: its moments in order, and the size of each parameter by its index in the moments, in elements of the compute
    dtype."""

    sizes: tuple[int, ...]
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> int:
        """Peak bytes of activations."""
        return max((moment.peak for moment in self.moments), default=0)

    def with_slots(self, other: Timeline, slots: int) -> Timeline:
        """The pass with `slots` slots, extrapolated from one (self) and two (other): every slot adds the same bytes. If the two
        passes do not have the same moments, every slot is counted like the first, which is more."""
        if [moment.kind for moment in self.moments] != [moment.kind for moment in other.moments]:
            return replace(self, moments=tuple(replace(moment, peak=slots * moment.peak) for moment in self.moments))
        pairs = zip(self.moments, other.moments, strict=True)
        return replace(self, moments=tuple(replace(a, peak=a.peak + (slots - 1) * (b.peak - a.peak)) for a, b in pairs))


@dataclass(frozen=True)
class Sharing:
    """How DeepSpeed partitions a base: workers, and its limits in elements."""

    workers: int
    live: int
    prefetch: int
    persistent: int
    per_node: int = 0
    """Number of workers per node that hold a second copy together; 0: no second copy."""
    copies: int = 1
    """Copies of a gathered tensor in memory while it arrives: gloo first fills its own buffer."""
    whole: int = 0
    """Elements of further tensors that every worker keeps whole."""
    late: int = -1
    """The tensor that is kept last: the input embedding, which is gathered once per pass."""


@dataclass(frozen=True)
class Gathering:
    """Traffic and memory of a step on a rank, in bytes."""

    received: int
    """Gathered per pass, the rank's own part included, as all-gathers count it."""
    gathered: int
    """Peak of gathered tensors, including the buffers they arrive in."""
    peak: int
    """Peak of gathered tensors plus activations."""


def share_bytes(whole: int, workers: int, per_node: int = 0) -> int:
    """Approximate bytes of a base that stay on a rank: its part and, with `per_node`, its part of the node's copy."""
    return whole // workers + (whole // per_node if per_node else 0)


def live_numbers(free: int, share: int, itemsize: int) -> int:
    """Maximum elements of the base that may be gathered at once: a third of the memory that the rank's own part leaves free.

    `free`: free bytes before the base is loaded; `share`: bytes that stay on the rank.
    """
    return max(10_000_000, max(0, free - share) // 3 // itemsize)


def prefetch_numbers(numbers: int, layers: int, live: int) -> int:
    """Elements that are prefetched: about two layers."""
    return min(live, 2 * numbers // max(1, layers))


def nodes_are_even(workers: int, per_node: int) -> bool:
    """True if the workers fill several nodes."""
    return workers > per_node > 1 and workers % per_node == 0


def node_copies_fit(whole: int, workers: int, per_node: int, free: int) -> bool:
    """True if a second copy of the base per node (ZeRO++'s hpZ) leaves a rank half of its memory.

    With it all later gathers stay inside the node; but for a base with 405 B parameters in bf16 each of a node's eight GPUs
    would need 101 GB more.
    """
    return nodes_are_even(workers, per_node) and whole / workers + whole / per_node <= free / 2


def kept_whole(sizes: Sequence[int], small: int, numbers: int = 0, late: int = -1) -> frozenset[int]:
    """The tensors that every rank keeps whole: those of at most `small` elements and, up to `numbers` elements, the first ones
    of the base; the one at `late` is the last."""
    kept = {tensor for tensor, size in enumerate(sizes) if size <= small}
    for tensor in sorted(set(range(len(sizes))) - kept, key=lambda tensor: (tensor == late, tensor)):
        if sizes[tensor] <= numbers:
            kept.add(tensor)
            numbers -= sizes[tensor]
    return frozenset(kept)


def share_numbers(sizes: Sequence[int], sharing: Sharing) -> int:
    """Elements that stay on a rank: its part of every tensor (padded), tensors kept whole, and its part of the node's copy."""
    if sharing.workers == 1:
        return sum(sizes)
    total = sum(sizes[tensor] for tensor in kept_whole(sizes, sharing.persistent, sharing.whole, sharing.late))
    for size in sizes:
        total += -(-size // sharing.workers) + (-(-size // sharing.per_node) if sharing.per_node else 0)
    return total


class _GatherSimulator:
    """DeepSpeed's parameter coordinator (0.19: runtime/zero/partitioned_param_coordinator.py), after it has recorded a pass.

    It fetches a module's tensors, then the next ones (prefetch), with one all-gather each. Several tensors of one all-gather
    arrive in a flat buffer; they are copied out when the first is needed, and the buffer stays until all are copied. A module's
    tensors are released after use unless they are needed again soon.
    """

    def __init__(self, timeline: Timeline, sharing: Sharing, itemsize: int) -> None:
        self.sizes, self.sharing, self.itemsize = timeline.sizes, sharing, itemsize
        self.fetches = [moment for moment in timeline.moments if moment.kind == "fetch"]
        self.queue = deque((tensor, step) for step, moment in enumerate(self.fetches) for tensor in sorted(set(moment.tensors)))
        self.uses: dict[int, list[int]] = {}
        self.before = [0]  # elements of all fetches before a step
        for step, moment in enumerate(self.fetches):
            for tensor in set(moment.tensors):
                self.uses.setdefault(tensor, []).append(step)
            self.before.append(self.before[-1] + sum(self.sizes[tensor] for tensor in set(moment.tensors)))
        self.step = 0
        self.fetched_for: dict[int, int] = {}
        self.available = 0
        self.whole: set[int] = set()  # gathered, usable
        self.numbers = 0  # of these
        self.flights: dict[int, list[int]] = {}  # tensor in flight -> all tensors of its all-gather
        self.buffers: list[tuple[set[int], int]] = []  # tensors that have not been fetched from a flat buffer, its bytes
        self.received = 0
        self.persistent = kept_whole(self.sizes, sharing.persistent, sharing.whole, sharing.late)

    def bytes(self) -> int:
        """Current bytes of gathered tensors and buffers."""
        numbers = self.numbers
        for tensor, group in self.flights.items():  # a single tensor arrives in place, several in a flat buffer
            numbers += self.sizes[tensor] * (self.sharing.copies - (len(group) > 1))
        return numbers * self.itemsize + sum(size for _, size in self.buffers)

    def fetch(self, tensors: Sequence[int]) -> None:
        need = set(tensors)
        self._gather(need - self.whole - self.persistent - set(self.flights))
        for tensor in need:
            self._wait(tensor)
        fresh = {tensor for tensor in need if self.fetched_for.get(tensor, -1) < self.step}
        seen: set[int] = set()
        while self.queue and len(seen) < len(fresh):
            tensor, last = self.queue.popleft()
            self.fetched_for[tensor] = last
            seen.add(tensor)
        most = min(self.sharing.live - self.available, self.sharing.prefetch)
        ahead: set[int] = set()
        numbers = 0
        while self.queue and numbers < most:
            tensor, last = self.queue.popleft()
            self.fetched_for[tensor] = max(self.fetched_for.get(tensor, -1), last)
            if tensor not in ahead | self.whole | self.persistent and tensor not in self.flights:
                ahead.add(tensor)
                numbers += self.sizes[tensor]
        self._gather(ahead)
        self.step += 1

    def _gather(self, tensors: set[int]) -> None:
        if not tensors:
            return
        group = sorted(tensors)
        numbers = sum(self.sizes[tensor] for tensor in group)
        self.available += numbers
        self.received += numbers * self.itemsize
        self.flights |= dict.fromkeys(group, group)
        if len(group) > 1:
            self.buffers.append((set(group), numbers * self.itemsize))

    def _wait(self, tensor: int) -> None:
        for each in self.flights.get(tensor, []):
            self.whole.add(each)
            self.numbers += self.sizes[each]
            del self.flights[each]
        for waiting, _ in self.buffers:
            waiting.discard(tensor)
        self.buffers = [(waiting, size) for waiting, size in self.buffers if waiting]

    def release(self, tensors: Sequence[int]) -> None:
        for tensor in set(tensors):
            if tensor in self.whole and self.fetched_for.get(tensor, -1) <= self.step and not self._needed_soon(tensor):
                self.whole.remove(tensor)
                self.available -= self.sizes[tensor]
                self.numbers -= self.sizes[tensor]

    def _needed_soon(self, tensor: int) -> bool:
        uses = self.uses[tensor]
        at = bisect_left(uses, self.step)
        return at < len(uses) and self.before[uses[at]] - self.before[self.step] < self.sharing.live


def gather(timeline: Timeline, sharing: Sharing, itemsize: int) -> Gathering:
    """Replay a pass. A single worker holds the whole base, and nothing is gathered."""
    if sharing.workers == 1:
        return Gathering(0, 0, timeline.peak)
    gatherer = _GatherSimulator(timeline, sharing, itemsize)
    most = peak = 0
    for moment in timeline.moments:
        getattr(gatherer, moment.kind)(moment.tensors)
        now = gatherer.bytes()
        most, peak = max(most, now), max(peak, now + moment.peak)
    return Gathering(gatherer.received, most, peak)
