"""Rows of the output head that prevent the generation of virtual tokens.

Guarantees: engines that honour `suppress_tokens` of the generation config, such as transformers' `generate`, never generate a
virtual token. If the head has a bias, no engine does: the bias of virtual tokens is -10,000. Without either, virtual tokens are
only very unlikely; their fraction is measured and reported. If they are not, as some base may have states in all directions,
their row lies between those of two unlikely real tokens: then no virtual token is ever the most likely one.

A head without a bias cannot exclude a token, because its logits are products `w . h` with the last hidden state h: a row of
zeros has the logit 0, which is often among the largest, and a row with a very small logit for h has a very large one for -h.
But the hidden states of a language model fill only a part of the space (Ethayarajh 2019), for most bases one half of it: then
there is a w with `w . h` far below zero for nearly all states. So the row is fitted to minimise its own probability, averaged
over states of this base, which is a convex problem. The remaining probability is measured on texts that were not used for the
fit.

Shapes: n states, H width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptuning.model.input_embedding import InputEmbedding
from ptuning.model.self_check import FAILURES

NEVER = -1e4
"""A bias that fits into 16-bit floats."""
TEXTS, HELD, LENGTH = 48, 16, 96
"""Texts of each kind, the number of them that is held out for measuring, and their tokens."""
HOT = 2.0
"""The temperature at which the fraction of virtual tokens is minimised; it is smaller at lower temperatures."""
DOUBT = 0.35
"""Relative size of the noise that is assumed on states that were not seen, in any direction. It amounts to a penalty on the
squared norm of w, as the mean of exp(w . noise) is exp((size * |w|)^2 / 2). A longer row is better on the held-out states but
generalises worse: with 0.12 the probability was below 1e-5 on every held-out state, but on two of 80,000 new states a virtual
token was certain. With 0.35 this did not happen, for three bases; larger values only increase the fraction."""

LIKELY = 0.01
"""Where a fitted row is more likely than this on any state, a row between two real tokens is taken instead."""
STATES = ("past_key_values", "cache_params", "state")
"""Names of what a pass returns for the next token: keys and values, or the state of a state space."""


@dataclass(frozen=True)
class States:
    """Hidden states that reach the head, `[n, H]` fp32: to fit a row to, and to measure it on."""

    fit: Tensor
    trial: Tensor


@dataclass(frozen=True)
class Suppression:
    """What prevents virtual tokens, in addition to the generation config."""

    exact: bool
    """The head has a bias."""
    mean: float
    """Fraction of virtual tokens among those sampled at temperature 2, on held-out states; about the same on new ones."""
    worst: float
    """The same at the worst held-out state; with more states it would be larger."""

    @property
    def safe(self) -> bool:
        """Less than one token in a billion."""
        return self.exact or self.mean < 1e-9


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, feeding: InputEmbedding, soft_prompts: Sequence[Tensor], front: list[int], words: int
) -> States:
    """States at random texts and at texts that the base generates at high and low temperature, with and without the soft
    prompts. Their number does not depend on that of the soft prompts.

    States at the virtual tokens themselves are left out: nothing is generated there.

    Args:
        soft_prompts: vectors `[P, H]`.
        front: special tokens that every text begins with.
        words: ids below this one are the base's own tokens.
    """
    fit: list[Tensor] = []
    trial: list[Tensor] = []
    for vectors in soft_prompts:
        found = _with_and_without(model, feeding, vectors, front, words)
        for each, part in ((fit, slice(HELD, None)), (trial, slice(HELD))):
            states = torch.cat([states[part].flatten(0, 1) for states in found])
            each.append(states[torch.isfinite(states).all(1)][:: len(soft_prompts)])
    return States(torch.cat(fit), torch.cat(trial))


def _with_and_without(
    model: PreTrainedModel, feeding: InputEmbedding, vectors: Tensor, front: list[int], words: int
) -> list[Tensor]:
    """`[TEXTS, n, H]` each."""
    generator = torch.Generator().manual_seed(0)
    prompt = vectors.to(model.dtype)[None].expand(TEXTS, -1, -1)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    length = max(2, min(LENGTH, room - len(vectors) - len(front)))
    first = torch.tensor(front, dtype=torch.long).expand(TEXTS, -1)
    texts = [torch.cat([first, torch.randint(words, (TEXTS, length), generator=generator)], dim=1)]
    try:
        texts += [_write(model, feeding, prompt, first, words, length, temperature, generator) for temperature in (HOT, 1.0)]
    except FAILURES:  # xLSTM's cache has other sizes than its states (5.23)
        generator = torch.Generator().manual_seed(1)
        texts += [
            _write(model, feeding, prompt, first, words, length, temperature, generator, cached=False)
            for temperature in (HOT, 1.0)
        ]
    return [_behind(model, feeding, start, ids) for ids in texts for start in (prompt, prompt[:, :0])]


def _write(
    model: PreTrainedModel, feeding: InputEmbedding, prompt: Tensor, first: Tensor, words: int, length: int,
    temperature: float, generator: torch.Generator, cached: bool = True,
) -> Tensor:  # fmt: skip
    """Ids: `first`, then `[TEXTS, length]` sampled from the whole vocabulary; end tokens are ignored."""
    embed = model.get_input_embeddings()
    ids = [torch.cat([first, torch.randint(words, (TEXTS, 1), generator=generator)], dim=1)]
    rows, before = torch.cat([prompt, embed(ids[0])], dim=1), torch.zeros(prompt.shape[:2], dtype=torch.long)
    out = model(**feeding.inputs(rows, torch.cat([before, *ids], dim=1)), use_cache=cached)
    for _ in range(length - 1):
        chances = torch.softmax(out.logits[:, -1, :words].float() / temperature, dim=-1)
        ids.append(torch.multinomial(chances, 1, generator=generator))
        state = {name: out[name] for name in STATES if cached and out.get(name) is not None}
        if state:
            out = model(**feeding.inputs(embed(ids[-1]), ids[-1]), use_cache=True, **state)
        else:  # the base has no cache that a caller can hand on: its rows are computed again
            rows = torch.cat([rows, embed(ids[-1])], dim=1)
            out = model(**feeding.inputs(rows, torch.cat([before, *ids], dim=1)), use_cache=False)
    return torch.cat(ids, dim=1)


def _behind(model: PreTrainedModel, feeding: InputEmbedding, start: Tensor, ids: Tensor) -> Tensor:
    """States `[TEXTS, length, H]` at the tokens of texts."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0][:, -ids.shape[1] :].float())

    rows = torch.cat([start, model.get_input_embeddings()(ids)], dim=1)
    whole = torch.cat([ids.new_zeros(start.shape[:2]), ids], dim=1)
    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(**feeding.inputs(rows, whole), use_cache=False)
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def suppress(model: PreTrainedModel, ids: list[int], states: States) -> Suppression:
    """Write the rows (and biases) of the virtual tokens `ids` into the head; all are equal."""
    head = model.get_output_embeddings()
    head.weight.data[ids] = 0
    if getattr(head, "bias", None) is not None:
        head.bias.data[ids] = NEVER
        return Suppression(exact=True, mean=0.0, worst=0.0)
    real = torch.ones(head.weight.shape[0], dtype=torch.bool)
    real[ids] = False
    rows = head.weight.data[real].float()
    penalty = states.fit.square().mean() * (DOUBT / HOT) ** 2 / 2
    others, tried = _others(states.fit, rows), _others(states.trial, rows)
    row = _fit(states.fit, others, float(penalty)).to(head.weight.dtype)
    logs = _logs(states.trial, tried, row, len(ids))
    if float(torch.cat([logs, _logs(states.fit, others, row, len(ids))]).max()) > math.log(LIKELY):
        row = _between(states.fit, others, rows).to(head.weight.dtype)
        logs = _logs(states.trial, tried, row, len(ids))
    head.weight.data[ids] = row
    return Suppression(
        exact=False, mean=float(logs.exp().clamp(max=1).mean()), worst=min(1.0, math.exp(min(0.0, float(logs.max()))))
    )


