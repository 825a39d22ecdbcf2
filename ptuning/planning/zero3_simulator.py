"""Which tensors of a sharded base are gathered when: DeepSpeed's rules, replayed on what a pass needs. Arithmetic, no torch.

`meta_model` writes down what a pass over a base allocates and which module needs its tensors when; here DeepSpeed's rules for
gathering and releasing them are replayed on it, for any number of workers. The same rules choose how much a worker may
gather (`live_numbers`) and whether nodes keep copies (`node_copies_fit`), so `zero` and the plans cannot disagree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Moment:
    """A module begins to need its own tensors (fetch) or has used them (release); `peak` bytes of activations at most until
    the next moment."""

    kind: Literal["fetch", "release"]
    tensors: tuple[int, ...]
    peak: int
    forward: bool = True


@dataclass(frozen=True)
class Timeline:
    """A pass: its moments in order, and the numbers of every parameter by its index in the moments."""

    sizes: tuple[int, ...]
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> int:
        """Most bytes of activations at once."""
        return max((moment.peak for moment in self.moments), default=0)

    def with_slots(self, other: Timeline, slots: int) -> Timeline:
        """The same pass with so many slots, from those with one (self) and two (other): every slot adds the same bytes."""
        pairs = zip(self.moments, other.moments, strict=True)
        return replace(self, moments=tuple(replace(a, peak=a.peak + (slots - 1) * (b.peak - a.peak)) for a, b in pairs))


@dataclass(frozen=True)
class Sharing:
    """How DeepSpeed spreads a base: workers, and its limits in numbers."""

    workers: int
    live: int
    prefetch: int
    persistent: int
    per_node: int = 0
    """Workers of a node that keep a second copy together; 0: none."""
    copies: int = 1
    """Times that a gathered tensor is in memory while it arrives: gloo fills a buffer of its own first."""


@dataclass(frozen=True)
class Gathering:
    """What a step brings to a rank and what it takes there, in bytes."""

    received: int
    """Gathered per pass, the rank's own share included, as all-gathers count it."""
    gathered: int
    """Most gathered tensors at once, with the buffers they arrive in."""
    peak: int
    """Most gathered tensors and activations at once."""


def share_bytes(whole: int, workers: int, per_node: int = 0) -> int:
    """Bytes of a base that stay on a rank, about: its part, and with `per_node` its part of the node's copy."""
    return whole // workers + (whole // per_node if per_node else 0)


def live_numbers(free: int, share: int, itemsize: int) -> int:
    """Numbers of the base that may be gathered at once: a third of what is left when the rank's own share is there.

    `free`: bytes before the base is loaded; `share`: bytes that stay on the rank.
    """
    return max(10_000_000, max(0, free - share) // 3 // itemsize)


def prefetch_numbers(numbers: int, layers: int, live: int) -> int:
    """Numbers that are fetched ahead: about two layers."""
    return min(live, 2 * numbers // max(1, layers))


def node_copies_fit(whole: int, workers: int, per_node: int, free: int) -> bool:
    """Whether a second copy of the base per node (ZeRO++'s hpZ) leaves a rank half of its memory for the rest.

    All later gathers then stay inside the node; but for a base of 405 B in bf16 each of a node's eight GPUs would have to
    hold 101 GB more.
    """
    return workers > per_node > 1 and whole / workers + whole / per_node <= free / 2


def share_numbers(sizes: Iterable[int], sharing: Sharing) -> int:
    """Numbers that stay on a rank: its part of every tensor (padded), small ones whole, and its part of the node's copy."""
    total = 0
    for size in sizes:
        part = -(-size // sharing.workers)
        total += part + (-(-size // sharing.per_node) if sharing.per_node else 0)
        if size <= sharing.persistent and sharing.workers > 1:
            total += size
    return total


class _GatherSimulator:
    """DeepSpeed's parameter coordinator (0.19: runtime/zero/partitioned_param_coordinator.py), once it knows a pass by heart.

    It fetches a module's tensors, then those that come next (prefetch), in one all-gather each; several in one arrive in a
    flat buffer, are copied out of it when the first of them is needed, and the buffer stays until all were. It releases
    a module's tensors after use, unless they are needed again soon.
    """

    def __init__(self, timeline: Timeline, sharing: Sharing, itemsize: int) -> None:
        self.sizes, self.sharing, self.itemsize = timeline.sizes, sharing, itemsize
        self.fetches = [moment for moment in timeline.moments if moment.kind == "fetch"]
        self.queue = deque((tensor, step) for step, moment in enumerate(self.fetches) for tensor in sorted(set(moment.tensors)))
        self.uses: dict[int, list[int]] = {}
        self.before = [0]  # numbers of all fetches before a step
        for step, moment in enumerate(self.fetches):
            for tensor in set(moment.tensors):
                self.uses.setdefault(tensor, []).append(step)
            self.before.append(self.before[-1] + sum(self.sizes[tensor] for tensor in set(moment.tensors)))
        self.step = 0
        self.fetched_for: dict[int, int] = {}
        self.available = 0
        self.whole: set[int] = set()  # gathered, usable
        self.numbers = 0  # of these
        self.flights: dict[int, list[int]] = {}  # tensor on its way -> all tensors of its all-gather
        self.buffers: list[tuple[set[int], int]] = []  # tensors that have not been fetched from a flat buffer, its bytes
        self.received = 0
        self.persistent = {tensor for tensor, size in enumerate(self.sizes) if size <= sharing.persistent}

    def bytes(self) -> int:
        """Gathered tensors and buffers now."""
        numbers = self.numbers
        for tensor, group in self.flights.items():  # one alone arrives in its own place, several in a flat buffer
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
    """Replay a pass; a single worker has everything, and nothing is gathered."""
    if sharing.workers == 1:
        return Gathering(0, 0, timeline.peak)
    gatherer = _GatherSimulator(timeline, sharing, itemsize)
    most = peak = 0
    for moment in timeline.moments:
        getattr(gatherer, moment.kind)(moment.tensors)
        now = gatherer.bytes()
        most, peak = max(most, now), max(peak, now + moment.peak)
    return Gathering(gatherer.received, most, peak)
