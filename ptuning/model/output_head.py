"""Logits of a few tokens at a few positions: only what is needed of the output head.

A choice among labels compares a handful of tokens, while the head has one row per token of the vocabulary. Operations after the
head (scaling, capping) are elementwise, so they work for a subset of the logits, too.

Shapes: B rows of T positions, H width, V vocabulary, U tokens, M positions that are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class OutputHead:
    """The output head of a base. `only` limits it to some tokens, `at` to some positions, if it is a plain `nn.Linear`."""

    def __init__(self, base: nn.Module) -> None:
        self._ids: Tensor | None = None
        self._at: Tensor | None = None
        head: Any = getattr(base, "get_output_embeddings", lambda: None)()
        self.limited = type(head) is nn.Linear
        """Whether `only` and `at` have an effect."""
        if self.limited:
            # The module itself stays: its hooks gather the weights if they are partitioned.
            setattr(head, "forward", lambda hidden: self._logits(head, hidden))  # noqa: B010 (mypy: a method)

    @contextmanager
    def only(self, ids: Tensor | None) -> Iterator[None]:
        """Compute only the logits of these tokens `[U]`, in this order; None: of all tokens."""
        self._ids = ids
        try:
            yield
        finally:
            self._ids = None

    @contextmanager
    def at(self, places: Tensor | None) -> Iterator[None]:
        """Compute only the logits at these places `[M]` of the head's flattened input `[B, T, H]`: `[1, M, V]`; None: all."""
        self._at = places
        try:
            yield
        finally:
            self._at = None

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if self._at is not None and hidden.dim() == 3:
            hidden = hidden.flatten(0, 1).index_select(0, self._at.to(hidden.device))[None]
        if self._ids is not None:
            ids = self._ids.to(hidden.device)
            weight, bias = weight.index_select(0, ids), None if bias is None else bias.index_select(0, ids)
        return nn.functional.linear(hidden, weight, bias)  # looked up at every call, because DeepSpeed and `zero` replace it
