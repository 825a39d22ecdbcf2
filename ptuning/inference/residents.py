"""The soft prompts that an engine holds, with their reference counts."""

from __future__ import annotations

import threading
from typing import Protocol

from torch import Tensor

from ptuning.inference.types import RequestError, ResidentPrompt


class Bank(Protocol):
    """Where an engine keeps the vectors of soft prompts, under virtual token ids."""

    @property
    def resident_bytes(self) -> int:
        """Memory that they take."""

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""

    def add(self, vectors: Tensor) -> range:
        """Store a soft prompt, `[P, H]` or a key-value prefix `[P, layers, 2, heads, d]`; returns its ids.

        Raises:
            ValueError: it does not fit this base, or is not finite in the base's dtype.
            RequestError: this engine does not compute its kind.
            NoRoom: there is no room for it.
        """

    def remove(self, ids: range) -> None:
        """Free the place of a soft prompt."""


class Residents:
    """Soft prompts by content hash. A served name and a running request hold a reference. Thread-safe."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        """Storing may take long, and requests hold and release others meanwhile."""
        self._held: dict[str, tuple[ResidentPrompt, int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt:
        """Store a soft prompt, or increment its reference count.

        Raises:
            RequestError: it does not fit this base, is not finite in the base's dtype, or there is no room for it.
        """
        with self._storing:
            with self._lock:
                known = self._held.get(content_hash)
                if known:
                    self._held[content_hash] = (known[0], known[1] + 1)
                    return known[0]
            try:
                handle = ResidentPrompt(content_hash, self._bank.add(vectors))
            except ValueError as error:
                raise RequestError(f"soft prompt {content_hash[:12]}: {error}; train it again for this base") from None
            with self._lock:
                self._held[content_hash] = (handle, 1)
            return handle

    def hold(self, handle: ResidentPrompt | None) -> None:
        """Increment the reference count.

        Raises:
            RequestError: the soft prompt was removed.
        """
        if handle is None:
            return
        with self._lock:
            known = self._held.get(handle.content_hash)
            if known is None or known[0] is not handle:
                raise RequestError(f"soft prompt {handle.content_hash[:12]} was removed from the engine; use its successor")
            self._held[handle.content_hash] = (handle, known[1] + 1)

    def release(self, handle: ResidentPrompt | None) -> None:
        """Decrement the reference count; at 0 the soft prompt is removed."""
        if handle is None:
            return
        with self._lock:
            _, holders = self._held[handle.content_hash]
            if holders > 1:
                self._held[handle.content_hash] = (handle, holders - 1)
            else:
                del self._held[handle.content_hash]
                self._bank.remove(handle.ids)
