"""`ptuning serve` as people run it: the command in its own process, Ray Serve in front, asked over HTTP while things change."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
import yaml
from conftest import REPOSITORY, toy_rows
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema
from serving_world import both_answer, idle, metrics, processes, serving, until
from test_http_api import ADMIN, GOOD, HOSTILE, KEY, LABELS, chat, publish_soft_prompt, raw

from ptuning.registry.promotions import PromotionLog

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMOTIONS = int(os.environ.get("PTUNING_PROMOTIONS", "6"))
"""Promotions under load."""


@pytest.fixture
def world(served_world: SimpleNamespace) -> SimpleNamespace:
    return served_world


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ready(world: SimpleNamespace) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{world.port}/readyz", timeout=20) as response:
        return dict(json.load(response))


def test_all_replicas_are_in_every_scrape(client, world):
    """Whichever replica is asked: every scrape has all requests, once, and a reload reaches both."""
    both_answer(world)

    def counted() -> dict[str, float]:
        """Replica -> its answers so far."""
        families = list(text_string_to_metric_families(metrics(world)))
        samples = [sample for family in families for sample in family.samples]
        series = [(sample.name, *sorted(sample.labels.items())) for sample in samples]
        assert len(series) == len(set(series)), "a series occurs twice"
        (many,) = [sample.value for sample in samples if sample.name == "ptuning_replicas"]
        mine = [each for each in samples if each.name == "ptuning_requests_total" and each.labels["status"] == "200"]
        found = {each.labels["replica"]: 0.0 for each in samples if "replica" in each.labels}
        for each in mine:
            found[each.labels["replica"]] += each.value
        assert len(found) == many == 2
        return found

    before = counted()
    with ThreadPoolExecutor(8) as pool:
        for turn in range(1, 20):
            list(pool.map(lambda number: client.completions.create(model="raw", prompt="a", max_tokens=4), range(16)))
            scrapes = [counted() for _ in range(4)]
            assert all(sum(each.values()) - sum(before.values()) == 16 * turn for each in scrapes), (before, scrapes)
            if all(scrapes[-1][replica] > before[replica] for replica in before):
                break
    assert all(scrapes[-1][replica] > before[replica] for replica in before), "one replica has answered everything"
    told = client.post("/admin/reload", cast_to=object, options={"headers": {"authorization": f"Bearer {ADMIN}"}})
    assert told["replicas"] == 2 and "fruits" in told["served"]


@pytest.mark.nightly
def test_a_reload_reaches_both_replicas_and_ray_exports_the_metrics(tmp_path, endless_base):
    """Both know a new version at once, though neither looks by itself; Ray's port has numbers, and no names."""
    with serving(tmp_path, endless_base, refresh_s=3600) as world, OpenAI(base_url=world.url, api_key=KEY) as client:
        both_answer(world)
        publish_soft_prompt(world.registry, world.base, tmp_path / "scratch", "late", 9, template=None, max_new_tokens=None)
        told = client.post("/admin/reload", cast_to=object, options={"headers": {"authorization": f"Bearer {ADMIN}"}})
        assert told["changed"] and told["replicas"] == 2 and "late:1" in told["served"]
        for _ in range(20):
            assert client.completions.create(model="late", prompt="a", max_tokens=2).model == "late:1"
        agents = [each for each in psutil.Process(world.command.process.pid).children(recursive=True) if listens(each)]
        deadline, ours, text = time.monotonic() + 60, [], ""
        while sum(each.value for each in ours) < 20:  # each replica reports for itself
            assert time.monotonic() < deadline, f"Ray does not export them: {text}"
            time.sleep(1)
            text = next((text for text in map(exported, ports(agents)) if "ray_ptuning_requests_total" in text), "")
            samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
            ours = [each for each in samples if each.name == "ray_ptuning_requests_total"]
        assert sum(each.value for each in ours) == 20 and {each.labels["deployment"] for each in ours} == {"replica"}
        assert "ray_ptuning_kv_cache_usage_ratio" in text and '"late' not in text


def listens(process: psutil.Process) -> list[int]:
    """The TCP ports at which a process listens."""
    with contextlib.suppress(psutil.Error):
        return [each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return []


def ports(candidates: list[psutil.Process]) -> list[int]:
    return [port for each in candidates for port in listens(each)]


def exported(port: int) -> str:
    """What a port of this machine answers to Prometheus; nothing, if it is another one."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as response:
            return str(response.read().decode())
    except Exception:
        return ""


def test_the_stock_client_through_the_proxy(client, world):
    assert {"fruits", "fruits:2", "writer"} <= {model.id for model in client.models.list()}
    with urllib.request.urlopen(f"http://127.0.0.1:{world.port}/livez", timeout=20) as response:
        assert json.load(response)["alive"] and ready(world)["ready"]
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
        environment = os.environ | {"PTUNING_API_KEY": KEY}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)

    assert ask("fruits", "the old hammer").stdout.strip() in LABELS.labels
    wrong = ask("nobody", "x")
    assert wrong.returncode == 2 and wrong.stderr.startswith("ptuning: there is no such model; the names are endless, fruits")
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("case", ["no JSON", "a lone surrogate", "NUL", "deep", "too large"])
def test_hostile_bodies_through_the_proxy(world, case):
    body, expected = HOSTILE[case]
    assert raw(world.url, "/v1/chat/completions", body)[0] == expected


def test_a_huge_body_through_the_proxy(world):
    """Who still sends when the connection is closed may lose the answer to a reset (RFC 9112, section 9.6); not always."""
    for attempt in range(5):
        try:
            status, _, content = raw(world.url, "/v1/chat/completions", GOOD + b" " * 20_000_000)
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
        with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
            while not stopped.is_set():
                try:
                    answer = chat(client, model="fruits", stream=False)
                    answers.append((answer.model, answer.answered_by["content_hash"]))
                except Exception as error:
                    failures.append(error)

    replica = processes(world, "ServeReplica")[0]
    before = replica.memory_info().rss
    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
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


def test_a_bad_soft_prompt_is_refused_loudly(client, world):
    other = {"config": "0" * 64, "tokenizer": "0" * 64, "weights": "0" * 64}
    bad = publish_soft_prompt(world.registry, world.base, world.folder / "bad", "fruits", 9, base_fingerprint=other)
    before = chat(client).model
    ledger = PromotionLog(world.registry, "fruits")
    ledger.promote(int(bad.partition(":")[2]), ledger.state())
    world.command.wait(f"refused: {bad}: was made for", 20)
    assert chat(client).model == before
    until(lambda: ready(world)["refused"] == 1, 10, "it is not told")
    ledger.rollback()


def test_clients_that_leave_free_their_places(client, world):
    for _ in range(10):
        stream = client.completions.create(model="raw", prompt="Text:", max_tokens=90, temperature=2, stream=True)
        next(iter(stream))
        stream.close()
    until(lambda: idle(world), 10, "who has left still has a place")


def test_overload_is_429_and_passes(world):
    waits = set()

    def ask(number: int) -> int:
        with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
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
    lines = (world.folder / "toy.toml").read_text(encoding="utf-8").splitlines()
    without = world.folder / "open.toml"
    without.write_text("\n".join(line for line in lines if not line.startswith("keys = ")), encoding="utf-8")
    command = [sys.executable, "-m", "ptuning", "serve", str(without), "serve.host=0.0.0.0"]
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
