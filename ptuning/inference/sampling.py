"""Chooses the next token of each request and reports it.

transformers' continuous batching (5.23) has one seed and one set of sampling parameters for all requests, reports only the log-
probability of the chosen token, and copies a request's whole text for every streamed token. Its list of logits processors is
called at every step with all requests, so the sampler replaces that list: it chooses each request's token with the request's
own generator, makes that token the only possible one, and reports it immediately.

What changes logits is in the order of vLLM: biases and end tokens that are not allowed yet, penalties, temperature, min_p,
top_k, top_p. Each is what the logits processor of transformers of this name computes.

Shapes: R requests of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from ptuning.inference.grammar import Matcher


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature 0: the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Sample from tokens that are at least this fraction as likely as the most likely one."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every time that it was generated."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the text or the answer and multiplies negative ones. Virtual tokens do not count."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of tokens."""
    min_tokens: int = 0
    """No token that ends an answer before this many tokens."""
    seed: int | None = None
    """The same seed gives the same answer, regardless of other requests in the batch."""
    top: int | None = None
    """Report log-probabilities: of the chosen token and of this many most likely ones. None: report none."""

    @cached_property
    def changes_logits(self) -> bool:
        """Whether another token than by the model's logits may be the most likely one."""
        penalties = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1 or self.min_tokens
        return bool(penalties or self.logit_bias)


@dataclass(frozen=True)
class Token:
    """A generated token."""

    id: int
    logprob: float | None = None
    """Log-probability from the model's logits, before all that changes them."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids with their log-probabilities, the most likely first."""


@dataclass
class SamplerState:
    """The sampler's state of a request."""

    sampling: Sampling
    text: Sequence[int] = ()
    """The token ids of the text."""
    ends: Sequence[int] = ()
    """The tokens that end the answer."""
    matcher: Matcher | None = None
    """What restricts the answer."""
    generator: torch.Generator | None = None
    computed: int = 0
    """Number of tokens computed for this request so far."""
    on_token: Callable[[Token | None], None] = field(default=lambda token: None)
    """Called with every token immediately; with None if the logits are NaN."""
    made: Counter[int] = field(default_factory=Counter)
    """How often each token was generated; only counted if logits depend on it."""

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    @cached_property
    def _distinct(self) -> list[int]:
        return sorted(set(self.text))

    @property
    def changes_logits(self) -> bool:
        return self.matcher is not None or self.sampling.changes_logits

    def chose(self, token: int) -> None:
        """Remember a token that was chosen from changed logits."""
        self.made[token] += 1
        if self.matcher:
            self.matcher.accept(token)

    def changed(self, logits: Tensor) -> Tensor:
        """Logits `[V]` -> a copy with biases, penalties and -inf for what is not allowed."""
        sampling, logits = self.sampling, logits.clone()

        def at(ids: Sequence[int]) -> Tensor:
            return torch.tensor(ids, dtype=torch.long, device=logits.device)

        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            logits[at(ids)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
        if self.made.total() < sampling.min_tokens:
            logits[at([end for end in self.ends if 0 <= end < len(logits)])] = -math.inf
        if sampling.repetition_penalty != 1:
            seen = at(sorted({*self._distinct, *self.made}))
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / sampling.repetition_penalty, found * sampling.repetition_penalty)
        if self.made and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = torch.tensor(list(self.made.values()), dtype=logits.dtype, device=logits.device)
            logits[at(list(self.made))] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        return self.matcher.restricted(logits) if self.matcher else logits


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
    changed = logits
    if choice.changes_logits:
        changed = choice.changed(logits)
        token = int(changed.argmax())
    if choice.generator is not None:
        token = draw(changed, choice.sampling, choice.generator)
    if changed is not logits:
        choice.chose(token)
    choice.on_token(describe(logits, token, choice.sampling.top))
    return token


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token sampled from logits `[V]`."""
    exact = logits.double().cpu()
    probabilities = torch.softmax((exact - exact.max()) / sampling.temperature, -1)  # no overflow at low temperatures
    if sampling.min_p > 0 or 0 < sampling.top_k < len(probabilities):
        least = sampling.min_p * probabilities.max()
        if 0 < sampling.top_k < len(probabilities):
            least = torch.maximum(least, probabilities.topk(sampling.top_k).values[-1])
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
        probabilities /= probabilities.sum()
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
