"""Labels that continue a text through the base's own cache, for bases that cannot take the segment tree's attention.

Written out, every path of a label trie is a sequence of its own with a copy of the text. Here each text is computed once, and
the tokens of the labels are fed level by level of the trie, each after a copy of the states of the token before it. So also a
recurrent state, which has no keys and values that several tokens could read, is continued by many labels.

Texts are padded on the left, as by transformers' `generate`. For which architectures that is right is checked when a base is
loaded (`self_check`). The number of calls of the base depends on the trie only, as a partitioned base needs.

Shapes: M texts, T tokens of the longest with its soft prompt, F fed tokens of the trie, H width, V vocabulary, U tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ptuning.model.packed_batch import PackedBatch
from ptuning.model.packed_layers import Layout, PackedLayers

AT_ONCE = 8
"""Tokens of a trie that are fed at once: each needs a copy of the states of all texts."""


class Passes(Protocol):
    """What is needed of a `PromptedModel`."""

    base: PreTrainedModel
    selects: bool

    @property
    def packed_layers(self) -> PackedLayers: ...

    def inputs(self, embeddings: Tensor, ids: Tensor) -> dict[str, Tensor]: ...


def has_trees(plan: PackedBatch) -> bool:
    """Whether labels follow texts in this pass."""
    return any(group.tree is not None for group in plan.segments.groups)


@dataclass(frozen=True)
class _States:
    """The states after some tokens: `cache` under the name by which the base takes it, `mask` `[rows, T]`, `lengths` `[rows]`
    without padding."""

    name: str
    cache: Cache
    mask: Tensor
    lengths: Tensor

    def of(self, rows: Tensor) -> _States:
        """A copy for some of the rows `[n]`, which may repeat."""
        shared = {id(tensor): tensor for layer in _layers(self.cache) for tensor in _tensors(vars(layer))}
        cache: Any = copy.deepcopy(self.cache, shared)
        rows = rows.to(self.mask.device)
        cache.reorder_cache(rows)  # makes new tensors
        return _States(self.name, cache, self.mask[rows], self.lengths[rows])


def _layers(cache: Any) -> list[Any]:
    """The layers of a cache, of both parts if it has two."""
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in [*filter(None, parts), cache] for layer in getattr(part, "layers", [])]


def _tensors(values: Mapping[Any, Any]) -> Iterator[Tensor]:
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


class _Pass:
    def __init__(self, model: Passes, packed: Tensor, plan: PackedBatch) -> None:
        self._model, self._packed, self._plan = model, packed, plan
        self._device = packed.device
        self._positions = "position_ids" in inspect.signature(model.base.forward).parameters
        self._found: list[tuple[Tensor, Tensor]] = []
        """Packed places, and their logits."""

    def logits(self, kept: Tensor) -> Tensor:
        index, lengths = self._plan.segments.sequences(trees=False)
        states = self._feed_texts(index, lengths)
        first, row = {}, 0
        for group in self._plan.segments.leaves(trees=False):
            first[id(group)] = row
            row += len(group.lengths)
        trees = [group for group in self._plan.segments.groups if group.tree is not None]
        rows = torch.tensor([first[id(tree.parent)] + at for tree in trees for at in tree.parent_rows or []])
        parents = trees[0].tree or ()
        starts = torch.tensor([tree.start + at * len(parents) for tree in trees for at in range(len(tree.lengths))])
        self._feed_labels(states.of(rows), parents, [-1], starts)
        places = torch.cat([places for places, _ in self._found])
        order = places.argsort()
        at = order[torch.searchsorted(places[order], kept)]
        return torch.cat([logits for _, logits in self._found]).index_select(0, at.to(self._device))

    def _feed_texts(self, index: Tensor, lengths: Tensor) -> _States:
        rows, longest = index.shape
        # From padding on the right to padding on the left.
        columns = torch.arange(longest)[None] - (longest - lengths[:, None])
        valid = columns >= 0
        index = index.gather(1, columns.clamp(min=0))
        used = index.unique()
        packed = self._packed.index_select(0, used.to(self._device))
        at = torch.searchsorted(used, index)
        if not bool(valid.all()):  # padding is a token of its own: a state space reads it, as zeros
            at[~valid] = len(packed)
            packed = torch.cat([packed, packed.new_zeros(1, packed.shape[1])])
        layout = Layout(at, torch.ones_like(valid), len(packed))
        mask = valid.long().to(self._device)
        with self._model.packed_layers.layout(layout, packed):
            inputs = self._model.inputs(layout.written_out(packed[None]), self._plan.ids[index])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            name, cache, logits = self._run(inputs | {"attention_mask": mask} | self._at(positions))
        self._found.append((index[:, -1], logits))
        return _States(name, cache, mask, lengths.to(self._device))

    def _feed_labels(self, states: _States, parents: Sequence[int], before: list[int], starts: Tensor) -> None:
        """Feed the tokens after those in `before`, whose states have one row per text for each of them. `starts` [M]: the
        packed place of the first label token of each text."""
        texts = len(starts)
        following = [(number, token) for number, last in enumerate(before) for token in _after(parents, last)]
        for part in range(0, len(following), AT_ONCE):
            now = following[part : part + AT_ONCE]
            rows = torch.cat([torch.arange(texts) + number * texts for number, _ in now])
            places = torch.cat([starts + token for _, token in now])
            here = states.of(rows)
            mask = torch.cat([here.mask, here.mask.new_ones(len(rows), 1)], 1)
            ids = self._plan.ids[places][:, None].to(self._device)
            base: Any = self._model.base  # its type has no generation
            inputs = base.prepare_inputs_for_generation(  # as `generate` does: some take no mask here
                ids,
                attention_mask=mask,
                use_cache=True,
                is_first_iteration=False,
                **{here.name: here.cache} | self._at(here.lengths[:, None]),
            )
            name, cache, logits = self._run(inputs)
            self._found.append((places, logits))
            tokens = [token for _, token in now]
            if any(parent in tokens for parent in parents):
                self._feed_labels(_States(name, cache, mask, here.lengths + 1), parents, tokens, starts)

    def _at(self, positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions} if self._positions else {}

    def _run(self, inputs: Mapping[str, Any]) -> tuple[str, Cache, Tensor]:
        """The cache with its name, and the logits `[rows, V or U]` of the last column."""
        keeping = {"logits_to_keep": 1} if self._model.selects else {}
        out = self._model.base(**dict(inputs) | {"use_cache": True} | keeping)
        found = [(name, value) for name, value in out.items() if isinstance(value, Cache)]
        if not found:
            raise NotImplementedError(f"{type(self._model.base).__name__} has no cache that can be copied")
        return *found[0], out.logits[:, -1]


def _after(parents: Sequence[int], token: int) -> list[int]:
    return [follower for follower, parent in enumerate(parents) if parent == token]


@torch.no_grad()
def label_logits(model: Passes, packed: Tensor, plan: PackedBatch, kept: Tensor) -> Tensor:
    """Logits at the packed places `kept` of texts' ends and label tokens, `[kept, V or U]`, from packed embeddings `[N, H]`."""
    with _cached(model.base):
        return _Pass(model, packed, plan).logits(kept)


@contextmanager
def _cached(base: nn.Module) -> Iterator[None]:
    """Modules that recompute their activations leave the cache empty; not here."""
    recomputing = [module for module in base.modules() if module.training]
    for module in recomputing:
        module.training = False
    try:
        yield
    finally:
        for module in recomputing:
            module.training = True
