"""Files and batches of a server that runs on Ray Serve: large uploads leave the memory as it is, and killed processes lose
nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from openai import OpenAI
from serving_world import Command, processes, serving
from test_batches import ended, request_line, rows_of, start
from test_http_api import ADMIN
from test_tracking import free_port

from ptuning.serving.batch_routes import AGAIN_S

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

BLOCK = b'{"text": "' + b"x" * 1000 + b'", "label": "fruit"}\n'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("faults"), tiny_base_folder, replicas=1) as world:
        yield world


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key=ADMIN, max_retries=2, timeout=120) as client:
        yield client


def own_memory(process: psutil.Process) -> int:
    """Bytes without those that are shared: Ray's object store, whose pages count for each process that has touched them."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


class Peak:
    """The largest growth in memory of the server's processes inside, in MB."""

    def __init__(self, world: SimpleNamespace) -> None:
        self._watched = [process for kind in ("ProxyActor", "ServeReplica") for process in processes(world, kind)]
        assert len(self._watched) == 2
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.mb = 0.0

    def __enter__(self) -> Peak:
        self._before = [own_memory(process) for process in self._watched]
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for process, before in zip(self._watched, self._before, strict=True):
                self.mb = max(self.mb, (own_memory(process) - before) / 1e6)


def upload(world: SimpleNamespace, mb: int, *, chunked: bool = False) -> tuple[int, dict[str, Any]]:
    """Send a file of this many MB as fast as it goes."""
    head = b'--xx\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head += b'--xx\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    block, end = BLOCK * 1000, b"\r\n--xx--\r\n"
    blocks = mb * 1_000_000 // len(block)

    def content() -> Iterator[bytes]:
        yield head
        for _ in range(blocks):
            yield block
        yield end

    headers = {"content-type": "multipart/form-data; boundary=xx", "authorization": f"Bearer {ADMIN}"}
    if not chunked:
        headers["content-length"] = str(len(head) + blocks * len(block) + len(end))
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=120)
    connection.request("POST", "/v1/files", content(), headers, encode_chunked=chunked)
    answer = connection.getresponse()
    told = answer.status, json.loads(answer.read())
    connection.close()
    return told


@pytest.mark.nightly
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_of_600_mb_is_refused_in_a_sentence(world: SimpleNamespace, chunked: bool) -> None:
    with Peak(world) as peak:
        status, told = upload(world, 600, chunked=chunked)
    print(f"refused, chunked={chunked}: {peak.mb:.0f} MB more")
    assert status == 413 and told["error"]["message"] == "the file is larger than 512 MB; split it"
    assert peak.mb < 100


@pytest.mark.nightly
def test_a_file_of_500_mb_comes_and_goes_through_memory_that_stays_as_it_is(world: SimpleNamespace, client: OpenAI) -> None:
    with Peak(world) as peak:
        began = time.monotonic()
        status, made = upload(world, 500)
        print(f"taken: {peak.mb:.0f} MB more, {time.monotonic() - began:.1f} s")
        assert status == 200 and made["bytes"] > 490_000_000
    assert peak.mb < 100
    with Peak(world) as peak:
        began, size = time.monotonic(), 0
        with client.files.with_streaming_response.content(made["id"]) as answer:
            for block in answer.iter_bytes(1 << 20):
                size += len(block)
                if size < 20 << 20:
                    time.sleep(0.1)  # a client that is slower than the disk
        print(f"sent: {peak.mb:.0f} MB more, {time.monotonic() - began:.1f} s")
    assert size == made["bytes"] and peak.mb < 100
    client.files.delete(made["id"])


def killed(world: SimpleNamespace, kind: str) -> None:
    found = processes(world, kind)
    assert found
    for process in found:
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["BatchActor", pytest.param("ServeReplica", marks=pytest.mark.nightly)])
def test_a_batch_survives_kill_9(world: SimpleNamespace, client: OpenAI, kind: str) -> None:
    """Killed twice in the middle: every line is answered once."""
    body = {"model": "raw", "prompt": "Text: the old", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    batch = start(client, *(request_line(str(n), "/v1/completions", body) for n in range(600)), endpoint="/v1/completions")

    def completed() -> int:
        return int(client.batches.retrieve(batch.id).request_counts.completed)

    for most in (30, 200):
        reached(lambda most=most: completed() >= most)
        killed(world, kind)
    done = ended(client, batch, 180)
    rows = rows_of(client, done.output_file_id)
    assert done.status == "completed" and sorted(int(row["custom_id"]) for row in rows) == list(range(600))
    assert len({row["response"]["body"]["choices"][0]["text"] for row in rows}) == 1


@contextlib.contextmanager
def frozen(world: SimpleNamespace, kind: str) -> Iterator[None]:
    """A process that is there, and answers nothing."""
    (process,) = processes(world, kind)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_nobody_waits_for_a_runner_that_is_frozen(world: SimpleNamespace, client: OpenAI) -> None:
    """What the storage knows is told at once, and a new replica starts; what was left is done when it goes on."""
    body = {"model": "raw", "prompt": "Text: the old", "max_tokens": 20, "ignore_eos": True}
    rows = [request_line(str(n), "/v1/completions", body) for n in range(400)]
    batch = start(client, *rows, endpoint="/v1/completions")
    reached(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    with frozen(world, "BatchActor"):
        quick = client.with_options(timeout=5, max_retries=0)
        until = time.monotonic() + 2 * AGAIN_S  # it is called again and again meanwhile
        while time.monotonic() < until:
            assert quick.batches.retrieve(batch.id).status == "in_progress"
            time.sleep(0.5)
        second = start(quick, request_line())
        assert [each.id for each in quick.batches.list(limit=1).data] == [second.id]
        assert quick.batches.cancel(batch.id).status == "cancelling"
        killed(world, "ServeReplica")
        time.sleep(1)  # until Serve has seen it
        assert client.with_options(max_retries=30).batches.retrieve(second.id).status == "validating"
    assert ended(client, batch, 120).status == "cancelled" and ended(client, second, 120).status == "completed"


def reached(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.nightly
def test_a_batch_goes_on_after_the_server_was_killed(tmp_path: Path, tiny_base_folder: Path) -> None:
    """The command and all that it has started, in the middle of a batch; the next server ends it."""
    body = {"model": "raw", "prompt": "Text: the old", "max_tokens": 20, "ignore_eos": True}
    with serving(tmp_path, tiny_base_folder, replicas=1) as world:
        with OpenAI(base_url=world.url, api_key=ADMIN) as client:
            batch = start(
                client, *(request_line(str(n), "/v1/completions", body) for n in range(400)), endpoint="/v1/completions"
            )
            reached(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 20)
        every = [world.command.process, *psutil.Process(world.command.process.pid).children(recursive=True)]
        for process in every:
            process.kill()
        world.command.process.wait()
        psutil.wait_procs(every[1:], 20)
    again = Command(tmp_path / "toy.toml", free_port(), tmp_path)
    try:
        again.wait("serving at")
        with OpenAI(base_url=again.url, api_key=ADMIN) as client:
            done = ended(client, batch, 120)
            assert done.status == "completed"
            assert sorted(int(row["custom_id"]) for row in rows_of(client, done.output_file_id)) == list(range(400))
    finally:
        again.stop()
