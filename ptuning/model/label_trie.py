"""The distribution over labels: a choice at every place where their tokens part.

The token paths of the labels, end token included, form a trie. At each node with more than one child the model's logits are
normalised over the children alone, and p(label | text) is the product of these shares along the label's path. It sums to 1 over
the labels, and it is what decoding draws from when every next token must go on with a label (constrained decoding). Training
minimises its negative logarithm; evaluation and serving read it.

Tokens that follow from those before them cost nothing: they have probability 1 and are fed only where a node lies behind them.

Words: a *fed* token is one that has to be computed behind the text; an *edge* leads from a branching node to one of its
children.
Shapes: L labels, F fed tokens, Q branching nodes, E edges, C children of the widest node, D edges of the longest path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Label = tuple[int, ...]
"""Token ids of a label, end token included."""


@dataclass(frozen=True)
class Node:
    """A place where labels part: behind fed token `place` (-1: behind the text), to `children`, ascending token ids."""

    place: int
    depth: int
    """Tokens of the label in front of it."""
    children: tuple[int, ...]


@dataclass(frozen=True)
class LabelTrie:
    """The labels of a task, as a trie.

    Raises:
        ValueError: fewer than two labels, or one that is another's beginning or the same.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise ValueError("a choice needs at least two labels")
        nested = nested_labels(self.labels)
        if nested:
            raise ValueError(f"label {nested[0]} is the beginning of label {nested[1]}")

    @cached_property
    def _shape(self) -> tuple[list[Node], list[int], list[int]]:
        """Branching nodes from the root down, fed tokens, and the fed token in front of each."""
        nodes: list[Node] = []
        fed: dict[Label, int] = {(): -1}  # beginnings of labels that are fed -> their last token's place
        tokens: list[int] = []
        parents: list[int] = []
        children: dict[Label, set[int]] = {}
        for label in self.labels:
            for depth, token in enumerate(label):
                children.setdefault(label[:depth], set()).add(token)
        branching = sorted((beginning for beginning, all_ in children.items() if len(all_) > 1), key=lambda b: (len(b), b))
        for beginning in branching:
            for depth in range(1, len(beginning) + 1):
                part = beginning[:depth]
                if part not in fed:
                    fed[part] = len(tokens)
                    tokens.append(part[-1])
                    parents.append(fed[part[:-1]])
            nodes.append(Node(fed[beginning], len(beginning), tuple(sorted(children[beginning]))))
        return nodes, tokens, parents

    @property
    def nodes(self) -> list[Node]:
        """The Q branching nodes, shallow ones first."""
        return self._shape[0]

    @property
    def tokens(self) -> list[int]:
        """The F fed tokens, each behind the one it follows."""
        return self._shape[1]

    @property
    def parents(self) -> list[int]:
        """For each fed token the place of the one before it among the fed tokens; -1: it follows the text."""
        return self._shape[2]

    @cached_property
    def ids(self) -> list[int]:
        """Token ids that any node chooses from, ascending: rows of the output head that are needed."""
        return sorted({child for node in self.nodes for child in node.children})

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """(node, which of its children), node by node."""
        return [(at, child) for at, node in enumerate(self.nodes) for child in range(len(node.children))]

    @cached_property
    def paths(self) -> dict[Label, list[tuple[int, int]]]:
        """The edges of every label, from the root down."""
        nodes = {self._beginning(at): at for at in range(len(self.nodes))}
        found: dict[Label, list[tuple[int, int]]] = {}
        for label in self.labels:
            on_path = [(nodes[label[:depth]], token) for depth, token in enumerate(label) if label[:depth] in nodes]
            found[label] = [(at, self.nodes[at].children.index(token)) for at, token in on_path]
        return found

    def _beginning(self, at: int) -> Label:
        """The tokens in front of a node."""
        tokens: list[int] = []
        place = self.nodes[at].place
        while place >= 0:
            tokens.append(self.tokens[place])
            place = self.parents[place]
        return tuple(reversed(tokens))

    def fed_length(self, label: Label) -> int:
        """Tokens of a label that have to be fed to make all its choices."""
        return self.nodes[self.paths[label][-1][0]].depth

    @cached_property
    def _path_edges(self) -> Tensor:
        """`[L, D]` edges of every label, filled up with E."""
        number = {edge: at for at, edge in enumerate(self.edges)}
        longest = max(map(len, self.paths.values()))
        rows = [[number[edge] for edge in self.paths[label]] for label in self.labels]
        return torch.tensor([row + [len(self.edges)] * (longest - len(row)) for row in rows])

    def label_logprobs(self, edge_logprobs: Tensor) -> Tensor:
        """Log-probabilities of the edges `[..., E]` -> of the labels `[..., L]`, in float64."""
        padded = torch.nn.functional.pad(edge_logprobs.double(), (0, 1))
        sums = padded[..., self._path_edges.to(padded.device)].sum(-1)
        return sums - sums.logsumexp(-1, keepdim=True)  # 1 in all, whatever float32 has rounded

    def token_logprobs(self, label_logprobs: Sequence[float], chosen: int) -> list[dict[int, float]]:
        """For every token of label `chosen`: the tokens that could stand there, with log-probabilities given those before."""
        label = self.labels[chosen]
        found = []
        for depth in range(len(label)):
            here = [at for at, other in enumerate(self.labels) if other[:depth] == label[:depth]]
            parts: dict[int, list[float]] = {}
            for at in here:
                parts.setdefault(self.labels[at][depth], []).append(label_logprobs[at])
            whole = _log_sum([label_logprobs[at] for at in here])
            found.append(
                {token: _log_sum(part) - whole for token, part in parts.items()} if len(parts) > 1 else {label[depth]: 0.0}
            )
        return found


def nested_labels(labels: Iterable[Label]) -> tuple[Label, Label] | None:
    """A label and another one that it is the beginning of, or the same as; None if there are none."""
    ordered = sorted(labels)
    pairs = zip(ordered, ordered[1:], strict=False)
    return next(((shorter, longer) for shorter, longer in pairs if longer[: len(shorter)] == shorter), None)


def _log_sum(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))
