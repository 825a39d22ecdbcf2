"""Initial vectors of a soft prompt, `[P, H]` fp32; key-value prefixes begin as what such vectors have as keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Embed = Callable[[list[int]], Tensor]
"""Token ids -> rows of the base's input embedding, `[n, H]` fp32. Goes through the module, so it works on a sharded base."""


Prefix = Callable[[Tensor], Tensor]
"""Embeddings `[P, H]` -> their keys and values in all layers (`kv_prefix.computed`)."""


def random_rows(length: int, sample: Tensor, generator: torch.Generator) -> Tensor:
    """`[P, ...]` normal numbers with the mean and standard deviation, per dimension, of the sampled rows `[n, ...]`.

    PEFT's default, a unit normal, has about fifty times the standard deviation of a trained embedding.
    """
    noise = torch.randn(length, *sample.shape[1:], generator=generator)
    return sample.mean(0) + noise * sample.std(0)


def vocabulary_rows(length: int, frequent: Sequence[int], embed: Embed, generator: torch.Generator) -> Tensor:
    """`[P, H]` embeddings of tokens sampled from the most frequent ones (Lester et al. 2021, section 3.2)."""
    order = torch.randperm(len(frequent), generator=generator).tolist()
    drawn = [frequent[order[place % len(order)]] for place in range(length)]
    return embed(drawn)


def text_rows(length: int, ids: Sequence[int], embed: Embed) -> Tensor:
    """`[P, H]` embeddings of a text's tokens, repeated or truncated to the length."""
    return embed([ids[place % len(ids)] for place in range(length)])


def label_rows(
    length: int, labels: Sequence[Sequence[int]], frequent: Sequence[int], embed: Embed, generator: torch.Generator
) -> Tensor:
    """`[P, H]`: one row per label, the mean of its tokens' embeddings; the rest from the vocabulary (section 3.2)."""
    means = torch.stack([embed(list(ids)).mean(0) for ids in labels])[:length]
    if len(means) == length:
        return means
    return torch.cat([means, vocabulary_rows(length - len(means), frequent, embed, generator)])


def transferred_rows(length: int, source: Tensor, frequent: Sequence[int], embed: Embed, generator: torch.Generator) -> Tensor:
    """`[P, H]` rows of another soft prompt (SPoT, Vu et al. 2022), truncated, or filled up from the vocabulary."""
    if len(source) >= length:
        return source[:length].clone()
    return torch.cat([source, vocabulary_rows(length - len(source), frequent, embed, generator)])
