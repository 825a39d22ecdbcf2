"""One frozen base, many resident soft prompts, and requests for all of them in the same batch.

A soft prompt is a range of virtual token ids (`virtual_tokens`), so a request is a list of ids. transformers' continuous
batching provides paged keys and values, shared prefixes, joining and leaving at every step, and cancellation. It finds cached
pages by their ids, and ids are never reused. So the keys and values of a soft prompt are computed once and never confused with
another's, regardless of the names they are served under.

The engine extends continuous batching: `sampling` for settings per request, `paged_attention` to separate requests, and an
output router that delivers results without a queue. Labels are scored by the pass of training and evaluation (`PromptedModel`)
between two steps of generation: one pass for all labels of all waiting rows. Generation would need a request per label and a
step per token.

Whole pages of text are shared, too. This does not change an answer, but it starts sooner, which may reveal that someone else
has sent the same text. Parties that do not trust each other need separate replicas.

The engine works on token ids, not text, and does not use Ray: it runs wherever torch does.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from ptuning.errors import BaseError
from ptuning.inference.engine_check import generates_right, quiet
from ptuning.inference.generator import Events, Generator
from ptuning.inference.label_scorer import Job, LabelJob, LabelScorer
from ptuning.inference.paged_generator import PagedGenerator
from ptuning.inference.plain_generator import PlainGenerator, RecomputingGenerator, SingleGenerator
from ptuning.inference.sampling import SamplerState, Token
from ptuning.inference.text_scorer import TextJob
from ptuning.inference.types import (
    Deliver,
    End,
    EngineBusy,
    EngineConfig,
    EngineStopped,
    Request,
    RequestError,
    ResidentPrompt,
    Stats,
)
from ptuning.inference.virtual_tokens import VirtualTokens
from ptuning.model.kv_prefix import KVShape, kv_shape
from ptuning.model.label_trie import LabelTrie
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import FAILURES, choose_pass
from ptuning.redaction import logger

log = logger(__name__)


HOW = {
    PlainGenerator: "no paged cache, requests run in batches of equal length",
    SingleGenerator: "no paged cache, requests run one after the other",
    RecomputingGenerator: "no cache gives the same numbers, every new token computes all tokens before it again",
}
"""What is slower than pages, in the log's words."""


@dataclass
class _Running:
    request: Request
    deliver: Deliver
    choice: SamplerState
    tokens: int = 0
    cached: int = 0


