"""Logits of a few tokens: the output head's rows that are read, and no others.

A choice among labels compares a handful of tokens, while a head has a row for each of the vocabulary. What a base does with
its logits behind the head (scaling, capping) it does number by number, so it does the same to a few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class OutputHead:
    """The output head of a base, which `only` limits to some of its rows. A head that is no linear map stays whole."""

    def __init__(self, base: nn.Module) -> None:
        self._ids: Tensor | None = None
        head: Any = getattr(base, "get_output_embeddings", lambda: None)()
        if type(head) is nn.Linear:
            # The module itself stays: hooks on it gather its weights where they are partitioned.
            setattr(head, "forward", lambda hidden: self._logits(head, hidden))  # noqa: B010 (mypy: a method)

    @contextmanager
    def only(self, ids: Tensor | None) -> Iterator[None]:
        """Compute the logits of these tokens `[U]` alone, in this order; None: of all."""
        self._ids = ids
        try:
            yield
        finally:
            self._ids = None

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if self._ids is not None:
            ids = self._ids.to(hidden.device)
            weight, bias = weight.index_select(0, ids), None if bias is None else bias.index_select(0, ids)
        return nn.functional.linear(hidden, weight, bias)  # looked up at every call: DeepSpeed and `zero` replace it
