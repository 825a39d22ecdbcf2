"""Middleware for Ray Serve's proxy: it limits the resources that untrusted input can occupy.

Ray 2.60 reads requests with uvicorn and httptools. They keep a request head of any length in memory and wait for its end
without a timeout. Ray also lets clients disable limits by headers, and answers 500 to a header that is not UTF-8. Ray calls
`middlewares` when a proxy starts if the variables of the part "proxy" (`environment`) are set for the cluster's processes:
`ptuning serve` sets them for a cluster that it starts, and the image contains them.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ptuning.serving.body_pacing import PACED, Pacer

HEAD_BYTES = 64 * 1024
"""Maximum bytes of a request head, or of anything after it that is not body; one read of the socket more is possible."""
HEAD_S = 20.0
"""Seconds in which a request head must arrive, counted from its first byte or from the start of the connection."""

FILES = "/v1/files"
"""Below this path bodies may be larger than the memory."""

BUSY = b"x-all-places-taken"
"""A header by which a replica reports that it is full: for `BUSY_S` seconds the proxy then answers 429 itself. A request that
Ray passes on only to be refused costs a replica some ten milliseconds."""
BUSY_S = 0.2
REFUSED = b"x-refused-meanwhile"
"""A header of the proxy on the next request that it passes on: how many it has refused itself, for the replica's metrics."""
SMALL_BYTES, SMALL_S = 64 * 1024, 1.0
"""The largest body that the proxy itself reads to its end, and the seconds in which it must arrive."""

CONTROLS = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id", REFUSED, PACED}
)
"""Headers by which a client could control Ray Serve or the replica."""


def middlewares() -> list[Middleware]:
    """Called by Ray in the process of a proxy before it listens."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = (
        f"{__name__}:{BoundedHttpProtocol.__name__}"  # Ray does not let uvicorn choose the protocol
    )
    return [Middleware(ProxyMiddleware)]


class BoundedHttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with limits on the size and duration of request heads."""

    _silent = 0
    _moved = False
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._moved = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        between = self.cycle is None or self.cycle.response_complete
        self._silent = 0 if self._moved else self._silent + len(data)
        if self._silent > HEAD_BYTES:
            if between:
                self.send_400_response("The head of the request is too large.")
            else:
                self.transport.abort()  # after a body: an answer may be in progress
        elif between and self._late is None and self.timeout_keep_alive_task is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._moved = True
        self._arrived()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        super().on_message_complete()

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.transport.abort)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class ProxyMiddleware:
    """Removes Ray's control headers from requests, refuses headers that Ray cannot read and connections that are not HTTP, and
    answers for replicas that are full."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._full: dict[str, _Full] = {}  # by path, only for paths where a replica was full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            if not all(name.isascii() and value.isascii() for name, value in headers):
                await _refuse(send, "the headers must be plain ASCII; change them")
                return
            full = self._full.get(scope["path"])
            # The headers of an answer to a page of another origin (CORS) are only right for this origin.
            mine = full and not any(name == b"origin" for name, _ in headers)
            if full and mine and time.monotonic() < full.until and await _read(headers, receive):
                full.refused += 1
                for message in full.answer:
                    await send(message)
                return
            headers = [header for header in headers if header[0] not in CONTROLS]
            if full and full.refused:
                headers.append((REFUSED, b"%d" % full.refused))
                full.refused = 0
            send = self._listening(scope["path"], send)
            if scope["path"].startswith(FILES):
                headers.append((PACED, b"1"))
                pacer = Pacer(receive, send)
                receive, send = pacer.receive, pacer.send
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)

    def _listening(self, path: str, send: Send) -> Send:
        """Remembers an answer by which a replica reports that it is full."""
        full = _Full()

        async def listen(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0] != BUSY]
                if len(headers) < len(message["headers"]):
                    message = {**message, "headers": headers}
                    # Ray's id of this request is not valid for others.
                    kept = [header for header in headers if header[0] != b"x-request-id"]
                    full.answer = [{**message, "headers": kept}]
            elif full.answer:
                full.answer.append(message)
                if not message.get("more_body"):
                    full.refused = self._full[path].refused if path in self._full else 0
                    full.until = time.monotonic() + BUSY_S
                    self._full[path] = full
            await send(message)

        return listen


@dataclass
class _Full:
    """The answer of a full replica, its time limit, and how often it was repeated."""

    answer: list[Message] = field(default_factory=list)
    until: float = 0.0
    refused: int = 0


async def _read(headers: list[tuple[bytes, bytes]], receive: Receive) -> bool:
    """Read a small body to its end; False if it is not small, and then nothing was read."""
    size = dict(headers).get(b"content-length", b"")
    if not size.isdigit() or int(size) > SMALL_BYTES:
        return False
    with suppress(TimeoutError):  # the answer may be lost then, if the client did not read it
        async with asyncio.timeout(SMALL_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    return True


async def _refuse(send: Send, message: str) -> None:
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})
