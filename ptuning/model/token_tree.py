"""The tree of token segments in one pass: soft prompts, texts after soft prompts, labels after texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ptuning.model.cpu_attention import Mask


class SegmentGroup:
    """R consecutive segments of the packed row that continue segments of the same parent group.

    Attention is computed once per group instead of once per segment: the texts of one slot's batch are one group. Groups of
    different slots never share a tensor, so the results of a slot cannot depend on the shapes of its neighbours.
    """

    def __init__(
        self,
        start: int,
        lengths: list[int],
        parent: SegmentGroup | None,
        parent_rows: list[int] | None,
        tree: Sequence[int] | None = None,
        given: bool = False,
    ) -> None:
        """`given`: the keys and values of its tokens are given (`TokenTree.prefixes`); the tokens themselves are not packed.

        `tree`: every row is the same tree of tokens instead of a sequence. It gives the predecessor of each token within its
        row, -1 for the parent's last token. So a text has many continuations without a copy of its keys for each."""
        if min(lengths) < 1:
            raise ValueError("a segment needs at least one token")
        if tree is not None and (parent is None or {*lengths} != {len(tree)}):
            raise ValueError("a tree needs a parent, and every row must have as many tokens as the tree")
        if given and (parent is not None or len(lengths) != 1):
            raise ValueError("only a single root can have given keys and values")
        self.start = start
        self.lengths = lengths
        self.parent = parent
        self.parent_rows = parent_rows
        self.tree = tree
        self.given = given
        self._masks: dict[tuple[int | None, int, torch.device], Mask] = {}
        self._placed: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Number of packed tokens."""
        return 0 if self.given else sum(self.lengths)

    @cached_property
    def dense(self) -> bool:
        """True if all rows have the same length: packed and padded layout are then identical."""
        return min(self.lengths) == self.longest

    @cached_property
    def offsets(self) -> list[int]:
        """Number of tokens before each segment, which is the position of its first token."""
        if self.parent is None:
            return [0] * len(self.lengths)
        before = [offset + length for offset, length in zip(self.parent.offsets, self.parent.lengths, strict=True)]
        return [before[row] for row in self._parent_rows]

    @cached_property
    def depths(self) -> Tensor:
        """`[T]` number of tokens of the same row before each token."""
        if self.tree is None:
            return torch.arange(self.longest)
        depths: list[int] = []
        for before in self.tree:
            depths.append(depths[before] + 1 if before >= 0 else 0)
        return torch.tensor(depths)

    def _follows(self) -> Tensor:
        """`[T, T]`, True where a token of the tree is a descendant of another one or the same."""
        assert self.tree is not None
        follows = torch.eye(self.longest, dtype=torch.bool)
        for token, before in enumerate(self.tree):
            if before >= 0:
                follows[token] |= follows[before]
        return follows

    def paths(self) -> list[list[int]]:
        """The tokens on each path of the tree, from a root to a leaf."""
        assert self.tree is not None
        found = []
        for end in sorted({*range(self.longest)} - {*self.tree}):
            path = [end]
            while self.tree[path[-1]] >= 0:
                path.append(self.tree[path[-1]])
            found.append(path[::-1])
        return found

    def at(self, name: str, device: torch.device) -> Tensor:
        """One of the indices `padded` and `unpadded` on a device, flattened: every layer needs them again."""
        if (name, device) not in self._placed:
            self._placed[name, device] = getattr(self, name).flatten().to(device)
        return self._placed[name, device]

    @property
    def _parent_rows(self) -> list[int]:
        return self.parent_rows if self.parent_rows is not None else [0] * len(self.lengths)

    @cached_property
    def padded(self) -> Tensor:
        """`[R, T]` index of each token within this group's part of the packed row.

        A short row is padded with its own last token, never with a neighbour's, so a neighbour's NaN cannot leak into it.
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
    def chain(self) -> list[tuple[SegmentGroup, list[int] | None]]:
        """The ancestors from the root to this group, each with its row for every row of this group."""
        if self.parent is None:
            return [(self, None)]
        rows = self._parent_rows
        above = [(group, rows if up is None else [up[row] for row in rows]) for group, up in self.parent.chain]
        return [*above, (self, None)]

    def mask(self, window: int | None, shared: int, device: torch.device) -> Mask:
        """The attention mask of `T * shared` queries; the `shared` queries of a token are adjacent."""
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
        """`[R or 1, 1, T, S]`, True where a token attends; None if this equals plain causal attention."""
        positions, valid = [], []
        # After equally long ancestors, the mask of the longest row is right for every row: a row's padding comes after its
        # tokens, so no token attends to it, and what the padding itself attends to is never read.
        alike = all(group.dense for group, _ in self.chain[:-1])
        for group, rows in self.chain:
            lengths = [group.longest] if alike else group.lengths
            at = torch.tensor(group.offsets[: len(lengths)])[:, None] + group.depths[None]
            there = torch.arange(group.longest)[None] < torch.tensor(lengths)[:, None]
            pick = slice(None) if rows is None or alike else torch.tensor(rows)
            positions.append(at[pick])
            valid.append(there[pick])
        keys, queries = torch.cat(positions, 1), positions[-1]
        distance = queries[:, :, None] - keys[:, None, :]  # [R, T, S]
        allowed = (distance >= 0) & torch.cat(valid, 1)[:, None, :]
        if window is not None:
            allowed &= distance < window
            # The padding of a short row may be too far from all tokens. A query without any key is NaN on some devices, and 0 *
            # NaN in the backward pass would reach the keys of others: it sees its row's last token.
            last = keys.shape[1] - self.longest + valid[-1].sum(1) - 1
            lost = ~allowed.any(2, keepdim=True)
            allowed |= lost & (torch.arange(keys.shape[1]) == last[:, None])[:, None]
        if self.tree is not None:
            allowed[:, :, -self.longest :] &= self._follows()
        if len(self.chain) == 1 and self.dense and (window is None or window >= self.longest):
            return None
        if bool((allowed == allowed[:1]).all()):
            allowed = allowed[:1]
        return allowed[:, None]


