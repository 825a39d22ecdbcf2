"""What every engine must do: law 6 (the same tokens and logits as evaluation) and law 7 (neighbours do not leak), with all that
joins, leaves, is replaced or is cancelled.

vLLM's engine runs where vllm is installed, in an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import math
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec

import psutil
import pytest
import torch
from support.engines import (
    END,
    ENGINES,
    PATIENCE,
    RANKS,
    World,
    answer,
    changed_reference,
    open_world,
    reference,
    send,
    text,
)

from ptuning.inference.grammar import GrammarCompiler
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.types import AnswerFailed, End, EngineBusy, EngineStopped, Request, RequestError
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_targets
from ptuning.model.prompted_model import PromptedModel

pytestmark = pytest.mark.fast

BATCHES = int(os.environ.get("PTUNING_BATCHES", "25"))
"""Random mixed batches of law 7; `make test-all` has 200."""
VLLM = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"),
]
KINDS = [pytest.param(kind, marks=VLLM if kind in RANKS else ()) for kind in ENGINES]


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tmp_path_factory, tiny_tokenizer) -> Iterator[World]:
    world = open_world(request.param, tmp_path_factory.mktemp("base"), tiny_tokenizer)
    engine = world.engine
    yield world
    assert engine.alive, "a test has brought the engine down"
    assert not engine.busy, "a request was never ended"
    assert not engine.residents, "a soft prompt was held for ever"
    engine.close()


@pytest.fixture
def world(opened: World) -> Iterator[World]:
    yield opened
    while opened.handles:
        opened.engine.remove(opened.handles.pop())


def test_logits_are_those_of_evaluation(world):
    """Law 6: what `PromptedModel`, hence training and evaluation, thinks of a target is what the engine thinks of it."""
    engine, vectors, model = world.engine, world.prompt(21, 1), PromptedModel(deepcopy(world.base))
    handle, ids = world.add(21, 1), text(random.Random(1), 30)
    near = {"atol": world.tolerance, "rtol": world.tolerance}
    for _ in range(2):  # the second time the soft prompt is in the cache
        *tokens, _ = engine.generate(Request(ids, handle, 6, Sampling(top=330), ignore_end=True))
        target = [token.id for token in tokens]
        expected = -model([vectors], pack_targets([21], [[(ids, target)]]))
        torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), expected, **near)
        for token in tokens:
            assert len(token.top) == 330 and token.top[0][0] == token.id
            assert math.isclose(sum(math.exp(logprob) for _, logprob in token.top), 1, abs_tol=1e-5)
    trie = LabelTrie(((7, END), (8, 9, END), (8, 9, 4, END), (END,)))
    (scores,) = engine.choose(handle, [ids], trie).result(PATIENCE)
    assert sum(map(math.exp, scores)) == pytest.approx(1, abs=1e-6)
    for label, found in zip(trie.labels, scores, strict=True):
        plan = pack_targets([21], [[(ids, list(label))]], [Objective(trie, text=False)])  # what training sees of the row
        assert found == pytest.approx(-float(model([vectors], plan).sum()), abs=world.tolerance)
    scored = engine.score(handle, ids, 3).result(PATIENCE)
    expected = -model([vectors], pack_targets([21], [[(ids[:1], ids[1:])]]))
    assert [token.id for token in scored] == ids[1:] and {len(token.top) for token in scored} == {3}
    torch.testing.assert_close(torch.tensor([token.logprob for token in scored]), expected, **near)
    assert engine.score(handle, ids[:1], 3).result(PATIENCE) == []


def test_a_choice_among_many_labels(world):
    labels = tuple((first, END) for first in range(3, 60)) + tuple((60, second) for second in range(3, 100))
    trie, handle, ids = LabelTrie(labels), world.add(5, 3), text(random.Random(2), 6)
    (scores,) = world.engine.choose(handle, [ids], trie).result(PATIENCE)
    model = PromptedModel(deepcopy(world.base))
    for at in (0, 30, 57, 150):
        plan = pack_targets([5], [[(ids, list(labels[at]))]], [Objective(trie, text=False)])
        assert scores[at] == pytest.approx(-float(model([world.prompt(5, 3)], plan).sum()), abs=world.tolerance)


def test_greedy_answers_are_those_of_the_base_alone(world):
    draw, sinks = random.Random(0), []
    for length in (1, 20, 33):
        handle = world.add(length, length)
        for _ in range(3):
            ids, sink = text(draw, draw.randint(1, 40)), queue.SimpleQueue()
            world.engine.submit(Request(ids, handle, 12), sink.put)
            sinks.append((length, ids, sink))
    for length, ids, sink in sinks:
        tokens = list(iter(lambda sink=sink: ended(sink.get(timeout=PATIENCE)), None))
        assert tokens == reference(world.base, world.prompt(length, length), ids, 12)


def ended(event: Token | End) -> int | None:
    return event.id if isinstance(event, Token) else None


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(logit_bias=((5, 8.0), (6, -100.0)), repetition_penalty=0.7),
        Sampling(min_tokens=9),
    ],
    ids=["repetition", "frequency", "bias", "min_tokens"],
)
def test_changed_logits(world, sampling):
    """Beside requests whose logits are not changed."""
    handle, ids, draw = world.add(17, 4), text(random.Random(3), 12), random.Random(5)
    plain = Request(ids, handle, 16)
    ends = tuple(answer(world.engine, plain)[2:4])
    changed = Request(ids, handle, 12, sampling, ignore_end=True, ends=ends)
    expected = changed_reference(world.base, world.prompt(17, 4), changed)
    alone = answer(world.engine, plain)
    for _ in range(3):
        sinks = [queue.SimpleQueue() for _ in range(4)]
        order = [changed, plain, changed, plain]
        draw.shuffle(order)
        for request, sink in zip(order, sinks, strict=True):
            world.engine.submit(request, sink.put)
        for request, sink in zip(order, sinks, strict=True):
            tokens = list(iter(lambda sink=sink: ended(sink.get(timeout=PATIENCE)), None))
            assert tokens == (expected if request is changed else alone)


def test_stops(world):
    handle, ids = world.add(9, 2), text(random.Random(4), 9)
    whole = answer(world.engine, Request(ids, handle, 12, ignore_end=True))
    place = next(at for at in range(3, 12) if whole[at] not in whole[:at])
    *tokens, end = world.engine.generate(Request(ids, handle, 12, ignore_end=True, ends=(whole[place],)))
    assert [token.id for token in tokens] == whole[: place + 1] and end.reason == "stop"
    *tokens, end = world.engine.generate(Request(ids, handle, 12, Sampling(logit_bias=((END, 100.0),))))
    assert [token.id for token in tokens] == [END] and end.reason == "stop"
    *tokens, end = world.engine.generate(Request(ids, handle, 3, Sampling(logit_bias=((END, 100.0),)), ignore_end=True))
    assert [token.id for token in tokens] == [END] * 3 and end.reason == "length"


def test_log_probabilities_beside_choices(world):
    """A step with requests that report the likeliest tokens and rows whose labels are scored."""
    handle, ids, draw = world.add(8, 6), text(random.Random(6), 10), random.Random(7)
    trie = LabelTrie(((7, END), (8, 9, END), (8, 5, END)))
    request = Request(ids, handle, 20, Sampling(top=4), ignore_end=True)
    *alone, _ = world.engine.generate(request)
    scores = world.engine.choose(handle, [ids], trie).result(PATIENCE)
    for _ in range(5):
        sinks = [queue.SimpleQueue() for _ in range(2)]
        for sink in sinks:
            world.engine.submit(request, sink.put)
        found = [world.engine.choose(handle, [ids] * draw.randint(1, 6), trie) for _ in range(8)]
        for sink in sinks:
            tokens = list(iter(lambda sink=sink: token_of(sink.get(timeout=PATIENCE)), None))
            assert [token.id for token in tokens] == [token.id for token in alone]
            for token, other in zip(tokens, alone, strict=True):
                assert [each for each, _ in token.top] == [each for each, _ in other.top] and len(token.top) == 4
                assert token.logprob == pytest.approx(other.logprob, abs=world.tolerance)
        for future in found:
            for row in future.result(PATIENCE):
                assert row == pytest.approx(scores[0], abs=world.tolerance)


def token_of(event: Token | End) -> Token | None:
    return event if isinstance(event, Token) else None


def test_json_of_a_schema(world, tiny_tokenizer):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    grammar = GrammarCompiler(tiny_tokenizer, world.engine.vocabulary).compile(schema, (END,))
    handle = world.add(6, 1)
    asked = Request(text(random.Random(8), 6), handle, 40, Sampling(temperature=2.0, seed=3), grammar=grammar)
    written = tiny_tokenizer.decode(answer(world.engine, asked)[:-1])
    assert written.replace(" ", "") in ('{"a":1}', '{"a":2}')


def test_hot_swaps_under_load(world):
    """Soft prompts replace each other under the same name and length while clients ask; rows and ids are used again."""
    engine, ids, wrong, asked, stop = world.engine, text(random.Random(9), 12), [], [], threading.Event()
    prompts = [world.prompt(20, seed) for seed in range(4)]
    expected = [reference(world.base, prompt, ids, 8) for prompt in prompts]
    current = [(0, engine.add(prompts[0], "swap-0"))]

    def ask() -> None:
        while not stop.is_set():
            which, handle = current[-1]
            try:
                found = answer(engine, Request(ids, handle, 8))
            except RequestError:  # it was replaced just now
                continue
            asked.append(which)
            if found != expected[which]:
                wrong.append((which, found))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    for swap in range(1, 24):
        which = swap % 4
        before = len(asked)
        current.append((which, engine.add(prompts[which], f"swap-{which}")))
        engine.remove(current[-2][1])
        while len(asked) < before + 3:
            stop.wait(0.002)
    stop.set()
    for client in clients:
        client.join()
    engine.remove(current[-1][1])
    assert not wrong and len(set(asked)) == 4


def test_neighbours_do_not_leak(world):
    """Law 7: random mixes of soft prompts, lengths, labels, joins and cancellations; every answer equals the answer alone."""
    engine = world.engine
    draw = random.Random(7)
    handles = [None, *(world.add(length, seed) for seed, length in enumerate((1, 7, 16, 20, 33)))]
    texts = [text(draw, draw.randint(1, 45)) for _ in range(12)]
    requests = [
        Request(ids, handle, draw.randint(1, 16), draw.choice([Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=5)]))
        for handle in handles
        for ids in texts
    ]
    alone = [answer(engine, request) for request in requests]
    trie = LabelTrie(((7, END), (8, 9, END), (8, 5, END)))
    scored = engine.choose(handles[2], texts[:4], trie).result(PATIENCE)

    wrong = cancelled = 0
    for _ in range(BATCHES // 5 if engine.kind == "plain" else BATCHES):
        pending = [send(engine, requests, at, draw) for at in draw.choices(range(len(requests)), k=draw.randint(2, 10))]
        if draw.random() < 0.3:
            found = engine.choose(handles[2], texts[:4], trie).result(PATIENCE)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(scored), atol=world.tolerance, rtol=0)
        for at, events, sink in pending:
            while not events or not isinstance(events[-1], End):
                events.append(sink.get(timeout=PATIENCE))
            tokens = [event.id for event in events[:-1]]
            if events[-1].reason == "cancelled":
                cancelled += 1
                wrong += tokens != alone[at][: len(tokens)]
            else:
                wrong += tokens != alone[at]
    assert wrong == 0
    assert cancelled >= BATCHES // 10


def test_requests_in_flight_keep_a_soft_prompt_that_leaves(world):
    engine = world.engine
    handle = engine.add(world.prompt(8, 1), "leaving")
    ids = text(random.Random(5), 10)
    expected = answer(engine, Request(ids, handle, 30, ignore_end=True))
    events = engine.generate(Request(ids, handle, 30, ignore_end=True))
    tokens = [next(events).id]
    engine.remove(handle)
    assert tokens + [event.id for event in events if isinstance(event, Token)] == expected
    assert not engine.residents  # it left with its last request
    with pytest.raises(RequestError, match="was removed from the engine"):
        engine.submit(Request(ids, handle, 1), print)


def test_virtual_tokens_are_never_generated(world):
    engine = world.engine
    world.add(50, 1)
    warm = engine.kind == "vllm"
    hot = Request(text(random.Random(6), 5), None, 100, Sampling(temperature=2.0 if warm else 1e6, seed=1), ignore_end=True)
    tokens = answer(engine, hot)
    assert len(set(tokens)) > (5 if warm else 50), "nearly uniform if hot"
    assert max(tokens) < engine.vocabulary
    if warm:
        with pytest.raises(RequestError, match="temperature is 2.1, and vLLM takes at most 2; lower it"):
            engine.check(Request([5], None, 1, Sampling(temperature=2.1)))


@pytest.mark.parametrize("strange", [-1, 330, 331, 2**31, 2**40])
def test_ids_that_are_no_tokens_are_refused(world, strange):
    engine = world.engine
    handle = world.add(4, 1)
    for call in (
        lambda: engine.submit(Request([5, strange], handle, 1), print),
        lambda: engine.choose(handle, [[5, strange]], LabelTrie(((5, END), (6, END)))),
    ):
        with pytest.raises(RequestError, match=f"token {strange} is not in the vocabulary of 330 tokens; send 0 to 329"):
            call()
    with pytest.raises(RequestError, match="no tokens"):
        engine.submit(Request([], handle, 1), print)


def test_longer_than_the_context_is_refused_with_the_numbers(world):
    engine = world.engine
    handle = world.add(20, 1)
    assert len(answer(engine, Request([5] * 100, handle, 8, ignore_end=True))) == 8
    with pytest.raises(
        RequestError, match="100 tokens of text, 20 virtual tokens and up to 9 new ones exceed the 128 positions"
    ):
        engine.submit(Request([5] * 100, handle, 9), print)


def test_the_same_content_is_resident_once(world):
    engine = world.engine
    one, two = world.add(4, 1), world.add(4, 1)
    assert one is two and engine.residents == 1


def test_soft_prompts_that_do_not_fit_are_refused(world):
    engine, width = world.engine, world.prompt(1, 1).shape[1]
    for vectors, words in (
        (torch.zeros(4, width // 2), rf"not \[P, {width}\]"),
        (torch.zeros(0, width), rf"not \[P, {width}\]"),
        (torch.full((4, width), math.inf), "not finite"),
        (torch.full((4, width), 1e39, dtype=torch.float64), "not finite in torch.float32"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add(vectors, "odd")


def test_a_seed_decides_the_answer(world):
    engine = world.engine
    handle, ids = world.add(8, 1), text(random.Random(9), 8)

    def ask(**sampling) -> list[int]:
        return answer(engine, Request(ids, handle, 20, Sampling(**sampling), ignore_end=True))

    assert ask(temperature=1.0, seed=1) == ask(temperature=1.0, seed=1)
    assert len({tuple(ask(temperature=1.0, seed=seed)) for seed in range(4)}) == 4
    assert len({tuple(ask(temperature=1.0)) for _ in range(4)}) == 4
    greedy = ask()
    assert ask(temperature=1.0, top_p=1e-9, seed=1) == greedy
    assert ask(temperature=1e-300, seed=1) == greedy  # no overflow, however cold


def test_a_full_engine_says_so(world):
    engine = world.engine
    handle, ids, gate = world.add(4, 1), [5] * 10, threading.Event()
    waiting = [engine.submit(Request(ids, handle, 100, ignore_end=True), lambda event: gate.wait(PATIENCE)) for _ in range(46)]
    with pytest.raises(EngineBusy, match="ask again later"):
        engine.submit(Request(ids, handle, 1), print)
    gate.set()
    for request_id in waiting:
        engine.cancel(request_id)
    assert answer(engine, Request(ids, handle, 1))


def test_labels_free_their_places_before_they_are_told(world):
    engine = world.engine
    handle = world.add(4, 1)
    for _ in range(200 if engine.kind == "paged" else 10):  # as many rows as may wait, again and again without a pause
        engine.choose(handle, [[5, 6]] * 40, LabelTrie(((7, END), (8, END)))).result(PATIENCE)


def test_a_receiver_that_fails_harms_nobody(world):
    engine = world.engine
    handle = world.add(4, 1)
    engine.submit(Request([5] * 10, handle, 4), lambda event: 1 / 0)
    assert answer(engine, Request([5] * 10, handle, 4))


def test_room_for_soft_prompts(world):
    """vLLM's rows: what fits between others is used again, what does not fit is refused with the numbers."""
    if world.engine.kind != "vllm":
        assert world.engine.resident_bytes
        return
    with pytest.raises(RequestError, match="vLLM does not serve key-value prefixes; set serve.engine=transformers"):
        world.engine.add(torch.zeros(4, 2, 2, 1, 32), "kv")
    handles = [world.add(64, seed) for seed in range(4)]
    with pytest.raises(RequestError, match="256 of 256 rows for virtual tokens are taken, and 1 are needed; raise serve.rows"):
        world.engine.add(world.prompt(1, 9), "more")
    assert all(len(answer(world.engine, Request([5], handle, 2, ignore_end=True))) == 2 for handle in handles)
    world.handles.remove(handles[1])
    world.engine.remove(handles[1])
    again = [world.add(32, 7), world.add(32, 8)]
    assert {handle.ids.start for handle in again} == {handles[1].ids.start, handles[1].ids.start + 32}
    ids = text(random.Random(1), 9)
    for seed, handle in zip((7, 8), again, strict=True):
        assert answer(world.engine, Request(ids, handle, 6)) == reference(world.base, world.prompt(32, seed), ids, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_engine_says_so(kind, tmp_path, tiny_tokenizer):
    before = psutil.Process().children(recursive=True)
    world = open_world(kind, tmp_path, tiny_tokenizer)
    engine = world.engine
    handle = world.add(4, 1)
    engine.submit(Request([5] * 10, handle, 100, ignore_end=True), (sink := queue.SimpleQueue()).put)
    trie = LabelTrie(((7, END), (8, END)))
    if kind in RANKS:  # its core dies
        future = engine.choose(handle, [[5, 6]] * 40, trie)
        started = [each for each in psutil.Process().children(recursive=True) if each not in before]
        children = [each for each in started if "VLLM::" in " ".join(each.cmdline())]
        for child in children:
            if "EngineCore" in " ".join(child.cmdline()):
                child.kill()
        assert len(children) == 1 + RANKS[kind]
        killed = time.monotonic()
        with pytest.raises(EngineStopped):
            engine.add(world.prompt(4, 2), "late")
        assert time.monotonic() < killed + PATIENCE, "it waits for a core that has ended"
        with pytest.raises(AnswerFailed):
            future.result(PATIENCE)
    else:
        engine.close()
    events = [sink.get(timeout=PATIENCE)]
    while not isinstance(events[-1], End):
        events.append(sink.get(timeout=PATIENCE))
    assert events[-1].reason == "failed"
    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.submit(Request([5], None, 1), print)
    with pytest.raises(EngineStopped):
        engine.choose(None, [[5]], trie)
    if kind in RANKS:
        engine.close()
        psutil.wait_procs(children, timeout=20)
        assert not [child for child in children if child.is_running()], "vLLM's processes are left"
