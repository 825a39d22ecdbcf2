"""Attention for training on CPU: a faster backward pass, and no work for masked blocks.

torch's own backward pass in half precision (2.13, `_scaled_dot_product_flash_attention_for_cpu_backward`) takes 3 to 10 times
as long as its four matrix products if rows are short, as soft prompts and texts are: it was a third of a training step. This
module computes these products directly, for as many heads at a time as fit into a core's cache.

Rows after a soft prompt need a mask, and with a mask torch computes every score. Long rows are therefore split into blocks of
queries, each with only the keys that at least one of its queries attends to: for 512 tokens five eighths of the scores.

The forward pass of a block is torch's own, so training and serving compute the same. In bf16 the relative error of the
gradients against float64 is 4e-3 to 5e-3 (torch: 2e-3 to 5e-3); in float32 both are at 3e-7 to 4e-7.

Shapes: R rows, h heads, T queries, S keys, d head width; a block has t queries and s keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SCORES = 1 << 18
"""Scores that are computed at a time: half a MiB in half precision."""
QUERIES = 128
"""Queries per block."""


class Block(NamedTuple):
    """Queries, and the keys that at least one of them attends to."""

    queries: slice
    keys: slice
    seen: int
    """Number of leading keys that all of these queries attend to."""


@dataclass(frozen=True)
class Mask:
    """`allowed` is `[R or 1, 1, T, S]`, True where a query attends to a key; None: causal with T = S."""

    allowed: Tensor | None
    size: int
    """T."""

    @cached_property
    def hidden(self) -> Tensor:
        """`[R or 1, 1, T, S]`, True where a query does not attend to a key."""
        if self.allowed is not None:
            return ~self.allowed
        return torch.ones(self.size, self.size, dtype=torch.bool).triu(1)[None, None]

    @cached_property
    def blocks(self) -> list[Block]:
        """All queries in their order."""
        return list(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        anybody = ~self.hidden.all(0)[0]  # [T, S]
        everybody = ~self.hidden.any(0)[0]
        for start in range(0, self.size, QUERIES):
            queries = slice(start, min(start + QUERIES, self.size))
            columns = anybody[queries].any(0).nonzero()[:, 0].tolist() or [0, anybody.shape[1] - 1]
            keys = slice(columns[0], columns[-1] + 1)
            yield Block(queries, keys, int(everybody[queries, keys].all(0).int().cumprod(0).sum()))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention` `[R, h, T, d]`. torch computes short rows in float32, and everything without a
    gradient."""
    here = q.device.type == "cpu" and (q.dtype in (torch.bfloat16, torch.float16) or mask.size > QUERIES)
    if here and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output: Tensor = _Attention.apply(q, k, v, mask, scale)
        return output
    return whole(q, k, v, mask, scale)


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """torch's own attention, all scores at once."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, is_causal=mask.allowed is None, scale=scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        context.save_for_backward(q, k, v)
        context.mask, context.scale = mask, scale if scale is not None else q.shape[-1] ** -0.5
        if mask.allowed is None or mask.size <= QUERIES:  # torch skips the masked half of causal attention
            return whole(q, k, v, mask, scale)
        rows, heads, queries = q.shape[:3]
        output = q.new_empty(rows, queries, heads, v.shape[-1]).transpose(1, 2)  # torch's memory layout
        for block in mask.blocks:
            looks = mask.allowed[:, :, block.queries, block.keys]
            found = scaled_dot_product_attention(
                q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys], attn_mask=looks, scale=scale
            )
            output[:, :, block.queries] = found
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = context.saved_tensors
        q, k, v = saved
        hidden, blocks = context.mask.hidden, context.mask.blocks
        of_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        once = len(blocks) == 1 and blocks[0].keys == slice(0, k.shape[2])
        if once:
            of_k, of_v = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (k, v))
        else:  # several blocks, or none, attend to a key; their sum is rounded once, at the end
            of_k, of_v = (each.new_zeros(each.shape, dtype=torch.float32) for each in (k, v))
        for block in blocks:
            for part in _parts(q, block):
                queries, keys = (*part, block.queries), (*part, block.keys)
                unseen = hidden[part[0] if len(hidden) > 1 else slice(None), :, block.queries, block.keys][..., block.seen :]
                found = _gradients(q[queries], k[keys], v[keys], gradients[0][queries], unseen, context.scale)
                of_q[queries] = found[0]
                for whole, share in ((of_k, found[1]), (of_v, found[2])):
                    if once:
                        whole[keys] = share
                    else:
                        whole[keys] += share
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None


def _parts(q: Tensor, block: Block) -> Iterator[tuple[slice, slice]]:
    """Rows and heads whose scores in a block are computed together."""
    rows, heads = q.shape[:2]
    scores = (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
    most_heads, most_rows = max(1, min(heads, SCORES // scores)), max(1, SCORES // (heads * scores))
    for row in range(0, rows, most_rows):
        for head in range(0, heads, most_heads):
            yield slice(row, row + most_rows), slice(head, head + most_heads)


def _gradients(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values from that of the output (all `[R, h, ., d]`); `hidden` masks the last keys."""
    shape = q.shape[:2]
    q, k, v, gradient = (each.flatten(0, 1) for each in (q * scale, k, v, gradient))
    scores = torch.bmm(q, k.transpose(1, 2))
    if hidden.shape[-1]:
        # Not -inf: a padded query that attends to nothing would be NaN, and 0 * NaN would spread to the other queries.
        scores.unflatten(0, shape)[..., -hidden.shape[-1] :].masked_fill_(hidden, torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    of_values = torch.bmm(shares.transpose(1, 2), gradient)
    of_shares = torch.bmm(gradient, v.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_shares, shares, -1, scores.dtype)
    found = torch.bmm(of_scores, k).mul_(scale), torch.bmm(of_scores.transpose(1, 2), q), of_values
    return tuple(each.unflatten(0, shape) for each in found)
