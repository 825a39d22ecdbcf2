"""What the users of an engine know of it: one frozen base, many resident soft prompts, and requests for all of them at once.

`Engine` is the interface, and the part that all engines share: which soft prompts are held, what is refused, how much may
wait, and how an answer ends. `transformers_engine` computes.

Whole pages of text are shared, too. This does not change an answer, but it starts sooner, which may reveal that someone else
has sent the same text. Parties that do not trust each other need separate replicas.

An engine works on token ids, not text, and does not use Ray.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ptuning.inference.jobs import Job, LabelJob, TextJob, Timed
from ptuning.inference.residents import Bank, Residents
from ptuning.inference.sampling import Token
from ptuning.inference.types import (
    Deliver,
    End,
    EngineBusy,
    EngineConfig,
    EngineStopped,
    Load,
    Request,
    RequestError,
    ResidentPrompt,
    Stats,
)
from ptuning.model.label_trie import LabelTrie
from ptuning.redaction import logger

log = logger(__name__)

STOPPED = "the engine has stopped; restart it"
DIVERGED = "the answer is not a number: this soft prompt has diverged"


@dataclass
class Running:
    """A request that runs or waits."""

    request: Request
    deliver: Deliver
    ends: tuple[int, ...]
    """All tokens that end the answer."""
    tokens: int = 0
    """Number of tokens that were delivered."""
    cached: int = 0
    """Number of tokens of soft prompt and text that were in the cache."""
    submitted: float = field(default_factory=time.monotonic)
    began: float = 0.0
    """When its first step began, by `time.monotonic`; 0: it waits."""

    @property
    def ids(self) -> list[int]:
        """The ids of the soft prompt and of the text."""
        return prompt_ids(self.request.handle, self.request.ids)

    @property
    def length(self) -> int:
        """Number of tokens of soft prompt and text."""
        return len(self.request.ids) + (len(self.request.handle.ids) if self.request.handle else 0)


class Engine(ABC):
    """Generates text and scores labels. All methods are thread-safe.

    `ends`: the tokens that end an answer.
    """

    def __init__(self, config: EngineConfig, vocabulary: int, ends: int | Sequence[int], bank: Bank) -> None:
        self.config = config
        self.vocabulary = vocabulary
        """Number of tokens of the base; higher ids belong to soft prompts."""
        self.ends = (ends,) if isinstance(ends, int) else tuple(ends)
        self.stats = Stats()
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._waiting_rows = 0
        self._bank = bank
        self._residents = Residents(bank)

    # -- what computes -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def kind(self) -> str:
        """How it generates, in a word."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Maximum number of positions of a request, given by the base and the cache."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """False after a step has failed: the engine no longer answers."""

    @property
    @abstractmethod
    def load(self) -> Load:
        """What runs and waits now."""

    @abstractmethod
    def _start(self, request_id: str, running: Running) -> None:
        """Compute a request: `_told` for every token, then `_finish`."""

    @abstractmethod
    def _left(self, request_id: str, running: Running, cancel: bool) -> None:
        """A request has ended; `cancel`: before its last step, which should not be computed any more."""

    @abstractmethod
    def _compute(self, job: Job) -> None:
        """Compute a job, then call `_scored` and complete its future, in this order."""

    @abstractmethod
    def _stop(self) -> None:
        """Stop immediately."""

    # -- soft prompts ------------------------------------------------------------------------------------------------

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt:
        """Make a soft prompt resident, or increment its reference count if it is: `[P, H]`, or a key-value prefix
        `[P, layers, 2, heads, d]`.

        Raises:
            RequestError: it does not fit this base, is not finite in the base's dtype, or there is no room for it.
        """
        return self._residents.add(vectors, content_hash)

    def remove(self, handle: ResidentPrompt) -> None:
        """Decrement the reference count of a soft prompt; at 0 it is removed. Requests hold a reference to their soft
        prompt."""
        self._residents.release(handle)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of a resident soft prompt."""
        return self._bank.itemsize

    @property
    def residents(self) -> int:
        return len(self._residents)

    @property
    def resident_bytes(self) -> int:
        return self._bank.resident_bytes

    # -- generation --------------------------------------------------------------------------------------------------

    def submit(self, request: Request, deliver: Deliver) -> str:
        """Start a request; returns its id. `deliver` receives its tokens and its end.

        Raises:
            RequestError: invalid token ids, or too many positions.
            EngineBusy: too many requests are running or waiting.
            EngineStopped: the engine is not running.
        """
        self.check(request)
        request_id = uuid.uuid4().hex
        ends = (*(() if request.ignore_end else self.ends), *request.ends)
        running = Running(request, deliver, ends)
        with self._lock:
            if not self.alive:
                raise EngineStopped(STOPPED)
            if self.full:
                raise EngineBusy(f"{len(self._running)} requests are running or waiting; ask again later")
            self._residents.hold(request.handle)
            self._running[request_id] = running
        self._start(request_id, running)
        return request_id

    def check(self, request: Request) -> None:
        """Check a request.

        Raises:
            RequestError: invalid token ids, or too many positions.
        """
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1")
        self.check_ids(request.ids)
        length = len(request.handle.ids) if request.handle else 0
        self.check_room(length, len(request.ids), request.max_new_tokens)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids that are not tokens of the base: higher ids belong to soft prompts."""
        if not ids:
            raise RequestError("the text has no tokens; send some text")
        strange = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise RequestError(
                f"token {strange} is not in the vocabulary of {self.vocabulary} tokens; send 0 to {self.vocabulary - 1}"
            )

    def check_room(self, virtual: int, text: int, new: int) -> None:
        """Refuse requests with too many positions."""
        if virtual + text + new > self.longest:
            raise RequestError(
                f"{text} tokens of text, {virtual} virtual tokens and up to {new} new ones exceed the {self.longest} "
                "positions; shorten the text or lower max_tokens"
            )

    def cancel(self, request_id: str) -> None:
        """Cancel a request; it leaves the batch before the next step. No effect if it has ended."""
        self._finish(request_id, "cancelled", cancel=True)

    def generate(self, request: Request) -> Iterator[Token | End]:
        """The tokens of a request as they are generated, then its end. Leaving the iteration early cancels it."""
        events: queue.SimpleQueue[Token | End] = queue.SimpleQueue()
        request_id = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, End):
                    return
        finally:
            self.cancel(request_id)

    # -- labels and given text -----------------------------------------------------------------------------------------

    def choose(self, handle: ResidentPrompt | None, rows: Sequence[Sequence[int]], trie: LabelTrie) -> Timed[list[list[float]]]:
        """Log-probability of every label after every row, `[n][L]`, computed as in training and evaluation.

        Raises:
            RequestError, EngineBusy, EngineStopped: as in `submit`.
        """
        length = len(handle.ids) if handle else 0
        for row in rows:
            self.check_ids(row)
            self.check_room(length, len(row), max(map(len, trie.labels)))
        job = LabelJob(handle, rows, trie)
        self._queue(job)
        return job.future

    def score(self, handle: ResidentPrompt | None, ids: Sequence[int], top: int) -> Future[list[Token]]:
        """Every token of a text but the first one, with the log-probabilities that generation would have reported.

        Raises:
            RequestError, EngineBusy, EngineStopped: as in `submit`.
        """
        self.check_ids(ids)
        self.check_room(len(handle.ids) if handle else 0, len(ids), 0)
        job = TextJob(handle, ids, top)
        self._queue(job)
        return job.future

    def _queue(self, job: Job) -> None:
        many = len(job.rows)
        with self._lock:
            if not self.alive:
                raise EngineStopped(STOPPED)
            if self._waiting_rows and self._waiting_rows + many > self.config.waiting:
                raise EngineBusy(f"{self._waiting_rows} rows are waiting to be labelled; ask again later")
            self._residents.hold(job.handle)
            self._waiting_rows += many
        self._compute(job)

    # -- the engine itself -------------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        """Number of requests that run or wait, plus rows that wait for labels."""
        return len(self._running) + self._waiting_rows

    @property
    def full(self) -> bool:
        """No further generation request is accepted."""
        return len(self._running) >= self.config.running + self.config.waiting

    def close(self) -> None:
        """Stop immediately. Running requests fail."""
        self._stop()
        for request_id in list(self._running):
            self._finish(request_id, "failed", "the engine was stopped")

    # -- what an implementation tells --------------------------------------------------------------------------------

    def _told(self, request_id: str, running: Running, token: Token | None, cached: int) -> None:
        """A token of a request; None: its logits are not numbers. `cached`: tokens of its prompt that were in the cache."""
        if request_id not in self._running:
            return
        if token is None:
            self._finish(request_id, "failed", DIVERGED, cancel=True)
            return
        if not running.tokens:
            running.cached = cached
            self.stats.prompt_tokens += running.length
            self.stats.cached_tokens += cached
        running.tokens += 1
        _deliver(running, token)

    def _finish(
        self,
        request_id: str,
        reason: Literal["stop", "length", "cancelled", "failed"],
        message: str = "",
        cancel: bool = False,
    ) -> None:
        with self._lock:
            running = self._running.pop(request_id, None)
        if running is None:
            return
        self._residents.release(running.request.handle)
        self._left(request_id, running, cancel)
        queued = running.began - running.submitted if running.began else None
        _deliver(running, End(reason, message, running.cached, queued))

    def _scored(self, jobs: Sequence[Job]) -> None:
        """Jobs were computed, or failed."""
        with self._lock:
            self._waiting_rows -= sum(len(job.rows) for job in jobs)
        for job in jobs:
            self._residents.release(job.handle)


def prompt_ids(handle: ResidentPrompt | None, ids: Sequence[int]) -> list[int]:
    """The ids of a soft prompt (None: none), then those of a text."""
    return [*(handle.ids if handle else ()), *ids]


def _deliver(running: Running, event: Token | End) -> None:
    try:
        running.deliver(event)
    except Exception:  # a failing receiver must not fail the step, and with it all other requests
        log.exception("an answer could not be delivered")
