"""Batches without Ray: what is refused, what lines are answered, cancelling, expiry, and runners that die at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from conftest import REPOSITORY
from jobs_world import ANN, BOB, client_of, served
from openai import OpenAI
from test_http_api import ADMIN, KEY, Running, fill_storage, raw

from ptuning import storage
from ptuning.serving.app import build_app
from ptuning.serving.batch_lane import QUIET_S, STARVED_S, BatchLane
from ptuning.tuning import batch_lines, batch_runner
from ptuning.tuning.batch_lines import survey
from ptuning.tuning.batch_runner import Answered, BatchRunner, Unreachable
from ptuning.tuning.batch_store import BatchRecord, BatchStore, LineResult
from ptuning.tuning.files import FileStore
from ptuning.tuning.ids import new_id

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CHAT = "/v1/chat/completions"


def request_line(custom_id: Any = "a", url: str = CHAT, body: Any = None, **more: Any) -> dict[str, Any]:
    body = {"model": "fruits", "messages": [{"role": "user", "content": "a plum"}]} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def content_of(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# The whole input.

WRONG: dict[str, tuple[bytes, str, str | None, int | None]] = {
    "empty": (b"\n", "empty_file", None, None),
    "no JSON": (content_of(request_line()) + b"{", "invalid_json_line", None, 2),
    "no object": (b"[]", "invalid_json_line", None, 1),
    "NaN": (b'{"custom_id": NaN}', "invalid_json_line", None, 1),
    "no id": (content_of(request_line(None)), "missing_required_parameter", "custom_id", 1),
    "a number as id": (content_of(request_line(5)), "invalid_request", "custom_id", 1),
    "a long id": (content_of(request_line("x" * 513)), "invalid_request", "custom_id", 1),
    "an id twice": (content_of(request_line(), request_line()), "duplicate_custom_id", "custom_id", 2),
    "GET": (content_of(request_line(method="GET")), "invalid_method", "method", 1),
    "another url": (content_of(request_line(url="/v1/completions")), "invalid_url", "url", 1),
    "no body": (content_of({**request_line(), "body": None}), "missing_required_parameter", "body", 1),
    "a text as body": (content_of(request_line(body="x")), "invalid_request", "body", 1),
    "a stream": (content_of(request_line(body={"model": "x", "stream": True})), "streaming_unsupported", "body.stream", 1),
    "no model": (content_of(request_line(body={})), "missing_required_parameter", "body.model", 1),
    "another key": (content_of(request_line(colour="red")), "invalid_request", "colour", 1),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_input_is_named(case: str) -> None:
    content, code, param, line = WRONG[case]
    found = survey(io.BytesIO(content), CHAT)
    assert [(error.code, error.param, error.line) for error in found.errors] == [(code, param, line)]
    assert all(each.message.isprintable() for each in found.errors)


@pytest.mark.fast
def test_all_lines_are_checked_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [request_line(None if n % 2 else str(n)) for n in range(500)]
    found = survey(io.BytesIO(content_of(*rows)), CHAT)
    assert [error.line for error in found.errors] == list(range(2, 202, 2))
    monkeypatch.setattr(batch_lines, "MOST_LINES", 10)
    found = survey(io.BytesIO(content_of(*(request_line(str(n)) for n in range(11)))), CHAT)
    assert [error.code for error in found.errors] == ["too_many_lines"]
    good = survey(io.BytesIO(content_of(*(request_line(str(n)) for n in range(10)))), CHAT)
    assert not good.errors and good.models == {"fruits": 1} and good.lines == 10


# The lane.


def in_loop(work: Callable[[], Any]) -> Any:
    return asyncio.run(work())


@pytest.mark.fast
def test_lines_start_when_no_client_waits_and_leave_when_one_comes() -> None:
    async def check() -> None:
        lane, started = BatchLane(2), []

        async def work() -> str:
            started.append(time.monotonic())
            await asyncio.sleep(0.2)
            return "done"

        lane.enter()
        line = asyncio.create_task(lane.run(work))
        await asyncio.sleep(0.2)
        assert not started
        lane.leave()
        left = time.monotonic()
        await asyncio.sleep(0.15)
        assert len(started) == 1 and started[0] - left >= QUIET_S
        lane.enter()  # the line leaves, and begins again
        await asyncio.sleep(0.3)
        assert not line.done() and len(started) == 1
        lane.leave()
        assert await line == "done" and len(started) == 2
        lines = [asyncio.create_task(lane.run(work)) for _ in range(4)]
        await asyncio.sleep(0.15)
        assert len(started) == 4  # two at once, of all that wait
        await asyncio.gather(*lines)

    in_loop(check)


@pytest.mark.fast
def test_lines_become_more_while_it_is_quiet() -> None:
    async def check() -> None:
        lane, running, most = BatchLane(8), 0, []

        async def work() -> None:
            nonlocal running
            running += 1
            most.append(running)
            await asyncio.sleep(0.03)
            running -= 1

        lane.enter()
        lane.leave()
        await asyncio.gather(*(lane.run(work) for _ in range(120)))
        assert most[:2] == [1, 1] and max(most) == 8 and most.index(2) < most.index(8)

    in_loop(check)


@pytest.mark.fast
def test_a_line_is_answered_now_and_then_although_clients_wait_all_the_time() -> None:
    async def check() -> None:
        lane, running, most = BatchLane(8), 0, 0

        async def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)
            running -= 1

        lane.enter()
        lines = [asyncio.create_task(lane.run(work)) for _ in range(3)]
        began = time.monotonic()
        while not all(line.done() for line in lines):
            lane.enter()
            await asyncio.sleep(0.01)
        assert most == 1 and 3 * STARVED_S <= time.monotonic() - began < 3 * STARVED_S + 3

    in_loop(check)


@pytest.mark.fast
def test_an_error_of_a_line_is_its_own_and_a_line_can_be_given_up() -> None:
    async def check() -> None:
        lane = BatchLane(1)

        async def fails() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            await lane.run(fails)
        ended = []

        async def long() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(True)

        line = asyncio.create_task(lane.run(long))
        await asyncio.sleep(0.1)
        line.cancel()
        with pytest.raises(asyncio.CancelledError):
            await line
        await asyncio.sleep(0)
        assert ended and not lane._running

    in_loop(check)


# The runner, with replicas that fail.


class Flaky:
    """Replicas that answer, refuse, or are not there."""

    def __init__(self, seed: int = 0, seconds: float = 0.0) -> None:
        self._draw = random.Random(seed)
        self._seconds = seconds
        self.asked: list[int] = []

    async def unknown(self, models: Sequence[str]) -> list[str]:
        if self._draw.random() < 0.5:
            raise Unreachable
        return [model for model in models if model == "nobody"]

    async def answer(self, endpoint: str, body: dict[str, Any]) -> Answered:
        await asyncio.sleep(self._seconds * self._draw.random())
        kind = self._draw.random()
        if kind < 0.1:
            raise Unreachable
        if kind < 0.2:
            return Answered(503, "r", {"error": {}})
        self.asked.append(body["n"])
        if body["n"] % 7 == 3:
            return Answered(400, "r", {"error": {"message": "wrong"}})
        usage = {"prompt_tokens": 2, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}
        return Answered(200, "r", {"n": body["n"], "usage": usage})


def new_batch(root: str, lines: int, model: str = "x", owner: str = "ann") -> BatchRecord:
    rows = (request_line(str(n), body={"model": model, "n": n}) for n in range(lines))
    file = FileStore(root).create(owner, "in.jsonl", "batch", [content_of(*rows)])
    return BatchStore(root).create(owner, CHAT, file.id)


def output_of(root: str, record: BatchRecord) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    files, found = FileStore(root), []
    for there, file_id in ((record.has_output, record.output_file_id), (record.has_errors, record.error_file_id)):
        found.append([])
        if there:
            with files.open(file_id, "ann") as stream:
                found[-1] = [json.loads(line) for line in stream]
    return found[0], found[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL_S", 0.02), ("PART", 5), ("PART_S", 0.02), ("PAUSE_S", 0.001), ("LONGEST_PAUSE_S", 0.01)):
        monkeypatch.setattr(batch_runner, name, value)


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(4))
def test_runners_that_die_at_any_moment_give_every_line_once(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A killed process is one that is cancelled at any await, and whose next write to the storage does not happen."""
    root, draw, lines = str(tmp_path / "tuning"), random.Random(seed), 60
    batches = [new_batch(root, lines) for _ in range(2)]
    replicas, kills = Flaky(seed, 0.03), 0
    write = storage.write_file

    def dying(countdown: int) -> Callable[..., None]:
        left = [countdown]

        def wrapped(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise KeyboardInterrupt  # nothing catches it
            write(*arguments)

        return wrapped

    while BatchStore(root).open():
        kills += 1
        assert kills < 200

        async def life() -> None:
            runner = BatchRunner(root, replicas, 8)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.run(idle_s=0.1), draw.uniform(0.01, 0.12))

        monkeypatch.setattr(storage, "write_file", dying(draw.randint(1, 12)) if draw.random() < 0.5 else write)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(life())
        monkeypatch.setattr(storage, "write_file", write)
    assert kills > 2
    for made in batches:
        record = BatchStore(root).get(made.id, "ann")
        good, wrong = output_of(root, record)
        assert record.status == "completed" and (record.completed, record.failed) == (len(good), len(wrong))
        assert sorted(int(row["custom_id"]) for row in good) == [n for n in range(lines) if n % 7 != 3]
        assert sorted(int(row["custom_id"]) for row in wrong) == [n for n in range(lines) if n % 7 == 3]
        assert all(row["response"]["body"]["n"] == int(row["custom_id"]) and row["error"] is None for row in good)
        assert (record.spent.input_tokens, record.spent.output_tokens, record.spent.cached_tokens) == (
            2 * len(good), len(good), len(good),
        )  # fmt: skip
        assert len({row["id"] for row in [*good, *wrong]}) == lines
    asyncio.run(BatchRunner(root, replicas, 8).run(idle_s=0.01))
    assert not BatchStore(root).has_open
    assert all(storage.list_names(f"{root}/batches/{made.id}") == ["batch.json"] for made in batches)
    assert len(FileStore(root).list("ann")) == 2 + 4  # inputs, and one output and one error file each


