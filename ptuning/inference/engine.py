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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from ptuning.inference.label_scorer import LabelJob, LabelScorer
from ptuning.inference.paged_attention import ATTENTION
from ptuning.inference.sampling import Sampler, SamplerState, Token
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
from ptuning.model.label_trie import LabelTrie
from ptuning.model.limits import PAGE
from ptuning.model.prompted_model import PromptedModel
from ptuning.redaction import logger

log = logger(__name__)

_NO_CHECK = 1e6
"""A `max_memory_percent` that never limits the cache."""


@dataclass
class _Running:
    request: Request
    deliver: Deliver
    choice: SamplerState
    tokens: int = 0
    cached: int = 0


class _Router(OutputRouter):
    """Passes finished requests to the engine directly, without a queue that every reader would have to search."""

    def __init__(self, ended: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._ended = ended

    def deliver(self, output: GenerationOutput) -> None:
        if output.is_finished():
            self._ended(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class Engine:
    """Generates text and scores labels. All methods are thread-safe.

    The engine modifies the base: it replaces the input embedding and the attention.

    Raises:
        RequestError: the base's attention cannot be replaced.
    """

    def __init__(self, base: PreTrainedModel, end: int, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self._model = PromptedModel(base)
        if not self._model.shared_prefix:
            raise RequestError(
                f"model.path: {type(base).__name__} cannot be served, its attention is not replaceable; choose another base"
            )
        described = base.config.get_text_config()
        self.vocabulary = int(described.vocab_size)
        self.config = config
        self.end = end
        self.stats = Stats()
        embedding: Any = base.get_input_embeddings()
        self._bank = VirtualTokens(embedding, self.vocabulary)
        base.set_input_embeddings(self._bank)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._resident: dict[str, tuple[ResidentPrompt, int]] = {}  # by content hash, with its reference count
        self._waiting_rows = 0
        _check_room(base, config.cache_bytes)
        pages = max(8, config.cache_bytes // (PAGE * _token_bytes(base)))
        self.longest = min(config.context, PAGE * pages * 3 // 4)
        """Maximum number of positions of a request, given by the base and the cache."""
        # transformers allows two names here; ours is not one of them and is set afterwards.
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        batching: Any = base
        self._manager = batching.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=pages,
                max_batch_tokens=config.batch_tokens,
                max_requests_per_batch=config.running,
                allow_block_sharing=config.share,
                # Its own check assumes a mask of batch_tokens times the whole cache for every attention but flash (5.23). Ours
                # has no mask; for a small base the mask would be many times the cache. The real sizes are checked above.
                max_memory_percent=_NO_CHECK,
                use_async_batching=False,  # the sampler runs in Python, between the steps
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        base.set_attn_implementation(ATTENTION)
        self._manager.output_router = _Router(self._ended)
        self._manager.logit_processor = Sampler(self._find, self._stepped)
        with torch.random.fork_rng():  # transformers seeds the whole process here
            self._manager.warmup()  # allocates the cache now, so that errors are raised here
        self._manager.start()
        self._scorer = LabelScorer(self._model, self._bank, self._manager.pause, self._scored)

    # -- soft prompts ------------------------------------------------------------------------------------------------

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt:
        """Make a soft prompt `[P, H]` resident, or increment its reference count if it is.

        Raises:
            RequestError: it does not fit this base, or is not finite in the base's dtype.
        """
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
        choice = SamplerState(request.sampling)
        running = _Running(request, deliver, choice)
        choice.on_token = lambda token: self._tell(request_id, running, token)
        with self._lock:
            if not self.alive:
                raise EngineStopped("the engine has stopped; restart it")
            if self.full:
                raise EngineBusy(f"{len(self._running)} requests are running or waiting; ask again later")
            self._hold(request.handle)
            self._running[request_id] = running
        self._manager.add_request(
            [*prefix, *request.ids],
            request_id=request_id,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=-1 if request.ignore_end else self.end,
        )
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
        with self._lock:
            if not self.alive:
                raise EngineStopped("the engine has stopped; restart it")
            if self._waiting_rows and self._waiting_rows + len(rows) > self.config.waiting:
                raise EngineBusy(f"{self._waiting_rows} rows are waiting to be labelled; ask again later")
            self._waiting_rows += len(rows)
            self._hold(handle)
        self._scorer.submit(job)
        return job.future

    # -- the engine itself -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False after a step has failed: the engine no longer answers."""
        return self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None

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
        self._scorer.close()
        self._manager.stop(block=True, hard_stop=True)
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

    def _scored(self, jobs: Sequence[LabelJob]) -> None:
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

    def _ended(self, output: GenerationOutput) -> None:
        if output.error is not None:
            log.error("request %s failed: %s", output.request_id, output.error)
            self._finish(output.request_id, "failed", "the generation failed; the server's log says why")
        else:
            ended = bool(output.generated_tokens) and output.generated_tokens[-1] == self.end
            self._finish(output.request_id, "stop" if ended else "length")

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
            self._manager.cancel_request(request_id)
        if running.request.ignore_end and reason == "stop":
            reason = "length"
        _deliver(running, End(reason, message, running.cached))


def _deliver(running: _Running, event: Token | End) -> None:
    try:
        running.deliver(event)
    except Exception:  # a failing receiver must not fail the step, and with it all other requests
        log.exception("an answer could not be delivered")


def _check_room(base: PreTrainedModel, cache_bytes: int) -> None:
    device = base.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if cache_bytes > free:
        raise RequestError(
            f"serve.cache_mb: {cache_bytes >> 20} MB for keys and values exceed the {free >> 20} MB of memory that the base "
            "leaves free; lower it, or set model.dtype=bfloat16"
        )


def _token_bytes(base: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in all layers."""
    config: Any = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * base.dtype.itemsize)
