"""`ptuning serve` with vLLM: Ray Serve in front, vLLM's processes behind, with one rank and with two.

It runs where vllm is installed, in an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import test_http_api
from conftest import save_endless_base, toy_rows
from serving_load import Load, Told, crowd
from serving_world import ask, body, metrics, processes, serving, until
from support.engines import WIDE
from test_http_api import KEY, publish_soft_prompt, raw
from transformers import PreTrainedTokenizerFast

from ptuning.registry.promotions import PromotionLog

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"),
]

PROMOTIONS = int(os.environ.get("PTUNING_PROMOTIONS", "6"))
"""Promotions under load."""
BACK_S = 60
"""Seconds until a replica whose engine was killed is replaced, and answers."""
CHANGING = ("id", "created", "created_at", "cached_tokens")
"""What two answers to the same request do not share."""

TEXTS = [row["text"] for row in toy_rows(6, seed=11)]
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("classify", {"model": model, "input": TEXTS}) for model in ("fruits:1", "fruits:2")),
    *(
        ("completions", {"model": model, "prompt": text, "max_tokens": 12, "temperature": 0, "logprobs": 3})
        for model in ("raw", "tiny")
        for text in TEXTS
    ),
    *(
        ("chat/completions", {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0})
        for model in ("fruits", "writer")
        for text in TEXTS
    ),
    ("chat/completions", {"model": "writer", "messages": [{"role": "user", "content": "a"}], "frequency_penalty": 1.5,
                          "temperature": 0}),
    ("completions", {"model": "raw", "prompt": "Text: the old man", "max_tokens": 0, "echo": True, "logprobs": 2}),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_endless_base(tmp_path_factory.mktemp("endless") / "tiny", tiny_tokenizer, **WIDE)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Any]:
    """What the transformers engine answers to the questions."""
    with test_http_api.serving(tmp_path_factory.mktemp("transformers") / "runs", base) as served:
        assert served.service.engine.kind == "paged"
        return [post(served.url, *question) for question in QUESTIONS]


@pytest.fixture(scope="module", params=(1, 2), ids=("one_rank", "two_ranks"))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[SimpleNamespace]:
    """A server with one replica. The last test ends it."""
    more = {"engine": "vllm", "tensor_parallel": request.param, "rows": 128}
    with serving(tmp_path_factory.mktemp("vllm"), base, replicas=1, **more) as world:
        yield SimpleNamespace(**vars(world), ranks=request.param)


def post(url: str, route: str, question: dict[str, Any]) -> Any:
    status, _, content = raw(url, f"/v1/{route}", json.dumps(question).encode())
    assert status == 200, content
    return json.loads(content)


def check_same(found: Any, expected: Any, place: str = "answer") -> None:
    """Equal but for what changes with every request, and numbers within 1e-4."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected.keys() - set(CHANGING):
            check_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_same(one, other, f"{place}[{at}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, abs_tol=1e-4, rel_tol=1e-4), (place, found, expected)
    else:
        assert found == expected, place


def vllm_processes(world: SimpleNamespace, kind: str = "") -> list[psutil.Process]:
    return processes(world, f"VLLM::{kind}")


def test_answers_are_those_of_the_other_engine(world, expected):
    """Over HTTP: greedy texts exactly, probabilities of labels and tokens within 1e-4, alone and all at once."""
    assert len(vllm_processes(world, "Worker")) == world.ranks
    for question, answer in zip(QUESTIONS, expected, strict=True):
        check_same(post(world.url, *question), answer)
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda question: post(world.url, *question), QUESTIONS))
    for one, other in zip(found, expected, strict=True):
        check_same(one, other)


def test_promotions_under_load_fail_no_request(world, tmp_path):
    """Soft prompts are written into every rank while all of them answer; each answer comes from one version."""
    for seed in (1, 2):  # longer than half of the rows that are left: one of them is in both ranks
        publish_soft_prompt(world.registry, world.base, tmp_path, "swap", seed, noise=1.0, template=None, max_new_tokens=None)
    world.command.wait("swap: swap:2", 60)
    alone = {f"swap:{number}": ask(world, 8, model=f"swap:{number}").answer["choices"][0]["text"] for number in (1, 2)}
    assert len(set(alone.values())) == 2, "the versions do not differ"
    ledger = PromotionLog(world.registry, "swap")
    with crowd(world.port, KEY, lambda number: body(8, model="swap"), clients=4) as load:
        for number in range(PROMOTIONS):
            wanted = 1 + number % 2
            ledger.promote(wanted, ledger.state())
            until(lambda wanted=wanted: ask(world, model="swap").answer["model"] == f"swap:{wanted}", 20, "it is not promoted")
    answers = [each.answer for each in load.good()]
    print(f"{world.ranks} ranks: {PROMOTIONS} promotions, {len(answers)} answers, {len(load.bad())} failed")
    assert not load.bad() and len(answers) > PROMOTIONS
    assert {(each["model"], each["choices"][0]["text"]) for each in answers} == set(alone.items())


def answered_again(load: Load) -> list[Told]:
    """The answers to requests that began after the first one that failed."""
    failed = min((each.ended for each in load.bad()), default=math.inf)
    return [each for each in load.good() if each.began > failed]


@pytest.mark.parametrize("kind", ["EngineCore", "Worker"])
def test_a_replica_without_its_engine_is_replaced(world, kind):
    """The core of the engine is killed, then a rank."""
    right = ask(world, 8).answer["choices"][0]["text"]
    before = vllm_processes(world)
    with crowd(world.port, KEY, lambda number: body(8), rate=2) as load:
        killed = time.monotonic()
        vllm_processes(world, kind)[-1].kill()
        until(lambda: answered_again(load), BACK_S, "no answer")
    again = answered_again(load)
    print(f"{world.ranks} ranks, {kind} killed: answered again after {again[0].ended - killed:.1f} s, {load.statuses()}")
    assert all(each.answer["choices"][0]["text"] == right for each in again)
    psutil.wait_procs(before, timeout=20)
    assert not [each for each in before if each.is_running()], "processes of the engine before are left"
    assert len(vllm_processes(world, "Worker")) == world.ranks


def running(world: SimpleNamespace) -> float:
    """Requests in the batches of all replicas."""
    return sum(map(float, re.findall(r"^ptuning_requests_running\{.*\} (\S+)$", metrics(world), re.MULTILINE)))


def test_a_stopping_server_answers_what_has_begun(world):
    """SIGTERM under load. The last test with this server: it ends it."""
    started = psutil.Process(world.command.process.pid).children(recursive=True)
    long: list[Told] = []
    tokens = max(300, min(900, int(200 * 3 / ask(world, 200).seconds)))  # 3 s alone
    asking = [threading.Thread(target=lambda: long.append(ask(world, tokens, stream=True))) for _ in range(4)]
    for thread in asking:
        thread.start()
    until(lambda: running(world) == len(asking), 30, "they have not begun")
    signalled = time.monotonic()
    world.command.process.terminate()
    world.command.process.wait(60)
    for thread in asking:
        thread.join()
    print(f"{world.ranks} ranks, SIGTERM: ended after {time.monotonic() - signalled:.1f} s")
    assert world.command.process.returncode == 0 and "Traceback" not in world.command.said
    assert all(each.status == 200 for each in long) and any(each.ended > signalled for each in long)
    assert all(re.search(rb'"finish_reason": ?"length"', each.content) for each in long)
    _, alive = psutil.wait_procs(started, 15)
    assert not alive, "processes are left"
