"""Generation by transformers' continuous batching: pages of keys and values, prefixes that are shared, joining at any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from ptuning.inference.generator import Events
from ptuning.inference.paged_attention import ATTENTION, Stored, remember_steps, stored_sizes, storing
from ptuning.inference.sampling import Sampler
from ptuning.inference.types import EngineConfig, RequestError
from ptuning.model.attention_sizes import token_numbers
from ptuning.model.limits import PAGE
from ptuning.model.prompted_model import PromptedModel
from ptuning.redaction import logger

log = logger(__name__)

_NO_CHECK = 1e6
"""A `max_memory_percent` that never limits the cache."""


class _Router(OutputRouter):
    """Passes finished requests on directly, without a queue that every reader would have to search."""

    def __init__(self, ended: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._ended = ended

    def deliver(self, output: GenerationOutput) -> None:
        if output.is_finished():
            self._ended(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class PagedGenerator:
    """Replaces the attention of a model whose soft prompts are computed once (`shared_prefix`).

    Raises:
        RequestError: the cache does not fit into memory.
    """

    kind = "paged"

    def __init__(self, model: PromptedModel, config: EngineConfig, events: Events) -> None:
        base = model.base
        self._events = events
        self._ends: dict[str, frozenset[int]] = {}
        _check_room(base, config.cache_bytes)
        sizes = stored_sizes(model)
        numbers = page_numbers(base, sizes)
        pages = max(8, config.cache_bytes // (PAGE * max(1, numbers * base.dtype.itemsize)))
        self.longest = min(config.context, PAGE * pages * 3 // 4)
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
        self._manager.logit_processor = Sampler(events.find, events.stepped)
        self._forget_steps = remember_steps(base)
        with torch.random.fork_rng(), storing(sizes):  # transformers seeds the whole process here
            try:
                self._manager.warmup()  # allocates the cache now, so that errors are raised here
            except BaseException:
                self._forget_steps()
                raise
        self._manager.start()

    def start(self, request_id: str, ids: Sequence[int], new: int, ends: Sequence[int]) -> None:
        self._ends[request_id] = frozenset(ends)
        self._manager.add_request(list(ids), request_id=request_id, max_new_tokens=new, eos_token_id=list(ends) or -1)

    def cancel(self, request_id: str) -> None:
        self._ends.pop(request_id, None)
        self._manager.cancel_request(request_id)

    def pause(self) -> AbstractContextManager[Any]:
        pause: AbstractContextManager[Any] = self._manager.pause()
        return pause

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None)

    @property
    def cache_used(self) -> float:
        processor = self._manager.batch_processor
        if processor is None:  # it was closed
            return 0.0
        cache = processor.cache
        # transformers (5.23) counts pages as used that it only keeps for later requests with the same beginning.
        kept = sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in cache.cache_allocators.values())
        free = cache.compute_free_capacity(relative=False) + kept
        return 1.0 - float(free) / (cache.num_sectors * cache.bytes_per_sector)

    def close(self) -> None:
        self._manager.stop(block=True, hard_stop=True)
        self._forget_steps()

    def _ended(self, output: GenerationOutput) -> None:
        ends = self._ends.pop(output.request_id, frozenset())
        if output.error is not None:
            log.error("request %s failed: %s", output.request_id, output.error)
            self._events.ended(output.request_id, "failed", "the generation failed; the server's log says why")
        else:
            stopped = bool(output.generated_tokens) and output.generated_tokens[-1] in ends
            self._events.ended(output.request_id, "stop" if stopped else "length", "")


def page_numbers(base: PreTrainedModel, sizes: Stored | None) -> int:
    """Elements of one token in all layers of the cache (`paged_attention.stored_sizes`)."""
    layers = int(base.config.get_text_config().num_hidden_layers)
    return token_numbers(base) if sizes is None else layers * sizes.numbers


def _check_room(base: PreTrainedModel, cache_bytes: int) -> None:
    device = base.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if cache_bytes > free:
        raise RequestError(
            f"serve.cache_mb: {cache_bytes >> 20} MB for keys and values exceed the {free >> 20} MB of memory that the base "
            "leaves free; lower it, or set model.dtype=bfloat16"
        )
