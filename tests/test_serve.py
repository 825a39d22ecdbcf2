"""`ptuning serve` as people run it: the command in its own process, Ray Serve in front, asked over HTTP while things change."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
import yaml
from conftest import REPOSITORY, toy_rows
from openai import OpenAI
from ray.serve.schema import ServeDeploySchema
from test_http_api import GOOD, HOSTILE, LABELS, chat, fill_storage, publish_soft_prompt, raw, settings
from test_tracking import free_port

from ptuning.registry.promotions import PromotionLog

pytestmark = [
    pytest.mark.slow,
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMOTIONS = int(os.environ.get("PTUNING_PROMOTIONS", "6"))
"""Promotions under load."""


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

    def wait(self, words: str, seconds: float = 120) -> None:
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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("served")
    registry = fill_storage(folder / "runs", tiny_base_folder)
    tables = settings(folder / "runs", tiny_base_folder, refresh_s=0.3, running=8, waiting=24)
    toml = folder / "toy.toml"
    lines = [f"name = {json.dumps(tables['name'])}"]
    for table in ("model", "data", "serve", "compute"):
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in tables[table].items())]
    toml.write_text("\n".join(lines), encoding="utf-8")
    command = Command(toml, free_port(), folder)
    try:
        command.wait("serving at")
        yield SimpleNamespace(
            registry=registry, command=command, url=command.url, base=tiny_base_folder, folder=folder, toml=toml
        )
    finally:
        if command.process.poll() is None:
            command.stop()
    print(command.said)


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def get(world: SimpleNamespace, path: str) -> str:
    with urllib.request.urlopen(world.url.removesuffix("/v1") + path, timeout=20) as response:
        return str(response.read().decode())


def test_the_stock_client_through_the_proxy(client, world):
    assert {"fruits", "fruits:2", "writer"} <= {model.id for model in client.models.list()}
    assert json.loads(get(world, "/readyz"))["ready"] and json.loads(get(world, "/livez"))["alive"]
    plain = chat(client, model="writer", temperature=1.0, seed=4, max_tokens=20)
    chunks = chat(client, model="writer", temperature=1.0, seed=4, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert chat(client).choices[0].message.content in LABELS.labels
    texts = ["a saw", "a plum"]
    labels = client.post("/classify", cast_to=object, body={"model": "fruits", "input": texts})
    assert [entry["label"] for entry in labels["data"]] == [chat(client, text).choices[0].message.content for text in texts]
    for wrong, kind in (({"model": "nobody"}, openai.NotFoundError), ({"temperature": 9}, openai.BadRequestError)):
        with pytest.raises(kind):
            chat(client, **wrong)


def test_ask(world):
    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ptuning", "ask", *arguments, "--url", world.url]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)

    assert ask("fruits", "the old hammer").stdout.strip() in LABELS.labels
    wrong = ask("nobody", "x")
    assert wrong.returncode == 2 and wrong.stderr.startswith("ptuning: there is no such model; the names are fruits")
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("case", ["no JSON", "a lone surrogate", "NUL", "deep", "too large"])
def test_hostile_bodies_through_the_proxy(world, case):
    body, expected = HOSTILE[case]
    assert raw(world.url, "/v1/chat/completions", body, None)[0] == expected


def test_a_huge_body_through_the_proxy(world):
    """Who still sends when the connection is closed may lose the answer to a reset (RFC 9112, section 9.6); not always."""
    for attempt in range(5):
        try:
            status, _, content = raw(world.url, "/v1/chat/completions", GOOD + b" " * 20_000_000, None)
            break
        except ConnectionResetError:
            assert attempt < 4, "nobody was ever told"
    assert status == 413 and b"larger than 64 KiB" in content


def test_mixed_load_answers_everybody_alike(client, world):
    """Law 7 through the proxy: sixteen clients at once get what one gets."""
    texts = [row["text"] for row in toy_rows(24, seed=11)]
    asked = [(model, text) for text in texts for model in ("fruits:1", "fruits:2", "writer", "raw")]

    def answer(question: tuple[str, str]) -> str:
        model, text = question
        more: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
        return str(client.completions.create(model=model, prompt=f"Text: {text}\nKind:", **more).choices[0].text)

    alone = [answer(question) for question in asked]
    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(answer, asked)) == alone


def test_promotions_under_load_fail_nobody(world):
    ledger, stopped, failures, answers = PromotionLog(world.registry, "fruits"), threading.Event(), [], []

    def load(number: int) -> None:
        with OpenAI(base_url=world.url, api_key="any", max_retries=0, timeout=60) as client:
            while not stopped.is_set():
                try:
                    answer = chat(client, model="fruits", stream=False)
                    answers.append((answer.model, answer.answered_by["content_hash"]))
                except Exception as error:
                    failures.append(error)

    replica = next(
        process for process in psutil.Process(world.command.process.pid).children(recursive=True) if is_replica(process)
    )
    before = replica.memory_info().rss
    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        with OpenAI(base_url=world.url, api_key="any", max_retries=0, timeout=60) as client:
            for number in range(PROMOTIONS):
                wanted = 2 - number % 2
                ledger.promote(wanted, ledger.state())
                promoted = time.monotonic()
                while chat(client).model != f"fruits:{wanted}":
                    assert time.monotonic() - promoted < 10, "a promotion takes seconds, not longer"
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failures and len(answers) > PROMOTIONS
    assert {model for model, _ in answers} == {"fruits:1", "fruits:2"}
    assert len(set(answers)) == 2, "an answer comes from exactly one version"
    grown = (replica.memory_info().rss - before) / 2**20
    print(f"{PROMOTIONS} promotions, {len(answers)} answers, memory grew by {grown:.1f} MiB")
    assert grown < 100


def is_replica(process: psutil.Process) -> bool:
    return any("ServeReplica" in part for part in process.cmdline())


def test_a_bad_soft_prompt_is_refused_loudly(client, world):
    other = {"config": "0" * 64, "tokenizer": "0" * 64, "weights": "0" * 64}
    bad = publish_soft_prompt(world.registry, world.base, world.folder / "bad", "fruits", 9, base_fingerprint=other)
    before = chat(client).model
    ledger = PromotionLog(world.registry, "fruits")
    ledger.promote(int(bad.partition(":")[2]), ledger.state())
    world.command.wait(f"refused: {bad}: was made for", 20)
    assert chat(client).model == before and json.loads(get(world, "/readyz"))["refused"] == 1
    ledger.rollback()


def test_clients_that_leave_free_their_places(client, world):
    for _ in range(10):
        stream = client.completions.create(model="raw", prompt="Text:", max_tokens=90, temperature=2, stream=True)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 10
    while not re.search(r"ptuning_busy\{.*\} 0\.0", get(world, "/metrics")):
        assert time.monotonic() < deadline, get(world, "/metrics")
        time.sleep(0.1)


def test_overload_is_429_and_passes(world):
    waits = set()

    def ask(number: int) -> int:
        with OpenAI(base_url=world.url, api_key="any", max_retries=0, timeout=60) as client:
            try:
                client.completions.create(model="raw", prompt="Text:", max_tokens=90, temperature=2, n=8, logprobs=20)
            except openai.APIStatusError as error:
                waits.add(float(error.response.headers["retry-after"]))
                return error.status_code
            return 200

    with ThreadPoolExecutor(24) as clients:
        found = list(clients.map(ask, range(24)))
    assert set(found) == {200, 429}
    time.sleep(max(waits))  # as the refusal says: `serving.proxy` may repeat a replica's word for BUSY_S after the last of them
    assert ask(0) == 200


def test_an_open_address_without_keys_is_refused(world):
    command = [sys.executable, "-m", "ptuning", "serve", str(world.toml), "serve.host=0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (
        done.returncode == 2
        and "serve.host: 0.0.0.0 can be reached from other machines, but there are no API keys" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_config_file_of_serve():
    tables = yaml.safe_load((REPOSITORY / "jobs" / "serve.yaml").read_text(encoding="utf-8"))
    (application,) = ServeDeploySchema.model_validate(tables).applications
    assert (
        application.import_path == "ptuning.serving.deployment:build"
        and (REPOSITORY / application.args["experiment"]).is_file()
    )


def test_stopping_answers_what_has_begun(world):
    """The last test of this module: it ends the server."""
    with OpenAI(base_url=world.url, api_key="any", max_retries=0, timeout=60) as client:
        stream = client.completions.create(model="raw", prompt="Text:", max_tokens=90, temperature=2, seed=1, stream=True)
        chunks = iter(stream)
        next(chunks)
        stopping = threading.Thread(target=lambda: alive.extend(world.command.stop()))
        alive: list[psutil.Process] = []
        stopping.start()
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        stopping.join()
    assert reasons[-1] in ("stop", "length")
    assert world.command.process.returncode == 0 and "Traceback" not in world.command.said
    assert not alive, "processes are left"
