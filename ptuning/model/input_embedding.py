"""Gives a base token ids and embeddings at once.

transformers' models take either ids or embeddings. Some look up more than the input embedding by id: embeddings of each layer
(Gemma 3n and 4), the route of a token through experts. They get ids, and the result of the input embedding is replaced.

Shapes: B rows, T tokens, H width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class InputEmbedding:
    """A hook on the input embedding of a base."""

    def __init__(self, base: nn.Module, needs_ids: bool = False) -> None:
        self.needs_ids = needs_ids
        """The base looks up more than its input embedding by token id (`self_check`). A virtual token has id 0 there."""
        self._instead: Tensor | None = None
        embedding: Any = getattr(base, "get_input_embeddings", lambda: None)()
        if embedding is not None:
            embedding.register_forward_hook(self._replaced)

    def inputs(self, embeddings: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """What a pass of the base begins with: embeddings `[B, T, H]` of ids `[B, T]`, in which virtual tokens are 0."""
        if not self.needs_ids:
            return {"inputs_embeds": embeddings}
        self.replace(embeddings)
        return {"input_ids": ids.to(embeddings.device)}

    def replace(self, embeddings: Tensor) -> None:
        """Replace the result of the next call by `embeddings` [B, T, H]."""
        self._instead = embeddings

    def _replaced(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        instead, self._instead = self._instead, None
        return instead
