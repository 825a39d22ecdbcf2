"""The engine answers as the base alone would: law 6 (the same tokens and logits as evaluation) and law 7 (neighbours do not
leak), whatever joins, leaves, is replaced or is cancelled."""

from __future__ import annotations

import math
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import ARCHITECTURES, CONCATENATED, tiny_base
from torch import Tensor

from ptuning.inference.engine import Engine
from ptuning.inference.sampling import SamplerState, Sampling, Token, choose_tokens, draw
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineBusy, EngineConfig, EngineStopped, Load, Request, RequestError, ResidentPrompt
from ptuning.inference.virtual_tokens import ROWS, VirtualTokens
from ptuning.model.label_trie import LabelTrie
from ptuning.model.limits import PAGE
from ptuning.model.packing import Objective, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel

pytestmark = pytest.mark.fast

BATCHES = int(os.environ.get("PTUNING_BATCHES", "25"))
"""Random mixed batches of law 7; `make test-all` has 200."""
SMALL = EngineConfig(running=6, waiting=40, batch_tokens=48, cache_bytes=1 << 20, context=128)
END = 2


def soft_prompt(length: int, seed: int) -> Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(seed)) * 0.3


def start(architecture: str = "llama_tied_gqa", config: EngineConfig = SMALL) -> TransformersEngine:
    return TransformersEngine(tiny_base(architecture, attention=None), END, config)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = start()
    yield engine
    assert engine.alive, "a test has brought the engine down"
    assert not engine.busy, "a request was never ended"
    assert not engine.residents, "a soft prompt was held for ever"
    engine.close()


@pytest.fixture
def add(engine: TransformersEngine) -> Iterator[object]:
    """Adds soft prompts and takes them away again."""
    handles: list[ResidentPrompt] = []

    def add(length: int, seed: int, name: str | None = None) -> ResidentPrompt:
        handles.append(engine.add(soft_prompt(length, seed), name or f"{length}-{seed}"))
        return handles[-1]

    yield add
    for handle in handles:
        engine.remove(handle)


def text(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, 100) for _ in range(length)]


def answer(engine: Engine, request: Request) -> list[int]:
    *tokens, end = engine.generate(request)
    assert isinstance(end, End) and end.reason in ("stop", "length"), end
    return [token.id for token in tokens]


def reference(base: torch.nn.Module, vectors: Tensor, ids: list[int], new: int) -> list[int]:
    """Plain `generate`, one request by itself."""
    embeds = torch.cat([vectors, base.get_input_embeddings()(torch.tensor(ids))])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = base.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=END
    )
    return out[0].tolist()


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in {"llama_tied_gqa", "gemma3"} else pytest.mark.nightly)
        for name in sorted(set(ARCHITECTURES) - CONCATENATED)
    ],
)
def test_answers_are_those_of_the_base_alone(architecture):
    base, engine, draw = tiny_base(architecture, attention=None), start(architecture), random.Random(0)
    try:
        prompts = {length: engine.add(soft_prompt(length, length), str(length)) for length in (1, 20, 33)}
        requests = [(length, text(draw, draw.randint(1, 40))) for length in prompts for _ in range(3)]
        answers_are_the_base(engine, base, prompts, requests)
    finally:
        engine.close()


def answers_are_the_base(
    engine: Engine, base: torch.nn.Module, handles: dict[int, ResidentPrompt], requests: list[tuple[int, list[int]]]
) -> None:
    """Requests (length of the soft prompt, text) that run together, each against the base alone."""
    sinks: list[queue.SimpleQueue[Token | End]] = [queue.SimpleQueue() for _ in requests]
    for (length, ids), sink in zip(requests, sinks, strict=True):
        engine.submit(Request(ids, handles[length], 12), sink.put)
    for (length, ids), sink in zip(requests, sinks, strict=True):
        tokens = [event.id for event in iter(lambda sink=sink: sink.get(timeout=20), None) if collect(event, sink)]
        assert tokens == reference(base, soft_prompt(length, length), ids, 12)


def collect(event: Token | End, sink: queue.SimpleQueue) -> bool:
    """True for a token; at the end, lets the iteration over the queue end."""
    if isinstance(event, End):
        sink.put(None)
    return isinstance(event, Token)


