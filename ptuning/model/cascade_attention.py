"""Attention over a token tree in a few calls, whose number depends only on the tree's depth: the path of GPUs.

Every segment attends to itself in one call of `varlen_attention`, all texts to their soft prompts in a second one, all labels
to their texts in a third. A query's results of several calls are merged by their logarithms of sums, in float32. No mask, no
padding, and no copy of a soft prompt's keys for each of its texts. Sequences never share values, so what is not a number in one
slot stays there.

The backward pass is exact, not an approximation: the gradient of a softmax over all keys needs, for the keys of one call, only
the merged output and the merged logarithm.

Keys and values that are given (`kv_prefix`) stand in front of those of the packed tokens.

Shapes: N packed tokens, S of them and given ones, n of a level, h heads, d head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptuning.model import varlen_attention
from ptuning.model.token_tree import SegmentGroup, TokenTree
from ptuning.model.varlen_attention import Sequences

At = slice | Tensor
"""Places among queries or keys: a range, or an index `[n]`."""


@dataclass(frozen=True)
class Level:
    """One call: the tokens whose queries, and those whose keys and values take part."""

    queries: At
    keys: At
    sequences: Sequences

    @property
    def tensors(self) -> list[Tensor]:
        parts = (self.queries, self.keys, self.sequences.queries, self.sequences.keys)
        return [part for part in parts if isinstance(part, Tensor)]

    def with_tensors(self, tensors: Iterator[Tensor]) -> Level:
        """The same with other tensors, in the order of `tensors`."""
        queries, keys = (next(tensors) if isinstance(at, Tensor) else at for at in (self.queries, self.keys))
        return Level(queries, keys, replace(self.sequences, queries=next(tensors), keys=next(tensors)))


def levels(tree: TokenTree) -> list[Level]:
    """The calls of a tree, on the CPU. The first is that of all tokens to their own segments."""
    lengths = [[1] * group.tokens if group.tree else group.lengths for group in tree.packed]
    ends = _ends(itertools.chain(*lengths))
    longest = max(itertools.chain(*lengths))
    given = sum(sum(group.lengths) for group in tree.given)
    whole, own = slice(0, tree.tokens), slice(given, given + tree.tokens)
    found = [Level(whole, own, Sequences(ends, ends, longest, longest, causal=True))]
    starts = _key_starts(tree, given)
    for distance in range(1, max((len(group.chain) for group in tree.groups), default=1)):
        found.append(_level(_merged(_to_ancestors(tree.packed, distance, starts))))
    inside = list(_inside_trees(tree.packed, given))
    return [*found, _level(inside)] if inside else found


Run = tuple[range, Sequence[int]]
"""Consecutive packed tokens, and the keys that they attend to."""


def _key_starts(tree: TokenTree, given: int) -> dict[int, int]:
    """The place of each group's first key, by the group's id."""
    starts = {id(group): group.start + given for group in tree.packed}
    begin = 0
    for group in tree.given:
        starts[id(group)] = begin
        begin += sum(group.lengths)
    return starts


def _to_ancestors(groups: Sequence[SegmentGroup], distance: int, starts: dict[int, int]) -> Iterator[tuple[range, range]]:
    """Every segment with an ancestor at this distance, and the ancestor."""
    for group in groups:
        if len(group.chain) <= distance:
            continue
        ancestor, rows = group.chain[-1 - distance]
        begins = [starts[id(ancestor)] + end for end in (0, *itertools.accumulate(ancestor.lengths))]
        start = group.start
        for at, length in enumerate(group.lengths):
            row = 0 if rows is None else rows[at]
            yield range(start, start + length), range(begins[row], begins[row + 1])
            start += length


def _merged(runs: Iterator[tuple[range, range]]) -> list[Run]:
    """Neighbours with the same ancestor are one run: the texts of a soft prompt."""
    found: list[tuple[range, range]] = []
    for mine, seen in runs:
        if found and found[-1][1] == seen and found[-1][0].stop == mine.start:
            found[-1] = (range(found[-1][0].start, mine.stop), seen)
        else:
            found.append((mine, seen))
    return list(found)


def _inside_trees(groups: Sequence[SegmentGroup], given: int) -> Iterator[Run]:
    """Every token of a row that is a tree, and the tokens before it in the tree."""
    for group in groups:
        if group.tree is None:
            continue
        before: list[list[int]] = []
        for parent in group.tree:
            before.append([*before[parent], parent] if parent >= 0 else [])
        for row in range(len(group.lengths)):
            start = group.start + row * group.longest
            for token, path in enumerate(before):
                if path:
                    yield range(start + token, start + token + 1), [given + start + each for each in path]


def _level(runs: Sequence[Run]) -> Level:
    many = [len(mine) for mine, _ in runs], [len(seen) for _, seen in runs]
    sequences = Sequences(_ends(many[0]), _ends(many[1]), max(many[0]), max(many[1]))
    return Level(_at([mine for mine, _ in runs]), _at([seen for _, seen in runs]), sequences)


def _at(parts: Sequence[Sequence[int]]) -> At:
    if all(isinstance(part, range) for part in parts) and all(one[-1] + 1 == two[0] for one, two in itertools.pairwise(parts)):
        return slice(parts[0][0], parts[-1][-1] + 1)
    return torch.tensor([*itertools.chain(*parts)])


def _ends(lengths: Any) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, levels: Sequence[Level], scale: float | None) -> Tensor:
    """Queries `[N, h, d]`, keys and values `[S, key heads, d]` -> `[N, h, d]`."""
    output: Tensor = _Cascade.apply(q, k, v, levels, scale)
    return output


def _take(values: Tensor, at: At, dim: int = 0) -> Tensor:
    if isinstance(at, slice):
        return values.narrow(dim, at.start, at.stop - at.start)
    return values.index_select(dim, at)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, levels: Sequence[Level], scale: float | None) -> Tensor:
        first, *others = levels
        out, sums = varlen_attention.forward(q, _take(k, first.keys), _take(v, first.keys), first.sequences, scale)
        for level in others:
            at = level.queries
            keys, values = _take(k, level.keys), _take(v, level.keys)
            part, of_part = varlen_attention.forward(_take(q, at), keys, values, level.sequences, scale)
            before, of_before = _take(out, at), _take(sums, at, 1)
            share = torch.sigmoid(of_part - of_before).t()[..., None]  # of the part in the sum of both
            merged = torch.lerp(before.to(share), part.to(share), share)
            total = torch.logaddexp(of_before, of_part)
            if isinstance(at, slice):
                before.copy_(merged)
                of_before.copy_(total)
            else:
                out.index_copy_(0, at, merged.to(out))
                sums.index_copy_(1, at, total)
        context.save_for_backward(q, k, v, out, sums)
        context.levels, context.scale = levels, scale
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = context.saved_tensors
        first, *others = context.levels
        gradient = gradients[0].contiguous()
        own = _take(k, first.keys), _take(v, first.keys)
        of_q, *of_own = varlen_attention.backward(gradient, q, *own, out, sums, first.sequences, context.scale)
        given = len(k) - len(q)
        whole = [of_q, *(torch.cat([each.new_zeros(given, *each.shape[1:]), each]) if given else each for each in of_own)]
        for level in others:
            at = level.queries
            came, mine, ours = (_take(each, at) for each in (gradient, q, out))
            keys, values = (_take(each, level.keys) for each in (k, v))
            merged = _take(sums, at, 1).contiguous()
            parts = varlen_attention.backward(came, mine, keys, values, ours, merged, level.sequences, context.scale)
            for total, part, place in zip(whole, parts, (at, level.keys, level.keys), strict=True):
                if isinstance(place, slice):
                    _take(total, place).add_(part)
                else:
                    total.index_add_(0, place, part)
        return *whole, None, None
