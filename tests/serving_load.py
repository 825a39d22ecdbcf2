"""Clients without a library: plain HTTP/1.1 over asyncio, one connection per request, everything that happened kept."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Told:
    """What one request came to. Times are of the monotonic clock, in seconds."""

    began: float
    ended: float
    status: int | str
    """Or the name of what went wrong with the connection."""
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def answer(self) -> Any:
        return json.loads(self.content)


async def tell(port: int, body: Any, key: str, path: str = "/v1/completions", **headers: str) -> Told:
    began = time.monotonic()
    content = json.dumps(body).encode()
    more = {"host": "x", "content-type": "application/json", "authorization": f"Bearer {key}", "connection": "close"} | headers
    head = f"POST {path} HTTP/1.1\r\ncontent-length: {len(content)}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in more.items())
    try:
        async with asyncio.timeout(90):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + b"\r\n" + content)
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return Told(began, time.monotonic(), type(error).__name__)
    top, _, rest = answer.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    if not first:
        return Told(began, time.monotonic(), "closed")
    found = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    whole = found.get("transfer-encoding") == "chunked" or len(rest) == int(found.get("content-length", -1))
    return Told(began, time.monotonic(), int(first.split()[1]) if whole else "cut off", found, rest)


class Load:
    """What a crowd was told, and how to ask about it."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.open = 0

    def statuses(self, since: float = 0.0) -> Counter[int | str]:
        return Counter(each.status for each in self.told if each.ended >= since)

    def good(self, since: float = 0.0, until: float = float("inf")) -> list[Told]:
        return sorted(
            (each for each in self.told if each.status == 200 and since <= each.ended < until), key=lambda each: each.ended
        )

    def bad(self) -> list[Told]:
        return [each for each in self.told if each.status != 200]

    async def ask(self, port: int, body: Any, key: str) -> None:
        self.open += 1
        self.told.append(await tell(port, body, key))
        self.open -= 1


@contextmanager
def crowd(port: int, key: str, body: Callable[[int], Any], *, clients: int = 0, rate: float = 0.0) -> Iterator[Load]:
    """So many clients that ask again and again, or so many new requests per second whatever becomes of the others. All have
    got their answers when this ends."""
    load, stopped = Load(), threading.Event()

    async def again(number: int) -> None:
        while not stopped.is_set():
            await load.ask(port, body(number), key)
            if load.told[-1].status != 200:
                await asyncio.sleep(0.02)

    async def arrive() -> None:
        begun, number, tasks = time.monotonic(), 0, set()
        while not stopped.is_set():
            while number < (time.monotonic() - begun) * rate:
                tasks.add(asyncio.create_task(load.ask(port, body(number), key)))
                number += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)

    async def all_of_them() -> None:
        await asyncio.gather(*(again(number) for number in range(clients)), *([arrive()] if rate else []))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    try:
        yield load
    finally:
        stopped.set()
        thread.join()


def middle(values: list[float], share: float = 0.5) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
