"""Attention over a tree of segments: what makes "one base, many soft prompts" cheap.

A causal model computes a token from itself and from what stands before it. So the keys and values of a soft prompt do not
depend on the text after it, and those of a text do not depend on the label that is scored behind it. A *segment tree* says who
stands before whom: soft prompts are roots, texts continue a soft prompt, labels continue a text. All tokens of all segments
lie side by side, unpadded, in one row `[1, N, H]`. Whatever treats tokens one by one (projections, norms, MLP) sees N tokens
and every shared beginning once. Only attention has to know the tree, and attention is the one function that transformers
lets anybody replace (https://huggingface.co/docs/transformers/attention_interface).

Against the usual two passes with a key-value cache this needs one pass: under ZeRO-3 each layer is gathered once forward and
once backward, and gradient checkpointing (which switches caches off) works.

Shapes: N packed tokens, R rows of a group, T its longest row, S the longest chain of ancestors plus T, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptuning.model import cpu_attention
from ptuning.model.cpu_attention import Mask

ATTENTION = "ptuning_segments"
"""Name of the attention below. Called without a segment tree it is transformers' own SDPA."""


class Group:
    """R segments that lie one after another in the packed row and continue segments of one parent group.

    Groups exist so that attention is computed once per group and not once per segment: the texts of one slot's batch
    are one group. Groups of different slots never share a tensor, so a slot's numbers cannot depend on its neighbours' shapes.
    """

    def __init__(
        self,
        start: int,
        lengths: list[int],
        parent: Group | None,
        parent_rows: list[int] | None,
        tree: Sequence[int] | None = None,
    ) -> None:
        """`tree`: every row is the same tree of tokens instead of a line: for each token the one of its row that it follows,
        -1 for the parent's last. So a text is continued in many ways without a copy of its keys for each."""
        if min(lengths) < 1:
            raise ValueError("a segment needs at least one token")
        if tree is not None and (parent is None or {*lengths} != {len(tree)}):
            raise ValueError("a tree continues a parent, and all its rows have its tokens")
        self.start = start
        self.lengths = lengths
        self.parent = parent
        self.parent_rows = parent_rows
        self.tree = tree
        self._masks: dict[tuple[int | None, int, torch.device], Mask] = {}

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def dense(self) -> bool:
        """True if no row is shorter than another: packed and padded are then the same memory."""
        return min(self.lengths) == self.longest

    @cached_property
    def offsets(self) -> list[int]:
        """Tokens that stand before each segment: the position of its first token."""
        if self.parent is None:
            return [0] * len(self.lengths)
        before = [offset + length for offset, length in zip(self.parent.offsets, self.parent.lengths, strict=True)]
        return [before[row] for row in self._parent_rows]

    @cached_property
    def depths(self) -> Tensor:
        """`[T]` how many tokens of its own row stand before each token."""
        if self.tree is None:
            return torch.arange(self.longest)
        depths: list[int] = []
        for before in self.tree:
            depths.append(depths[before] + 1 if before >= 0 else 0)
        return torch.tensor(depths)

    def _follows(self) -> Tensor:
        """`[T, T]`, True where a token of a tree follows another one, or is it."""
        assert self.tree is not None
        follows = torch.eye(self.longest, dtype=torch.bool)
        for token, before in enumerate(self.tree):
            if before >= 0:
                follows[token] |= follows[before]
        return follows

    def paths(self) -> list[list[int]]:
        """The tokens of a tree from its beginning to each of its ends."""
        assert self.tree is not None
        found = []
        for end in sorted({*range(self.longest)} - {*self.tree}):
            path = [end]
            while self.tree[path[-1]] >= 0:
                path.append(self.tree[path[-1]])
            found.append(path[::-1])
        return found

    @property
    def _parent_rows(self) -> list[int]:
        return self.parent_rows if self.parent_rows is not None else [0] * len(self.lengths)

    @cached_property
    def padded(self) -> Tensor:
        """`[R, T]` index of each token within this group's part of the packed row.

        A short row repeats its own last token, never a neighbour's: what is NaN there cannot leak from here.
        """
        lengths = torch.tensor(self.lengths)[:, None]
        starts = torch.cumsum(lengths, 0) - lengths
        return starts + torch.minimum(torch.arange(self.longest)[None], lengths - 1)

    @cached_property
    def unpadded(self) -> Tensor:
        """`[tokens]` index into the flattened `[R * T]` padded rows."""
        columns = torch.arange(self.longest)[None] < torch.tensor(self.lengths)[:, None]
        return columns.flatten().nonzero()[:, 0]

    @cached_property
    def chain(self) -> list[tuple[Group, list[int] | None]]:
        """The ancestors from the root to this group, each with the row that every row of this group continues."""
        if self.parent is None:
            return [(self, None)]
        rows = self._parent_rows
        above = [(group, rows if up is None else [up[row] for row in rows]) for group, up in self.parent.chain]
        return [*above, (self, None)]

    def mask(self, window: int | None, shared: int, device: torch.device) -> Mask:
        """Where `T * shared` queries may look, every token's `shared` ones side by side."""
        key = (window, shared, device)
        if key not in self._masks:
            allowed = self._allowed(window)
            if shared > 1:
                if allowed is None:
                    allowed = torch.ones(self.longest, self.longest, dtype=torch.bool).tril()[None, None]
                allowed = allowed.repeat_interleave(shared, 2)
            self._masks[key] = Mask(allowed if allowed is None else allowed.to(device), self.longest * shared)
        return self._masks[key]

    def _allowed(self, window: int | None) -> Tensor | None:
        """`[R or 1, 1, T, S]`, True where a token may look; None if plain causal attention says the same."""
        positions, valid = [], []
        for group, rows in self.chain:
            at = torch.tensor(group.offsets)[:, None] + group.depths[None]
            there = torch.arange(group.longest)[None] < torch.tensor(group.lengths)[:, None]
            pick = torch.tensor(rows) if rows is not None else slice(None)
            positions.append(at[pick])
            valid.append(there[pick])
        keys, queries = torch.cat(positions, 1), positions[-1]
        distance = queries[:, :, None] - keys[:, None, :]  # [R, T, S]
        allowed = (distance >= 0) & torch.cat(valid, 1)[:, None, :]
        if window is not None:
            allowed &= distance < window
        if self.tree is not None:
            allowed[:, :, -self.longest :] &= self._follows()
        if len(self.chain) == 1 and self.dense and (window is None or window >= self.longest):
            return None
        if bool((allowed == allowed[:1]).all()):
            allowed = allowed[:1]
        return allowed[:, None]


