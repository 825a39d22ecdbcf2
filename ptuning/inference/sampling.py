"""Chooses the next token of each request and reports it.

transformers' continuous batching (5.23) has one seed and one set of sampling parameters for all requests, reports only the log-
probability of the chosen token, and copies a request's whole text for every streamed token. Its list of logits processors is
called at every step with all requests, so the sampler replaces that list: it chooses each request's token with the request's
own generator, makes that token the only possible one, and reports it immediately.

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
    """Sampling parameters. Temperature 0: the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    seed: int | None = None
    """The same seed gives the same answer, regardless of other requests in the batch."""
    top: int | None = None
    """Report log-probabilities: of the chosen token and of this many most likely ones. None: report none."""


@dataclass(frozen=True)
class Token:
    """A generated token."""

    id: int
    logprob: float | None = None
    """Log-probability from the model's logits, before temperature and top_p."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids with their log-probabilities, the most likely first."""


@dataclass
class SamplerState:
    """The sampler's state of a request."""

    sampling: Sampling
    generator: torch.Generator | None = None
    computed: int = 0
    """Number of tokens computed for this request so far."""
    on_token: Callable[[Token | None], None] = field(default=lambda token: None)
    """Called with every token immediately; with None if the logits are NaN."""

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)


class Sampler(ContinuousBatchingLogitsProcessorList):
    """Takes the place of transformers' list of logits processors."""

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
        """Logits `[R or more, V]` fp32 -> the same, with the chosen tokens as maximum."""
        largest, likeliest = scores[: len(self._step)].max(-1)
        for row, (logit, token) in enumerate(zip(largest.tolist(), likeliest.tolist(), strict=True)):
            choice = self._find(self._step[row])
            if choice is None:  # the request was cancelled
                continue
            chosen = _choose(scores[row], choice, logit, token)
            if chosen is not None:
                scores[row, chosen] = math.inf
        return scores


def choose_token(logits: Tensor, choice: SamplerState) -> int | None:
    """Choose the next token from logits `[V]` fp32 and report it; None if they are NaN, which is reported, too."""
    largest, likeliest = logits.max(-1)
    return _choose(logits, choice, float(largest), int(likeliest))


def _choose(logits: Tensor, choice: SamplerState, largest: float, token: int) -> int | None:
    if not math.isfinite(largest):
        choice.on_token(None)
        return None
    if choice.generator is not None:
        token = draw(logits, choice.sampling, choice.generator)
    choice.on_token(describe(logits, token, choice.sampling.top))
    return token


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token sampled from logits `[V]`."""
    exact = logits.double().cpu()
    probabilities = torch.softmax((exact - exact.max()) / sampling.temperature, -1)  # no overflow at low temperatures
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token is kept if those before it do not reach top_p, so the most likely one always is.
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        ordered = ordered * kept
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def describe(logits: Tensor, token: int, top: int | None) -> Token:
    """A token with the requested log-probabilities."""
    if top is None:
        return Token(token)
    logprobs = torch.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(min(top, len(logprobs))) if top else (logprobs[:0], logprobs[:0])
    likely = tuple((int(id), value) for id, value in zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), likely)
