"""[train] and [zero]: training of one soft prompt, and how DeepSpeed partitions the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ptuning.settings.fields import Count, Metric, Number, Positive, PositiveNumber, Share, Table

TEXT_WEIGHT = 0.3
"""Measured (BENCHMARKS.md, "Labels as a choice"): it raises the accuracy of one-token labels and makes free generation produce
them."""
AVERAGE_DECAY = 0.95
"""Measured (BENCHMARKS.md, "The average of the vectors")."""
RATE = 0.8
"""Learning rate in units of the base's embeddings. Measured (BENCHMARKS.md, "The learning rate and the base")."""
KV_RATE = 0.1
"""Learning rate of a key-value prefix. A base computes keys and values from normalised states, so the size of its embeddings
says little of theirs."""


Objective = Literal["choice", "text", "distill"]


class TrainConfig(Table):
    """Training of one soft prompt."""

    objective: Literal["auto"] | Objective = "auto"
    """choice: cross-entropy over the labels, as evaluation and serving read them; text: cross-entropy of every target token
    over the whole vocabulary, as in PEFT; distill: cross-entropy to the distribution of the base behind `data.teacher`, over
    the labels, or over the vocabulary at every token of the answer; auto: distill with a teacher, else choice if there are
    labels, else text."""
    text_weight: Annotated[float, Field(ge=0, le=1, strict=True)] | Literal["auto"] = "auto"
    """With objective = "choice": weight of an additional text objective. It makes unconstrained generation (PEFT's generate,
    merged checkpoints) produce the label, too. auto: 0.3 if every label is one token of the base, else 0, because learning to
    spell a label costs accuracy."""
    average_decay: Annotated[float, Field(ge=0, lt=1, strict=True)] | Literal["auto"] = "auto"
    """What is evaluated and kept is an exponential average of the vectors over the steps, with this decay (Polyak and Juditsky
    1992); 0: the vectors of the last step. auto: 0.95, an average over about 20 steps, if labels are compared, else 0."""
    class_weights: Literal["balanced"] | None = None
    """balanced: every label has the same weight in the loss, regardless of its number of rows. The predicted probabilities then
    assume that all labels are equally frequent."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30, strict=True)] | Literal["auto"] = "auto"
    """Peak learning rate. AdamW moves every number of the vectors by about this much per step, so what is right depends on the
    size of the base's embeddings. auto: 0.8 of their typical root mean square, to one digit; 0.1 for key-value prefixes."""
    learning_rate_multiplier: PositiveNumber = 1.0
    """Factor of the learning rate."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Optimizer of the soft prompt; the base has none."""
    weight_decay: Number = 0.0
    """Decoupled weight decay of the soft prompt."""
    starts: Annotated[int, Field(gt=0, le=32, strict=True)] = 1
    """Number of initialisations (different seeds) that train side by side for the first fifth of the steps. The one that is
    best on the validation rows (without them: on the training rows) continues. In a search every trial has one."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup: Share = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    batch_size: Positive = 16
    """Rows per step, summed over all workers."""
    micro_batch_size: Positive | None = None
    """Maximum rows per worker in one pass. A larger part of the batch is split into several passes. Default: one pass."""
    steps: Count = 300
    """Optimizer updates. The learning-rate schedule ends at the last one. 0 if `epochs` is set, until the rows are counted."""
    epochs: PositiveNumber | None = None
    """Passes over the training rows, instead of steps."""
    evaluate_every: Positive = 50
    """Steps between evaluations on the validation rows."""
    patience: Positive | None = None
    """Stop after this many evaluations in a row without improvement."""
    metric: Metric | None = None
    """Validation metric that selects the best step. Default: accuracy if there are labels and no teacher, else loss. Between
    accuracies that differ by less than a standard error from the highest, the loss decides."""
    clip: Number = 1.0
    """Maximum gradient norm of a soft prompt; 0 disables clipping."""
    checkpoint_every: Positive = 20
    """Steps between checkpoints. A crash loses at most this many steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about half more compute."""
    seed: Count = 0
    """Seed of the initialisation and of the order of the rows."""

    @model_validator(mode="before")
    @classmethod
    def _steps_are_left_to_epochs(cls, tables: Any) -> Any:
        if isinstance(tables, Mapping) and tables.get("epochs") is not None and "steps" not in tables:
            return {**tables, "steps": 0}
        return tables

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.epochs is not None and self.steps:
            raise ValueError("epochs: train.steps is set, too; set only one of them")
        if self.epochs is None and not self.steps:
            raise ValueError("steps: input should be greater than 0 (got 0); change the value")
        return self

    def with_learning_rate(self, size: float | None) -> TrainConfig:
        """These settings with the learning rate as a number. `size`: typical root mean square of the base's embeddings; None:
        the soft prompt is a key-value prefix."""
        usual = self.learning_rate
        if usual == "auto":
            usual = KV_RATE if size is None else float(f"{RATE * size:.1g}")
        changes = {"learning_rate": usual * self.learning_rate_multiplier, "learning_rate_multiplier": 1.0}
        return self.model_copy(update=changes)

    @property
    def peak(self) -> float:
        """The peak learning rate of settings that have it as a number."""
        assert self.learning_rate != "auto"
        return self.learning_rate * self.learning_rate_multiplier

    def resolved_text_weight(self, target_tokens: int) -> float:
        """The weight of the text objective. `target_tokens`: tokens of the longest label, its end token included."""
        if self.text_weight == "auto":
            return TEXT_WEIGHT if target_tokens <= 2 else 0.0
        return self.text_weight

    def resolved_average_decay(self, chooses: bool) -> float:
        """The decay of the average of the vectors; 0: none. `chooses`: labels are compared."""
        if self.average_decay == "auto":
            return AVERAGE_DECAY if chooses else 0.0
        return self.average_decay


class ZeroConfig(Table):
    """How DeepSpeed ZeRO partitions the frozen base over the workers. All other DeepSpeed settings are derived."""

    stage: Literal["auto", 0, 3] = "auto"
    """0: every worker holds the whole base; 3: the base is partitioned over the workers; auto: whole if that fits beside its
    activations, else partitioned, with as many tensors whole on every worker, or as many copies per node, as memory allows."""
    offload: bool = False
    """Keep the partitions of the base in CPU memory (GPU workers only)."""
    live_parameters: Positive | None = None
    """Maximum parameters of the base that are gathered at once on a worker. Default: depends on the free memory."""
    persistent_below: Count = 10_000
    """Tensors with fewer elements than this (norms, biases) are not partitioned."""
    persistent_parameters: Count | None = None
    """Parameters of a partitioned base that every worker keeps whole after their first use, besides these small tensors: they
    are not gathered again. Default: 0; stage = "auto" chooses it."""
    node_copies: bool | None = None
    """A second copy of a partitioned base per node, if all nodes have the same number of workers: gathers then stay inside the
    nodes. Default: if it leaves half of the memory; stage = "auto" chooses it."""
