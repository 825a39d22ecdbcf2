"""Input of a capacity plan: the base's shape, one pass, the machine, and the settings that affect memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ptuning.config import Experiment
from ptuning.planning.zero3_simulator import Timeline
from ptuning.settings.fields import Kind

LABEL_TOKENS = 4
"""Tokens of a label, where they are not known."""


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base that plans need."""

    numbers: int
    """All parameters; tied ones count once."""
    units: int
    """Elements of the compute dtype that take the memory of all parameters: fewer where some are stored in 8 bits."""
    embedding: int
    """Of the parameters, in the input embedding."""
    head: int
    """Of these, in the output head; 0 where it is tied to the embedding."""
    last: int
    """Of the last layer, the parameters that are applied only where a token is predicted (`LastLayer`)."""
    width: int
    layers: int
    vocabulary: int
    attention_width: int
    """Query heads times their width, averaged over the layers."""
    token_numbers: int
    """Elements of one token's keys and values in all layers, as the engine's pages store them."""
    cached_numbers: int
    """The same in the base's own cache, which evaluation uses for generated text."""
    itemsize: int
    """Bytes per element in the compute dtype."""
    buffers: int = 0
    """Bytes of buffers, which are not parameters and are whole on every rank."""
    embedding_at: int = -1
    """Index of the input embedding among all parameters."""

    @property
    def inner(self) -> int:
        """Parameters that are applied to every token."""
        return self.numbers - self.embedding - self.head - self.last

    @property
    def bytes(self) -> int:
        return self.units * self.itemsize + self.buffers


@dataclass(frozen=True)
class Workload:
    """One pass of one rank: `slots` soft prompts of `length` vectors, each with `rows` rows of `tokens` tokens (input and
    target) of which `targets` are predicted."""

    slots: int
    length: int
    rows: int
    tokens: int
    targets: int
    compared: int = 0
    """Token ids that a choice among labels compares; 0: every target token is predicted over the whole vocabulary."""
    kv: bool = False
    """The soft prompts are key-value prefixes: the base does not process their tokens."""

    @property
    def fed_per_row(self) -> int:
        """Tokens of a row that the base processes. The last target token is predicted but never fed. For a choice among labels,
        neither the end token nor the token before it (the latest possible choice) is fed."""
        return self.tokens - (2 if self.compared else 1)

    @property
    def fed(self) -> int:
        """Tokens of text that the base processes."""
        return self.slots * self.rows * self.fed_per_row

    @property
    def positions(self) -> int:
        return self.fed if self.kv else self.slots * self.length + self.fed

    @property
    def predictions(self) -> int:
        return self.slots * self.rows * (1 if self.compared else self.targets)


@dataclass(frozen=True)
class Machine:
    """The ranks that a plan is for."""

    ranks: int
    memory: int
    """Bytes of each rank."""
    per_node: int
    """Ranks of one node."""
    bandwidth: float
    """Bytes per second that a rank can receive from the others."""
    flops: float
    """Operations per second that a rank achieves in the base's dtype."""
    gpus: bool = True
    inside: float | None = None
    """Bytes per second from the ranks of the same node; None: as `bandwidth`."""

    @property
    def reserved(self) -> int:
        """Bytes in use before the base is loaded: on a GPU the CUDA context, NCCL's buffers and cuBLAS's workspaces (an
        estimate, not measured), on a CPU the libraries (measured: 0.62 GB of private memory after the imports)."""
        return 1_500_000_000 if self.gpus else 650_000_000


@dataclass(frozen=True)
class RunShape:
    """Settings of an experiment that affect memory."""

    length: int
    tokens: int
    """Longest row in tokens, input and target."""
    targets: int
    """Of these, target tokens with the end token."""
    batch: int
    """Rows of a step, summed over all ranks."""
    micro_batch: int | None = None
    new_tokens: int = 0
    """Tokens that evaluation generates; 0 if labels are scored."""
    compared: int = 0
    """Maximum token ids that a choice among labels compares; 0: the objective is text."""
    live: int | None = None
    persistent: int = 10_000
    stage: Literal["auto", 0, 3] = 3
    """auto: not yet decided (`placement.place`)."""
    whole: int = 0
    """Elements of a partitioned base that every rank keeps whole, besides tensors of at most `persistent`."""
    copies: bool | None = None
    """A second copy of the base per node; None: if it leaves half of the memory."""
    offload: bool = False
    recompute: bool = False
    """Activations are computed again in the backward pass."""
    kinds: tuple[Kind, ...] = ("embedding",)
    """The kinds of soft prompt: the plan is for the one that needs most."""

    @property
    def kv(self) -> bool:
        """No soft prompt is computed."""
        return "embedding" not in self.kinds

    def vector_numbers(self, shape: BaseShape) -> int:
        """Elements of a virtual token."""
        return max(shape.token_numbers, shape.width) if "kv" in self.kinds else shape.width

    @staticmethod
    def read(experiment: Experiment, tokens: int, targets: int) -> RunShape:
        """The settings of an experiment whose rows have this many tokens; a search plans for its longest soft prompts."""
        train, zero = experiment.train, experiment.zero
        return RunShape(
            experiment.prompt.length,
            tokens + all_labels(experiment, targets),
            targets,
            train.batch_size,
            train.micro_batch_size,
            0 if experiment.data.labels else targets,
            compared(experiment, targets),
            zero.live_parameters,
            zero.persistent_below,
            zero.stage,
            zero.persistent_parameters or 0,
            zero.node_copies,
            zero.offload,
            train.gradient_checkpointing,
            (experiment.prompt.kind,),
        )

    @staticmethod
    def of_rows(experiment: Experiment, lengths: Sequence[int], targets: Sequence[int]) -> RunShape:
        """The settings of an experiment whose rows have these lengths and target lengths, for its heaviest batch. Rows that a
        teacher answers have no targets yet."""
        batch = experiment.train.batch_size
        if not any(targets):
            many = LABEL_TOKENS if experiment.data.labels else experiment.data.teacher_tokens
            lengths, targets = [length + many for length in lengths], [many] * len(targets)
        return RunShape.read(experiment, heaviest_rows(lengths, batch), heaviest_rows(targets, batch))

    def rows(self, ranks: int) -> int:
        """Rows of one pass on a rank."""
        share = -(-self.batch // ranks)
        if self.micro_batch is None or share <= self.micro_batch:
            return share
        return -(-share // -(-share // self.micro_batch))

    def passes(self, ranks: int) -> int:
        share = -(-self.batch // ranks)
        return -(-share // (self.micro_batch or share))


def compared(experiment: Experiment, targets: int) -> int:
    """Token ids that a step compares if it only chooses among labels: a tree with n leaves has fewer than 2n edges. `targets`:
    tokens of the longest label."""
    only = experiment.chooses and (experiment.objective == "distill" or not experiment.train.resolved_text_weight(targets))
    return 2 * len(experiment.data.labels or ()) if only else 0


def all_labels(experiment: Experiment, targets: int) -> int:
    """Tokens that a row has in addition if all labels are predicted after it, as a teacher's are: at most those inside every
    other label. `targets`: tokens of the longest label."""
    if experiment.objective != "distill" or not experiment.data.labels:
        return 0
    return (len(experiment.data.labels) - 1) * max(0, targets - 2)


Trace = Callable[[Workload], Timeline]
"""Records a pass (`MetaModel.training`, `MetaModel.evaluation`, which cache their results)."""


def heaviest_rows(lengths: Sequence[int], batch: int) -> int:
    """Mean tokens of the rows in the heaviest batch."""
    longest = sorted(lengths)[-batch:]
    return -(-sum(longest) // len(longest))
