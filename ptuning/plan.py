"""What fits where, and how fast: memory and time of training and serving, by arithmetic. No torch, no weights.

`blueprint` writes down what a pass over a base allocates and which module needs its weights when; here DeepSpeed's rules for
gathering and releasing them are replayed on it, for any number of workers. The same rules choose how much a worker may
gather (`live_numbers`) and whether nodes keep copies (`node_copies_fit`), so `zero` and the plan cannot disagree.

Bytes are bytes, GB are 10^9 of them. A rank is one worker, with a GPU or a share of a machine's memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ptuning.config import Experiment

MOST_SLOTS = 32
"""Soft prompts that train side by side, at most."""
PAGE = 16
"""Tokens of a page of the cache. Whole pages are shared; transformers' default of 256 would share no soft prompt."""
STEP_TOKENS = 1024
"""Tokens in one step of a serving replica; longer prefills are spread over several."""
TOKENS = 8192
"""Tokens in one pass of an evaluation, about: a bound on activations."""
LOGITS = 1 << 26
"""Logits in one pass of an evaluation, at most: 256 MiB in fp32."""


@dataclass(frozen=True)
class Shape:
    """A base, as far as plans need it."""

    numbers: int
    """All parameters, tied ones once."""
    embedding: int
    """Of these, in the input embedding."""
    head: int
    """Of these, in the output head; 0 where it is tied to the embedding."""
    width: int
    layers: int
    vocabulary: int
    attention_width: int
    """Query heads times their width."""
    token_numbers: int
    """Numbers of one token's keys and values in all layers."""
    itemsize: int
    """Bytes of a number as it is computed in."""
    buffers: int = 0
    """Bytes of what is no parameter and whole on every rank."""

    @property
    def inner(self) -> int:
        """Parameters that every token goes through: all but embedding and head."""
        return self.numbers - self.embedding - self.head

    @property
    def bytes(self) -> int:
        return self.numbers * self.itemsize + self.buffers


@dataclass(frozen=True)
class Workload:
    """One pass of one rank: `slots` soft prompts of `length` vectors, each with `rows` rows of `tokens` tokens (input and
    target) of which `targets` are predicted."""

    slots: int
    length: int
    rows: int
    tokens: int
    targets: int

    @property
    def fed(self) -> int:
        """Tokens of text that go through the base; the last target token is predicted but never fed."""
        return self.slots * self.rows * (self.tokens - 1)

    @property
    def positions(self) -> int:
        return self.slots * self.length + self.fed

    @property
    def predictions(self) -> int:
        return self.slots * self.rows * self.targets


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


class _Gatherer:
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
    gatherer = _Gatherer(timeline, sharing, itemsize)
    most = peak = 0
    for moment in timeline.moments:
        getattr(gatherer, moment.kind)(moment.tensors)
        now = gatherer.bytes()
        most, peak = max(most, now), max(peak, now + moment.peak)
    return Gathering(gatherer.received, most, peak)


@dataclass(frozen=True)
class Machine:
    """The ranks that a plan is for."""

    ranks: int
    memory: int
    """Bytes of each rank."""
    per_node: int
    """Ranks of one node."""
    bandwidth: float
    """Bytes a second that a rank can receive from the others."""
    flops: float
    """Operations a second that a rank really computes in the base's dtype."""
    gpus: bool = True

    @property
    def reserved(self) -> int:
        """Bytes that are taken before the base: on a GPU the CUDA context, NCCL's buffers and cuBLAS's workspaces (an estimate,
        not measured here), on a CPU the libraries (measured: 0.62 GB of private memory after the imports)."""
        return 1_500_000_000 if self.gpus else 650_000_000


