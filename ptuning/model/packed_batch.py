"""One packed forward pass: the tokens to feed and the positions of the predictions. `packing` makes it.

Shapes: K slots, P soft-prompt tokens, N packed tokens, M predictions over the vocabulary, M' choices, Q comparisons of a
node's children (at most C), U tokens that occur in any comparison.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ptuning.model.cascade_attention import Level, levels
from ptuning.model.token_tree import TokenTree
from ptuning.model.transfer import moved


@dataclass(frozen=True)
class Choices:
    """Predictions over the children of label trie nodes. Nodes are numbered over the tries of all slots."""

    at: Tensor
    """`[Q]` packed positions where the children of a node are compared."""
    node: Tensor
    """`[Q]` number of the node."""
    children: Tensor
    """`[nodes, C]` columns of `ids`, padded with -1."""
    ids: Tensor
    """`[U]` ascending token ids of all children."""
    asked: Tensor
    """`[M']` index of the comparison (of Q) that a prediction belongs to."""
    child: Tensor
    """`[M']` the predicted child."""
    per_slot: list[int]

    @cached_property
    def columns(self) -> Tensor:
        """`[Q, C]` columns of `ids`, 0 for what is not there."""
        return self.children.clamp(min=0)[self.node]

    @cached_property
    def hidden(self) -> Tensor:
        """`[Q, C]`, True where a node has fewer children."""
        return (self.children < 0)[self.node]

    @cached_property
    def chosen(self) -> Tensor:
        """`[M']` place of each predicted child in the flattened `[Q, C]`."""
        return self.asked * self.children.shape[1] + self.child


@dataclass(frozen=True)
class Candidates:
    """Shares of other tokens in predictions over the vocabulary: the loss of such a prediction is the cross-entropy to a
    distribution instead of the target alone."""

    of: Tensor
    """`[S]` number of the prediction (of M)."""
    ids: Tensor
    """`[S]` a token."""
    shares: Tensor
    """`[S]` its probability, fp32. Those of a prediction sum to 1."""


@dataclass(frozen=True)
class PlacedBatch:
    """What a pass reads of a `PackedBatch`, on the device that computes it."""

    tokens: Tensor
    positions: Tensor
    """`[N]` position of every token in its own sequence."""
    kept: Tensor
    read: Tensor
    targets: Tensor
    rows: Tensor | None
    """`[M]` row of the logits of `kept` for each prediction over the vocabulary; None: they are in this order."""
    choice_rows: Tensor
    """`[Q]` the same for each comparison; the next four are those of `Choices`, empty without any."""
    ids: Tensor
    columns: Tensor
    hidden: Tensor
    chosen: Tensor
    candidates: Candidates | None
    levels: list[Level] | None
    """The calls of `cascade_attention`."""


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass: `tokens` [N - sum of P] text ids after the soft prompts; predictions `targets` [M] over the whole
    vocabulary at the packed positions `at` [M], and their number per slot; then the choices among labels."""

    segments: TokenTree
    tokens: Tensor
    at: Tensor
    targets: Tensor
    per_slot: list[int]
    choices: Choices | None = None
    candidates: Candidates | None = None
    read: Tensor | None = None
    """`[U]` packed positions at which the last layer is computed; None: at `kept`."""

    @property
    def positions(self) -> int:
        """Number of tokens that the base processes."""
        return self.segments.tokens

    @cached_property
    def ids(self) -> Tensor:
        """`[N]` token ids, 0 for virtual tokens."""
        return torch.cat([self.tokens.new_zeros(self.positions - len(self.tokens)), self.tokens])

    @cached_property
    def kept(self) -> Tensor:
        """Packed positions at which anything is predicted, ascending, without duplicates."""
        return (torch.cat([self.at, self.choices.at]) if self.choices else self.at).unique()

    @cached_property
    def levels(self) -> list[Level]:
        return levels(self.segments)

    def placed(self, device: torch.device, cascade: bool = False) -> PlacedBatch:
        """What a pass reads, on a device, by one copy. `cascade`: with the levels of the tree."""
        return self.read_from(iter(moved(self.parts(cascade), device)), cascade)

    def parts(self, cascade: bool) -> list[Tensor]:
        """The tensors that a pass reads, on the CPU."""
        choices, kept = self.choices, self.kept
        row = torch.empty(self.positions, dtype=torch.long)
        row[kept] = torch.arange(len(kept))
        none = kept.new_empty(0)
        own = [row[choices.at], choices.ids, choices.columns, choices.hidden, choices.chosen] if choices else [none] * 5
        read = kept if self.read is None else self.read
        fixed = [self.tokens, self.segments.positions(), kept, read, self.targets, row[self.at], *own]
        if self.candidates:
            fixed += [self.candidates.of, self.candidates.ids, self.candidates.shares]
        return [*fixed, *(tensor for level in self.levels for tensor in level.tensors)] if cascade else fixed

    def read_from(self, tensors: Iterator[Tensor], cascade: bool) -> PlacedBatch:
        """The batch whose `parts` these are on a device."""
        tokens, positions, kept, read, targets, rows, at, ids, columns, hidden, chosen = itertools.islice(tensors, 11)
        candidates = Candidates(*itertools.islice(tensors, 3)) if self.candidates else None
        found = [level.with_tensors(tensors) for level in self.levels] if cascade else None
        order = None if len(self.at) == len(self.kept) else rows
        return PlacedBatch(tokens, positions, kept, read, targets, order, at, ids, columns, hidden, chosen, candidates, found)

    def split(self, nll: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The result of the pass for each slot: losses of the text's tokens, and of the choices."""
        text = nll[: len(self.at)].split(self.per_slot)
        chosen = nll[len(self.at) :].split(self.choices.per_slot if self.choices else [0] * len(self.per_slot))
        return list(zip(text, chosen, strict=True))