def _logs(states: Tensor, others: Tensor, row: Tensor, tokens: int) -> Tensor:
    """`[n]`: log of the fraction of virtual tokens with this row of the head, relative to the real tokens."""
    return states @ row.float() / HOT - others + math.log(tokens)


def _between(states: Tensor, others: Tensor, rows: Tensor) -> Tensor:
    """The mean of the rows of the two real tokens that are least likely over all states: wherever it is, one of the two is
    more likely."""
    total = torch.full((len(rows),), -math.inf)
    for part, sums in zip(states.split(1024), others.split(1024), strict=True):
        total = torch.logaddexp(total, torch.logsumexp(part @ rows.T / HOT - sums[:, None], dim=0))
    return rows[total.topk(2, largest=False).indices].mean(0)


def _others(states: Tensor, rows: Tensor) -> Tensor:
    """`[n]`: log of the sum over the real tokens of exp(logit / HOT), in pieces."""
    return torch.cat([torch.logsumexp(part @ rows.T / HOT, dim=1) for part in states.split(1024)])


@torch.enable_grad()
def _fit(states: Tensor, others: Tensor, penalty: float) -> Tensor:
    """The row `[H]` whose probability at temperature HOT, averaged over states, is smallest; convex."""
    row = torch.zeros(states.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([row], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.logsumexp(states @ row / HOT - others, dim=0) + penalty * row.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return row.detach()
