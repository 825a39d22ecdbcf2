"""How an engine generates: what it gives to a generator, and what it hears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ptuning.inference.sampling import SamplerState


@dataclass(frozen=True)
class Events:
    """What a generator tells its engine, from its own threads."""

    find: Callable[[str], SamplerState | None]
    """The sampler's state of a request by its id; None if it has ended or was cancelled."""
    stepped: Callable[[int], None]
    """A step for this many requests begins."""
    ended: Callable[[str, Literal["stop", "length", "failed"], str], None]
    """A request has ended, with a message if it has failed."""


class Generator(Protocol):
    """Continues lists of token ids, virtual ones included, many at once; the engine's sampler chooses each token."""

    kind: str
    longest: int
    """Maximum number of positions of a request."""

    @property
    def cache_used(self) -> float:
        """Part of the cache that running requests use, 0 to 1."""

    def start(self, request_id: str, ids: Sequence[int], new: int, ends: Sequence[int]) -> None:
        """Continue `ids` by at most `new` tokens, up to one of `ends`."""

    def cancel(self, request_id: str) -> None:
        """Let a request leave before the next step."""

    def pause(self) -> AbstractContextManager[Any]:
        """No step runs inside, so another pass may use the base."""

    @property
    def alive(self) -> bool:
        """False after a step has failed."""

    def close(self) -> None:
        """Stop immediately."""