def test_a_base_in_16_bits():
    base, vectors, ids = tiny_base("llama_tied_gqa", attention=None).bfloat16(), soft_prompt(20, 1), text(random.Random(0), 12)
    engine = TransformersEngine(tiny_base("llama_tied_gqa", attention=None).bfloat16(), END, SMALL)
    try:
        handle = engine.add(vectors, "a")
        *tokens, _ = engine.generate(Request(ids, handle, 6, Sampling(top=0), ignore_end=True))
        expected = -PromptedModel(base)([vectors], pack_targets([20], [[(ids, [token.id for token in tokens])]]))
        torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), expected, atol=0.15, rtol=0.05)
        trie = LabelTrie(((tokens[0].id, END), (tokens[1].id + 1, END)))
        (scores,) = engine.choose(handle, [ids], trie).result(20)
        exact = PromptedModel(tiny_base("llama_tied_gqa", attention=None))([vectors], pack_labels([20], [[ids]], trie))
        assert scores == pytest.approx((-exact).tolist(), abs=0.15)
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gemma3", pytest.param("gpt2", marks=pytest.mark.nightly)])
def test_logits_are_those_of_evaluation(architecture):
    """Law 6: what `PromptedModel`, hence training and evaluation, thinks of a target is what the engine thinks of it."""
    engine, vectors = start(architecture), soft_prompt(21, 1)
    model = PromptedModel(tiny_base(architecture, attention=None))
    try:
        handle = engine.add(vectors, "a")
        ids = text(random.Random(1), 30)
        for _ in range(2):  # the second time the soft prompt is in the cache
            *tokens, _ = engine.generate(Request(ids, handle, 6, Sampling(top=100), ignore_end=True))
            target = [token.id for token in tokens]
            expected = -model([vectors], pack_targets([21], [[(ids, target)]]))
            torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), expected, atol=1e-5, rtol=1e-5)
            for token in tokens:
                assert len(token.top) == 100 and token.top[0][0] == token.id
                assert math.isclose(sum(math.exp(logprob) for _, logprob in token.top), 1, abs_tol=1e-5)
        trie = LabelTrie(((7, END), (8, 9, END), (8, 9, 4, END), (END,)))
        (scores,) = engine.choose(handle, [ids], trie).result(20)
        assert sum(map(math.exp, scores)) == pytest.approx(1, abs=1e-6)
        for label, found in zip(trie.labels, scores, strict=True):
            plan = pack_targets([21], [[(ids, list(label))]], [Objective(trie, text=False)])  # what training sees of the row
            assert found == pytest.approx(-float(model([vectors], plan).sum()), abs=1e-5)
    finally:
        engine.close()


def test_neighbours_do_not_leak(engine, add):
    """Law 7: random mixes of soft prompts, lengths, labels, joins and cancellations; every answer equals the answer alone."""
    draw = random.Random(7)
    handles = [None, *(add(length, seed) for seed, length in enumerate((1, 7, 16, 20, 33)))]
    texts = [text(draw, draw.randint(1, 45)) for _ in range(12)]
    requests = [
        Request(ids, handle, draw.randint(1, 16), draw.choice([Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=5)]))
        for handle in handles
        for ids in texts
    ]
    alone = [answer(engine, request) for request in requests]
    trie = LabelTrie(((7, END), (8, 9, END), (8, 5, END)))
    scored = engine.choose(handles[2], texts[:4], trie).result(20)

    wrong = cancelled = 0
    for _ in range(BATCHES):
        pending = [send(engine, requests, at, draw) for at in draw.choices(range(len(requests)), k=draw.randint(2, 10))]
        if draw.random() < 0.3:
            found = engine.choose(handles[2], texts[:4], trie).result(20)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(scored), atol=1e-5, rtol=0)
        for at, events, sink in pending:
            while not events or not isinstance(events[-1], End):
                events.append(sink.get(timeout=20))
            tokens = [event.id for event in events[:-1]]
            if events[-1].reason == "cancelled":
                cancelled += 1
                wrong += tokens != alone[at][: len(tokens)]
            else:
                wrong += tokens != alone[at]
    assert wrong == 0
    assert cancelled >= BATCHES // 2


