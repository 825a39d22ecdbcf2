"""The soft prompts that an engine holds, with their reference counts."""

from __future__ import annotations

from torch import Tensor

from ptuning.inference.types import RequestError, ResidentPrompt
from ptuning.inference.virtual_tokens import VirtualTokens


class Residents:
    """Soft prompts by content hash. Whoever is served or answers with one holds a reference. The engine's lock must be held."""

    def __init__(self, bank: VirtualTokens) -> None:
        self._bank = bank
        self._held: dict[str, tuple[ResidentPrompt, int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt:
        """Store a soft prompt `[P, H]`, or increment its reference count.

        Raises:
            RequestError: it does not fit this base, or is not finite in the base's dtype.
        """
        known = self._held.get(content_hash)
        if known:
            handle, holders = known
        else:
            try:
                handle, holders = ResidentPrompt(content_hash, self._bank.add(vectors)), 0
            except ValueError as error:
                raise RequestError(f"soft prompt {content_hash[:12]}: {error}; train it again for this base") from None
        self._held[content_hash] = (handle, holders + 1)
        return handle

    def hold(self, handle: ResidentPrompt | None) -> None:
        """Increment the reference count.

        Raises:
            RequestError: the soft prompt was removed.
        """
        if handle is None:
            return
        known = self._held.get(handle.content_hash)
        if known is None or known[0] is not handle:
            raise RequestError(f"soft prompt {handle.content_hash[:12]} was removed from the engine; use its successor")
        self._held[handle.content_hash] = (handle, known[1] + 1)

    def release(self, handle: ResidentPrompt | None) -> None:
        """Decrement the reference count; at 0 the soft prompt is removed."""
        if handle is None:
            return
        _, holders = self._held[handle.content_hash]
        if holders > 1:
            self._held[handle.content_hash] = (handle, holders - 1)
        else:
            del self._held[handle.content_hash]
            self._bank.remove(handle.ids)
