"""Bodies larger than the memory, through Ray Serve's proxy.

Between its proxy and a replica Ray 2.60 keeps messages in queues without limits: a sender that is faster than its receiver
fills the memory of both. So the middleware of the proxy (`Pacer`) and that of a replica (`Paced`) tell each other what they
have taken, in messages of their own between those of ASGI, and each sends at most `WINDOW` bytes ahead. The proxy's header
`PACED` on a request says that it does so; without it a replica reads and sends as it can.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PACED = b"x-body-paced"
TAKEN = "ptuning.taken"
"""Type of the messages: `bytes` more were taken."""
WINDOW = 4 << 20
STEP = 1 << 20
"""Bytes after which the other side is told."""


class Pacer:
    """The side of the proxy, for one request."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._pending: asyncio.Future[Message] | None = None
        """The next message of the client."""
        self._ahead = 0
        """Bytes of the request that the replica has not taken."""
        self._taken = 0
        """Bytes of the answer that the client has taken, of which the replica was not told."""
        self._moved = asyncio.Event()

    async def receive(self) -> Message:
        """The next message for the replica."""
        try:
            while True:
                self._moved.clear()
                if self._taken >= STEP:
                    told, self._taken = self._taken, 0
                    return {"type": TAKEN, "bytes": told}
                if self._pending is None and self._ahead < WINDOW:
                    self._pending = asyncio.ensure_future(self._receive())
                if self._pending is not None and self._pending.done():
                    message, self._pending = self._pending.result(), None
                    self._ahead += len(message.get("body", b""))
                    return message
                moved = asyncio.ensure_future(self._moved.wait())
                await asyncio.wait({moved, self._pending or moved}, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
        except asyncio.CancelledError:
            if self._pending is not None:
                self._pending.cancel()
            raise

    async def send(self, message: Message) -> None:
        """A message of the replica."""
        if message["type"] == TAKEN:
            self._ahead -= message["bytes"]
        else:
            await self._send(message)
            self._taken += len(message.get("body", b""))
        self._moved.set()


class Paced:
    """Middleware of the replica."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(name == PACED for name, _ in scope["headers"]):
            paced = _Replica(receive, send)
            await self._app(scope, paced.receive, paced.send)
        else:
            await self._app(scope, receive, send)


class _Replica:
    """The side of the replica, for one request."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._kept: deque[Message] = deque()
        """Messages for the application that came while it was sending."""
        self._taken = 0
        """Bytes of the request that the application has taken, of which the proxy was not told."""
        self._ahead = 0
        """Bytes of the answer that the client has not taken."""
        self._reading = asyncio.Lock()
        self._moved = asyncio.Event()

    async def receive(self) -> Message:
        if self._taken >= STEP:  # what was received before is processed when more is asked for
            told, self._taken = self._taken, 0
            await self._send({"type": TAKEN, "bytes": told})
        while not self._kept:
            await self._read()
        message = self._kept.popleft()
        self._taken += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Raises:
        OSError: the client has left.
        """
        await self._send(message)
        self._ahead += len(message.get("body", b""))
        while self._ahead > WINDOW:
            if any(kept["type"] == "http.disconnect" for kept in self._kept):
                raise OSError("the client has left")
            if self._reading.locked():  # the application listens, too
                self._moved.clear()
                await self._moved.wait()
            else:
                await self._read()

    async def _read(self) -> None:
        async with self._reading:
            message = await self._receive()
        if message["type"] == TAKEN:
            self._ahead -= message["bytes"]
        else:
            self._kept.append(message)
        self._moved.set()
