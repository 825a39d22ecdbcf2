"""The probability distribution over labels: a choice wherever their token sequences branch.

The token sequences of the labels, end token included, form a trie. At each node with more than one child the model's logits are
normalised over the children only, and p(label | text) is the product of these probabilities along the label's path. It sums to
1 over the labels. It is the distribution of constrained decoding, where every next token must continue a label. Training
minimises its negative logarithm; evaluation and serving use it.

Tokens without an alternative cost nothing: they have probability 1, and are fed only if a branching node follows them.

Terms: a *fed* token is one that the model must process after the text; an *edge* leads from a branching node to one of its
children.
Shapes: L labels, F fed tokens, Q branching nodes, E edges, C children of the widest node, D edges of the longest path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Label = tuple[int, ...]
"""Token ids of a label, end token included."""


@dataclass(frozen=True)
class Node:
    """A point where labels branch: after fed token `place` (-1: after the text), into `children`, ascending token ids."""

    place: int
    depth: int
    """Number of label tokens before it."""
    children: tuple[int, ...]


@dataclass(frozen=True)
class LabelTrie:
    """The labels of a task, as a trie.

    Raises:
        ValueError: fewer than two labels, or one that is a prefix of another or equal to it.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise ValueError("a choice needs at least two labels")
        nested = nested_labels(self.labels)
        if nested:
            raise ValueError(f"label {nested[0]} is a prefix of label {nested[1]}")

    @cached_property
    def _shape(self) -> tuple[list[Node], list[int], list[int]]:
        """Branching nodes from the root down, fed tokens, and the fed token before each."""
        nodes: list[Node] = []
        fed: dict[Label, int] = {(): -1}  # prefixes of labels that are fed -> the index of their last token
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
        """The Q branching nodes, by depth."""
        return self._shape[0]

    @property
    def tokens(self) -> list[int]:
        """The F fed tokens, each after the one it follows."""
        return self._shape[1]

    @property
    def parents(self) -> list[int]:
        """For each fed token the index of its predecessor among the fed tokens; -1: it follows the text."""
        return self._shape[2]

    @cached_property
    def ids(self) -> list[int]:
        """Ascending token ids of all children: the rows of the output head that are needed."""
        return sorted({child for node in self.nodes for child in node.children})

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """(node, index of the child), node by node."""
        return [(at, child) for at, node in enumerate(self.nodes) for child in range(len(node.children))]

    @cached_property
    def paths(self) -> dict[Label, list[tuple[int, int]]]:
        """The edges of each label, from the root down."""
        nodes = {self.beginning(node): at for at, node in enumerate(self.nodes)}
        found: dict[Label, list[tuple[int, int]]] = {}
        for label in self.labels:
            on_path = [(nodes[label[:depth]], token) for depth, token in enumerate(label) if label[:depth] in nodes]
            found[label] = [(at, self.nodes[at].children.index(token)) for at, token in on_path]
        return found

    def beginning(self, node: Node) -> Label:
        """The label tokens before a node."""
        tokens: list[int] = []
        place = node.place
        while place >= 0:
            tokens.append(self.tokens[place])
            place = self.parents[place]
        return tuple(reversed(tokens))

    def fed_length(self, label: Label) -> int:
        """Number of tokens of a label that must be fed to compute all its choices."""
        return self.nodes[self.paths[label][-1][0]].depth

    @cached_property
    def _path_edges(self) -> Tensor:
        """`[L, D]` edges of each label, padded with E."""
        number = {edge: at for at, edge in enumerate(self.edges)}
        longest = max(map(len, self.paths.values()))
        rows = [[number[edge] for edge in self.paths[label]] for label in self.labels]
        return torch.tensor([row + [len(self.edges)] * (longest - len(row)) for row in rows])

    def label_logprobs(self, edge_logprobs: Tensor) -> Tensor:
        """Log-probabilities of the edges `[..., E]` -> of the labels `[..., L]`, in float64."""
        padded = torch.nn.functional.pad(edge_logprobs.double(), (0, 1))
        sums = padded[..., self._path_edges.to(padded.device)].sum(-1)
        return sums - sums.logsumexp(-1, keepdim=True)  # removes the rounding of float32: they sum to 1

    def edge_shares(self, label_shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of labels `[..., L]` -> of the labels behind each edge `[..., E]`."""
        return label_shares @ self._behind

    @cached_property
    def _behind(self) -> NDArray[np.float64]:
        """`[L, E]`, 1 where a label is behind an edge."""
        found = np.zeros((len(self.labels), len(self.edges) + 1))
        np.put_along_axis(found, self._path_edges.numpy(), 1.0, axis=1)
        return found[:, :-1]

    def token_logprobs(self, label_logprobs: Sequence[float], chosen: int) -> list[dict[int, float]]:
        """For each token of label `chosen`: its alternatives and itself, with log-probabilities given the tokens before."""
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
    """A label, and another one that it is a prefix of or equal to; None if there are none."""
    ordered = sorted(labels)
    pairs = zip(ordered, ordered[1:], strict=False)
    return next(((shorter, longer) for shorter, longer in pairs if longer[: len(shorter)] == shorter), None)


def _log_sum(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))
