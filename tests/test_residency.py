"""Soft prompts that leave the engine's memory, and are brought back when they are asked."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_base
from torch import Tensor

from ptuning.errors import UserError
from ptuning.inference.engine import Engine
from ptuning.inference.sampling import Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineBusy, EngineConfig, NoRoom, Request
from ptuning.serving.residency import Residency, Resident

pytestmark = pytest.mark.fast

TEXT = [5, 6, 7]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = TransformersEngine(tiny_base("llama_tied_gqa", attention=None), 2, EngineConfig(cache_bytes=1 << 20))
    yield engine
    engine.close()


def drawn(number: int) -> Tensor:
    """Soft prompts of both kinds, all of the same size in memory: 512 numbers."""
    draw = torch.Generator().manual_seed(number)
    if number % 2:
        return torch.randn(8, 2, 2, 2, 8, generator=draw)
    return torch.randn(16, 32, generator=draw)


BYTES = 512 * 4


def answer(engine: Engine, resident: Resident) -> list[int]:
    events = list(engine.generate(Request(TEXT, resident.handle, 4, ignore_end=True)))
    return [event.id for event in events if isinstance(event, Token)]


def admitted(residency: Residency, number: int) -> Resident:
    resident = residency.admit(f"{number:064x}", drawn(number), lambda: drawn(number))
    residency.release(resident)
    return resident


async def asked(residency: Residency, engine: Engine, resident: Resident) -> list[int]:
    async with residency.held(resident):
        return await asyncio.to_thread(answer, engine, resident)


def test_the_least_used_leave_and_come_back(engine: Engine) -> None:
    """Six soft prompts of both kinds in the memory of three, asked from many threads: each answers as it does alone."""
    alone = Residency(engine)
    everybody = [admitted(alone, number) for number in range(6)]
    expected = [answer(engine, resident) for resident in everybody]
    assert len({*map(tuple, expected)}) == 6, "answers that are all alike prove nothing"
    for resident in everybody:
        alone.leave(resident)
    residency = Residency(engine, 3 * BYTES)
    served = [admitted(residency, number) for number in range(6)]
    assert [resident.handle is not None for resident in served] == [False] * 3 + [True] * 3
    assert residency.used == 3 * BYTES and len(residency) == engine.residents == 3
    draw = random.Random(0)

    def ask(_: int) -> None:
        number = draw.randrange(6)
        assert asyncio.run(asked(residency, engine, served[number])) == expected[number]

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(60)))
    assert residency.brought >= 6 and residency.used <= 3 * BYTES and engine.residents == len(residency) <= 3
    for resident in served:
        residency.leave(resident)
    assert engine.residents == 0 and residency.used == 0


def test_what_was_used_last_stays(engine: Engine) -> None:
    residency = Residency(engine, 2 * BYTES)
    first, second = admitted(residency, 0), admitted(residency, 1)
    asyncio.run(asked(residency, engine, first))
    third = admitted(residency, 2)
    assert (first.handle, second.handle is None, third.handle) == (first.handle, True, third.handle) and first.handle
    for resident in (first, second, third):
        residency.leave(resident)


def test_those_in_use_stay_even_above_the_limit(engine: Engine) -> None:
    residency = Residency(engine, BYTES)
    first, second = admitted(residency, 0), admitted(residency, 1)

    async def both() -> None:
        async with residency.held(first), residency.held(second):
            assert first.handle and second.handle and residency.used == 2 * BYTES
            residency.leave(second)
            assert second.handle, "it is no longer served, and stays until its last request is through"
        assert second.handle is None and residency.used == BYTES

    asyncio.run(both())
    residency.leave(first)
    assert engine.residents == 0


def test_an_engine_without_room_makes_some(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever limits it: rows of a table, say. If all are in use, the request is told to come again."""
    add = engine.add

    def limited(vectors: Tensor, content_hash: str) -> object:
        if engine.residents == 2:
            raise NoRoom("2 of 2 rows are taken")
        return add(vectors, content_hash)

    monkeypatch.setattr(engine, "add", limited)
    residency = Residency(engine)
    served = [admitted(residency, number) for number in range(3)]
    assert [resident.handle is not None for resident in served] == [False, True, True]

    async def all_three() -> None:
        async with residency.held(served[1]), residency.held(served[2]):
            with pytest.raises(EngineBusy, match="all soft prompts in memory are in use"):
                async with residency.held(served[0]):
                    pass

    asyncio.run(all_three())
    assert asyncio.run(asked(residency, engine, served[0])), "and is answered then"
    for resident in served:
        residency.leave(resident)
    monkeypatch.setattr(engine, "add", lambda vectors, content_hash: limited_always())
    with pytest.raises(NoRoom):
        admitted(residency, 3)


def limited_always() -> None:
    raise NoRoom("it alone does not fit")


def test_one_request_brings_it_for_all_that_wait(engine: Engine) -> None:
    residency = Residency(engine, BYTES)
    read, go = [], threading.Event()

    def bring() -> Tensor:
        go.wait(10)
        read.append(1)
        return drawn(0)

    resident = residency.admit("a" * 64, drawn(0), bring)
    residency.release(resident)
    other = admitted(residency, 1)
    assert resident.handle is None

    async def many() -> list[list[int]]:
        asking = [asyncio.create_task(asked(residency, engine, resident)) for _ in range(4)]
        await asyncio.sleep(0.1)
        go.set()
        return await asyncio.gather(*asking)

    answers = asyncio.run(many())
    assert read == [1] and all(each == answers[0] for each in answers)
    for each in (resident, other):
        residency.leave(each)


def test_vectors_that_are_gone_are_a_sentence_and_the_next_request_tries_again(engine: Engine) -> None:
    residency = Residency(engine, BYTES)
    there = [False]

    def bring() -> Tensor:
        if not there[0]:
            raise UserError("its file is gone; publish it again")
        return drawn(0)

    resident = residency.admit("b" * 64, drawn(0), bring)
    residency.release(resident)
    other = admitted(residency, 1)
    with pytest.raises(UserError, match="its file is gone"):
        asyncio.run(asked(residency, engine, resident))
    assert resident.users == 0
    there[0] = True
    assert asyncio.run(asked(residency, engine, resident))
    for each in (resident, other):
        residency.leave(each)
