"""Attention in half precision on CPU: torch's forward pass, and gradients as good as torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptuning import half_attention

pytestmark = pytest.mark.fast

SHAPES = [
    (3, 2, 5, 9, 8, "rows"),
    (3, 2, 5, 9, 8, "one"),
    (2, 2, 7, 7, 16, None),
    (1, 3, 40, 60, 32, "rows"),
    (4, 1, 1, 6, 8, "one"),
]


def gradients(attention, tensors: list[Tensor], gradient: Tensor, *options) -> tuple[Tensor, list[Tensor]]:
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    output = attention(*leaves, *options)
    return output.detach(), list(torch.autograd.grad(output, leaves, gradient.to(output.dtype)))


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


@pytest.mark.parametrize("scores", [1 << 18, 100, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_exact_attention(shape, dtype, scale, scores, monkeypatch):
    """However few scores are worked on at a time."""
    monkeypatch.setattr(half_attention, "SCORES", scores)
    rows, heads, queries, keys, width, kind = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(rows, heads, many, width, generator=generator).to(dtype) for many in (queries, keys, keys, queries)
    )
    mask = None
    if kind:
        mask = torch.rand(rows if kind == "rows" else 1, 1, queries, keys, generator=generator) < 0.6
        mask[..., 0] = True
    output, found = gradients(half_attention.attention, [q, k, v], gradient, mask, scale)
    doubles = [each.double() for each in (q, k, v)]
    expected, wanted = gradients(exact, doubles, gradient.double(), mask, scale)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-3
    assert float((output.double() - expected).norm() / expected.norm()) < tolerance
    assert torch.equal(output, exact(q, k, v, mask, scale)), "the forward pass is torch's"
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm()) <= tolerance * float(max(each.norm() for each in wanted))


def test_a_query_that_may_look_nowhere_leaves_the_others_finite():
    q, k, v = (torch.randn(1, 1, 3, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    gradient = torch.ones_like(q)
    gradient[:, :, 1] = 0  # nobody reads it
    assert all(bool(each.isfinite().all()) for each in gradients(half_attention.attention, [q, k, v], gradient, mask, None)[1])


def test_it_is_used_in_training_only(monkeypatch):
    """Whole precision and generation stay with torch."""
    used: list[torch.dtype] = []
    apply = half_attention._Attention.apply
    monkeypatch.setattr(half_attention._Attention, "apply", lambda *given: used.append(given[0].dtype) or apply(*given))
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(1, 1, 3, 8, dtype=dtype, requires_grad=True)
        half_attention.attention(q, q, q, None, None)
        with torch.no_grad():
            half_attention.attention(q, q, q, None, None)
    assert used == [torch.bfloat16]
