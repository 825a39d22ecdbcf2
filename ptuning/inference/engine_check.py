"""Which generator an engine uses: the fastest one that generates with its cache what the base computes without one."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ptuning.inference.generator import Events, Generator
from ptuning.inference.paged_generator import PagedGenerator
from ptuning.inference.plain_generator import PlainGenerator, RecomputingGenerator, SingleGenerator
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.types import Deliver, End, EngineConfig, Request, RequestError, ResidentPrompt
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import FAILURES, ROUGH, TOLERANCE, random_prompts
from ptuning.redaction import logger

log = logger(__name__)

HOW = {
    PlainGenerator: "no paged cache, requests run in batches of equal length",
    SingleGenerator: "no paged cache, requests run one after the other",
    RecomputingGenerator: "no cache gives the same numbers, every new token computes all tokens before it again",
}
"""What is slower than pages, in the log's words."""

LENGTH, NEW = 3, 3
TEXTS = (4, 6, 4)
"""Tokens of the texts: two share a soft prompt's pages, and two may share a batch."""
TIMES = 25
"""A log-probability may differ by this many times what is tolerated in a pass (0.05, in 16 bits 0.5): others differ by nats."""
PATIENCE = 600.0
"""Seconds for a step of a large base on a CPU."""


class Checked(Protocol):
    """What the check needs of an engine."""

    vocabulary: int

    def add(self, vectors: Tensor, content_hash: str) -> ResidentPrompt: ...

    def remove(self, handle: ResidentPrompt) -> None: ...

    def submit(self, request: Request, deliver: Deliver) -> str: ...

    def cancel(self, request_id: str) -> None: ...

    def paused(self) -> AbstractContextManager[object]: ...


def choose_generator(
    model: PromptedModel, config: EngineConfig, events: Events, right: Callable[[Generator], bool]
) -> Generator:
    """Start the fastest generator that is `right`.

    Raises:
        RequestError: there is none, or the cache does not fit into memory.
    """
    kinds: list[type[PagedGenerator] | type[PlainGenerator]] = [
        *(PagedGenerator, PlainGenerator, SingleGenerator, RecomputingGenerator)
    ]
    for kind in kinds[not model.shared_prefix :]:
        try:
            generator = kind(model, config, events)
        except RequestError:
            raise
        except FAILURES as error:  # this cache has no place for the states of this architecture
            log.debug("%s: %s", kind.kind, error)
            continue
        with quiet() if kind is not RecomputingGenerator else nullcontext():  # the last one says why it fails
            found = right(generator)
        if found:
            if kind in HOW:
                log.warning("%s: %s", type(model.base).__name__, HOW[kind])
            return generator
        generator.close()
    raise RequestError(
        f"model.path: {config.name} ({type(model.base).__name__}) does not generate with its cache what it "
        "computes without, in this version of transformers; choose another base"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the tracebacks of a cache that does not suit an architecture: another one is tried next."""
    loggers = [logging.getLogger(name) for name in ("transformers", "ContinuousBatchingLogger", "ptuning.inference")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def generates_right(engine: Checked, model: PromptedModel) -> bool:
    """Three requests of a few tokens; their log-probabilities must be those of the pass of evaluation."""
    draw = torch.Generator().manual_seed(2)
    low, high = engine.vocabulary // 8, engine.vocabulary
    texts = [torch.randint(low, high, (length,), generator=draw).tolist() for length in TEXTS]
    (vectors,) = random_prompts(model, [LENGTH], draw)
    handle = engine.add(vectors, "check")
    try:
        answers = _generate(engine, [Request(text, handle, NEW, Sampling(top=0), ignore_end=True) for text in texts])
    finally:
        engine.remove(handle)
    if answers is None:
        return False
    rows = [(text, [token.id for token in tokens]) for text, tokens in zip(texts, answers, strict=True)]
    with torch.no_grad(), engine.paused():
        nll = model([vectors], pack_targets([LENGTH], [rows])).float().cpu()
    found = torch.tensor([token.logprob for tokens in answers for token in tokens])
    return float((found + nll).abs().max()) <= TOLERANCE.get(model.base.dtype, ROUGH / 10) * TIMES


def _generate(engine: Checked, requests: Sequence[Request]) -> list[list[Token]] | None:
    """The tokens of all requests, which run together; None if one fails."""
    sinks: list[queue.SimpleQueue[Token | End]] = [queue.SimpleQueue() for _ in requests]
    with engine.paused():  # so they run in the same batch
        running = [engine.submit(request, sink.put) for request, sink in zip(requests, sinks, strict=True)]
    answers: list[list[Token]] = []
    try:
        for sink in sinks:
            tokens: list[Token] = []
            while isinstance(event := sink.get(timeout=PATIENCE), Token):
                tokens.append(event)
            if event.reason == "failed" or len(tokens) != NEW:
                return None
            answers.append(tokens)
    except queue.Empty:
        return None
    finally:
        for request_id in running:
            engine.cancel(request_id)
    return answers
