"""Attention for serving: requests of any length in one batch, each over its own pages of the key-value cache.

On a CPU, transformers' continuous batching (5.23) computes one attention for all requests, with a mask that separates them. Its
cost is the product of all queries and all keys, and masking does not isolate: a NaN of one request spreads to all others,
because 0 * NaN is NaN. Here each request has an attention call of its own: the cost is the sum, and requests cannot affect each
other. On a GPU one call of flash attention does the same for all requests (`varlen_attention`).

Shapes: N packed query tokens and S packed keys of all requests, h heads, d head width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching import cache as paged_cache
from transformers.generation.continuous_batching.cache_allocators import full_attention
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from ptuning.model import varlen_attention
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.tree_attention import explicit_attention, segment_attention, tree_of
from ptuning.model.varlen_attention import Sequences

_RECORDED = "ptuning_recorded"
ATTENTION = "ptuning_serving"
"""Name of the attention below. Only for `segments` and paged caches, neither of which needs a mask from transformers."""


_STEP = threading.local()
"""The arguments of the step that this thread computes: some layers do not pass them on to their attention."""


@dataclass(frozen=True)
class Stored:
    """Keys and values of a token in one layer, as the paged cache stores them."""

    heads: int
    width: int

    @property
    def numbers(self) -> int:
        return 2 * self.heads * self.width


@torch.no_grad()
def stored_sizes(model: PromptedModel) -> Stored | None:
    """How the paged cache must store keys and values: transformers allocates the same heads and widths for the keys and the
    values of all layers, from the config. None if that is right; otherwise one head, as wide as all heads of the largest layer
    together (latent attention: values are narrower than keys; other heads in some layers; one head for all queries)."""
    found: set[tuple[int, int, int]] = set()

    def recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.add((key.shape[1], key.shape[3], value.shape[3]))
        return segment_attention(module, query, key, value, *args, **kwargs)

    base = model.base
    AttentionInterface.register(_RECORDED, recorded)
    AttentionMaskInterface.register(_RECORDED, _no_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(_RECORDED)
    try:
        width = base.get_input_embeddings().weight.shape[1]
        model([torch.empty(0, int(width))], pack_targets([0], [[([1], [1])]]))
    finally:
        base.set_attn_implementation(before)
    config = base.config.get_text_config()
    try:
        usual = find_num_key_value_heads(config), find_head_dim(config)
    except Exception:  # the config gives none, or another for each layer (an error of its own)
        usual = None
    if found == {(*usual, usual[1])} if usual else False:
        return None
    return Stored(1, max(heads * max(keys, values) for heads, keys, values in found))


@contextmanager
def storing(sizes: Stored | None) -> Iterator[None]:
    """transformers allocates a paged cache of these sizes."""
    if sizes is None:
        yield
        return
    places: Any = [(paged_cache, "find_num_key_value_heads", sizes.heads)]
    places += [(module, "find_head_dim", sizes.width) for module in (paged_cache, full_attention)]
    originals = [getattr(module, name) for module, name, _ in places]
    for module, name, number in places:
        setattr(module, name, lambda config, number=number: number)
    try:
        yield
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def remember_steps(base: nn.Module) -> Any:
    """Keep the arguments of each step for attention that is not given them, and the step's tokens of key-value prefixes
    (`virtual_tokens.VirtualTokens`); returns what removes the hooks."""

    embedding: Any = getattr(base, "get_input_embeddings", lambda: None)()

    def begin(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        _STEP.options = options if options.get("cache") is not None else None

    def embedded(module: nn.Module, *_: Any) -> None:
        _STEP.given = getattr(module, "given", None)

    def end(*_: Any) -> None:
        _STEP.options = _STEP.given = None

    handles = [
        *([embedding.register_forward_hook(embedded)] if embedding is not None else []),
        base.register_forward_pre_hook(begin, with_kwargs=True),
        base.register_forward_hook(end, always_call=True),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _updated(cache: Any, key: Tensor, value: Tensor, layer: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Store keys and values, and read those of all tokens of the requests."""
    allocated = cache.layer_to_allocator[layer]
    shape = (allocated.num_key_value_heads, allocated.head_dim)
    if key.shape[1:4:2] == shape and value.shape == key.shape:
        updated: tuple[Tensor, Tensor] = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=options)
        return updated
    flat = [each.transpose(1, 2).flatten(2)[:, None] for each in (key, value)]  # [1, 1, N, h * d]
    flat = [pad(each, (0, allocated.head_dim - each.shape[3])) for each in flat]
    found = cache.update(key_states=flat[0], value_states=flat[1], layer_idx=layer, kwargs=options)
    keys, values = (
        whole[:, 0, :, : each.shape[1] * each.shape[3]].unflatten(2, (each.shape[1], each.shape[3])).transpose(1, 2)
        for whole, each in zip(found, (key, value), strict=True)
    )
    return keys, values


def _given(layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, h, N, d]` of a layer, with those of key-value prefixes in their places."""
    for part in getattr(_STEP, "given", None) or ():
        keys, values = part.prefix[layer].index_select(2, part.virtual).to(key)
        key, value = key.index_copy(2, part.at, keys[None]), value.index_copy(2, part.at, values[None])
    return key, value


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
    if cache is None and tree_of(attention_mask) is None and (step := getattr(_STEP, "options", None)):
        cache, kwargs = step["cache"], kwargs | step
    if cache is None:
        return segment_attention(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window, softcap, s_aux, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention with position_bias")
    key, value = _updated(cache, *_given(module.layer_idx, key, value), module.layer_idx, kwargs)
    if softcap is None and s_aux is None and varlen_attention.suits(query, key, value):
        sequences = Sequences(
            kwargs["cu_seq_lens_q"],
            kwargs["cu_seq_lens_k"],
            kwargs["max_length_q"],
            kwargs["max_length_k"],
            causal=True,
            window=sliding_window,
        )
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        return varlen_attention.forward(q, k, v, sequences, scaling)[0][None], None
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    groups = query.shape[1] // key.shape[1]
    out = query.new_empty(*query.shape[:3], value.shape[3])
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
