"""The attention of GPUs, computed on a CPU in float64: against plain attention of every token to all tokens before it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from ptuning.model import cascade_attention, varlen_attention
from ptuning.model.cascade_attention import levels
from ptuning.model.token_tree import TokenTree
from ptuning.model.varlen_attention import Sequences, suits

pytestmark = pytest.mark.fast


def drawn_tree(seed: int) -> TokenTree:
    """Soft prompts, texts in one or two groups, labels as trees; some slots without a soft prompt, without texts or labels."""
    draw = random.Random(seed)
    tree = TokenTree()
    roots = [tree.add([draw.randint(1, 5)]) if draw.random() < 0.8 else None for _ in range(draw.randint(1, 4))]
    for root in roots:
        for _ in range(draw.randint(0 if root else 1, 2)):
            texts = tree.add([draw.randint(1, 6) for _ in range(draw.randint(1, 4))], root)
            if draw.random() < 0.5:
                rows = list(range(len(texts.lengths)))
                tree.add([4] * len(rows), texts, rows, tree=(-1, 0, 0, 2) if draw.random() < 0.7 else (-1, -1, -1, -1))
    return tree


def seen_by(tree: TokenTree) -> Tensor:
    """`[N, N]`, True where a token attends to another one, from the written-out sequences."""
    index, lengths = tree.sequences()
    seen = torch.eye(tree.tokens, dtype=torch.bool)
    for row, length in zip(index, lengths.tolist(), strict=True):
        for at in range(length):
            seen[row[at], row[: at + 1]] = True
    return seen


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("shared", [1, 2])
def test_the_levels_of_random_trees_are_plain_attention(shared: int) -> None:
    """Output and all gradients; nothing but float64's rounding is left of merging."""
    indexed = 0
    for seed in range(40):
        tree = drawn_tree(seed)
        generator = torch.Generator().manual_seed(seed)
        shapes = ((tree.tokens, 4, 8), (tree.tokens, 4 // shared, 8), (tree.tokens, 4 // shared, 8))
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).requires_grad_() for shape in shapes]
        came = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
        scale = 0.7 if seed % 2 else None
        calls = levels(tree)
        indexed += any(isinstance(at, Tensor) for level in calls for at in (level.queries, level.keys))
        found = cascade_attention.attention(*inputs, calls, scale)
        expected = plain(*inputs, seen_by(tree), scale)
        assert float((found - expected).detach().abs().max()) < 1e-13
        for one, two in zip(torch.autograd.grad(found, inputs, came), torch.autograd.grad(expected, inputs, came), strict=True):
            assert float((one - two).abs().max()) < 1e-12
    assert 5 < indexed < 35  # both ways of taking a level's tokens


def test_the_calls_depend_on_the_depth_of_the_tree_only() -> None:
    """Training copies no keys: its levels are ranges."""
    for slots, rows in ((1, 2), (3, 5)):
        tree = TokenTree()
        roots = [tree.add([4]) for _ in range(slots)]
        for root in roots:
            tree.add([3] * rows, root)
            tree.add([7] * rows, root)
        first, second = levels(tree)
        assert first.sequences.causal and len(first.sequences.queries) == slots * (1 + 2 * rows) + 1
        assert (second.queries, second.keys) == (slice(4 * slots, tree.tokens), slice(0, 4 * slots))
        assert second.sequences.queries.tolist() == [10 * rows * slot for slot in range(slots + 1)]


def test_what_is_not_a_number_stays_in_its_slot() -> None:
    tree = TokenTree()
    for root in [tree.add([2]), tree.add([3])]:
        tree.add([4, 1], root)
    values = torch.randn(tree.tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    values[1] = math.nan  # of the first soft prompt
    inputs = [values.clone().requires_grad_() for _ in range(3)]
    out = cascade_attention.attention(*inputs, levels(tree), None)
    out.sum().backward()
    mine = [0, 1, *range(5, 10)]
    others = [at for at in range(tree.tokens) if at not in mine]
    for each in (out, *(leaf.grad for leaf in inputs)):
        assert each is not None and bool(each[others].isfinite().all()) and bool(each[1].isnan().all())


@pytest.mark.parametrize("window", [None, 3])
def test_the_last_queries_of_a_sequence_see_its_keys(window: int | None) -> None:
    """As serving needs it: the keys of earlier steps come before those of the queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(many, 2, 8, generator=generator, dtype=torch.float64) for many in (4, 11, 11))
    ends = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 5, 11], dtype=torch.int32)
    out, _ = varlen_attention.forward(q, k, v, Sequences(*ends, 3, 6, True, window), None)
    for query, last, first in ((0, 5, 0), (1, 9, 5), (2, 10, 5), (3, 11, 5)):
        first = first if window is None else max(first, last - window)
        alone = plain(q[query : query + 1], k[first:last], v[first:last], torch.ones(1, last - first).bool(), None)
        assert float((out[query] - alone[0]).abs().max()) < 1e-13


def test_only_gpus_compute_so() -> None:
    half = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not suits(half, half, half) and not suits(*(half.to("meta"),) * 3)
