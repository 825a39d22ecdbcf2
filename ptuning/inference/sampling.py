"""How the next token of each request is chosen, and what is told about it.

transformers' continuous batching (5.23) has one seed and one way of sampling for all requests, tells only the chosen token's
log-probability, and copies a request's whole text at every token it streams. Its list of logits processors sees every step
with all its requests, so this list takes its place: it chooses each request's token with the request's own generator, makes
that token the only possible one, and tells it at once.

Shapes: R requests of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """How to choose. Temperature 0: the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Choose among the most likely tokens that have this much probability together."""
    seed: int | None = None
    """The same seed gives the same answer, whoever else is answered at the same time."""
    top: int | None = None
    """Tell log-probabilities: the chosen token's and so many of the most likely ones. None: tell nothing."""


@dataclass(frozen=True)
class Token:
    """A generated token."""

    id: int
    logprob: float | None = None
    """Before temperature and top_p: what the model thinks."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids with their log-probabilities, the likeliest first."""


@dataclass
class SamplerState:
    """What the sampler keeps of a request."""

    sampling: Sampling
    generator: torch.Generator | None = None
    computed: int = 0
    """Tokens computed for this request so far."""
    on_token: Callable[[Token | None], None] = field(default=lambda token: None)
    """Called with every token, at once; with None where the model's answer is not a number."""

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)


class Sampler(ContinuousBatchingLogitsProcessorList):
    """Stands where transformers keeps its logits processors."""

    def __init__(self, find: Callable[[str], SamplerState | None], stepped: Callable[[int], None]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._find = find
        self._stepped = stepped
        self._step: list[str] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """The requests of the next step, in the order of their logits."""
        self._step = [request.state.request_id for request in requests_in_batch if request.has_new_token]
        for request in requests_in_batch:
            choice = self._find(request.state.request_id)
            if choice:
                choice.computed += request.query_length
        self._stepped(len(requests_in_batch))
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Logits `[R or more, V]` fp32 -> the same, the chosen tokens being the largest."""
        largest, likeliest = scores[: len(self._step)].max(-1)
        for row, (logit, token) in enumerate(zip(largest.tolist(), likeliest.tolist(), strict=True)):
            choice = self._find(self._step[row])
            if choice is None:  # cancelled meanwhile
                continue
            if not math.isfinite(logit):
                choice.on_token(None)
                continue
            if choice.generator is not None:
                token = draw(scores[row], choice.sampling, choice.generator)
            choice.on_token(describe(scores[row], token, choice.sampling.top))
            scores[row, token] = math.inf
        return scores


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn from logits `[V]`."""
    exact = logits.double().cpu()
    probabilities = torch.softmax((exact - exact.max()) / sampling.temperature, -1)  # no overflow, however cold
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # Kept while the tokens before have not reached top_p: the likeliest always is.
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        ordered = ordered * kept
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def describe(logits: Tensor, token: int, top: int | None) -> Token:
    """A token with the log-probabilities that were asked for."""
    if top is None:
        return Token(token)
    logprobs = torch.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(min(top, len(logprobs))) if top else (logprobs[:0], logprobs[:0])
    likely = tuple((int(id), value) for id, value in zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), likely)
