"""Which served soft prompts are in the memory of the engine: all that fit, the least used leave first.

A version that is served is always known by its card. Its vectors are brought from disk when a request needs them, and stay in
memory while one does. An embedding prompt of a large base takes about a megabyte; a key-value prefix takes as much as the cache
of a text of its length.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from torch import Tensor

from ptuning.inference.engine import Engine
from ptuning.inference.types import EngineBusy, NoRoom, ResidentPrompt


@dataclass(eq=False)
class Resident:
    """A served soft prompt, in memory or not."""

    content_hash: str
    length: int
    bytes: int
    """Memory that it takes while it is there."""
    bring: Callable[[], Tensor]
    """Reads its vectors."""
    handle: ResidentPrompt | None = None
    """None: it is not in memory."""
    users: int = 0
    """Requests that need it to stay."""
    served: bool = True
    """False: it leaves with its last user."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while its vectors are brought."""


class Residency:
    """The soft prompts of one engine. Thread-safe."""

    def __init__(self, engine: Engine, limit: int | None = None) -> None:
        """`limit`: bytes of all soft prompts in memory; None: as many as the engine takes."""
        self._engine = engine
        self.limit = limit
        self._lock = threading.Lock()
        self._present: dict[Resident, None] = {}  # the least recently used first
        self.used = 0
        """Bytes of those in memory."""
        self.brought = 0
        """How often one was brought back."""

    def __len__(self) -> int:
        """Number of soft prompts in memory."""
        return len(self._present)

    def admit(self, content_hash: str, vectors: Tensor, bring: Callable[[], Tensor]) -> Resident:
        """Bring a new soft prompt into memory, `[P, H]` or a key-value prefix. It has one user, until `release`.

        Raises:
            RequestError: it does not fit this base, or there is no room even without all others.
            EngineBusy: there is no room beside those in use.
        """
        resident = Resident(content_hash, len(vectors), vectors.numel() * self._engine.itemsize, bring, users=1)
        self._put(resident, vectors)
        return resident

    @asynccontextmanager
    async def held(self, resident: Resident | None) -> AsyncIterator[None]:
        """Keep a soft prompt in memory; None: the base needs none.

        Raises:
            UserError: it cannot be read any more.
            EngineBusy: there is no room beside those in use.
        """
        if resident is None:
            yield
            return
        if not self._hold(resident):
            await asyncio.to_thread(self._bring, resident)
        try:
            yield
        finally:
            self.release(resident)

    def release(self, resident: Resident) -> None:
        """A request needs it no longer; those that it has started hold it themselves."""
        with self._lock:
            resident.users -= 1
            if not resident.served and not resident.users:
                self._remove(resident)
            self._make_room(0)

    def leave(self, resident: Resident) -> None:
        """It is no longer served."""
        with self._lock:
            resident.served = False
            if not resident.users:
                self._remove(resident)

    def _hold(self, resident: Resident) -> bool:
        """True if it was in memory, and stays there."""
        with self._lock:
            if resident.handle is None:
                return False
            resident.users += 1
            self._present[resident] = self._present.pop(resident)
            return True

    def _bring(self, resident: Resident) -> None:
        with resident.lock:  # of several requests one brings it
            if not self._hold(resident):
                self._put(resident, resident.bring())
                with self._lock:
                    resident.users += 1
                    self.brought += 1

    def _put(self, resident: Resident, vectors: Tensor) -> None:
        while True:
            with self._lock:
                self._make_room(resident.bytes)
            try:
                handle = self._engine.add(vectors, resident.content_hash)
                break
            except NoRoom:
                with self._lock:
                    if not self._evict():
                        if not self._present:
                            raise
                        raise EngineBusy("all soft prompts in memory are in use; ask again later") from None
        with self._lock:
            resident.handle = handle
            self._present[resident] = None
            self.used += resident.bytes

    def _make_room(self, bytes_: int) -> None:
        """Let the least used leave until that number of bytes fits. If all others are in use, they exceed the limit for a
        moment."""
        while self.limit is not None and self.used + bytes_ > self.limit and self._evict():
            pass

    def _evict(self) -> bool:
        """False: all are in use."""
        unused = next((each for each in self._present if not each.users), None)
        if unused is not None:
            self._remove(unused)
        return unused is not None

    def _remove(self, resident: Resident) -> None:
        if resident.handle is not None:
            del self._present[resident]
            self.used -= resident.bytes
            self._engine.remove(resident.handle)
            resident.handle = None
