"""The distribution over labels: it sums to 1, and it is what decoding under the constraint draws from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.model.label_trie import LabelTrie

pytestmark = pytest.mark.fast

END = 0
label = st.lists(st.integers(1, 9), max_size=5).map(lambda tokens: (*tokens, END))
"""Ends with the end token, so that none is another's beginning; the empty label is the end token alone."""
many_labels = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=3), min_size=200, max_size=300, unique_by=tuple)
some_labels = st.lists(label, min_size=2, max_size=12, unique=True)
tries = st.one_of(some_labels, many_labels.map(lambda all_: [(*each, END) for each in all_])).map(
    lambda all_: LabelTrie(tuple(all_))
)


def logits_behind(beginning: tuple[int, ...], seed: int) -> torch.Tensor:
    """What some model says behind the text and these tokens: any numbers, the same for the same tokens."""
    generator = torch.Generator().manual_seed(hash((seed, beginning)) % 2**31)
    return 3 * torch.randn(401, generator=generator, dtype=torch.float64)


def beginning_of(trie: LabelTrie, place: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while place >= 0:
        tokens.insert(0, trie.tokens[place])
        place = trie.parents[place]
    return tuple(tokens)


def scores(trie: LabelTrie, seed: int) -> torch.Tensor:
    """The trie's own sums over what the model says at its branching nodes."""
    edges = []
    for node in trie.nodes:
        among = logits_behind(beginning_of(trie, node.place), seed)[torch.tensor(node.children)]
        edges.append(torch.log_softmax(among, -1))
    return trie.label_logprobs(torch.cat(edges))


def constrained(trie: LabelTrie, chosen: tuple[int, ...], seed: int) -> float:
    """Brute force: at every step the next tokens that any label allows share the probability."""
    total = 0.0
    for depth, token in enumerate(chosen):
        allowed = sorted({other[depth] for other in trie.labels if other[:depth] == chosen[:depth]})
        among = torch.log_softmax(logits_behind(chosen[:depth], seed)[torch.tensor(allowed)], -1)
        total += float(among[allowed.index(token)])
    return total


@settings(max_examples=60, deadline=None)
@given(trie=tries, seed=st.integers(0, 99))
def test_it_is_constrained_decoding_and_sums_to_one(trie: LabelTrie, seed: int) -> None:
    found = scores(trie, seed)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)
    for at in range(0, len(trie.labels), max(1, len(trie.labels) // 12)):
        assert float(found[at]) == pytest.approx(constrained(trie, trie.labels[at], seed), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(trie=tries)
def test_only_what_leads_to_a_choice_is_fed(trie: LabelTrie) -> None:
    beginnings = [beginning_of(trie, place) for place in range(len(trie.tokens))]
    assert len({*beginnings}) == len(beginnings)
    branching = {beginning_of(trie, node.place) for node in trie.nodes}
    for beginning in beginnings:
        assert any(other[: len(beginning)] == beginning for other in branching)
    for node in trie.nodes:
        assert len(node.children) > 1 and node.depth == len(beginning_of(trie, node.place))
    for each, path in trie.paths.items():
        assert trie.fed_length(each) < len(each)
        assert [trie.nodes[at].children[child] for at, child in path] == [each[trie.nodes[at].depth] for at, _ in path]


def test_labels_that_part_at_once_need_no_label_token() -> None:
    trie = LabelTrie(((7, 8, END), (9, END), (11, 8, 8, END)))
    assert trie.tokens == [] and [node.children for node in trie.nodes] == [(7, 9, 11)]
    assert trie.ids == [7, 9, 11]


def test_a_shared_beginning_is_fed_once_and_chosen_never() -> None:
    trie = LabelTrie(((5, 6, 1, END), (5, 6, 2, END), (5, 6, 2, 3, END)))
    assert trie.tokens == [5, 6, 2] and trie.parents == [-1, 0, 1]
    assert [(node.place, node.depth, node.children) for node in trie.nodes] == [(1, 2, (1, 2)), (2, 3, (END, 3))]


@settings(max_examples=40, deadline=None)
@given(trie=some_labels.map(lambda all_: LabelTrie(tuple(all_))), seed=st.integers(0, 99), data=st.data())
def test_tokens_of_an_answer_have_the_shares_of_the_constraint(trie: LabelTrie, seed: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, len(trie.labels) - 1))
    whole = scores(trie, seed).tolist()
    told = trie.token_logprobs(whole, chosen)
    label_ids = trie.labels[chosen]
    assert len(told) == len(label_ids)
    assert sum(shares[token] for shares, token in zip(told, label_ids, strict=True)) == pytest.approx(whole[chosen], abs=1e-9)
    for depth, shares in enumerate(told):
        assert set(shares) == {other[depth] for other in trie.labels if other[:depth] == label_ids[:depth]}
        assert sum(map(math.exp, shares.values())) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("labels", [((1, END),), ((1, END), (1, END)), ((1,), (1, END))], ids=["one", "twice", "beginning"])
def test_what_is_no_choice_is_refused(labels: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="label"):
        LabelTrie(labels)
