"""Attention for serving: requests of any length in one batch, each over its own pages of the key-value cache.

On a CPU, transformers' continuous batching (5.23) computes one attention for all requests, with a mask that separates them. Its
cost is the product of all queries and all keys, and masking does not isolate: a NaN of one request spreads to all others,
because 0 * NaN is NaN. Here each request has an attention call of its own: the cost is the sum, and requests cannot affect each
other.

Shapes: N packed query tokens and S packed keys of all requests, h heads, d head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ptuning.model.tree_attention import explicit_attention, segment_attention

ATTENTION = "ptuning_serving"
"""Name of the attention below. Only for `segments` and paged caches, neither of which needs a mask from transformers."""


def serving_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `[1, h, N, d]` -> `[1, N, h, d]`.

    Raises:
        NotImplementedError: the architecture's attention has a feature that is not implemented here.
    """
    if cache is None:
        return segment_attention(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window, softcap, s_aux, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention with position_bias")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for at in range(len(queries) - 1):
        mine, seen = slice(queries[at], queries[at + 1]), slice(keys[at], keys[at + 1])
        out[:, :, mine] = _attend(
            query[:, :, mine], key[:, :, seen], value[:, :, seen], groups, scaling, sliding_window, softcap, s_aux
        )
    return out.transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one request: its last T tokens `[1, h, T, d]` over all its S cached tokens."""
    length, seen = query.shape[2], key.shape[2]
    if groups > 1:  # the query heads of one key head become additional rows, so keys and values are not copied per query head
        query = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    mask = None
    if length > 1 or (window is not None and window < seen):
        mask = _causal(length, seen, window, groups, query.device)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        if mask is None:
            mask = torch.ones(query.shape[2], seen, dtype=torch.bool, device=query.device)
        if sinks is not None:
            sinks = sinks.view(-1, groups).repeat_interleave(length, 1)
        out = explicit_attention(query, key, value, mask, scale, softcap, sinks)
    return out.unflatten(2, (groups, length)).flatten(1, 2) if groups > 1 else out


@lru_cache(maxsize=1024)
def _causal(length: int, seen: int, window: int | None, groups: int, device: torch.device) -> Tensor:
    """`[groups * T, S]`, True where a query attends to a key; the queries are the last positions of the keys."""
    distance = torch.arange(seen - length, seen, device=device)[:, None] - torch.arange(seen, device=device)[None]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    return mask.repeat(groups, 1)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(ATTENTION, serving_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
