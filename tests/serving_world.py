"""`ptuning serve` in a process of its own, with replicas and keys, and how tests look at it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from conftest import REPOSITORY, shared_memory, toml
from serving_load import Told, tell
from test_http_api import ADMIN, KEY, TUNER, fill_storage, settings
from test_tracking import free_port


class Command:
    """`ptuning serve` in a process of its own."""

    def __init__(self, toml: Path, port: int, folder: Path) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}/v1"
        self._log = folder / "serve.log"
        command = [sys.executable, "-m", "ptuning", "serve", str(toml), f"serve.port={port}"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self, words: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def stop(self) -> list[psutil.Process]:
        """Ask it to stop; returns what it had started and is still there."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        _, alive = psutil.wait_procs(started, 15)
        return alive


@contextlib.contextmanager
def serving(
    folder: Path,
    base: Path,
    replicas: int = 2,
    refresh_s: float = 0.3,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Iterator[SimpleNamespace]:
    """`ptuning serve` with replicas, keys, and a registry that changes while it runs. `tables`: further ones of its experiment;
    `more`: settings of [serve]."""
    shared = shared_memory()
    registry = fill_storage(folder / "runs", base)
    (folder / "keys").write_text(f"{KEY}\n{TUNER} tuning\n{ADMIN} admin\n", encoding="utf-8")
    whole = settings(
        folder / "runs", base, refresh_s=refresh_s, running=8, waiting=24, cache_mb=16, replicas=replicas, cpus_per_replica=0.5,
        keys=str(folder / "keys"), **more,
    )  # fmt: skip
    (folder / "toy.toml").write_text(toml(whole | dict(tables or {})), encoding="utf-8")
    command = Command(folder / "toy.toml", free_port(), folder)
    try:
        command.wait("serving at")
        yield SimpleNamespace(
            command=command, port=command.port, url=command.url, registry=registry, base=base, shared=shared, folder=folder
        )
    finally:
        if command.process.poll() is None:
            command.stop()
        print(command.said)


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "raw", "prompt": "Text: the old", "max_tokens": tokens, "temperature": 0, **more}


def ask(world: SimpleNamespace, tokens: int = 4, **more: Any) -> Told:
    headers = more.pop("headers", {})
    return asyncio.run(tell(world.port, body(tokens, **more), KEY, **headers))


def processes(world: SimpleNamespace, kind: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(world.command.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(kind in part for part in process.cmdline()):
                found.append(process)
    return found


def metrics(world: SimpleNamespace) -> str:
    url = world.url.removesuffix("/v1") + "/metrics"
    asked = urllib.request.Request(url, headers={"authorization": f"Bearer {ADMIN}"})
    with urllib.request.urlopen(asked, timeout=20) as response:
        return str(response.read().decode())


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """How long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


def both_answer(world: SimpleNamespace, seconds: float = 60) -> float:
    """Wait until two replicas answer."""

    def look() -> bool:
        with contextlib.suppress(OSError):
            return len(re.findall(r"^ptuning_requests_running\{", metrics(world), re.MULTILINE)) >= 2
        return False

    return until(look, seconds, "two replicas do not answer")


def idle(world: SimpleNamespace) -> bool:
    """No replica has anything to do."""
    names = "ptuning_requests_running|ptuning_requests_waiting|ptuning_rows_waiting"
    numbers = re.findall(rf"^(?:{names})\{{.*\}} (\S+)$", metrics(world), re.MULTILINE)
    return len(numbers) >= 3 and not any(map(float, numbers))
