"""The proxy's door alone: heads are bounded in bytes and in time, and nothing else is. Through Ray: `test_faults_serving`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from test_tracking import free_port

from ptuning.serving import proxy
from ptuning.serving.proxy import BoundedHttpProtocol, ProxyMiddleware

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore::ResourceWarning")]

HEAD_S = 0.5


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Tells the size of the body and which headers have come, a second after all of it is there."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await asyncio.sleep(2 * HEAD_S)
    names = sorted(name.decode() for name, _ in scope["headers"])
    content = f"{size} {names}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
    await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    patch = pytest.MonkeyPatch()
    patch.setattr(proxy, "HEAD_S", HEAD_S)
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(
            ProxyMiddleware(application),
            port=port,
            http=BoundedHttpProtocol,
            log_level="critical",
            lifespan="off",
            timeout_keep_alive=60,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join()
    patch.undo()


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        yield client


def closed_after(client: socket.socket) -> float:
    """Seconds until the other side ends the connection."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):
            pass
    return time.monotonic() - began


GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET, GET + b"x: y", b"\r\n\r\n"], ids=range(5))
def test_a_head_that_does_not_come_is_not_waited_for(port: int, sent: bytes) -> None:
    with connected(port) as client:
        client.sendall(sent)
        assert HEAD_S / 2 < closed_after(client) < HEAD_S + 1


def test_drop_by_drop_is_no_excuse(port: int) -> None:
    with connected(port) as client, pytest.raises(OSError):
        for byte in GET + b"x: " + b"y" * 1000:
            client.sendall(bytes([byte]))
            time.sleep(0.02)


def test_what_comes_between_two_requests_keeps_no_connection(port: int) -> None:
    with connected(port) as client:
        client.sendall(GET + b"\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"\r\n")  # stops uvicorn's own timer
        assert closed_after(client) < HEAD_S + 1


def test_slow_answers_slow_bodies_and_large_ones_are_not_cut(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000000\r\n\r\n")
        time.sleep(2 * HEAD_S)
        client.sendall(b"x" * 5_000_000)
        assert b"5000000 [" in client.recv(1000)
        client.sendall((GET + b"connection: close\r\n\r\n") * 2)  # two at once, by the same connection
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"['connection', 'host']")


def test_heads_and_trailers_without_end(port: int) -> None:
    chunked = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"
    for begin, line in (
        (GET, b"x: " + b"y" * 1000 + b"\r\n"),
        (GET + b"x: ", b"y" * 1000),
        (b"GET /", b"a" * 1000),
        (chunked + b"0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (chunked + b"0\r\nx: ", b"y" * 1000),
        (chunked + b"1;", b"y" * 1000),
    ):
        sent = 0
        with connected(port) as client, contextlib.suppress(OSError):
            client.sendall(begin)
            while sent < 20_000_000:
                client.sendall(line * 10)
                sent += 10 * len(line)
        assert sent < 20_000_000, (begin, sent)


def test_rays_own_headers_do_not_reach_ray(port: int) -> None:
    with connected(port) as client:
        client.sendall(GET + b"".join(name + b": 0\r\n" for name in proxy.CONTROLS) + b"x-request-id: mine\r\n\r\n")
        assert client.recv(1000).endswith(b"0 ['host', 'x-request-id']")
    with connected(port) as client:
        client.sendall(GET + b"x-request-id: \xff\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400") and closed_after(client) < 1


def test_what_a_full_replica_says_is_repeated_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment, on its path only, to small requests only, and with Ray's id left out; the next one tells how many."""
    monkeypatch.setattr(proxy, "BUSY_S", 0.3)
    asked: list[dict[bytes, bytes]] = []

    async def replica(scope: Any, receive: Any, send: Any) -> None:
        asked.append(dict(scope["headers"]))
        told = {"/full": [(proxy.BUSY, b"1")]}.get(scope["path"], [])
        headers = [(b"retry-after", b"1"), (b"x-request-id", b"first"), *told]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"all places", "more_body": True})
        await send({"type": "http.response.body", "body": b" are taken"})

    screen = ProxyMiddleware(replica)

    async def ask(path: str, *headers: tuple[bytes, bytes], size: int = 3) -> tuple[list[tuple[bytes, bytes]], bytes, int]:
        body, sent = [b"x" * size], []

        async def receive() -> Any:
            return {"type": "http.request", "body": body.pop()}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = ((b"content-length", b"%d" % size), *headers)
        await screen({"type": "http", "path": path, "headers": list(headers)}, receive, send)
        return sent[0]["headers"], b"".join(each.get("body", b"") for each in sent[1:]), len(body)

    async def story() -> None:
        first, content, _ = await ask("/full")
        assert (b"x-request-id", b"first") in first and proxy.BUSY not in dict(first) and content == b"all places are taken"
        for _ in range(3):
            headers, content, unread = await ask("/full")
            assert headers == [(b"retry-after", b"1")] and content == b"all places are taken" and not unread
        assert len(asked) == 1
        await ask("/full", size=proxy.SMALL_BYTES + 1)
        await ask("/full", (b"content-length", b"no number"))
        await ask("/other"), await ask("/other")
        assert len(asked) == 5
        await asyncio.sleep(0.35)
        await ask("/full", (proxy.REFUSED, b"1000"))
        assert len(asked) == 6

    asyncio.run(story())
    assert [headers.get(proxy.REFUSED) for headers in asked] == [None, b"3", None, None, None, None]