class Segments:
    """A segment tree, built group by group in the order in which the tokens are packed."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.tokens = 0
        self.read: Tensor | None = None
        """Places `[U]` in the packed row whose outputs are read, each once; None: all of them may be."""

    def add(
        self,
        lengths: list[int],
        parent: Group | None = None,
        parent_rows: list[int] | None = None,
        tree: Sequence[int] | None = None,
    ) -> Group:
        """Append R segments of the given lengths; `parent_rows` names the parent's row for each (None: row 0); `tree`: see
        `Group`."""
        group = Group(self.tokens, lengths, parent, parent_rows, tree)
        self.groups.append(group)
        self.tokens += group.tokens
        return group

    def positions(self) -> Tensor:
        """`[N]` position of every token in its own sequence, as if its ancestors stood right in front of it."""
        parts = [
            group.depths[:length] + offset
            for group in self.groups
            for offset, length in zip(group.offsets, group.lengths, strict=True)
        ]
        return torch.cat(parts)

    def sequences(self) -> tuple[Tensor, Tensor]:
        """The tree written out: `[L, S]` packed index of every token of every leaf's sequence, and `[L]` their lengths.

        What plain concatenation computes on: shared beginnings appear once per leaf. Short rows repeat their last token.
        """
        parents = {id(group.parent) for group in self.groups}
        sequences = []
        for group in self.groups:
            if id(group) in parents:
                continue
            for row in range(len(group.lengths)):
                parts = []
                for ancestor, rows in group.chain:
                    at = row if rows is None else rows[row]
                    begin = ancestor.start + sum(ancestor.lengths[:at])
                    parts.append(torch.arange(begin, begin + ancestor.lengths[at]))
                if group.tree is None:
                    sequences.append(torch.cat(parts))
                else:
                    sequences += [torch.cat([*parts[:-1], parts[-1][torch.tensor(path)]]) for path in group.paths()]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        index = torch.stack(
            [torch.cat([sequence, sequence[-1:].expand(int(lengths.max()) - len(sequence))]) for sequence in sequences]
        )
        return index, lengths


def _rows(packed: Tensor, groups: list[Group]) -> dict[int, Tensor]:
    """`[h, N, d]` packed -> `[R, h, T, d]` padded rows of every group, by the group's id.

    One split, whose backward pass is one concatenation. A slice for each group would have a backward pass that fills a whole
    `[h, N, d]` each time: with K slots, K times K of them.
    """
    rows = {}
    for group, part in zip(groups, packed.split([group.tokens for group in groups], 1), strict=True):
        if not group.dense:
            part = part.index_select(1, group.padded.flatten().to(packed.device))
        rows[id(group)] = part.unflatten(1, (len(group.lengths), group.longest)).transpose(0, 1)
    return rows


def _attend(
    group: Group,
    queries: dict[int, Tensor],
    keys: dict[int, Tensor],
    values: dict[int, Tensor],
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one group's rows to themselves and their ancestors: rows `[R, h, T, d]` -> `[tokens, h, d]`."""
    q = queries[id(group)]
    k = torch.cat([_inherited(keys[id(ancestor)], rows) for ancestor, rows in group.chain], 2)  # [R, key heads, S, d]
    v = torch.cat([_inherited(values[id(ancestor)], rows) for ancestor, rows in group.chain], 2)
    shared = q.shape[1] // k.shape[1]  # grouped-query attention: query heads per key head
    mask = group.mask(window, shared, k.device)
    if shared > 1:
        # The query heads of one key head become more query rows: no copy of keys and values per query head.
        q = q.unflatten(1, (k.shape[1], shared)).transpose(2, 3).flatten(2, 3)
    if softcap is None:
        out = cpu_attention.attention(q, k, v, mask, scale)
    else:
        out = softcapped_attention(q, k, v, mask.allowed, scale, softcap)
    if shared > 1:
        out = out.unflatten(2, (group.longest, shared)).transpose(2, 3).flatten(1, 2)
    out = out.transpose(1, 2).flatten(0, 1)  # [R * T, h, d]
    return out if group.dense else out.index_select(0, group.unpadded.to(out.device))