class TokenTree:
    """A segment tree. Groups are added in the order in which their tokens are packed."""

    def __init__(self) -> None:
        self.groups: list[SegmentGroup] = []
        self.tokens = 0
        self.read: Tensor | None = None
        """Packed positions `[U]` whose outputs are read, without duplicates; None: any may be read."""
        self.trained: int | None = None
        """Number of leading tokens, those of the soft prompts, whose inputs have a gradient; None: any may have one."""
        self.levels: Any = None
        """The calls of `cascade_attention` on the device of the current pass; None: this pass has none."""
        self.prefixes: list[Tensor] = []
        """Keys and values of each group that is `given`, `[layers, 2, heads, P, d]`, in the current pass."""

    def add(
        self,
        lengths: list[int],
        parent: SegmentGroup | None = None,
        parent_rows: list[int] | None = None,
        tree: Sequence[int] | None = None,
        given: bool = False,
    ) -> SegmentGroup:
        """Append R segments of the given lengths. `parent_rows`: the parent's row for each (None: row 0); `tree` and `given`:
        see `SegmentGroup`."""
        group = SegmentGroup(self.tokens, lengths, parent, parent_rows, tree, given)
        self.groups.append(group)
        self.tokens += group.tokens
        return group

    @property
    def packed(self) -> list[SegmentGroup]:
        """The groups whose tokens are packed."""
        return [group for group in self.groups if not group.given]

    @property
    def given(self) -> list[SegmentGroup]:
        """The groups whose keys and values are given, as in `prefixes`."""
        return [group for group in self.groups if group.given]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of segments, at most: an ancestor counts with its longest row."""
        return max(sum(above.longest for above, _ in group.chain) for group in self.groups)

    def positions(self) -> Tensor:
        """`[N]` position of every token in its own sequence, which starts with its ancestors."""
        parts = [
            group.depths[:length] + offset
            for group in self.packed
            for offset, length in zip(group.offsets, group.lengths, strict=True)
        ]
        return torch.cat(parts)

    def leaves(self, trees: bool = True) -> list[SegmentGroup]:
        """The groups that no other group continues. `trees`: rows that are trees count."""
        groups = [group for group in self.packed if trees or group.tree is None]
        parents = {id(group.parent) for group in groups}
        return [group for group in groups if id(group) not in parents]

    def sequences(self, trees: bool = True) -> tuple[Tensor, Tensor]:
        """The sequence of every leaf: `[L, S]` packed indices of its tokens, and `[L]` lengths.

        Plain concatenation computes on these: a shared prefix appears once per leaf. Short rows repeat their last token.
        """
        sequences = []
        for group in self.leaves(trees):
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
