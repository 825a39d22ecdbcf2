"""Attention over a tree of segments: it makes "one base, many soft prompts" cheap.

A causal model computes a token from itself and the tokens before it. So the keys and values of a soft prompt do not depend on
the text after it, and those of a text do not depend on the label that is scored after it. A *segment tree* gives the order:
soft prompts are roots, texts continue a soft prompt, labels continue a text. The tokens of all segments are packed without
padding into one row `[1, N, H]`. Operations on single tokens (projections, norms, MLP) see these N tokens, so a shared prefix
is computed once. Only attention has to know the tree, and attention is the function that transformers allows to replace
(https://huggingface.co/docs/transformers/attention_interface).

On a GPU the tree is a few calls of flash attention (`cascade_attention`). Elsewhere, and for what flash attention cannot
compute, it is one call per group of segments.

The usual alternative, a key-value cache, needs two passes; this needs one. Under ZeRO-3 each layer is gathered once in the
forward and once in the backward pass, and gradient checkpointing, which disables caches, works.

Shapes: N packed tokens, R rows of a group, T its longest row, S the longest chain of ancestors plus T, h heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ptuning.model import cascade_attention, cpu_attention, varlen_attention
from ptuning.model.token_tree import SegmentGroup, TokenTree

ATTENTION = "ptuning_segments"
"""Name of the attention below."""


class _Padded(torch.autograd.Function):
    """Repeats the last token of short rows. No token attends to the copies and their outputs are dropped, so their gradient is
    zero: the backward pass is a selection, where that of `index_select` is a sum into zeros."""

    @staticmethod
    def forward(context: Any, part: Tensor, padded: Tensor, unpadded: Tensor) -> Tensor:
        context.save_for_backward(unpadded)
        return part.index_select(1, padded)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (unpadded,) = context.saved_tensors
        return gradients[0].index_select(1, unpadded), None, None


def _rows(packed: Tensor, groups: list[SegmentGroup]) -> dict[int, Tensor]:
    """`[h, N, d]` packed -> `[R, h, T, d]` padded rows of every packed group, by the group's id.

    The backward pass of a single `split` is one concatenation. With one slice per group the backward pass would fill a whole
    `[h, N, d]` for each: quadratic in the number of slots.
    """
    rows = {}
    for group, part in zip(groups, packed.split([group.tokens for group in groups], 1), strict=True):
        if not group.dense:
            part = _Padded.apply(part, group.at("padded", packed.device), group.at("unpadded", packed.device))
        rows[id(group)] = part.unflatten(1, (len(group.lengths), group.longest)).transpose(0, 1)
    return rows


def _attend(
    group: SegmentGroup,
    queries: dict[int, Tensor],
    keys: dict[int, Tensor],
    values: dict[int, Tensor],
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a group's rows to themselves and their ancestors: rows `[R, h, T, d]` -> `[tokens, h, d]`."""
    q = queries[id(group)]
    k = torch.cat([_inherited(keys[id(ancestor)], rows) for ancestor, rows in group.chain], 2)  # [R, key heads, S, d]
    v = torch.cat([_inherited(values[id(ancestor)], rows) for ancestor, rows in group.chain], 2)
    shared = q.shape[1] // k.shape[1]  # grouped-query attention: query heads per key head
    mask = group.mask(window, shared, k.device)
    if shared > 1:
        # The query heads of one key head become additional query rows, so keys and values are not copied per query head.
        q = q.unflatten(1, (k.shape[1], shared)).transpose(2, 3).flatten(2, 3)
    if softcap is None and sinks is None:
        out = cpu_attention.attention(q, k, v, mask, scale)
    else:
        if sinks is not None:  # of the query heads that one key head has, for each of their rows
            sinks = sinks.view(k.shape[1], shared).repeat(1, group.longest)
        out = explicit_attention(q, k, v, mask.allowed, scale, softcap, sinks)
    if shared > 1:
        out = out.unflatten(2, (group.longest, shared)).transpose(2, 3).flatten(1, 2)
    out = out.transpose(1, 2).flatten(0, 1)  # [R * T, h, d]
    return out if group.dense else out.index_select(0, group.at("unpadded", out.device))


