"""Bodies larger than the memory: between the two middlewares stand queues without limits, as in Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ptuning.serving.body_pacing import PACED, STEP, WINDOW, Paced, Pacer

pytestmark = pytest.mark.fast

BLOCK, MB = 1 << 16, 1 << 20
SCOPE = {"type": "http", "method": "POST", "path": "/v1/files", "headers": [(PACED, b"1")], "query_string": b""}


class Queue:
    """Without limits; remembers the most bytes of bodies that it held."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self.held = self.most = 0

    async def put(self, message: Any) -> None:
        self.held += len(message.get("body", b""))
        self.most = max(self.most, self.held)
        self._messages.put_nowait(message)

    async def get(self) -> Any:
        message = await self._messages.get()
        self.held -= len(message.get("body", b""))
        return message


async def through(
    app: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> tuple[Queue, Queue]:
    """Run an application as behind Serve's proxy. Returns the queues of the request and of the answer."""
    pacer, up, down = Pacer(receive, send), Queue(), Queue()

    async def pump_up() -> None:
        while True:
            message = await pacer.receive()
            await up.put(message)
            if message["type"] == "http.disconnect":
                return

    async def pump_down() -> None:
        while True:
            await pacer.send(await down.get())

    pumps = [asyncio.create_task(pump_up()), asyncio.create_task(pump_down())]
    try:
        await asyncio.wait_for(Paced(app)(SCOPE, up.get, down.put), 20)
        for _ in range(40):  # the client takes the rest
            await asyncio.sleep(0.05)
            if not down.held:
                break
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
    return up, down


def client(size: int) -> Callable[[], Awaitable[Any]]:
    """Sends a body as fast as it is taken, then stays."""
    left = [size]

    async def receive() -> Any:
        if left[0] < 0:
            await asyncio.sleep(60)
        left[0] -= BLOCK
        return {"type": "http.request", "body": b"x" * BLOCK, "more_body": left[0] >= 0}

    return receive


def test_an_upload_waits_for_a_slow_replica() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        size = 0
        async for chunk in Request(scope, receive).stream():
            size += len(chunk)
            await asyncio.sleep(0.0005)  # the disk
        await Response(str(size))(scope, receive, send)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    up, _ = asyncio.run(through(app, client(40 * MB), send))
    assert int(sent[1]["body"]) >= 40 * MB and STEP < up.most <= WINDOW + BLOCK
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_an_answer_waits_for_a_slow_client() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def blocks() -> Any:
            for _ in range(40 * MB // BLOCK):
                yield b"x" * BLOCK

        await StreamingResponse(blocks())(scope, receive, send)

    size = 0

    async def send(message: Any) -> None:
        nonlocal size
        size += len(message.get("body", b""))
        await asyncio.sleep(0.0005)

    _, down = asyncio.run(through(app, client(0), send))
    assert size == 40 * MB and STEP < down.most <= WINDOW + BLOCK


def test_an_answer_ends_when_its_client_leaves() -> None:
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def blocks() -> Any:
            while True:
                yield b"x" * BLOCK

        await StreamingResponse(blocks())(scope, receive, send)

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    taken = 0

    async def send(message: Any) -> None:
        nonlocal taken
        taken += len(message.get("body", b""))
        if taken > 8 * MB:
            gone.set()
            await asyncio.sleep(60)  # it reads no more

    async def check() -> None:
        await through(app, receive, send)

    asyncio.run(check())
    assert taken < 9 * MB


def test_without_a_pacing_proxy_nothing_is_added() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Response((await Request(scope, receive).body())[:3])(scope, receive, send)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(Paced(app)({**SCOPE, "headers": []}, client(4 * MB), send))
    assert sent == ["http.response.start", "http.response.body"]
