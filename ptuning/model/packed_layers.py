"""Rows that are written out only where tokens are mixed.

A base that cannot take the segment tree's attention (`tree_attention`) computes whole sequences, each with a copy of its soft
prompt and padded to the longest. But only the parts of a layer that mix tokens (attention, convolutions, state spaces) need
them. Norms, MLPs and projections process each token by itself, and the copies of a token are equal, as everything before it
is. So between the mixing parts a token is computed once, from the packed row that the shared pass has, too.

Which parts mix tokens is taken from their names; a part that is not known is taken for one. `self_check` compares the pass with
the base's own: where this is wrong, whole layers compute the written-out rows.

Shapes: B sequences of at most T tokens, N packed tokens, H width of any part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptuning.model.eight_bits import EightBitLinear

TOKENWISE = ("norm", "mlp", "feedforward", "ffn", "moe", "expert", "router", "dropout", "activation")
"""Parts of the names of classes that process each token by itself."""


class Layout:
    """Where the N packed tokens are in B written-out sequences of T tokens."""

    def __init__(self, index: Tensor, valid: Tensor, tokens: int) -> None:
        """`index` [B, T]: the packed token at every place; `valid` [B, T]: False for padding. Every token occurs."""
        self.rows, self.longest = index.shape
        self.tokens = tokens
        self.index = index.flatten()
        places = valid.flatten().nonzero()[:, 0]
        token = self.index[places]
        order = token.argsort(stable=True)
        self._places = places[order]
        self._counts = torch.bincount(token, minlength=tokens)
        self._starts = self._counts.cumsum(0) - self._counts
        self.first = self._places[self._starts]
        """`[N]` the first place `[B * T]` of every token."""
        self._on: dict[tuple[str, torch.device], Any] = {}

    @property
    def written(self) -> tuple[int, int]:
        return self.rows, self.longest

    @cached_property
    def _copies(self) -> tuple[list[tuple[Tensor, int]], Tensor]:
        """For tokens with equally many places: their places and the number of places of each; and the order of the tokens."""
        parts, tokens = [], []
        for many in self._counts.unique().tolist():
            alike = (self._counts == many).nonzero()[:, 0]
            parts.append((self._places[self._starts[alike][:, None] + torch.arange(many)].flatten(), many))
            tokens.append(alike)
        return parts, torch.cat(tokens).argsort()

    @cached_property
    def _back(self) -> Tensor:
        """`[B * T]` the token whose first place this is, N elsewhere."""
        back = torch.full((self.rows * self.longest,), self.tokens)
        back[self.first] = torch.arange(self.tokens)
        return back

    def _at(self, name: str, device: torch.device) -> Any:
        if (name, device) not in self._on:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = value.to(device)
            else:
                value = [(places.to(device), many) for places, many in value[0]], value[1].to(device)
            self._on[name, device] = value
        return self._on[name, device]

    def write(self, packed: Tensor) -> Tensor:
        """Packed `[1, N, ...]` -> written out `[B * T, ...]`; padding repeats a token."""
        return packed[0].index_select(0, self._at("index", packed.device))

    def read(self, rows: Tensor) -> Tensor:
        """Written out `[B, T, ...]` -> packed `[N, ...]`, one of the copies of each token."""
        return rows.flatten(0, 1).index_select(0, self._at("first", rows.device))

    def written_out(self, packed: Tensor) -> Tensor:
        """`[B, T, ...]`: `write` with a gradient: that of a token is the sum of its copies'."""
        rows: Any = _Write.apply(packed, self)
        rows = rows.unflatten(0, self.written)
        rows.packed_tokens = packed, rows._version  # what is read from unchanged rows
        written: Tensor = rows
        return written

    def packed_again(self, rows: Tensor) -> Tensor:
        """`[1, N, ...]`: `read` with a gradient, or what the rows were written from, if nothing has changed them."""
        known, version = getattr(rows, "packed_tokens", (None, 0))
        if known is not None and rows._version == version:
            packed: Tensor = known
            return packed
        read: Any = _Read.apply(rows, self)
        packed = read[None]
        return packed

    def sum(self, rows: Tensor) -> Tensor:
        """The sum over all copies of each token, without padding: `[B * T, ...]` -> `[1, N, ...]`."""
        parts, order = self._at("_copies", rows.device)
        found = []
        for places, many in parts:
            part = rows.index_select(0, places)
            found.append(part if many == 1 else part.unflatten(0, (-1, many)).sum(1))
        return torch.cat(found).index_select(0, order)[None]

    def put(self, packed: Tensor) -> Tensor:
        """Packed `[N, ...]` -> `[B, T, ...]`, at the first place of each token; zero elsewhere."""
        whole = torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])
        return whole.index_select(0, self._at("_back", packed.device)).unflatten(0, self.written)