def send(
    engine: TransformersEngine, requests: list[Request], at: int, draw: random.Random
) -> tuple[int, list, queue.SimpleQueue]:
    """Submit a request, and now and then cancel it at once, after its first token, or let the next one wait for that."""
    sink: queue.SimpleQueue[Token | End] = queue.SimpleQueue()
    request_id, events, fate = engine.submit(requests[at], sink.put), [], draw.random()
    if 0.2 <= fate < 0.5:
        events.append(sink.get(timeout=20))
    if fate < 0.3:
        engine.cancel(request_id)
    return at, events, sink


def test_a_neighbour_that_is_not_a_number_stays_alone(engine, add):
    sick, well = add(20, 1, "sick"), add(20, 2, "well")
    ids = text(random.Random(3), 20)
    expected = answer(engine, Request(ids, well, 10))
    engine._bank.vectors(sick.ids)[:] = math.nan  # past the check at the door
    sink: queue.SimpleQueue[Token | End] = queue.SimpleQueue()
    for _ in range(4):
        engine.submit(Request(ids, sick, 10), sink.put)
        assert answer(engine, Request(ids, well, 10)) == expected
    end = sink.get(timeout=20)
    assert isinstance(end, End) and end.reason == "failed" and "diverged" in end.message


def test_a_replacement_of_the_same_length_answers_at_once(engine):
    """The same name, the same length, the same text, and the keys and values of the old one in the cache."""
    ids = text(random.Random(4), 20)
    old = engine.add(soft_prompt(32, 1), "old")
    first = answer(engine, Request(ids, old, 10))
    *_, end = engine.generate(Request(ids, old, 10))
    assert end.cached >= 32, "the soft prompt should have been in the cache"
    engine.remove(old)
    new = engine.add(soft_prompt(32, 2), "new")
    second = answer(engine, Request(ids, new, 10))
    engine.remove(new)
    base = tiny_base("llama_tied_gqa", attention=None)
    assert first == reference(base, soft_prompt(32, 1), ids, 10)
    assert second == reference(base, soft_prompt(32, 2), ids, 10)
    assert first != second
    assert old.ids.stop <= new.ids.start, "ids are never given twice"


def test_nothing_is_shared_unless_it_may_be():
    config, ids = replace(SMALL, share=False), text(random.Random(4), 40)
    engine = start(config=config)
    try:
        handle = engine.add(soft_prompt(32, 1), "one")
        for _ in range(2):
            *tokens, end = engine.generate(Request(ids, handle, 10))
            assert end.cached == 0
            expected = reference(tiny_base("llama_tied_gqa", attention=None), soft_prompt(32, 1), ids, 10)
            assert [token.id for token in tokens] == expected
    finally:
        engine.close()


def test_requests_in_flight_keep_a_soft_prompt_that_leaves(engine):
    handle = engine.add(soft_prompt(8, 1), "leaving")
    ids = text(random.Random(5), 10)
    expected = answer(engine, Request(ids, handle, 30, ignore_end=True))
    events = engine.generate(Request(ids, handle, 30, ignore_end=True))
    tokens = [next(events).id]
    engine.remove(handle)
    assert tokens + [event.id for event in events if isinstance(event, Token)] == expected
    assert not engine.residents  # it left with its last request
    with pytest.raises(RequestError, match="was removed from the engine"):
        engine.submit(Request(ids, handle, 1), print)


def test_virtual_tokens_are_never_generated(engine, add):
    add(50, 1)
    hot = Request(text(random.Random(6), 5), None, 100, Sampling(temperature=1e6, seed=1), ignore_end=True)
    tokens = answer(engine, hot)
    assert len(set(tokens)) > 50 and max(tokens) < engine.vocabulary  # nearly uniform, and all of them below


@pytest.mark.parametrize("strange", [-1, 100, 101, 2**31, 2**40])
def test_ids_that_are_no_tokens_are_refused(engine, add, strange):
    handle = add(4, 1)
    for call in (
        lambda: engine.submit(Request([5, strange], handle, 1), print),
        lambda: engine.choose(handle, [[5, strange]], LabelTrie(((5, END), (6, END)))),
    ):
        with pytest.raises(RequestError, match=f"token {strange} is not in the vocabulary of 100 tokens; send 0 to 99"):
            call()
    with pytest.raises(RequestError, match="no tokens"):
        engine.submit(Request([], handle, 1), print)


