"""The sampler computes what transformers' logits processors compute, for every engine that chooses tokens with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_base
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptuning.inference import text_scorer
from ptuning.inference.sampling import Sampler, SamplerState, Sampling, Token, choose_tokens, draw
from ptuning.model.prompted_model import PromptedModel

pytestmark = pytest.mark.fast

V = 40
ENDS = (3, 5)
seeds = st.integers(0, 2**32 - 1)


def choose_token(logits: torch.Tensor, state: SamplerState) -> int | None:
    return choose_tokens(logits.clone()[None], [state])[0]


def drawn_logits(seed: int) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


@given(
    seeds,
    st.floats(0.2, 3),
    st.one_of(st.just(0.0), st.floats(0.01, 0.9)),
    st.integers(0, V + 3),
    st.one_of(st.just(1.0), st.floats(0.1, 0.99)),
)
def test_what_is_drawn_from_is_what_transformers_keeps(seed, temperature, min_p, top_k, top_p):
    logits = drawn_logits(seed)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = LogitsProcessorList(warpers)(torch.empty(1, 0, dtype=torch.long), logits[None])[0]
    kept = {token for token, each in enumerate(expected.tolist()) if each > -math.inf}
    sampling = Sampling(temperature, top_p, top_k, min_p)
    generator = torch.Generator().manual_seed(seed)
    assert {draw(logits, sampling, generator) for _ in range(30)} <= kept


@given(
    seeds,
    st.lists(st.integers(0, V - 1), max_size=8),
    st.lists(st.integers(0, V - 1), max_size=8),
    st.floats(0.2, 3),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, V - 1), st.floats(-10, 10), max_size=3),
)
def test_biases_and_penalties(seed, text, made, repetition, frequency, presence, bias):
    """Repetition as in transformers over text and answer; frequency and presence as in OpenAI's formula, over the answer."""
    logits = drawn_logits(seed)
    sampling = Sampling(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias=tuple(bias.items())
    )
    state = SamplerState(sampling, text)
    for token in made:
        state.made[token] += 1
    before = logits.clone()
    found = state.changed(logits)
    assert torch.equal(logits, before), "the log-probabilities that are reported are of the model"
    processors: list[Any] = []
    if bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]))
    if text or made:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition))
    expected = LogitsProcessorList(processors)(torch.tensor([[*text, *made]], dtype=torch.long), logits[None].clone())[0]
    for token in set(made):
        expected[token] -= frequency * made.count(token) + presence
    torch.testing.assert_close(found, expected)


def test_no_end_before_the_least_number_of_tokens():
    logits = torch.zeros(V)
    logits[list(ENDS)] = 9.0
    logits[7] = 5.0
    told: list[Token | None] = []
    state = SamplerState(Sampling(min_tokens=2), (1,), ENDS, on_token=told.append)
    assert [choose_token(logits.clone(), state) for _ in range(3)] == [7, 7, ENDS[0]]
    assert choose_token(torch.full((V,), math.nan), state) is None and told[-1] is None


def test_both_samplers_give_the_same_and_neighbours_do_not_matter():
    """Rows of one step, each with its own parameters: as if each were alone."""
    asked = [
        Sampling(),
        Sampling(logit_bias=((9, 50.0),)),
        Sampling(presence_penalty=2.0, frequency_penalty=2.0, top=3),
        Sampling(temperature=1.0, top_k=3, seed=4),
        Sampling(temperature=1.0, min_p=0.3, seed=4, repetition_penalty=1.5),
    ]
    steps = [torch.stack([drawn_logits(10 * step + row) for row in range(len(asked))]) for step in range(6)]

    def states() -> tuple[list[SamplerState], list[list[Token | None]]]:
        told: list[list[Token | None]] = [[] for _ in asked]
        return [SamplerState(replace(each), (1, 2), ENDS, on_token=told[at].append) for at, each in enumerate(asked)], told

    packed, together = states()
    single, alone = states()
    sampler = Sampler(lambda request_id: packed[int(request_id)], lambda requests: None)
    for scores in steps:
        sampler._step = [str(at) for at in range(len(asked))]
        scores = scores.clone()
        chosen = sampler(torch.empty(0), scores, torch.empty(0)).argmax(-1).tolist()
        assert chosen == [tokens[-1].id for tokens in together]  # type: ignore[union-attr]
    for scores in steps:
        for row, state in enumerate(single):
            choose_token(scores[row], state)
    assert together == alone
    assert {token.id for token in together[1]} == {9}  # type: ignore[union-attr]


def test_a_text_is_scored_in_parts_as_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedModel(tiny_base("llama"))
    vocabulary, ids = model.base.config.vocab_size, [5, 9, 4, 7, 8, 6, 3]
    vectors = torch.randn(3, model.base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = text_scorer.score_text(model, vectors, ids, 2, vocabulary)
    monkeypatch.setattr(text_scorer, "LOGITS", 2 * vocabulary)
    parts = text_scorer.score_text(model, vectors, ids, 2, vocabulary)
    assert [token.id for token in parts] == [token.id for token in whole] == ids[1:]
    assert [token.logprob for token in parts] == pytest.approx([token.logprob for token in whole], abs=1e-4)
    assert [[each for each, _ in token.top] for token in parts] == [[each for each, _ in token.top] for token in whole]
