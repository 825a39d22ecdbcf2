"""Packs the rows of all slots into one forward pass. K slots, T target tokens, C candidates for each."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptuning.model.label_trie import LabelTrie
from ptuning.model.packed_batch import Candidates, Choices, PackedBatch
from ptuning.model.token_tree import SegmentGroup, TokenTree

WORTHWHILE = 0.75
"""Rows are split into two groups only if the attention scores shrink to this fraction: two groups need two attention calls."""

Row = tuple[list[int], list[int]]
"""Token ids of one example: input, target (with the end token)."""

TurnsRow = Row | tuple[list[int], list[int], list[int]]
"""The same of a conversation: with the ascending places in its input, not the first, whose tokens are predicted, too (earlier
answers)."""


@dataclass(frozen=True)
class Objective:
    """What is predicted for the rows of a slot: the target's tokens (`text`), the choices along a label's path (`trie`), or
    both."""

    trie: LabelTrie | None = None
    text: bool = True
    all_labels: bool = False
    """All choices of the trie are predicted after every row, as by `pack_labels`, not only those of its label."""


TokenShares = tuple[NDArray[np.int64], NDArray[np.float32]]
"""The C most likely tokens at each of T places, `[T, C]`, and their probabilities, which sum to 1."""


class _Packer:
    """Collects the parts of a `PackedBatch` in packed order."""

    def __init__(self, lengths: Sequence[int], kv: Collection[int]) -> None:
        self.segments = TokenTree()
        # A slot without a soft prompt (length 0) is the bare base: its texts are roots themselves.
        self.roots = [self.segments.add([length], given=at in kv) if length else None for at, length in enumerate(lengths)]
        self.tokens: list[int] = []
        self.at: list[int] = []
        self.targets: list[int] = []
        self.per_slot: list[int] = []
        self.choices = _ChoicePacker()
        self.candidates: list[Candidates] = []

    def share(self, first: int, rows: Sequence[TokenShares]) -> None:
        """The predictions from number `first` on are those of these rows' targets, and have candidates."""
        for ids, shares in rows:
            of = torch.arange(first, first + len(ids)).repeat_interleave(ids.shape[1])
            self.candidates.append(Candidates(of, torch.from_numpy(ids).flatten(), torch.from_numpy(shares).flatten()))
            first += len(ids)

    def plan(self) -> PackedBatch:
        parts = [(each.of, each.ids, each.shares) for each in self.candidates]
        return PackedBatch(
            self.segments,
            _ids(self.tokens),
            _ids(self.at),
            _ids(self.targets),
            self.per_slot,
            self.choices.choices(),
            Candidates(*(torch.cat(kind) for kind in zip(*parts, strict=True))) if parts else None,
        )


class _ChoicePacker:
    """Collects the `Choices` of a batch. Slots of the same task share the nodes of its trie."""

    def __init__(self) -> None:
        self.first_node: dict[LabelTrie, int] = {}
        self.nodes: list[tuple[int, ...]] = []
        self.at: list[int] = []
        self.node: list[int] = []
        self.asked: list[int] = []
        self.child: list[int] = []
        self.per_slot: list[int] = []

    def enter(self, trie: LabelTrie) -> int:
        """The number of a trie's first node."""
        if trie not in self.first_node:
            self.first_node[trie] = len(self.nodes)
            self.nodes += [each.children for each in trie.nodes]
        return self.first_node[trie]

    def ask(self, node: int, at: int, children: Sequence[int]) -> None:
        """Compare the children of a node at a packed place, and predict some of them."""
        self.asked += [len(self.at)] * len(children)
        self.child += children
        self.at.append(at)
        self.node.append(node)

    def end_slot(self) -> None:
        self.per_slot.append(len(self.child) - sum(self.per_slot))

    def choices(self) -> Choices | None:
        if not self.at:
            return None
        ids = sorted({child for children in self.nodes for child in children})
        column = {token: at for at, token in enumerate(ids)}
        most = max(map(len, self.nodes))
        children = [[column[child] for child in node] + [-1] * (most - len(node)) for node in self.nodes]
        return Choices(
            _ids(self.at), _ids(self.node), _ids(children), _ids(ids), _ids(self.asked), _ids(self.child), self.per_slot
        )


