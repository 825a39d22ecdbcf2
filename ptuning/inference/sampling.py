"""Chooses the next token of each request and reports it.

transformers' continuous batching (5.23) has one seed and one set of sampling parameters for all requests, reports only the log-
probability of the chosen token, and copies a request's whole text for every streamed token. Its list of logits processors is
called at every step with all requests, so the sampler replaces that list: it chooses each request's token with the request's
own generator, makes that token the only possible one, and reports it immediately. All requests are computed at once, on the
device of the logits: a step would otherwise wait for every request, and on a CPU sampling was slower than a GPU's whole step.

What changes logits is in the order of vLLM: biases and end tokens that are not allowed yet, penalties, temperature, min_p,
top_k, top_p. Each is what the logits processor of transformers of this name computes.

Shapes: R requests of a step, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from ptuning.inference.grammar import Matcher
from ptuning.model.transfer import moved

COLDEST = 1e-6
"""Lowest temperature."""


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
    began: float = 0.0
    """When its first step began, by `time.monotonic`; 0: it waits."""
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

    def compute(self, tokens: int) -> None:
        """The step that begins computes this many tokens of the request."""
        self.began = self.began or time.monotonic()
        self.computed += tokens

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
                choice.compute(request.query_length)
        self._stepped(len(requests_in_batch))
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Logits `[R or more, V]` fp32 -> the same, with the chosen tokens as maximum."""
        rows = scores[: len(self._step)]
        choose_tokens(rows, [self._find(request) for request in self._step])
        return scores


def choose_tokens(logits: Tensor, states: Sequence[SamplerState | None]) -> list[int | None]:
    """Choose the next token of every request from logits `[R, V]` fp32, and report it. None: the request was cancelled, or its
    logits are NaN, which is reported, too. Afterwards the chosen tokens are the maximum of their rows.

    The number of kernels does not depend on R, and the host waits once: for the tokens and all that is reported with them.
    """
    device = logits.device
    drawn = [row for row, state in enumerate(states) if state and state.generator]
    told = [row for row, state in enumerate(states) if state and state.sampling.top is not None]
    settings = [states[row].sampling for row in drawn]  # type: ignore[union-attr]
    uniforms = [_uniform(states[row].generator) for row in drawn]  # type: ignore[union-attr]
    drawn_rows, told_rows, numbers = moved(
        [torch.tensor(drawn, dtype=torch.long), torch.tensor(told, dtype=torch.long), _numbers(settings, uniforms)], device
    )
    largest, tokens = logits.max(-1)
    changing = [row for row, state in enumerate(states) if state and state.changes_logits]
    changed = logits
    if changing:  # what is reported is of the model's own logits
        changed = logits.clone()
        for row in changing:
            changed[row] = states[row].changed(logits[row])  # type: ignore[union-attr]
        tokens = changed.argmax(-1)
    if drawn:
        found = _draw(changed.index_select(0, drawn_rows), numbers, *_limited(settings))
        tokens = tokens.index_copy(0, drawn_rows, found)
    results = [largest, tokens]
    top = 0
    if told:
        logprobs = torch.log_softmax(logits.index_select(0, told_rows), -1)
        top = min(max(states[row].sampling.top or 0 for row in told), logits.shape[1])  # type: ignore[union-attr]
        likely = logprobs.topk(top)
        own = logprobs.gather(1, tokens.index_select(0, told_rows)[:, None])
        results += [own.flatten(), likely.values.flatten(), likely.indices.flatten()]
    logits.scatter_(1, tokens[:, None], math.inf)
    flat = torch.cat([each.double() for each in results]).tolist()
    many = len(states)
    reports = dict(zip(told, _reports(flat[2 * many :], len(told), top), strict=True))
    chosen: list[int | None] = []
    for row, state in enumerate(states):
        token = int(flat[many + row]) if state and math.isfinite(flat[row]) else None
        chosen.append(token)
        if state is None:
            continue
        if token is None:
            state.on_token(None)
            continue
        if state.changes_logits:
            state.chose(token)
        logprob, pairs = reports.get(row, (None, ()))
        state.on_token(Token(token, logprob, pairs[: state.sampling.top or 0]))
    return chosen


def _reports(flat: list[float], many: int, top: int) -> Iterator[tuple[float, tuple[tuple[int, float], ...]]]:
    """The log-probability of the chosen token, and the most likely ids with theirs, of each row."""
    values, ids = flat[many : many + many * top], flat[many + many * top :]
    for row in range(many):
        part = slice(row * top, (row + 1) * top)
        yield flat[row], tuple(zip(map(int, ids[part]), values[part], strict=True))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token sampled from logits `[V]`."""
    return int(_draw(logits[None], _numbers([sampling], [_uniform(generator)]).to(logits.device), *_limited([sampling])))


def _uniform(generator: torch.Generator | None) -> float:
    """A number in [0, 1), one per token: what a request draws depends on its own generator only."""
    return int(torch.randint(1 << 32, (), generator=generator)) / (1 << 32)


def _numbers(samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """`[5, n]` float64: temperatures, top_p, top_k, min_p, uniform numbers."""
    # float32 has no smaller differences of logits that a lower temperature could enlarge.
    temperatures = [max(each.temperature, COLDEST) for each in samplings]
    limits = [each.top_p if each.top_p < 1 else math.inf for each in samplings]
    most = [each.top_k or math.inf for each in samplings]
    return torch.tensor([temperatures, limits, most, [each.min_p for each in samplings], uniforms], dtype=torch.float64)


def _limited(samplings: Sequence[Sampling]) -> tuple[bool, bool]:
    """Whether some have a top_p, and whether some have a top_k or min_p."""
    return any(each.top_p < 1 for each in samplings), any(each.top_k or each.min_p for each in samplings)


def _draw(logits: Tensor, numbers: Tensor, limited: bool, narrowed: bool) -> Tensor:
    """A token per row of logits `[n, V]`: where the cumulated probabilities, in the order of the ids, exceed the row's uniform
    number. `limited`: some row has a top_p; `narrowed`: a top_k or min_p. A row's token does not depend on the others."""
    temperatures, limits, most, least, uniforms = numbers[..., None]
    shifted = logits - logits.amax(-1, keepdim=True)  # no overflow at low temperatures
    probabilities = torch.softmax(shifted / temperatures.to(logits.dtype), -1)
    if narrowed:
        places = most.clamp(max=logits.shape[1]).long() - 1
        likeliest = probabilities.sort(descending=True).values
        least = torch.maximum(likeliest.gather(1, places), least.to(logits.dtype) * likeliest[:, :1])
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if limited:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token is kept if those before it do not reach top_p, so the most likely one always is.
        kept = ordered.cumsum(-1, dtype=torch.float64) - ordered < limits
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered * kept)
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    places = torch.searchsorted(cumulated, uniforms * cumulated[:, -1:], right=True)
    return places[:, 0].clamp_(max=logits.shape[1] - 1)  # only NaN is beyond