def _inherited(above: Tensor, rows: list[int] | None) -> Tensor:
    """An ancestor's keys or values, one row for each row that continues it."""
    if rows is None:
        return above
    if len(above) == 1:
        return above.expand(len(rows), -1, -1, -1)
    return above.index_select(0, torch.tensor(rows, device=above.device))


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2, arXiv 2408.00118, section 2), which SDPA cannot do."""
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:  # causal, the queries being the last of the keys
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    # Not -inf: a padded query that may look nowhere would be NaN, and 0 * NaN would reach the others as a value.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function given to transformers: `[1, h, N, d]` -> `[1, N, h, d]`.

    Without `segments` it is SDPA (or capped attention), so the same model generates text and runs plain batches.

    Raises:
        NotImplementedError: the architecture wants something in its attention that is not computed here.
    """
    if segments is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        groups = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = softcapped_attention(query, k, v, attention_mask, scaling, softcap)
        return out.transpose(1, 2), None
    extras = sorted(name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None)
    if extras:
        raise NotImplementedError(f"attention with {', '.join(extras)}")
    queries, keys, values = (_rows(packed[0], segments.groups) for packed in (query, key, value))
    rows = [_attend(group, queries, keys, values, scaling, sliding_window, softcap) for group in segments.groups]
    return torch.cat(rows)[None], None


AttentionInterface.register(ATTENTION, segment_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