def _ids(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def kv_slots(soft_prompts: Sequence[Tensor]) -> list[int]:
    """The numbers of the soft prompts that are key-value prefixes."""
    return [at for at, each in enumerate(soft_prompts) if each.ndim > 2]


def pack_targets(
    lengths: Sequence[int],
    batches: Sequence[Sequence[TurnsRow]],
    objectives: Sequence[Objective] | None = None,
    kv: Collection[int] = (),
    shares: Sequence[Sequence[TokenShares] | None] | None = None,
) -> PackedBatch:
    """The pass that predicts every row's target, for training and for evaluation by loss.

    `lengths` [K] are the lengths of the soft prompts, `batches[k]` the rows of slot k, `objectives[k]` what is predicted for
    them (default: all tokens of the targets), `kv` the slots whose soft prompts are key-value prefixes, `shares[k]` the
    candidates at every token of the targets of slot k, whose objective is their text. Tokens after a row's last prediction are
    not fed.
    """
    packer = _Packer(lengths, kv)
    objectives, shares = objectives or [Objective()] * len(lengths), shares or [None] * len(lengths)
    for root, rows, objective, own in zip(packer.roots, batches, objectives, shares, strict=True):
        before = len(packer.at)
        if not all(row[0] and row[1] for row in rows):
            raise ValueError("a row needs at least one input and one target token")
        if rows and objective.all_labels and objective.trie:
            _add_labels(packer, root, [row[0] for row in rows], objective.trie)
        elif rows:
            _add_targets(packer, root, rows, objective)
        if own:
            packer.share(before, own)
        packer.per_slot.append(len(packer.at) - before)
        packer.choices.end_slot()
    return packer.plan()


def _add_targets(packer: _Packer, root: SegmentGroup | None, rows: Sequence[TurnsRow], objective: Objective) -> None:
    trie = objective.trie
    fed = [len(target) - 1 if objective.text or trie is None else trie.fed_length(tuple(target)) for _, target, *_ in rows]
    texts = [source + target[:many] for (source, target, *_), many in zip(rows, fed, strict=True)]
    first = packer.choices.enter(trie) if trie else 0
    at = packer.segments.tokens
    for part in _alike([len(text) for text in texts], root.longest if root else 0):
        packer.segments.add(part, root)
    for (source, target, *earlier), text in zip(rows, texts, strict=True):
        packer.tokens += text
        last = at + len(source) - 1
        if objective.text:
            for place in itertools.chain(*earlier):
                packer.at.append(at + place - 1)
                packer.targets.append(source[place])
            packer.at += range(last, at + len(text))
            packer.targets += target
        if trie is not None:
            for node, child in trie.paths[tuple(target)]:
                packer.choices.ask(first + node, last + trie.nodes[node].depth, [child])
        at += len(text)


def _alike(lengths: list[int], before: int) -> list[list[int]]:
    """Row lengths `[R]`, split into two groups where this saves most of attention's padding: attention pads every row of a
    group to the longest. Rows are sorted by length, so two groups remove most of the padding."""

    def scores(part: list[int]) -> int:
        return len(part) * max(part) * (before + max(part))

    cut = min(range(1, len(lengths)), key=lambda at: scores(lengths[:at]) + scores(lengths[at:]), default=0)
    if not cut or scores(lengths[:cut]) + scores(lengths[cut:]) > WORTHWHILE * scores(lengths):
        return [lengths]
    return [lengths[:cut], lengths[cut:]]


def pack_labels(
    lengths: Sequence[int], inputs: Sequence[Sequence[list[int]]], trie: LabelTrie, kv: Collection[int] = ()
) -> PackedBatch:
    """The pass that predicts every edge of the label trie after every input: `inputs[k]` are the texts of slot k. `kv`: the
    slots whose soft prompts are key-value prefixes.

    Predictions are ordered by slot, row and edge. A text is computed once, regardless of the number of labels.
    """
    packer = _Packer(lengths, kv)
    for root, texts in zip(packer.roots, inputs, strict=True):
        if texts:
            _add_labels(packer, root, texts, trie)
        packer.per_slot.append(0)
        packer.choices.end_slot()
    return packer.plan()


def _add_labels(packer: _Packer, root: SegmentGroup | None, texts: Sequence[list[int]], trie: LabelTrie) -> None:
    group = packer.segments.add([len(text) for text in texts], root)
    for text in texts:
        packer.tokens += text
    many = len(trie.tokens)
    behind = 0
    if many:
        behind = packer.segments.add([many] * len(texts), group, list(range(len(texts))), tree=trie.parents).start
        packer.tokens += trie.tokens * len(texts)
    first, last = packer.choices.enter(trie), group.start - 1
    for row, text in enumerate(texts):
        last += len(text)
        for at, node in enumerate(trie.nodes, first):
            packer.choices.ask(at, last if node.place < 0 else behind + row * many + node.place, range(len(node.children)))
