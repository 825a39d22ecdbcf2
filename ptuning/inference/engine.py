"""One frozen base, many resident soft prompts, requests of all of them in the same batch.

A soft prompt is a run of virtual token ids (`virtual_tokens`), so a request is a list of ids and transformers' continuous
batching does what it is good at: paged keys and values, shared beginnings, joining and leaving at every step, cancellation.
Its pages are found by the ids they hold, and ids are never reused, so a soft prompt's keys and values are computed once and
can never be taken for another's, whatever name either of them is served under.

Where it falls short it is extended through the parts it is made of: `sampling` for what is particular to a request,
`paged_attention` for requests that do not meet, an output router for results without a queue to search. Labels are scored by
the pass that training and evaluation use (`PromptedModel`), between two steps of generation: one pass for all labels
of all waiting rows, where generating would need a request per label and a step per token.

Whole pages of text are shared as well as soft prompts. The answer is the same either way, but it begins sooner, and whoever can
measure that may learn that somebody has asked the same: parties that distrust each other want replicas of their own.

The engine knows token ids, not text, and no ray: it runs wherever torch does.
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
"""A share of the memory that nothing exceeds."""


@dataclass
class _Running:
    request: Request
    deliver: Deliver
    choice: SamplerState
    tokens: int = 0
    cached: int = 0


class _Router(OutputRouter):
    """Hands what has ended to the engine instead of a queue that every reader would have to search."""

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
    """Generates and labels. Every method may be called from any thread.

    The base is taken over: its input embedding and its attention are replaced.

    Raises:
        RequestError: the base's attention cannot be replaced.
    """

    def __init__(self, base: PreTrainedModel, end: int, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self._model = PromptedModel(base)
        if not self._model.shared_prefix:
            raise RequestError(
                f"model.path: {type(base).__name__} cannot be served, its attention is fixed; choose another base"
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
        self._resident: dict[str, tuple[ResidentPrompt, int]] = {}  # by content hash, with the number of holders
        self._waiting_rows = 0
        _check_room(base, config.cache_bytes)
        pages = max(8, config.cache_bytes // (PAGE * _token_bytes(base)))
        self.longest = min(config.context, PAGE * pages * 3 // 4)
        """Most positions of a request: what the base and the cache allow."""
        # transformers chooses between two names here; ours is not among them and is set behind its back.
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
                # Its own check counts a mask of batch_tokens times the whole cache for any attention but flash (5.23). Ours has
                # none, and for a small base it would be many times the cache. What is made is checked above.
                max_memory_percent=_NO_CHECK,
                use_async_batching=False,  # the sampler chooses with Python, between the steps
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        base.set_attn_implementation(ATTENTION)
        self._manager.output_router = _Router(self._ended)
        self._manager.logit_processor = Sampler(self._find, self._stepped)
        with torch.random.fork_rng():  # transformers seeds the whole process here
            self._manager.warmup()  # makes the cache now, so that what is wrong with it is raised here
        self._manager.start()
        self._scorer = LabelScorer(self._model, self._bank, self._manager.pause, self._scored)

    # -- soft prompts ------------------------------------------------------------------------------------------------

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt:
        """Make a soft prompt `[P, H]` resident, or hold it once more if it is.

        Raises:
            RequestError: it does not fit this base, or is not finite in its dtype.
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
        """Let go of a soft prompt. It leaves with its last holder; requests hold what they use."""
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
        """Start a request; returns its id. `deliver` takes its tokens and its end.

        Raises:
            RequestError: ids that are no tokens of the base, or more positions than there are.
            EngineBusy: all places are taken.
            EngineStopped: the engine does not run.
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
        """Refuse what cannot be answered.

        Raises:
            RequestError: ids that are no tokens of the base, or more positions than there are.
        """
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1")
        self.check_ids(request.ids)
        length = len(request.handle.ids) if request.handle else 0
        self.check_room(length, len(request.ids), request.max_new_tokens)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids that are not the base's own tokens: those above belong to somebody's soft prompt."""
        if not ids:
            raise RequestError("the text has no tokens; send some text")
        strange = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise RequestError(
                f"token {strange} is not in the vocabulary of {self.vocabulary} tokens; send 0 to {self.vocabulary - 1}"
            )

    def check_room(self, virtual: int, text: int, new: int) -> None:
        """Refuse more positions than there are."""
        if virtual + text + new > self.longest:
            raise RequestError(
                f"{text} tokens of text, {virtual} virtual tokens and up to {new} new ones are {virtual + text + new}, "
                f"where {self.longest} fit; shorten the text or lower max_tokens"
            )

    def cancel(self, request_id: str) -> None:
        """End a request; it leaves the batch before the next step. One that has ended is left alone."""
        self._finish(request_id, "cancelled", cancel=True)

    def generate(self, request: Request) -> Iterator[Token | End]:
        """Tokens and end of a request, as they come. Leaving the iteration early cancels it."""
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
        """Log-probability of every label behind every row: `[n][L]`, as training and evaluation compute it.

        Raises:
            RequestError, EngineBusy, EngineStopped: as `submit`.
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
        """False once a step has failed: nothing is answered any more."""
        return self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None

    @property
    def busy(self) -> int:
        """Requests that run or wait, and rows that wait for labels."""
        return len(self._running) + self._waiting_rows

    @property
    def full(self) -> bool:
        """All places for generation are taken."""
        return len(self._running) >= self.config.running + self.config.waiting

    def close(self) -> None:
        """Stop at once. Whatever runs is told that it failed."""
        self._scorer.close()
        self._manager.stop(block=True, hard_stop=True)
        for request_id in list(self._running):
            self._finish(request_id, "failed", "the engine was stopped")

    def _hold(self, handle: ResidentPrompt | None) -> None:
        """One holder more; under the lock."""
        if handle is None:
            return
        known = self._resident.get(handle.content_hash)
        if known is None or known[0] is not handle:
            raise RequestError(f"soft prompt {handle.content_hash[:12]} has left the engine; ask for its successor")
        self._resident[handle.content_hash] = (handle, known[1] + 1)

    def _release(self, handle: ResidentPrompt | None) -> None:
        """One holder less; under the lock."""
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
    except Exception:  # a receiver that has gone must not take the step, and so all other requests, with it
        log.exception("an answer could not be delivered")


def _check_room(base: PreTrainedModel, cache_bytes: int) -> None:
    device = base.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if cache_bytes > free:
        raise RequestError(
            f"serve.cache_mb: {cache_bytes >> 20} MB for keys and values, but beside the base {free >> 20} MB of memory are "
            "free; set it to less, or model.dtype=bfloat16"
        )


def _token_bytes(base: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    config: Any = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * base.dtype.itemsize)