class Engine:
    """Generates text and scores labels. All methods are thread-safe.

    The engine modifies the base: it replaces the input embedding and the attention. `end`: the tokens that end an answer.

    Raises:
        BaseError: no pass is right for this base (`model.self_check`).
        RequestError: the base does not generate with a cache what it computes without, or the cache does not fit into memory.
    """

    def __init__(self, base: PreTrainedModel, end: int | Sequence[int], config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.config = config
        self.vocabulary = int(base.config.get_text_config().vocab_size)
        self.ends = (end,) if isinstance(end, int) else tuple(end)
        self.stats = Stats()
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._resident: dict[str, tuple[ResidentPrompt, int]] = {}  # by content hash, with its reference count
        self._waiting_rows = 0
        model = PromptedModel(base)
        choose_pass(model, config.name, gradients=False)
        self._kv = _kv_shape(model)
        self._bank = VirtualTokens.install(base, self.vocabulary, model.needs_ids)
        self._start_generator(model)
        self._scorer = LabelScorer(model, self._bank, self._generator.pause, self._scored)

    @property
    def longest(self) -> int:
        """Maximum number of positions of a request, given by the base and the cache."""
        return self._generator.longest

    @property
    def kind(self) -> str:
        """How it generates: "paged", "plain", "single" or "recomputing"."""
        return self._generator.kind

    def _start_generator(self, model: PromptedModel) -> None:
        """Start the fastest generator that generates what the base generates.

        Raises:
            RequestError: there is none, or the cache does not fit into memory.
        """
        self._generator: Generator
        events = Events(self._find, self._stepped, self._finish)
        kinds: list[type[PagedGenerator] | type[PlainGenerator]] = [
            *(PagedGenerator, PlainGenerator, SingleGenerator, RecomputingGenerator)
        ]
        for kind in kinds[not model.shared_prefix :]:
            try:
                self._generator = kind(model, self.config, events)
            except RequestError:
                raise
            except FAILURES as error:  # this cache has no place for the states of this architecture
                log.debug("%s: %s", kind.kind, error)
                continue
            with quiet() if kind is not RecomputingGenerator else nullcontext():  # the last one says why it fails
                right = generates_right(self, model)
            if right:
                self.stats = Stats()
                if kind in HOW:
                    log.warning("%s: %s", type(model.base).__name__, HOW[kind])
                return
            self._generator.close()
        raise RequestError(
            f"model.path: {self.config.name} ({type(model.base).__name__}) does not generate with its cache what it "
            "computes without, in this version of transformers; choose another base"
        )

    # -- soft prompts ------------------------------------------------------------------------------------------------

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt:
        """Make a soft prompt resident, or increment its reference count if it is: `[P, H]`, or a key-value prefix
        `[P, layers, 2, heads, d]`.

        Raises:
            RequestError: it does not fit this base, or is not finite in the base's dtype.
        """
        self._check_kind(vectors, content_hash)
        with self._lock:
            known = self._resident.get(content_hash)
            if known:
                handle, holders = known
            else:
                try:
                    handle, holders = ResidentPrompt(content_hash, self._bank.add(vectors)), 0
                except ValueError as error:
                    raise RequestError(f"soft prompt {content_hash[:12]}: {error}; train it again for this base") from None
            self._resident[content_hash] = (handle, holders + 1)
        return handle

    def _check_kind(self, vectors: Tensor, content_hash: str) -> None:
        """Refuse key-value prefixes that this engine cannot compute."""
        if vectors.ndim <= 2:
            return
        shape = KVShape(vectors.shape[1], vectors.shape[3], vectors.shape[4])
        if self._kv is None or self.kind != "paged":
            raise RequestError(
                f"soft prompt {content_hash[:12]}: is a key-value prefix, which {self.config.name} is not served with; "
                "serve one of kind embedding"
            )
        if shape != self._kv:
            raise RequestError(
                f"soft prompt {content_hash[:12]}: its keys and values are {tuple(shape)}, not {tuple(self._kv)} (layers, "
                "heads, width); train it again for this base"
            )

    def remove(self, handle: ResidentPrompt) -> None:
        """Decrement the reference count of a soft prompt; at 0 it is removed. Requests hold a reference to their soft
        prompt."""
        with self._lock:
            self._release(handle)

    @property
    def residents(self) -> int:
        return len(self._resident)

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
        prefix = list(request.handle.ids) if request.handle else []
        ends = (*(() if request.ignore_end else self.ends), *request.ends)
        choice = SamplerState(request.sampling, request.ids, ends, request.grammar.start() if request.grammar else None)
        running = _Running(request, deliver, choice)
        choice.on_token = lambda token: self._tell(request_id, running, token)
        with self._lock:
            if not self.alive:
                raise EngineStopped("the engine has stopped; restart it")
            if self.full:
                raise EngineBusy(f"{len(self._running)} requests are running or waiting; ask again later")
            self._hold(request.handle)
            self._running[request_id] = running
        self._generator.start(request_id, [*prefix, *request.ids], request.max_new_tokens, ends)
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

    # -- labels ------------------------------------------------------------------------------------------------------

    def choose(
        self, handle: ResidentPrompt | None, rows: Sequence[Sequence[int]], trie: LabelTrie
    ) -> Future[list[list[float]]]:
        """Log-probability of every label after every row, `[n][L]`, computed as in training and evaluation.

        Raises:
            RequestError, EngineBusy, EngineStopped: as in `submit`.
        """
        length = len(handle.ids) if handle else 0
        for row in rows:
            self.check_ids(row)
            self.check_room(length, len(row), max(map(len, trie.labels)))
        job = LabelJob(handle, rows, trie)
        self._queue_job(job)
        return job.future

    def _queue_job(self, job: Job) -> None:
        many = len(job.rows)
        with self._lock:
            if not self.alive:
                raise EngineStopped("the engine has stopped; restart it")
            if self._waiting_rows and self._waiting_rows + many > self.config.waiting:
                raise EngineBusy(f"{self._waiting_rows} rows are waiting to be labelled; ask again later")
            self._waiting_rows += many
            self._hold(job.handle)
        self._scorer.submit(job)

    def score(self, handle: ResidentPrompt | None, ids: Sequence[int], top: int) -> Future[list[Token]]:
        """Every token of a text but the first one, with the log-probabilities that generation would have reported, in one pass
        and without generating.

        Raises:
            RequestError, EngineBusy, EngineStopped: as in `submit`.
        """
        self.check_ids(ids)
        self.check_room(len(handle.ids) if handle else 0, len(ids), 0)
        job = TextJob(handle, ids, top)
        self._queue_job(job)
        return job.future

    # -- the engine itself -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False after a step has failed: the engine no longer answers."""
        return self._generator.alive

    @property
    def busy(self) -> int:
        """Number of requests that run or wait, plus rows that wait for labels."""
        return len(self._running) + self._waiting_rows

    @property
    def full(self) -> bool:
        """No further generation request is accepted."""
        return len(self._running) >= self.config.running + self.config.waiting

    def paused(self) -> AbstractContextManager[object]:
        """No step of generation runs inside, so another pass may use the base."""
        return self._generator.pause()

    def close(self) -> None:
        """Stop immediately. Running requests fail."""
        self._scorer.close()
        self._generator.close()
        for request_id in list(self._running):
            self._finish(request_id, "failed", "the engine was stopped")

    def _hold(self, handle: ResidentPrompt | None) -> None:
        """Increment the reference count; the lock must be held."""
        if handle is None:
            return
        known = self._resident.get(handle.content_hash)
        if known is None or known[0] is not handle:
            raise RequestError(f"soft prompt {handle.content_hash[:12]} was removed from the engine; use its successor")
        self._resident[handle.content_hash] = (handle, known[1] + 1)

    def _release(self, handle: ResidentPrompt | None) -> None:
        """Decrement the reference count; the lock must be held."""
        if handle is None:
            return
        _, holders = self._resident[handle.content_hash]
        if holders > 1:
            self._resident[handle.content_hash] = (handle, holders - 1)
        else:
            del self._resident[handle.content_hash]
            self._bank.remove(handle.ids)

    def _scored(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            for job in jobs:
                self._waiting_rows -= len(job.rows)
                self._release(job.handle)

    def _find(self, request_id: str) -> SamplerState | None:
        running = self._running.get(request_id)
        return running.choice if running else None

    def _stepped(self, requests: int) -> None:
        self.stats.steps += 1
        self.stats.batched += requests

    def _tell(self, request_id: str, running: _Running, token: Token | None) -> None:
        if token is None:
            self._finish(request_id, "failed", "the answer is not a number: this soft prompt has diverged", cancel=True)
            return
        if not running.tokens:
            length = len(running.request.ids) + (len(running.request.handle.ids) if running.request.handle else 0)
            running.cached = max(0, length - running.choice.computed)
            self.stats.prompt_tokens += length
            self.stats.cached_tokens += running.cached
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
            self._release(running.request.handle)
        if cancel:
            self._generator.cancel(request_id)
        _deliver(running, End(reason, message, running.cached))


def _kv_shape(model: PromptedModel) -> KVShape | None:
    """The shape of the base's key-value prefixes; None: it cannot take any. Before anything of the engine is installed: the
    check uses transformers' own attention."""
    try:
        return kv_shape(model)
    except BaseError as error:
        log.debug("no key-value prefixes: %s", error)
        return None


def _deliver(running: _Running, event: Token | End) -> None:
    try:
        running.deliver(event)
    except Exception:  # a failing receiver must not fail the step, and with it all other requests
        log.exception("an answer could not be delivered")