def _inherited(above: Tensor, rows: list[int] | None) -> Tensor:
    """The keys or values of an ancestor, one row for each row of the group."""
    if rows is None:
        return above
    if len(above) == 1:
        return above.expand(len(rows), -1, -1, -1)
    return above.index_select(0, torch.tensor(rows, device=above.device))


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What SDPA cannot do: tanh-capped scores (Gemma 2, arXiv 2408.00118, section 2), and a learned score `sinks` [h, T] for
    attending to nothing, which takes part in the softmax (gpt-oss, arXiv 2508.10925, section 2.2)."""
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:  # causal: the queries are the last positions of the keys
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    # Not -inf: a padded query that attends to nothing would be NaN, and 0 * NaN would spread to the other queries.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[None, :, :, None].expand(len(scores), -1, -1, 1)], -1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return shares[..., : k.shape[2]] @ v


def tree_mask(segments: TokenTree, device: torch.device) -> Tensor:
    """A mask that carries the tree: some layers pass on nothing else to their attention (Nemotron 4, transformers 5.23). Given
    a 4-D mask, transformers does not build its own."""
    mask: Any = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask.segments = segments
    carrying: Tensor = mask
    return carrying


def tree_of(mask: Any) -> TokenTree | None:
    """The tree that a mask carries."""
    segments: TokenTree | None = getattr(mask, "segments", None)
    return segments


def segment_attention(
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
    segments: TokenTree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `[1, h, N, d]` -> `[1, N, h, d]`. `s_aux` [h] are attention sinks.

    Raises:
        NotImplementedError: the architecture's attention has a feature that is not implemented here, or does not pass on the
            segment tree.
    """
    segments = segments or tree_of(attention_mask)
    if segments is None:
        raise NotImplementedError("attention without a segment tree")
    extras = sorted(name for name in ("position_bias", "cache") if kwargs.get(name) is not None)
    if attention_mask is not None and attention_mask.numel() > 1:
        extras.append("a mask of its own")
    if extras:
        raise NotImplementedError(f"attention with {', '.join(extras)}")
    prefixes = [each[layer_of(module)].to(key) for each in segments.prefixes] if segments.given else []
    if segments.levels and _cascades(query, key, value, segments, sliding_window, softcap, s_aux):
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        if prefixes:
            k, v = (torch.cat([*(each[at].transpose(0, 1) for each in prefixes), own]) for at, own in enumerate((k, v)))
        return cascade_attention.attention(q, k, v, segments.levels, scaling)[None], None
    queries, keys, values = (_rows(packed[0], segments.packed) for packed in (query, key, value))
    for group, prefix in zip(segments.given, prefixes, strict=True):
        keys[id(group)], values[id(group)] = (part[None] for part in prefix.unbind())
    rows = [_attend(group, queries, keys, values, scaling, sliding_window, softcap, s_aux) for group in segments.packed]
    return torch.cat(rows)[None], None


def layer_of(attention: nn.Module) -> int:
    """The number of an attention's layer, as it names its layer in transformers' caches.

    Raises:
        NotImplementedError: it has none.
    """
    for name in ("layer_idx", "layer_id"):  # GPT-Neo has the second
        layer = getattr(attention, name, None)
        if isinstance(layer, int):
            return layer
    raise NotImplementedError("given keys and values for attention without the number of its layer")


def _cascades(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: TokenTree,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> bool:
    """Whether flash attention can compute this layer; a window that no sequence exceeds is none."""
    plain = softcap is None and sinks is None and (window is None or window >= segments.longest)
    return plain and varlen_attention.suits(query, key, value)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The segment tree is the mask."""


AttentionInterface.register(ATTENTION, segment_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
