"""Rows of an output head that hardly ever win: how virtual tokens are kept from being generated.

What is promised. Engines that honour `suppress_tokens` of the generation config, as transformers' `generate` does, never
generate a virtual token. Neither does any other engine if the head has a bias: it is -10,000 there. Without both there is no
"never", only a small share of the tokens, which is measured and said.

A head without a bias cannot say "never" because its logits are products `w . h` with the last hidden state h: a row of zeros
has the logit 0, which is often among the largest, and what is far below all others for h is far above them for -h. But the
states that a language model reaches fill a part of the space only (Ethayarajh 2019), for most bases one half of it: then there
is a w with `w . h` far below zero for nearly all of them. So the row is fitted to make its own probability, averaged over the
states of this base, as small as possible: a convex problem. What remains is measured on texts that were not used.

Shapes: n states, H width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NEVER = -1e4
"""A bias that 16-bit floats can hold."""
TEXTS, HELD, LENGTH = 48, 16, 96
"""Texts of each kind, how many of them are kept for the trial, and their tokens."""
HOT = 2.0
"""The temperature at which the share of virtual tokens is made small; at lower ones it is smaller."""
DOUBT = 0.35
"""By how much of its size a state to come may differ, in any direction, from those the row is fitted to. Such noise amounts to
a penalty on the squared length of w, as the mean of exp(w . noise) is exp((size * |w|)^2 / 2). A longer row promises more on
the trial and breaks it elsewhere: with a doubt of 0.12 every state of the trial gave less than 1e-5, but two of 80,000 new
states lay so far on the wrong side of w that a virtual token was certain. With 0.35 there was none, for three bases; beyond it
the share only grows."""


@dataclass(frozen=True)
class States:
    """Hidden states that reach the head, `[n, H]` fp32: to fit a row to, and to measure it on."""

    fit: Tensor
    trial: Tensor


@dataclass(frozen=True)
class Suppression:
    """What keeps virtual tokens out, beside the generation config."""

    exact: bool
    """The head has a bias."""
    mean: float
    """Share of virtual tokens among those drawn at temperature 2, on the trial's states; on new ones it is about the same."""
    worst: float
    """The same at the trial's worst state; among more states there are worse ones."""

    @property
    def safe(self) -> bool:
        """Not one token in a billion."""
        return self.exact or self.mean < 1e-9


@torch.no_grad()
def hidden_states(model: PreTrainedModel, vectors: Tensor, front: list[int], words: int) -> States:
    """States at random texts and at texts that the base writes, hot and cold, behind the soft prompt and without it.

    Without those at the virtual tokens themselves: nothing is generated there.

    Args:
        front: special tokens that every text begins with.
        words: the ids below are those of the base's own tokens.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = vectors.to(model.dtype)[None].expand(TEXTS, -1, -1)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    length = max(2, min(LENGTH, room - len(vectors) - len(front)))
    first = torch.tensor(front, dtype=torch.long).expand(TEXTS, -1)
    texts = [torch.cat([first, torch.randint(words, (TEXTS, length), generator=generator)], dim=1)]
    texts += [_write(model, prompt, first, words, length, temperature, generator) for temperature in (HOT, 1.0)]
    found = [_behind(model, start, ids) for ids in texts for start in (prompt, prompt[:, :0])]
    fit, trial = (torch.cat([states[part].flatten(0, 1) for states in found]) for part in (slice(HELD, None), slice(HELD)))
    return States(fit[torch.isfinite(fit).all(1)], trial[torch.isfinite(trial).all(1)])


def _write(
    model: PreTrainedModel, prompt: Tensor, first: Tensor, words: int, length: int, temperature: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Ids: `first`, then `[TEXTS, length]` sampled from the whole vocabulary, past every end token."""
    embed = model.get_input_embeddings()
    ids = [torch.cat([first, torch.randint(words, (TEXTS, 1), generator=generator)], dim=1)]
    out = model(inputs_embeds=torch.cat([prompt, embed(ids[0])], dim=1), use_cache=True)
    for _ in range(length - 1):
        chances = torch.softmax(out.logits[:, -1, :words].float() / temperature, dim=-1)
        ids.append(torch.multinomial(chances, 1, generator=generator))
        out = model(inputs_embeds=embed(ids[-1]), past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(ids, dim=1)


def _behind(model: PreTrainedModel, start: Tensor, ids: Tensor) -> Tensor:
    """States `[TEXTS, length, H]` at the tokens of texts."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0][:, -ids.shape[1] :].float())

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(inputs_embeds=torch.cat([start, model.get_input_embeddings()(ids)], dim=1), use_cache=False)
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def suppress(model: PreTrainedModel, ids: list[int], states: States) -> Suppression:
    """Write the rows (and biases) of the virtual tokens `ids` into the head, all the same."""
    head = model.get_output_embeddings()
    head.weight.data[ids] = 0
    if getattr(head, "bias", None) is not None:
        head.bias.data[ids] = NEVER
        return Suppression(exact=True, mean=0.0, worst=0.0)
    real = torch.ones(head.weight.shape[0], dtype=torch.bool)
    real[ids] = False
    rows = head.weight.data[real].float()
    penalty = states.fit.square().mean() * (DOUBT / HOT) ** 2 / 2
    row = _fit(states.fit, _others(states.fit, rows), float(penalty)).to(head.weight.dtype)
    head.weight.data[ids] = row
    logs = states.trial @ row.float() / HOT - _others(states.trial, rows) + math.log(len(ids))
    return Suppression(
        exact=False, mean=float(logs.exp().clamp(max=1).mean()), worst=min(1.0, math.exp(min(0.0, float(logs.max()))))
    )


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
