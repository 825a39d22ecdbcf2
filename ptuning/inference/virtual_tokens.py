"""Virtual tokens: soft prompts as token ids above the vocabulary.

Every resident soft prompt has a range of ids. The input embedding looks up an id in the base's embedding or in a bank of soft
prompts. A request is then a plain list of ids, and caches that are keyed by ids (paged keys and values, shared prefixes) work
for soft prompts. The output head has no rows for these ids, so they are never generated.

Ids increase and are never reused: entries that are cached for a removed soft prompt can never be hit.

A key-value prefix has ids, too. Their rows are zeros, and attention puts the prefix in the place of the keys and values that it
computes for them (`given`). So caches and shared pages treat both kinds alike, and a page that was dropped is written again.

Shapes: P virtual tokens, H width, R rows of the bank, n resident soft prompts.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptuning.inference.types import RequestError
from ptuning.model.kv_prefix import KVShape

ROWS = 1024
"""Rows of a new bank."""
LAST = 2**31 - 1
"""Ids are int32. With 100 virtual tokens each, a process can load twenty million soft prompts."""


@dataclass(frozen=True)
class _Bank:
    """An immutable state of the bank. A forward pass uses one state; changes create a new one."""

    vectors: Tensor
    """`[R, H]`; rows from `used` on are spare."""
    used: int
    firsts: Tensor
    """`[n]` first id of each soft prompt, ascending."""
    shifts: Tensor
    """`[n]` row minus id."""


class Given(NamedTuple):
    """Tokens of a step that belong to a key-value prefix."""

    at: Tensor
    """`[n]` their places in the step."""
    prefix: Tensor
    """`[layers, 2, heads, P, d]`."""
    virtual: Tensor
    """`[n]` the virtual token of each."""


class VirtualTokens(nn.Module):
    """The input embedding of a base, extended by a bank of soft prompts. Adding and removing is safe while others compute."""

    def __init__(self, embedding: nn.Module, vocabulary: int) -> None:
        super().__init__()
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        self.embedding = embedding
        self.first = max(vocabulary, len(weight))
        """The first virtual id: all lower ids are tokens of the base."""
        self._next = self.first
        self._lock = threading.Lock()
        self._places: dict[int, tuple[int, int]] = {}  # first id -> row, length; ascending, as ids only grow
        self._removed = 0
        self._prefixes: dict[int, Tensor] = {}  # first id -> [layers, 2, heads, P, d]
        self.kv_shape: KVShape | None = None
        """Of key-value prefixes; None: they cannot be added."""
        self.given: list[Given] = []
        """The tokens of the last call that belong to key-value prefixes."""
        self._instead: Tensor | None = None
        """The result of the next call."""
        empty = torch.empty(0, dtype=torch.long, device=weight.device)
        self._bank = _Bank(weight.new_empty(ROWS, weight.shape[1]), 0, empty, empty)

    @classmethod
    def install(cls, base: Any, vocabulary: int, needs_ids: bool = False) -> VirtualTokens:
        """Put it into a base. `needs_ids`: the base looks up more than this embedding by id. There, a virtual token has id 0,
        as in training."""
        bank = cls(base.get_input_embeddings(), vocabulary)
        if needs_ids:
            base.register_forward_pre_hook(bank._hide, with_kwargs=True)
        base.set_input_embeddings(bank)
        return bank

    @property
    def weight(self) -> Tensor:
        """The base's rows, for code that ties or measures embeddings."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def resident_bytes(self) -> int:
        tensors = [self._bank.vectors, *self._prefixes.values()]
        return sum(each.numel() * each.element_size() for each in tensors)

    @property
    def itemsize(self) -> int:
        return self.weight.element_size()

    def add(self, vectors: Tensor) -> range:
        """Make a soft prompt resident, `[P, H]` or a key-value prefix `[P, layers, 2, heads, d]`; returns its ids.

        Raises:
            ValueError: not this base's width, empty, or not finite in the base's dtype.
            RequestError: key-value prefixes are not computed (`kv_shape`).
        """
        rows = vectors.detach().to(self.weight)
        prefix: Tensor | None = None
        if rows.ndim > 2:
            self._check_prefix(rows)
            prefix, rows = rows.movedim(0, 3).contiguous(), rows.new_zeros(len(rows), self.weight.shape[1])
        if rows.ndim != 2 or rows.shape[1] != self.weight.shape[1] or not len(rows):
            raise ValueError(f"vectors are {tuple(vectors.shape)}, not [P, {self.weight.shape[1]}]")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"vectors are not finite in {rows.dtype}")
        with self._lock:
            ids = range(self._next, self._next + len(rows))
            if ids.stop > LAST:
                raise ValueError("no virtual ids are left; restart the process")
            self._next = ids.stop
            if prefix is not None:
                self._prefixes = self._prefixes | {ids.start: prefix}
            bank, used = self._bank.vectors, self._bank.used
            if used + len(rows) > len(bank):
                grown = bank.new_empty(max(2 * len(bank), used + len(rows)), bank.shape[1])
                grown[:used] = bank[:used]
                bank = grown
            bank[used : used + len(rows)] = rows  # spare rows, which are not read yet
            self._places[ids.start] = (used, len(rows))
            self._publish(bank, used + len(rows))
        return ids

    def _check_prefix(self, vectors: Tensor) -> None:
        """Refuse key-value prefixes `[P, layers, 2, heads, d]` that do not fit."""
        if self.kv_shape is None:
            raise RequestError(
                "key-value prefixes are not served with this base, which has no pages of equal keys and values; "
                "serve a soft prompt of kind embedding"
            )
        found = KVShape(vectors.shape[1], vectors.shape[3], vectors.shape[4])
        if found != self.kv_shape:
            raise ValueError(f"its keys and values are {tuple(found)}, not {tuple(self.kv_shape)} (layers, heads, width)")
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError(f"keys and values are not finite in {vectors.dtype}")

    def remove(self, ids: range) -> None:
        """Remove a soft prompt. Its ids become invalid and are never reused."""
        with self._lock:
            _, length = self._places.pop(ids.start)
            self._prefixes = {first: prefix for first, prefix in self._prefixes.items() if first != ids.start}
            self._removed += length
            if self._removed <= max(ROWS, self._bank.used // 2):
                self._publish(self._bank.vectors, self._bank.used)
                return
            kept = [(first, row, length) for first, (row, length) in self._places.items()]
            index = torch.cat(
                [torch.arange(row, row + length) for _, row, length in kept] or [torch.empty(0, dtype=torch.long)]
            )
            bank = self._bank.vectors.new_empty(max(ROWS, 2 * len(index)), self._bank.vectors.shape[1])
            bank[: len(index)] = self._bank.vectors[index.to(bank.device)]
            self._places, row = {}, 0
            for first, _, length in kept:
                self._places[first] = (row, length)
                row += length
            self._removed = 0
            self._publish(bank, row)

    def vectors(self, ids: range) -> Tensor:
        """As added, in the base's dtype."""
        if ids.start in self._prefixes:
            return self._prefixes[ids.start].movedim(3, 0)
        row, length = self._places[ids.start]
        return self._bank.vectors[row : row + length]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[..., N]` -> `[..., N, H]`. Scaling by the base's own embedding applies only to the base's tokens."""
        instead, self._instead = self._instead, None
        if instead is not None:
            return instead
        bank = self._bank
        self.given = self._find_given(ids) if self._prefixes else []
        virtual = ids >= self.first
        # Most steps only decode. On an accelerator the check itself would force a synchronisation.
        if ids.device.type == "cpu" and not bool(virtual.any()):
            return self.embedding(ids)
        text = self.embedding(torch.where(virtual, 0, ids))
        if not len(bank.firsts):
            return text
        if bank.vectors.is_cuda:
            # The bank may be replaced while this step still runs on the stream of the engine: its memory must wait for it.
            bank.vectors.record_stream(torch.cuda.current_stream(bank.vectors.device))
        slots = (torch.searchsorted(bank.firsts, ids.long(), right=True) - 1).clamp_(min=0)
        # A cancelled request may run for one more step after its soft prompt was removed: any row will do.
        rows = (ids + bank.shifts[slots]).clamp_(0, bank.used - 1)
        return torch.where(virtual[..., None], bank.vectors[rows], text)

    def _find_given(self, ids: Tensor) -> list[Given]:
        """The tokens of a step that belong to key-value prefixes. On an accelerator this waits for the ids: a step cannot know
        from its shapes whether it begins with a prefix."""
        flat, found = ids.flatten(), []
        here = flat.cpu()
        for first, prefix in self._prefixes.items():
            at = ((here >= first) & (here < first + prefix.shape[3])).nonzero()[:, 0]
            if len(at):
                found.append(Given(at.to(ids.device), prefix, (here[at].long() - first).to(ids.device)))
        return found

    def _hide(self, base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Virtual ids as 0, after their vectors were looked up for the base's next call of this module."""
        self._instead = None
        ids = options.get("input_ids")
        if ids is None or not bool((ids >= self.first).any()):
            return None
        self._instead = self(ids)
        return arguments, options | {"input_ids": torch.where(ids >= self.first, 0, ids)}

    def _publish(self, vectors: Tensor, used: int) -> None:
        firsts = torch.tensor(list(self._places), dtype=torch.long)
        rows = torch.tensor([row for row, _ in self._places.values()], dtype=torch.long)
        if vectors.device.type != "cpu":
            # Rows are written on the stream of this thread, and steps run on another one.
            torch.get_device_module(vectors.device).synchronize()
        self._bank = _Bank(vectors, used, firsts.to(vectors.device), (rows - firsts).to(vectors.device))