def test_longer_than_the_context_is_refused_with_the_numbers(engine, add):
    handle = add(20, 1)
    assert len(answer(engine, Request([5] * 100, handle, 8, ignore_end=True))) == 8
    with pytest.raises(
        RequestError, match="100 tokens of text, 20 virtual tokens and up to 9 new ones exceed the 128 positions"
    ):
        engine.submit(Request([5] * 100, handle, 9), print)


def test_a_thousand_soft_prompts():
    engine, ids = start(), text(random.Random(8), 10)
    base = tiny_base("llama_tied_gqa", attention=None)
    try:
        handles = [engine.add(soft_prompt(4, seed), str(seed)) for seed in range(1000)]
        for seed in (0, 1, 500, 999):
            assert answer(engine, Request(ids, handles[seed], 6)) == reference(base, soft_prompt(4, seed), ids, 6)
        before = engine.resident_bytes
        for seed, handle in enumerate(handles):
            if seed % 100:
                engine.remove(handle)
        assert engine.residents == 10 and engine.resident_bytes <= before // 2  # moved together, the ids as they were
        for seed in (0, 100, 900):
            assert answer(engine, Request(ids, handles[seed], 6)) == reference(base, soft_prompt(4, seed), ids, 6)
    finally:
        engine.close()


def test_the_same_content_is_resident_once(engine, add):
    one, two = add(4, 1), add(4, 1)
    assert one is two and engine.residents == 1


