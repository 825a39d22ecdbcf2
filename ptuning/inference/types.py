"""Requests to the engine, its answers and its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ptuning.errors import UserError
from ptuning.inference.grammar import Grammar
from ptuning.inference.sampling import Sampling, Token
from ptuning.model.limits import STEP_TOKENS


class RequestError(UserError):
    """A request that is not valid."""


class NoRoom(RequestError):
    """There is no room for a further soft prompt."""


class EngineBusy(RuntimeError):
    """Too many requests are running or waiting; retry later."""


class EngineStopped(RuntimeError):
    """The engine is not running."""


@dataclass(frozen=True)
class ResidentPrompt:
    """A resident soft prompt: its content hash and its virtual token ids."""

    content_hash: str
    ids: range


@dataclass(frozen=True)
class End:
    """The end of an answer."""

    reason: Literal["stop", "length", "cancelled", "failed"]
    """stop: an end token; length: the requested number of tokens."""
    message: str = ""
    cached: int = 0
    """Number of tokens of soft prompt and text whose keys and values were in the cache."""
    queued_s: float | None = None
    """Seconds from the request to its first step; None: it had none."""


@dataclass(frozen=True)
class Request:
    """A generation request: text ids after a soft prompt (None: the bare base)."""

    ids: Sequence[int]
    handle: ResidentPrompt | None = None
    max_new_tokens: int = 16
    sampling: Sampling = Sampling()
    ignore_end: bool = False
    """Do not stop at the end tokens of the base."""
    ends: tuple[int, ...] = ()
    """Further end tokens, such as the end of a turn."""
    grammar: Grammar | None = None
    """Restricts the answer."""


Deliver = Callable[[Token | End], None]
"""Receives the tokens of a request and then one `End`, in the engine's thread. It must not block."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine."""

    running: int = 32
    """Maximum requests in one batch."""
    waiting: int = 256
    """Maximum requests, or rows to label, that wait in addition."""
    batch_tokens: int = STEP_TOKENS
    """Maximum tokens in one step; longer prefills take several steps."""
    cache_bytes: int = 1 << 29
    """Memory for keys and values."""
    context: int = 2**31
    """Maximum positions of a request, soft prompt included; default: the base's limit."""
    name: str = "the base"
    """The base's name in errors."""
    share: bool = True
    """Reuse the keys and values of whole pages for requests with the same prefix. False: every request computes its own, so its
    latency reveals nothing about other requests."""


@dataclass(frozen=True)
class Load:
    """What an engine has to do now."""

    running: int
    """Requests in the batch."""
    waiting: int
    """Requests that wait for a place in the batch."""
    waiting_rows: int
    """Rows that wait for labels or log-probabilities."""
    cache_used: float
    """Part of the cache that running requests use, 0 to 1. Pages that are only kept for later requests do not count."""


@dataclass
class Stats:
    """Counters since the engine started."""

    steps: int = 0
    batched: int = 0
    """Sum of the requests over all steps."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache."""


class AnswerFailed(RuntimeError):
    """The engine failed to complete an answer. Not the client's fault."""
