"""Attention in half precision on CPU, with a backward pass that is as quick as the rest.

torch's own backward pass (2.13, `_scaled_dot_product_flash_attention_for_cpu_backward`) takes 3 to 10 times as long as the four
matrix products that it consists of while rows are short, as soft prompts and texts are: it was a third of a training step.
Here are these products, as many heads at a time as a core's cache holds. The forward pass is torch's own, so what is trained is
what is served. Against it the gradients are 4e-3 instead of 3e-3 from those in float64 (relative norm; bf16 itself is 4e-3).

Shapes: R rows, h heads, T queries, S keys, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SCORES = 1 << 18
"""Scores that are worked on at a time: 1 MiB in float32."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention`; `mask`: `[R or 1, 1, T, S]`, True where a query may look, None for causal with T = S."""
    half = q.dtype in (torch.bfloat16, torch.float16) and q.device.type == "cpu"
    if half and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output: Tensor = _Attention.apply(q, k, v, mask, scale)
        return output
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        context.save_for_backward(q, k, v, mask)
        context.scale = scale if scale is not None else q.shape[-1] ** -0.5
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = context.saved_tensors
        q, k, v, mask = saved
        rows, heads, queries = q.shape[:3]
        keys = k.shape[2]
        if mask is None:
            mask = q.new_ones(queries, keys, dtype=torch.bool).tril()[None, None]
        hidden = ~mask
        wanted = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v)]
        most_heads = max(1, min(heads, SCORES // (queries * keys)))
        most_rows = max(1, SCORES // (heads * queries * keys))
        for row in range(0, rows, most_rows):
            for head in range(0, heads, most_heads):
                here = slice(row, row + most_rows), slice(head, head + most_heads)
                unseen = hidden if len(hidden) == 1 else hidden[here[0]]
                found = _gradients(q[here], k[here], v[here], gradients[0][here], unseen, context.scale)
                for whole, part in zip(wanted, found, strict=True):
                    whole[here] = part
        return *wanted, None, None


def _gradients(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Those of queries, keys and values, given that of the output (all `[R, h, ., d]`)."""
    shape = q.shape[:2]
    q, k, v, gradient = (each.flatten(0, 1) for each in (q, k, v, gradient))
    scores = torch.bmm(q * scale, k.transpose(1, 2)).unflatten(0, shape)
    # Not -inf: a padded query that may look nowhere would be NaN, and 0 * NaN would reach the others as a value.
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1, dtype=torch.float32).flatten(0, 1)
    of_values = torch.bmm(shares.to(q.dtype).transpose(1, 2), gradient)
    of_shares = torch.bmm(gradient, v.transpose(1, 2)).float()
    of_scores = of_shares.sub_((of_shares * shares).sum(-1, keepdim=True)).mul_(shares).mul_(scale).to(q.dtype)
    found = torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_values
    return tuple(each.unflatten(0, shape) for each in found)
