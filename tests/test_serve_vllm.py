"""`ptuning serve` with vLLM: the answers are those of the other engine, and an engine that has died is replaced.

In an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_base
from serving_world import processes, serving, until
from support.engines import WIDE
from test_http_api import KEY, Running, raw, settings

from ptuning.config import parse_experiment
from ptuning.errors import UserError
from ptuning.inference.open_engine import open_engine
from ptuning.inference.types import EngineConfig
from ptuning.model.base import find_base
from ptuning.registry.promotions import PromotionLog
from ptuning.serving.app import build_app
from ptuning.serving.service import Service
from ptuning.settings.model import ModelConfig

INSTALLED = find_spec("vllm") is not None
WITH_VLLM = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed: make test-vllm")
SLOW = 600
"""Seconds that a start may take: vLLM imports itself in three processes."""


@pytest.mark.fast
@pytest.mark.skipif(INSTALLED, reason="vllm is installed")
def test_without_vllm_a_sentence_says_what_to_install(tiny_base_folder):
    with pytest.raises(UserError, match=r"serve.engine: vLLM is not installed; install ptuning\[vllm\] with .*=transformers"):
        open_engine(find_base(ModelConfig(path=str(tiny_base_folder))), torch.float32, EngineConfig(), "vllm")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (
            {"engine": "transformers", "tensor_parallel": 2},
            "tensor_parallel: 2 GPUs share a base in vllm only",
        ),
        ({"tensor_parallel": 2, "gpus_per_replica": 1}, "gpus_per_replica: is 1, and tensor_parallel 2; leave the first out"),
        ({"engine": "tensorrt"}, "'auto', 'transformers' or 'vllm'"),
    ],
)
def test_settings_that_do_not_fit_together(tiny_base_folder, tmp_path, serve, words):
    with pytest.raises(UserError, match=words):
        parse_experiment(settings(tmp_path, tiny_base_folder, **serve))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "wide"
    tiny_base("llama_tied_gqa", vocab_size=len(tiny_tokenizer), **WIDE).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, base, replicas=1, wait=SLOW, engine="vllm", rows=512, deadline_s=60.0) as world:
        yield world


QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/classify", {"model": name, "input": ["the old hammer", "one pear"]}) for name in ("fruits", "fruits:2", "pair")),
    *(
        ("/v1/completions", {"model": name, "prompt": "Text: the old", "max_tokens": 12, "temperature": 0, "logprobs": 3})
        for name in ("raw", "writer", "fruits:1", "wide")
    ),
    (
        "/v1/completions",
        {"model": "raw", "prompt": "Text: the old", "max_tokens": 2, "logprobs": 2, "echo": True},
    ),
    ("/v1/completions", {"model": "raw", "prompt": "a", "max_tokens": 9, "temperature": 0, "frequency_penalty": 1.5}),
    ("/v1/chat/completions", {"model": "fruits", "messages": [{"role": "user", "content": "one plum"}], "logprobs": True}),
]


def told(url: str, path: str, body: dict[str, Any]) -> Any:
    status, _, content = raw(url, path, json.dumps(body).encode())
    assert status == 200, content
    answer = json.loads(content)
    return answer.get("data") or answer["choices"]


def near(one: Any, other: Any) -> bool:
    """The same texts and, within 1e-4, the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return bool(one == pytest.approx(other, abs=1e-4)) if isinstance(one, float) else bool(one == other)


@pytest.mark.nightly
@pytest.mark.cluster
@WITH_VLLM
@pytest.mark.timeout(3600)
def test_vllm_serves_what_transformers_serves(world, base):
    tables = settings(world.folder / "runs", base, cache_mb=16, engine="transformers")
    service = Service(parse_experiment(tables), {}, "other")
    other = Running(build_app(service))
    try:
        for path, body in QUESTIONS:
            mine, theirs = told(world.url, path, body), told(other.url, path, body)
            assert near(mine, theirs), (path, body, mine, theirs)
    finally:
        other.stop()
        service.close()
    ledger = PromotionLog(world.registry, "fruits")
    second = told(world.url, "/v1/classify", {"model": "fruits:2", "input": "the old hammer"})
    ledger.promote(2, ledger.state())
    ask = {"model": "fruits", "input": "the old hammer"}
    until(lambda: near(told(world.url, "/v1/classify", ask), second), 60, "the promotion does not arrive")


@pytest.mark.nightly
@pytest.mark.cluster
@WITH_VLLM
@pytest.mark.timeout(3600)
def test_a_replica_whose_engine_has_died_is_replaced(world):
    body = {"model": "raw", "prompt": "Text: the old", "max_tokens": 4, "temperature": 0}
    before = told(world.url, "/v1/completions", body)
    (core,) = processes(world, "EngineCore")
    core.kill()

    def answers() -> bool:
        status, _, content = raw(world.url, "/v1/completions", json.dumps(body).encode(), KEY)
        return status == 200 and json.loads(content)["choices"] == before

    print(f"answers again after {until(answers, SLOW, 'no answer after the engine has died'):.0f} s")
    assert not re.search(r"Traceback", world.command.said.rpartition("serving at")[0])