@dataclass(frozen=True)
class Settings:
    """What an experiment decides about memory."""

    length: int
    tokens: int
    """Longest row in tokens, input and target."""
    targets: int
    """Of these, target tokens with the end token."""
    batch: int
    """Rows of a step over all ranks."""
    micro_batch: int | None = None
    new_tokens: int = 0
    """Tokens that evaluation generates; 0 where labels are scored."""
    live: int | None = None
    persistent: int = 10_000
    stage: int = 3
    offload: bool = False

    @staticmethod
    def read(experiment: Experiment, tokens: int, targets: int) -> Settings:
        """Those of an experiment with rows of so many tokens; a search plans for its longest soft prompts."""
        train, zero = experiment.train, experiment.zero
        return Settings(
            experiment.prompt.length,
            tokens,
            targets,
            train.batch_size,
            train.micro_batch_size,
            0 if experiment.data.labels else targets,
            zero.live_parameters,
            zero.persistent_below,
            zero.stage,
            zero.offload,
        )

    def rows(self, ranks: int) -> int:
        """Rows of one pass on a rank."""
        share = -(-self.batch // ranks)
        if self.micro_batch is None or share <= self.micro_batch:
            return share
        return -(-share // -(-share // self.micro_batch))

    def passes(self, ranks: int) -> int:
        share = -(-self.batch // ranks)
        return -(-share // (self.micro_batch or share))


Trace = Callable[[Workload], Timeline]
"""Writes down a pass (`Blueprint.training`, `Blueprint.evaluation`)."""


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
    """On a CPU: what the C library's heap may keep between tensors, at most about as much as the activations (measured: 0.4
    to 1.0 of them). GPU memory is handed out by torch, whose own holes are part of `reserved`."""
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


STATES = 8
"""Tensors like a soft prompt in fp32: itself, the best so far, two moments; in a step its gradient, that of all slots in one
tensor, its part of it, and a clipped copy."""


def step_flops(shape: Shape, work: Workload) -> int:
    """FLOPs of a step on frozen weights: 2 forward and 2 backward per weight and token. Attention computes the scores again
    in its backward pass: 7 products instead of the forward's 2."""
    looked = work.slots * (work.length**2 + work.rows * (work.tokens - 1) * (work.length + work.tokens - 1))
    attention = 7 * 2 * shape.layers * shape.attention_width * looked
    return 4 * shape.inner * work.positions + attention + 4 * shape.vocabulary * shape.width * work.predictions


def sharing(shape: Shape, settings: Settings, machine: Machine) -> Sharing:
    """How `zero.derive_config` spreads a base over such a machine."""
    free = machine.memory - machine.reserved
    whole = shape.numbers * shape.itemsize
    copy = node_copies_fit(whole, machine.ranks, machine.per_node, free)
    share = whole // machine.ranks + (whole // machine.per_node if copy else 0)
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

    def __init__(self, shape: Shape, settings: Settings, machine: Machine, training: Trace, evaluation: Trace) -> None:
        self.shape, self.settings, self.machine = shape, settings, machine
        self._evaluation = evaluation
        self.sharing = sharing(shape, settings, machine)
        self._one, self._two = training(self.work(1)), training(self.work(2))
        self._sizes = self._one.sizes

    def work(self, slots: int) -> Workload:
        settings = self.settings
        return Workload(slots, settings.length, settings.rows(self.machine.ranks), settings.tokens, settings.targets)

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
            0 if machine.gpus else timeline.peak,
            received,
            times[bound] if machine.gpus else sum(times.values()),
            flops,
            bound,
            bool(sharded and spread.per_node),
        )

    def _evaluated(self, slots: int, spread: Sharing) -> int:
        settings, shape = self.settings, self.shape
        fitting = min(TOKENS // (slots * settings.tokens), LOGITS // (slots * settings.targets * shape.vocabulary))
        work = Workload(slots, settings.length, max(1, fitting), settings.tokens, settings.targets)
        peak = gather(self._evaluation(work), spread, shape.itemsize).peak
        if settings.new_tokens:
            rows = max(1, TOKENS // (settings.tokens + settings.new_tokens))
            positions = rows * (settings.length + settings.tokens + settings.new_tokens)
            # transformers' cache grows by concatenation, one layer at a time.
            cache = positions * shape.token_numbers * shape.itemsize * (shape.layers + 1) // shape.layers
            work = replace(work, slots=1, rows=rows, targets=1)
            peak = max(peak, cache + gather(self._evaluation(work), spread, shape.itemsize).peak)
        return peak

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


def heaviest_rows(lengths: Sequence[int], batch: int) -> int:
    """Tokens of the rows of the heaviest batch, in the mean: rows of about the same length share a batch."""
    longest = sorted(lengths)[-batch:]
    return -(-sum(longest) // len(longest))


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
    shape: Shape, settings: Settings, machine: Machine, evaluation: Trace, *, cache: int, running: int, resident: int, new: int
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