def test_soft_prompts_that_do_not_fit_are_refused(engine):
    for vectors, words in (
        (torch.zeros(4, 16), r"not \[P, 32\]"),
        (torch.zeros(0, 32), r"not \[P, 32\]"),
        (torch.full((4, 32), math.inf), "not finite"),
        (torch.full((4, 32), 1e39, dtype=torch.float64), "not finite in torch.float32"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add(vectors, "odd")


def test_a_seed_decides_the_answer(engine, add):
    handle, ids = add(8, 1), text(random.Random(9), 8)

    def ask(**sampling) -> list[int]:
        return answer(engine, Request(ids, handle, 20, Sampling(**sampling), ignore_end=True))

    assert ask(temperature=1.0, seed=1) == ask(temperature=1.0, seed=1)
    assert len({tuple(ask(temperature=1.0, seed=seed)) for seed in range(4)}) == 4
    assert len({tuple(ask(temperature=1.0)) for _ in range(4)}) == 4
    greedy = ask()
    assert ask(temperature=1.0, top_p=1e-9, seed=1) == greedy
    assert ask(temperature=1e-300, seed=1) == greedy  # no overflow, however cold


def test_drawing_follows_the_probabilities():
    logits, generator = torch.tensor([0.0, math.log(3.0), math.log(4.0)]), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw(logits, Sampling(1.0), generator) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([1.0, 3.0, 4.0]) / 8, atol=0.03, rtol=0)
    kept = {draw(logits, Sampling(1.0, top_p=0.6), generator) for _ in range(200)}
    assert kept == {1, 2}  # 4/8 is not enough, 7/8 is


def test_what_is_drawn_does_not_depend_on_the_neighbours():
    """Rows of a step with any settings, a cancelled one and one that is not a number: the same tokens and reports as alone, and
    a row that fails leaves the others."""
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[4] = math.nan
    kinds = [Sampling(), Sampling(0.7, seed=1), Sampling(1.5, 0.6, seed=2, top=3), None, Sampling(1.0, seed=3), Sampling(top=0)]
    kinds.append(Sampling(2.0, 0.9, seed=4))

    def chosen(rows: list[int]) -> tuple[list, list]:
        tokens, told = [], []
        states = [SamplerState(kinds[row]) if kinds[row] else None for row in rows]
        for row, state in zip(rows, states, strict=True):
            if state:
                state.on_token = lambda token, row=row: told.append((row, token))
        for step in range(5):
            scores = (logits[rows] + 0.1 * step).clone()
            tokens.append(choose_tokens(scores, states))
            found = scores.argmax(-1).tolist()
            assert all(token is None or token == most for token, most in zip(tokens[-1], found, strict=True))
        return tokens, sorted(told, key=lambda each: each[0])

    together, reports = chosen(list(range(7)))
    for row in range(7):
        alone, own = chosen([row])
        assert [each[row] for each in together] == [token for (token,) in alone]
        assert [each for each in reports if each[0] == row] == own
    assert together[0][3] is None and together[0][4] is None and len({step[1] for step in together}) > 1
    [first, *_] = [token for row, token in reports if row == 2]
    expected = torch.log_softmax(logits[2], -1)
    assert first.logprob == pytest.approx(float(expected[first.id]), abs=1e-6) and len(first.top) == 3
    assert [token for token, _ in first.top] == expected.topk(3).indices.tolist()
    assert [token for row, token in reports if row == 4] == [None] * 5


def test_a_full_engine_says_so(engine, add):
    handle, ids, gate = add(4, 1), [5] * 10, threading.Event()
    waiting = [engine.submit(Request(ids, handle, 100, ignore_end=True), lambda event: gate.wait(20)) for _ in range(46)]
    with pytest.raises(EngineBusy, match="ask again later"):
        engine.submit(Request(ids, handle, 1), print)
    gate.set()
    for request_id in waiting:
        engine.cancel(request_id)
    assert answer(engine, Request(ids, handle, 1))


@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gpt_neo"])
def test_what_runs_and_waits_is_told(architecture):
    """Seen while the first token of a batch is delivered, which holds up the step: the places are taken, the others wait."""
    engine = start(architecture)
    try:
        handle, gate, arrived = engine.add(soft_prompt(9, 1), "1"), threading.Event(), threading.Event()
        ends: queue.SimpleQueue[End] = queue.SimpleQueue()

        def deliver(event: Token | End) -> None:
            arrived.set()
            gate.wait(20)
            if isinstance(event, End):
                ends.put(event)

        with engine.paused():
            for _ in range(8):
                engine.submit(Request([5] * 30, handle, 3, ignore_end=True), deliver)
            jobs = [engine.choose(handle, [[5, 6]] * 3, LabelTrie(((7, END), (8, END))))]
            assert engine.load == Load(0, 8, 3, 0.0)
        assert arrived.wait(20)
        load = engine.load
        assert (load.running + load.waiting, load.running) in {(8, 6), (8, 2)}, load  # 2: a step's tokens are limited, too
        assert 0 < load.cache_used <= 1
        time.sleep(0.2)
        gate.set()
        queued = sorted(ends.get(timeout=20).queued_s or math.nan for _ in range(8))
        assert 0 < queued[0] < queued[-1] and queued[-1] > 0.2, "the last ones have waited for the first"
        jobs[0].result(20)
        assert engine.load == Load(0, 0, 0, 0.0), "what is only kept for later requests is not in use"
        with engine.paused():
            request_id = engine.submit(Request([5], handle, 1), lambda event: ends.put(event))
            engine.cancel(request_id)
        assert ends.get(timeout=20).queued_s is None
    finally:
        engine.close()


def test_labels_free_their_places_before_they_are_told(engine, add):
    handle = add(4, 1)
    for _ in range(200):  # as many rows as may wait, again and again without a pause
        engine.choose(handle, [[5, 6]] * 40, LabelTrie(((7, END), (8, END)))).result(20)


def test_cancelled_requests_leave_nothing_behind(engine, add):
    handle = add(32, 1)
    answer(engine, Request([5] * 10, handle, 1))
    cache = engine._generator._manager.batch_processor.cache
    tables = cache.cache_allocators["full_attention"].block_table
    for _ in range(20):
        events = engine.generate(Request([6] * 10, handle, 80, ignore_end=True))
        next(events)
        events.close()  # the client has gone
    answer(engine, Request([5] * 10, handle, 1))
    assert not tables, "pages are still held"


def test_a_receiver_that_fails_harms_nobody(engine, add):
    handle = add(4, 1)
    engine.submit(Request([5] * 10, handle, 4), lambda event: 1 / 0)
    assert answer(engine, Request([5] * 10, handle, 4))


def test_more_than_the_cache_holds():
    """Far more requests than pages: they wait or are computed again, and all answers are right."""
    config = EngineConfig(running=16, waiting=40, batch_tokens=64, cache_bytes=16 * PAGE * 2 * 2 * 2 * 8 * 4, context=128)
    engine, base = start(config=config), tiny_base("llama_tied_gqa", attention=None)
    try:
        handle, ids = engine.add(soft_prompt(16, 1), "a"), text(random.Random(2), 40)
        assert engine.longest == 128
        sinks: list[queue.SimpleQueue[Token | End]] = [queue.SimpleQueue() for _ in range(16)]
        for at, sink in enumerate(sinks):
            engine.submit(Request([at + 3, *ids], handle, 40), sink.put)
        for at, sink in enumerate(sinks):
            tokens = [event.id for event in iter(lambda sink=sink: sink.get(timeout=30), None) if collect(event, sink)]
            assert tokens == reference(base, soft_prompt(16, 1), [at + 3, *ids], 40)
    finally:
        engine.close()


def test_a_small_machine_serves_and_says_what_does_not_fit(monkeypatch):
    """A cache of 512 MB is a million tokens of this base: what is never made for them, their masks, would be 8 GB."""
    machine = psutil.virtual_memory()._replace(total=3 << 30, available=2 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    engine = start(config=EngineConfig(context=128))
    assert answer(engine, Request([3, 4, 5], max_new_tokens=2))
    engine.close()
    with pytest.raises(
        RequestError,
        match="serve.cache_mb: 2049 MB for keys and values exceed the 2048 MB of memory that the base leaves free; lower it",
    ):
        start(config=EngineConfig(cache_bytes=2049 << 20))


def test_a_stopped_engine_says_so():
    engine = start()
    sink: queue.SimpleQueue[Token | End] = queue.SimpleQueue()
    engine.submit(Request([5] * 10, None, 100, ignore_end=True), sink.put)
    engine.close()
    events = [sink.get(timeout=20)]
    while not isinstance(events[-1], End):
        events.append(sink.get(timeout=20))
    assert events[-1].reason == "failed"
    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.submit(Request([5], None, 1), print)


def test_a_base_without_a_paged_cache_is_served_as_well():
    """Batches of equal length take turns: soft prompts side by side, seeds, labels, cancelled and long requests."""
    engine, draw = start("gpt_neo"), random.Random(0)
    base = tiny_base("gpt_neo", attention=None)
    try:
        assert engine.kind == "plain"
        handles = {length: engine.add(soft_prompt(length, length), str(length)) for length in (1, 9)}
        long = engine.generate(Request([5] * 10, handles[9], 100, ignore_end=True))
        first = next(long)
        requests = [(length, text(draw, size)) for size in (3, 3, 3, 8) for length in handles]
        answers_are_the_base(engine, base, handles, requests)
        assert isinstance(first, Token) and isinstance(next(long), Token), "the long one goes on meanwhile"
        long.close()  # the client has gone

        drawn = Request([7, 8], handles[1], 8, Sampling(temperature=1.0, seed=3), ignore_end=True)
        assert answer(engine, drawn) == answer(engine, drawn)
        trie = LabelTrie(((7, END), (8, 9, END)))
        (scores,) = engine.choose(handles[1], [[5, 6]], trie).result(20)
        exact = PromptedModel(base)([soft_prompt(1, 1)], pack_labels([1], [[[5, 6]]], trie))
        assert scores == pytest.approx(trie.label_logprobs(-exact.double()).tolist(), abs=1e-5)
        assert engine.busy == 0 and engine.alive
        with pytest.raises(RequestError, match="exceed the 128 positions"):
            engine.submit(Request([5] * 100, handles[9], 40), print)
    finally:
        engine.close()
    assert not engine.alive


def test_the_bank_keeps_its_rows_through_growth_and_removal():
    embedding, draw = torch.nn.Embedding(10, 3), random.Random(0)
    bank, held = VirtualTokens(embedding, 10), {}
    for step in range(300):
        if held and draw.random() < 0.45:
            ids = draw.choice(list(held))
            del held[ids]
            bank.remove(ids)
        else:
            vectors = torch.full((draw.randint(1, 90), 3), float(step))
            held[bank.add(vectors)] = vectors
    for ids, vectors in held.items():
        assert torch.equal(bank(torch.tensor(ids)[None])[0], vectors)
    assert torch.equal(bank(torch.tensor([[3, next(iter(held)).start]]))[0, 0], embedding.weight[3])
    live = sum(map(len, held))
    assert bank._bank.used <= max(2 * live, live + ROWS), "what has left takes up too much room"
