"""Attention in training on CPU against exact attention in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptuning.model import cpu_attention
from ptuning.model.cpu_attention import Mask
from ptuning.model.token_tree import TokenTree

pytestmark = pytest.mark.fast

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}
SHAPES = [
    (3, 2, 5, 9, 8, "rows"),
    (3, 2, 5, 9, 8, "one"),
    (2, 2, 7, 7, 16, None),
    (1, 3, 40, 60, 32, "rows"),
    (2, 2, 33, 40, 16, "behind"),
    (4, 1, 1, 6, 8, "one"),
]


def gradients(attention, tensors: list[Tensor], gradient: Tensor, *options) -> tuple[Tensor, list[Tensor]]:
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    output = attention(*leaves, *options)
    return output.detach(), list(torch.autograd.grad(output, leaves, gradient.to(output.dtype)))


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, is_causal=mask.allowed is None, scale=scale)


def drawn(shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Mask]:
    """Queries, keys, values; a gradient; a mask at random, that of a row behind a soft prompt, or none."""
    rows, heads, queries, keys, width, kind = shape
    generator = torch.Generator().manual_seed(0)
    *inputs, gradient = (
        torch.randn(rows, heads, many, width, generator=generator).to(dtype) for many in (queries, keys, keys, queries)
    )
    allowed = None
    if kind == "behind":
        allowed = (torch.arange(queries)[:, None] + keys - queries >= torch.arange(keys))[None, None]
    elif kind:
        allowed = torch.rand(rows if kind == "rows" else 1, 1, queries, keys, generator=generator) < 0.6
        allowed[..., 0] = True
    return inputs, gradient, Mask(allowed, queries)


@pytest.mark.parametrize("queries", [128, 16, 1])
@pytest.mark.parametrize("scores", [1 << 18, 100, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_exact_attention(shape, dtype, scale, scores, queries, monkeypatch):
    """However few scores and queries are worked on at a time."""
    monkeypatch.setattr(cpu_attention, "SCORES", scores)
    monkeypatch.setattr(cpu_attention, "QUERIES", queries)
    inputs, gradient, mask = drawn(shape, dtype)
    output, found = gradients(cpu_attention.attention, inputs, gradient, mask, scale)
    expected, wanted = gradients(exact, [each.double() for each in inputs], gradient.double(), mask, scale)
    tolerance = TOLERANCE[dtype]
    assert float((output.double() - expected).norm() / expected.norm()) < tolerance
    if queries == 128 or mask.allowed is None:
        assert torch.equal(output, exact(*inputs, mask, scale)), "the forward pass is torch's"
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm()) <= tolerance * float(max(each.norm() for each in wanted))


@pytest.mark.parametrize("values", [4, 24])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_values_may_be_narrower_or_wider_than_keys(values: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in multi-head latent attention; a row of several blocks."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 16)
    (q, k, _), _, mask = drawn((2, 2, 33, 40, 16, "behind"), dtype)
    v, gradient = torch.randn(2, 2, 40, values).to(dtype), torch.randn(2, 2, 33, values).to(dtype)
    output, found = gradients(cpu_attention.attention, [q, k, v], gradient, mask, None)
    expected, wanted = gradients(exact, [each.double() for each in (q, k, v)], gradient.double(), mask, None)
    assert output.shape == (2, 2, 33, values)
    assert float((output.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    for one, other in zip(found, wanted, strict=True):
        assert float((one.double() - other).norm()) <= TOLERANCE[dtype] * float(max(each.norm() for each in wanted))


@given(
    before=st.integers(0, 9),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 25),
    shared=st.integers(1, 3),
    queries=st.integers(1, 9),
)
@settings(deadline=None)
def test_blocks_leave_out_what_nobody_sees_and_nothing_else(before, lengths, window, shared, queries):
    segments = TokenTree()
    root = segments.add([before]) if before else None
    mask = segments.add(lengths, root).mask(window, shared, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "QUERIES", queries)
        blocks = mask.blocks
    hidden = mask.hidden
    covered = [range(block.queries.start, block.queries.stop) for block in blocks]
    assert list(itertools.chain(*covered)) == list(range(mask.size))
    for block in blocks:
        rest = torch.ones(hidden.shape[-1], dtype=torch.bool)
        rest[block.keys] = False
        here = hidden[:, :, block.queries]
        assert here[..., rest].all(), "a key that is left out is seen by nobody"
        assert not here[..., block.keys][..., : block.seen].any(), "what is not masked is seen by all"
        if block.keys != slice(0, hidden.shape[-1]):
            assert not here[..., block.keys.start].all() and not here[..., block.keys.stop - 1].all(), "no key too many"


def test_a_query_that_may_look_nowhere_leaves_the_others_finite():
    q, k, v = (torch.randn(1, 1, 3, 8, dtype=torch.bfloat16) for _ in range(3))
    allowed = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    allowed[..., 1, :] = False
    gradient = torch.ones_like(q)
    gradient[:, :, 1] = 0  # nobody reads it
    found = gradients(cpu_attention.attention, [q, k, v], gradient, Mask(allowed, 3), None)[1]
    assert all(bool(each.isfinite().all()) for each in found)


def test_it_is_used_in_training_only(monkeypatch):
    """Short rows in whole precision and generation stay with torch."""
    used: list[tuple[torch.dtype, int]] = []
    apply = cpu_attention._Attention.apply
    monkeypatch.setattr(
        cpu_attention._Attention, "apply", lambda *given: used.append((given[0].dtype, given[0].shape[2])) or apply(*given)
    )
    for dtype, length in itertools.product((torch.float32, torch.bfloat16), (3, 130)):
        q = torch.randn(1, 1, length, 8, dtype=dtype, requires_grad=True)
        cpu_attention.attention(q, q, q, Mask(None, length), None)
        with torch.no_grad():
            cpu_attention.attention(q, q, q, Mask(None, length), None)
    assert used == [(torch.float32, 130), (torch.bfloat16, 3), (torch.bfloat16, 130)]
