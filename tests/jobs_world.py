"""Files, jobs and batches behind HTTP, without Ray: a replica in this process, beside what trains and what runs batches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import OpenAI
from test_http_api import ADMIN, KEY, Running, fill_empty, raw, settings
from tuning_world import World

from ptuning.config import parse_experiment
from ptuning.registry.registry import Registry
from ptuning.serving.api import Api
from ptuning.serving.app import build_app
from ptuning.serving.auth import read_keys
from ptuning.serving.request_record import Record
from ptuning.serving.service import Service
from ptuning.tuning import batch_runner
from ptuning.tuning.answers import JobAnswers
from ptuning.tuning.batch_runner import Answered, BatchRunner

ANN, BOB = "tuning-key-of-ann-0123", "tuning-key-of-bob-0123"
ROUND_S = 60.0
"""Seconds after which the training thread begins a new pass; a pass has a deadline of its own."""


class Local:
    """The replica of this process. Its lines run in the event loop of its requests, as under Ray Serve."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._api = Api(service)

    async def unknown(self, models: Sequence[str]) -> list[str]:
        return [model for model in models if model not in self._service.models.names]

    async def answer(self, endpoint: str, body: dict[str, Any]) -> Answered:
        response = await self._api.line(endpoint, json.dumps(body).encode(), Record())
        return Answered(response.status_code, "r", json.loads(bytes(response.body)))


class Remembering:
    """The application, and the event loop that it runs in."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.loop = asyncio.get_running_loop()
        await self._app(scope, receive, send)


@contextlib.contextmanager
def served(
    storage: Path,
    base: Path,
    fill: Callable[[Path], Registry] = fill_empty,
    *,
    jobs: World | None = None,
    batches: bool = False,
    **tables: Any,
) -> Iterator[SimpleNamespace]:
    """A server over a new storage folder. `fill` makes its registry; `jobs`: what takes its jobs; `batches`: they run;
    `tables`: of its experiment."""
    registry = jobs.registry if jobs else fill(storage)
    keys = storage / "keys"
    keys.write_text(f"{KEY}\n{ANN} tuning\n{BOB} tuning\n{ADMIN} admin\n", encoding="utf-8")
    experiment = jobs.server if jobs else parse_experiment(settings(storage, base) | tables)
    service = Service(experiment, read_keys(str(keys)), "test")
    runner = BatchRunner(service.storage, Local(service), service.lane.places) if batches else None

    async def wake() -> None:
        assert runner
        runner.wake()

    app = Remembering(build_app(service, jobs=JobAnswers(jobs.service) if jobs else None, wake=wake if runner else None))
    running = Running(app)  # type: ignore[arg-type]
    raw(running.url, "/livez", b"")
    assert app.loop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_runner, "POLL_S", 0.1)
        patch.setattr(batch_runner, "PART_S", 0.1)
        work = asyncio.run_coroutine_threadsafe(runner.run(), app.loop) if runner else None
        try:
            yield SimpleNamespace(
                url=running.url, port=running.port, storage=storage, base=base, registry=registry, service=service,
                runner=runner, tuning=jobs,
            )  # fmt: skip
        finally:
            if work:
                work.cancel()
                time.sleep(0.2)
            running.stop()
    assert service.alive and not service.engine.busy, "something is left in the engine"
    service.close()


@contextlib.contextmanager
def trained(jobs: World) -> Iterator[None]:
    """Jobs are trained in a thread."""
    over = threading.Event()

    def train() -> None:
        while not over.is_set():
            until = time.monotonic() + ROUND_S
            jobs.work(until=lambda until=until: over.is_set() or time.monotonic() > until)  # type: ignore[misc]

    thread = threading.Thread(target=train, name="training")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def client_of(world: SimpleNamespace, key: str = ANN) -> OpenAI:
    return OpenAI(base_url=world.url, api_key=key, max_retries=0, timeout=30)
