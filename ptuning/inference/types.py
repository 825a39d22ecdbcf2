"""Requests to the engine, what it answers, and its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ptuning.errors import UserError
from ptuning.inference.sampling import Sampling, Token
from ptuning.model.limits import STEP_TOKENS


class RequestError(UserError):
    """A request that cannot be answered as it is."""


class EngineBusy(RuntimeError):
    """All places are taken; ask again later."""


class EngineStopped(RuntimeError):
    """The engine does not run (any more)."""


@dataclass(frozen=True)
class ResidentPrompt:
    """A resident soft prompt: its content hash and its virtual token ids."""

    content_hash: str
    ids: range


@dataclass(frozen=True)
class End:
    """The last thing a request tells."""

    reason: Literal["stop", "length", "cancelled", "failed"]
    """stop: an end token; length: as many tokens as were asked for."""
    message: str = ""
    cached: int = 0
    """Tokens of soft prompt and text whose keys and values were in the cache."""


@dataclass(frozen=True)
class Request:
    """What to generate: text ids behind a soft prompt (None: behind nothing, the bare base)."""

    ids: Sequence[int]
    handle: ResidentPrompt | None = None
    max_new_tokens: int = 16
    sampling: Sampling = Sampling()
    ignore_end: bool = False
    """Do not stop at the end token."""


Deliver = Callable[[Token | End], None]
"""Takes a request's tokens and then its one `End`, in the engine's thread: it must not block."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine."""

    running: int = 32
    """Requests in one batch."""
    waiting: int = 256
    """Requests, or rows to be labelled, that may wait beyond."""
    batch_tokens: int = STEP_TOKENS
    """Tokens in one step; longer prefills are spread over several."""
    cache_bytes: int = 1 << 29
    """Memory for keys and values."""
    context: int = 2**31
    """Most positions of a request, soft prompt included; the base's own limit."""
    share: bool = True
    """Keep the keys and values of whole pages for the next request that begins alike. Off: every request computes its own, and
    none can tell from its time what others have asked."""


@dataclass
class Stats:
    """Counted since the engine started."""

    steps: int = 0
    batched: int = 0
    """Requests in all steps together."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of prompts that were found in the cache."""


class AnswerFailed(RuntimeError):
    """The engine could not go on. Not the client's fault."""