# Neither returns a view: some architectures change hidden states in place, which autograd forbids for views of these.
class _Write(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, packed: Tensor, layout: Layout) -> Tensor:
        context.layout = layout
        return layout.write(packed)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return context.layout.sum(gradients[0]), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, layout: Layout) -> Tensor:
        context.layout = layout
        return layout.read(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return context.layout.put(gradients[0]), None


class PackedLayers:
    """Hooks on the decoder layers of a base. Passes without a layout are unchanged."""

    def __init__(self, base: nn.Module, layers: int) -> None:
        self._layout: Layout | None = None
        self.found = False
        """The structure of the base is recognised."""
        self.active = True
        """False: whole layers compute written-out rows."""
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
        if not lists or not layers:
            return
        mixing = [module for layer in lists[0] for module in _mixing(layer)]
        if not mixing:
            return
        self.found = True
        lists[0][0].register_forward_pre_hook(self._begin, with_kwargs=True)
        lists[0][-1].register_forward_hook(self._end)
        for module in dict.fromkeys(mixing):
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave)
            for inner in module.modules():
                if type(inner) in (nn.Linear, EightBitLinear) or isinstance(inner, Conv1D):
                    inner.register_forward_pre_hook(self._once)
                    inner.register_forward_hook(self._spread)

    @contextmanager
    def layout(self, layout: Layout, packed: Tensor) -> Iterator[None]:
        """The base's layers compute with this layout. With a gradient they keep it until that of `packed` is known, as layers
        may be computed again in the backward pass."""
        use = self.active and self.found and layout.rows > 1
        self._layout = layout if use else None
        kept = use and torch.is_grad_enabled() and packed.requires_grad
        if kept:
            packed.register_hook(lambda _: self.forget())
        try:
            yield
        finally:
            if not kept:
                self.forget()

    def forget(self) -> None:
        """Leave other passes of the base alone."""
        self._layout = None

    def _write(self, value: Any) -> Any:
        """Written-out rows of a packed tensor; anything else as it is."""
        layout = self._layout
        if layout is None or not isinstance(value, Tensor) or value.shape[:2] != (1, layout.tokens):
            return value
        return layout.written_out(value)

    def _read(self, value: Any) -> Any:
        """The packed tokens of written-out rows; anything else as it is."""
        layout = self._layout
        if layout is None or not isinstance(value, Tensor) or value.shape[:2] != layout.written:
            return value
        return layout.packed_again(value)

    def _begin(self, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._layout is None:
            return None
        if arguments:
            return (self._read(arguments[0]), *arguments[1:]), options
        return arguments, options | {"hidden_states": self._read(options["hidden_states"])}

    def _end(self, layer: nn.Module, arguments: Any, output: Any) -> Any:
        return None if self._layout is None else _mapped(self._write, output)

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._layout is None:
            return None
        return tuple(map(self._write, arguments)), {name: self._write(value) for name, value in options.items()}

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        return None if self._layout is None else _mapped(self._read, output)

    def _once(self, module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return None if self._layout is None else tuple(map(self._read, arguments))

    def _spread(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        return None if self._layout is None else self._write(output)


def _mapped(change: Any, output: Any) -> Any:
    """The result of a module with its tensors changed; only plain tuples and lists are looked into."""
    return type(output)(map(change, output)) if type(output) in (tuple, list) else change(output)


def _mixing(layer: nn.Module) -> Iterator[nn.Module]:
    """The parts of a layer that may mix tokens."""
    for module in layer.children():
        name = type(module).__name__.lower()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _mixing(module)
        elif isinstance(module, (nn.Linear, Conv1D)) or not list(module.parameters()):
            continue
        elif not any(part in name for part in TOKENWISE):
            yield module