@pytest.mark.fast
def test_a_finished_line_is_asked_only_once_by_one_runner(tmp_path: Path, quick: None) -> None:
    root, replicas = str(tmp_path), Flaky()
    made = new_batch(root, 100)
    asyncio.run(BatchRunner(root, replicas, 8).run(idle_s=0.1))
    assert sorted(replicas.asked) == list(range(100)) and BatchStore(root).get(made.id, None).completed == 86


@pytest.mark.fast
def test_two_batches_share_the_places(tmp_path: Path, quick: None) -> None:
    root = str(tmp_path)
    first = new_batch(root, 200)
    second = new_batch(root, 20)
    asyncio.run(BatchRunner(root, Flaky(seconds=0.02), 4).run(idle_s=0.2))
    records = [BatchStore(root).get(made.id, None) for made in (first, second)]
    assert [record.status for record in records] == ["completed"] * 2
    written = [BatchStore(root)._place(record.id) for record in records]
    times = [storage.modified(place) for place in written]
    assert times[1] is not None and times[0] is not None and times[1] < times[0]  # it did not wait for the larger one


@pytest.mark.fast
def test_owners_take_turns(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches of one owner do not keep the only batch of another waiting."""
    root = str(tmp_path)
    many = [new_batch(root, 30) for _ in range(6)]
    one = new_batch(root, 30, owner="bob")
    monkeypatch.setattr(batch_runner, "ACTIVE", 2)
    ends: list[str] = []
    save = BatchStore.save

    def noting(self: BatchStore, record: BatchRecord) -> None:
        save(self, record)
        if record.ended:
            ends.append(record.id)

    monkeypatch.setattr(BatchStore, "save", noting)
    asyncio.run(BatchRunner(root, Flaky(seconds=0.01), 4).run(idle_s=0.2))
    assert sorted(ends) == sorted([*(record.id for record in many), one.id]) and ends.index(one.id) < 3


@pytest.mark.fast
def test_a_batch_that_expires_keeps_what_is_answered(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    made = new_batch(root, 50)
    now, late = time.time(), [0.0]
    monkeypatch.setattr(batch_runner.time, "time", lambda: now + late[0])

    async def check() -> None:
        running = asyncio.create_task(BatchRunner(root, Flaky(seconds=0.1), 2).run(idle_s=0.3))
        while BatchStore(root).get(made.id, None).completed < 5:
            await asyncio.sleep(0.01)
        late[0] = 24 * 3600 + 1
        await running

    asyncio.run(check())
    record = BatchStore(root).get(made.id, None)
    good, wrong = output_of(root, record)
    left = [row for row in wrong if row["response"] is None]
    assert record.status == "expired" and record.expired_at and 5 <= len(good) < 50 and len(good) + len(wrong) == 50
    assert left and {row["error"]["code"] for row in left} == {"batch_expired"}
    assert record.completed + record.failed + len(left) == record.total == 50


@pytest.mark.fast
def test_an_input_that_is_deleted_and_a_model_that_is_unknown_fail_the_batch(tmp_path: Path, quick: None) -> None:
    root = str(tmp_path)
    gone, unknown = new_batch(root, 3), new_batch(root, 3, model="nobody")
    FileStore(root).delete(gone.input_file_id, "ann")
    asyncio.run(BatchRunner(root, Flaky(), 2).run(idle_s=0.1))
    codes = {}
    for made in (gone, unknown):
        record = BatchStore(root).get(made.id, None)
        assert record.status == "failed" and record.failed_at and not record.has_output
        codes[made.id] = [(error.code, error.param, error.line) for error in record.errors]
    assert codes == {gone.id: [("file_not_found", "input_file_id", None)], unknown.id: [("model_not_found", "body.model", 1)]}


@pytest.mark.fast
def test_a_part_of_lines_is_read_as_it_was_written(tmp_path: Path) -> None:
    store, own = BatchStore(str(tmp_path)), new_id("batch", "_")
    results = [LineResult(1, True, '{"a": "é\\n"}'), LineResult(2, False, "{}")]
    store.write_part(own, 3, results)
    assert list(store.parts(own)) == [(3, results)]


# Through HTTP, with the stock client.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("batches") / "runs"
    with served(folder, tiny_base_folder, lambda storage: fill_storage(storage, tiny_base_folder), batches=True) as world:
        yield world


@contextlib.contextmanager
def own_app(world: SimpleNamespace, wake: Any) -> Iterator[str]:
    """Another server over the same service."""
    running = Running(build_app(world.service, wake=wake))
    try:
        yield running.url
    finally:
        running.stop()


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with client_of(world) as client:
        yield client


def start(client: OpenAI, *rows: dict[str, Any], endpoint: Any = CHAT, **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content_of(*rows)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client: OpenAI, batch: Any, seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
    return batch


def rows_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()] if file_id else []


PLAIN = {"temperature": 0}
BODIES: dict[str, list[dict[str, Any]]] = {
    CHAT: [{"model": model, "messages": [{"role": "user", "content": "a plum"}], **PLAIN} for model in ("fruits", "writer")],
    "/v1/completions": [{"model": "raw", "prompt": ["Text: the old", "x"], "max_tokens": 4, "logprobs": 2, **PLAIN}],
    "/v1/responses": [{"model": "writer", "input": "the old saw", **PLAIN}],
    "/v1/classify": [{"model": "fruits:2", "input": ["a plum", "a saw"]}],
}
OWN = {"id", "created", "created_at"}


def same(answer: Any) -> Any:
    """An answer without what is different every time."""
    if isinstance(answer, dict):
        return {key: same(value) for key, value in answer.items() if key not in (*OWN, "cached_tokens")}
    if isinstance(answer, float):  # of another batch of rows
        return round(answer, 3)
    return [same(each) for each in answer] if isinstance(answer, list) else answer


@pytest.mark.parametrize("endpoint", BODIES)
def test_a_line_is_answered_as_its_route_answers(world: SimpleNamespace, client: OpenAI, endpoint: str) -> None:
    bodies = [*BODIES[endpoint], {**BODIES[endpoint][0], "colour": 1}, {**BODIES[endpoint][0], "metadata": {"a": "b"}}]
    batch = ended(
        client, start(client, *(request_line(f"r{n}", endpoint, body) for n, body in enumerate(bodies)), endpoint=endpoint)
    )
    good, wrong = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
    assert batch.status == "completed" and len(wrong) == 1 and len(good) == len(bodies) - 1
    for row in [*good, *wrong]:
        status, _, content = raw(world.url, endpoint, json.dumps(bodies[int(row["custom_id"][1:])]).encode())
        assert row["response"]["status_code"] == status and same(row["response"]["body"]) == same(json.loads(content))
        assert row["error"] is None and row["id"].startswith("batch_req_") and row["response"]["request_id"]
    assert wrong[0]["response"]["status_code"] == 400 and wrong[0]["response"]["body"]["error"]["param"] == "colour"
    usage = [row["response"]["body"]["usage"] for row in good]
    sent = sum(each.get("prompt_tokens", each.get("input_tokens", 0)) for each in usage)
    assert batch.usage.input_tokens == sent > 0 and batch.usage.total_tokens == sent + batch.usage.output_tokens
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (len(bodies), len(good), 1)


def test_every_call_of_the_stock_client(client: OpenAI) -> None:
    more = {"metadata": {"team": "x"}, "output_expires_after": {"anchor": "created_at", "seconds": 7200}}
    made = start(client, *(request_line(str(n)) for n in range(5)), **more)
    assert made.object == "batch" and made.id.startswith("batch_") and made.status == "validating"
    assert made.expires_at == made.created_at + 24 * 3600 and made.metadata == {"team": "x"} and made.endpoint == CHAT
    done = ended(client, made)
    assert done.status == "completed" and done.errors is None and done.error_file_id is None
    assert done.in_progress_at and done.finalizing_at and done.completed_at and done.model == "fruits"
    output = client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output" and output.filename == f"{made.id}_output.jsonl"
    assert output.expires_at == output.created_at + 7200
    assert {row["custom_id"] for row in rows_of(client, output.id)} == {"0", "1", "2", "3", "4"}
    second = start(client, request_line())
    assert [batch.id for batch in client.batches.list(limit=1)][:2] == [second.id, made.id]
    assert next(iter(client.batches.list(after=second.id))).id == made.id
    with pytest.raises(openai.BadRequestError, match="the batch is completed; it cannot be cancelled"):
        client.batches.cancel(made.id)
    ended(client, second)


def test_what_cannot_be_a_batch_is_refused(client: OpenAI) -> None:
    tuning = client.files.create(file=("a.jsonl", b'{"a": "b"}'), purpose="fine-tune")
    good = client.files.create(file=("a.jsonl", b"x"), purpose="batch")
    asked: dict[str, Any] = {"input_file_id": good.id, "endpoint": CHAT, "completion_window": "24h"}
    for change, param in (
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": tuning.id}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ):
        with pytest.raises(openai.BadRequestError) as told:
            client.batches.create(**asked | change)
        assert told.value.param == param, told.value.body
    failed = ended(client, client.batches.create(**asked))
    assert failed.status == "failed" and failed.failed_at
    (error,) = failed.errors.data
    assert (error.code, error.line) == ("invalid_json_line", 1) and "is not valid JSON" in error.message
    unknown = ended(client, start(client, request_line(), request_line("b", body={"model": "nobody"})))
    assert [(error.code, error.line) for error in unknown.errors.data] == [("model_not_found", 2)]


def test_nobody_waits_for_a_runner_that_hangs(world: SimpleNamespace, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients are told is in the storage."""
    hanging = threading.Event()

    async def hang() -> None:
        hanging.set()
        await asyncio.sleep(300)

    with own_app(world, hang) as url, OpenAI(base_url=url, api_key=ANN, max_retries=0, timeout=30) as own:
        made = start(own, request_line())
        assert hanging.wait(30) and own.batches.retrieve(made.id).id == made.id
        assert own.batches.cancel(made.id).status in ("cancelling", "cancelled")
    assert ended(client, made).status in ("cancelled", "completed")


def test_a_key_has_only_so_many_batches(world: SimpleNamespace, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.serving.batch_routes.MOST_OPEN", 1)
    monkeypatch.setattr(batch_runner, "ACTIVE", 0)
    first = start(client, request_line())
    with pytest.raises(openai.RateLimitError, match="1 batches of this key have not ended") as told:
        start(client, request_line())
    assert told.value.code == "too_many_batches"
    with client_of(world, BOB) as bob:
        other = start(bob, request_line())
        monkeypatch.undo()
        ended(bob, other)
    ended(client, first)


def test_each_key_sees_its_own_batches(world: SimpleNamespace, client: OpenAI) -> None:
    made = start(client, request_line())
    with client_of(world, BOB) as bob, client_of(world, ADMIN) as admin, client_of(world, KEY) as asker:
        assert made.id not in [batch.id for batch in bob.batches.list()]
        for call in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        with pytest.raises(openai.BadRequestError):  # a file of another key
            bob.batches.create(input_file_id=made.input_file_id, endpoint=CHAT, completion_window="24h")
        assert made.id in [batch.id for batch in admin.batches.list()]
        with pytest.raises(openai.PermissionDeniedError):
            asker.batches.list()
        done = ended(admin, made)
        with pytest.raises(openai.NotFoundError):
            bob.files.content(done.output_file_id)
        assert rows_of(client, done.output_file_id)  # of an admin's batch, too, the output belongs to the file's owner
    for wrong in ("batch_x", "..x", "batch_" + "a" * 24):
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve(wrong)


def test_a_cancelled_batch_keeps_what_is_answered(world: SimpleNamespace, client: OpenAI) -> None:
    body = {"model": "raw", "prompt": "Text: the old", "max_tokens": 60, "ignore_eos": True}
    batch = start(client, *(request_line(str(n), "/v1/completions", body) for n in range(400)), endpoint="/v1/completions")
    while client.batches.retrieve(batch.id).request_counts.completed < 5:
        time.sleep(0.05)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    good, left = rows_of(client, done.output_file_id), rows_of(client, done.error_file_id)
    assert done.status == "cancelled" and done.cancelling_at and done.cancelled_at
    assert 5 <= len(good) < 400 and len(good) + len(left) == 400
    assert {row["error"]["code"] for row in left} == {"batch_cancelled"}
    assert not world.service.engine.busy


def test_a_client_that_waits_comes_first(world: SimpleNamespace, client: OpenAI) -> None:
    """While a client is being answered, and for a moment after, no line is; the batch is still answered in the end."""
    body = {"model": "raw", "prompt": "Text: the old", "max_tokens": 30, "ignore_eos": True}
    batch = start(client, *(request_line(str(n), "/v1/completions", body) for n in range(40)), endpoint="/v1/completions")
    while not world.service.lane._running:
        time.sleep(0.005)
    stop, seen = threading.Event(), []

    def ask() -> None:
        with client_of(world, KEY) as own:
            while not stop.is_set():
                own.completions.create(model="raw", prompt="Text: x", max_tokens=5)
                seen.append(sum(not alone for alone in world.service.lane._running.values()))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1.5)
    stop.set()
    asking.join()
    assert len(seen) > 5 and not any(seen[1:])
    assert ended(client, batch).request_counts.completed == 40


def test_the_page_works_as_it_stands(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the address, the key and the model."""
    page = (REPOSITORY / "docs" / "guides" / "batches.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for shown, own in (("http://127.0.0.1:8000/v1", world.url), ("unused", ANN), ("sentiment", "fruits")):
        assert shown in script
        script = script.replace(shown, own)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "batches.md", "exec"), {"__name__": "__main__"})
    said = sorted(line.split() for line in capsys.readouterr().out.splitlines())
    assert [custom_id for custom_id, _ in said] == ["row-0", "row-1"] and {label for _, label in said} <= {"fruit", "tool"}
