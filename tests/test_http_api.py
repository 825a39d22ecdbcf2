"""The HTTP face of a replica, asked by the stock `openai` client: conformance, every class of error, law 6 through HTTP.

Uvicorn in a thread instead of Ray Serve, which `test_serve` puts in front of the same application.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
import uvicorn
from conftest import tiny_base, toy_rows
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from invention import invent
from openai import OpenAI
from test_registry import put
from test_soft_prompt import make
from test_tracking import free_port, new_database
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.config import parse_experiment
from ptuning.data.dataset import load_split
from ptuning.data.encoder import Encoder
from ptuning.errors import UserError
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig
from ptuning.model.base import Base, find_base
from ptuning.model.prompted_model import PromptedModel
from ptuning.registry.promotions import PromotionLog
from ptuning.registry.registry import Registry
from ptuning.serving import proxy
from ptuning.serving.app import build_app
from ptuning.serving.auth import read_keys
from ptuning.serving.detokenizer import TextStream
from ptuning.serving.metrics import exposition
from ptuning.serving.served_models import ServedModels
from ptuning.serving.service import Service
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig
from ptuning.tracking import client as tracking_client
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import evaluate

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

LABELS = Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool"))
FREE = Template(input="Text: {text}\nKind:", target=" {answer}")
PAIR = Template(input="A: {first} B: {second}\nKind:", target=" {label}", labels=("fruit", "tool"))
KEY, TUNER, ADMIN = "inference-key-0123456789", "tuning-key-0123456789", "admin-key-0123456789"
EXAMPLES = int(os.environ.get("PTUNING_EXAMPLES", "20"))
"""Requests that schemathesis invents per operation, half of them wrong; `make test-all` has 50."""


def publish_soft_prompt(
    registry: Registry, base_folder: Path, folder: Path, name: str, seed: int, noise: float = 0.02, **card: Any
) -> str:
    """A soft prompt that begins with the embeddings of the word that tells the taught base its task, then noise."""
    base = find_base(ModelConfig(path=str(base_folder)))
    embed = base.load(torch.float32).get_input_embeddings()
    rows = embed(torch.tensor(base.tokenizer("Text: sort").input_ids)).detach()
    random = torch.randn(4, base.width, generator=torch.Generator().manual_seed(seed)) * noise
    about = {
        "base": str(base_folder),
        "base_fingerprint": base.fingerprint.parts(),
        "template": LABELS,
        "max_new_tokens": 4,
    }
    vectors = torch.cat([rows, random])
    made = make(vectors, **{**about, "length": len(vectors), "width": base.width, **card})
    path = folder / f"{name}-{seed}-{time.monotonic_ns()}"
    made.save(str(path), layers=2, heads=4)
    return str(put(registry, name, str(path)))


def fill_empty(folder: Path) -> Registry:
    """A new storage folder with an empty registry."""
    folder.mkdir()
    new_database(folder)
    return Registry(tracking_client.default_uri(folder))


def fill_storage(folder: Path, base_folder: Path) -> Registry:
    """A storage folder whose registry holds: fruits 1 (champion) and 2, writer, pair, raw, and one for another base."""
    registry = fill_empty(folder)
    scratch = folder.parent / f"{folder.name}-scratch"
    for name, seed, card in (
        ("fruits", 1, {}),
        ("fruits", 2, {}),
        ("writer", 3, {"template": FREE}),
        ("pair", 4, {"template": PAIR}),
        ("raw", 5, {"template": None, "max_new_tokens": None}),
        ("stranger", 6, {"base_fingerprint": {"config": "0" * 64, "tokenizer": "0" * 64, "weights": "0" * 64}}),
    ):
        publish_soft_prompt(registry, base_folder, scratch, name, seed, **card)
    ledger = PromotionLog(registry, "fruits")
    ledger.promote(1, ledger.state())
    return registry


def settings(storage: Path, base_folder: Path, **serve: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "model": {"path": str(base_folder)},
        "data": {"train": "unused.jsonl", "input": LABELS.input, "target": LABELS.target, "labels": list(LABELS.labels)},
        "serve": {"running": 4, "waiting": 12, "cache_mb": 4, "max_body_kb": 64, "refresh_s": 3600.0, **serve},
        "compute": {"storage": str(storage)},
    }


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, app: FastAPI) -> None:
        self.port = free_port()
        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@contextlib.contextmanager
def serving(storage: Path, base: Path) -> Iterator[SimpleNamespace]:
    """Serve what `fill_storage` registers, without Ray."""
    registry = fill_storage(storage, base)
    keys = storage / "keys"
    keys.write_text(f"# keys\n{KEY}\n{TUNER} tuning\n{ADMIN} admin\n", encoding="utf-8")
    service = Service(parse_experiment(settings(storage, base)), read_keys(str(keys)), "test")
    running = Running(build_app(service))
    try:
        yield SimpleNamespace(
            storage=storage, registry=registry, service=service, base=base, url=running.url, app=build_app(service)
        )
    finally:
        running.stop()
    assert service.alive and not service.engine.busy, "something is left in the engine"
    service.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("serving") / "runs", tiny_base_folder) as served:
        yield served


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def chat(client: OpenAI, text: str = "the old hammer", model: str = "fruits", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **more)


def raw(url: str, path: str, body: bytes, key: str | None = KEY, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request without a client in between: status, headers, body."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"} | headers
    if key:
        headers["authorization"] = f"Bearer {key}"
    lines = [f"POST {path} HTTP/1.1", f"host: {host}:{port}", *(f"{name}: {value}" for name, value in headers.items())]
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        # A small body with the head: whoever answers without reading it (404) would else reset the connection when it comes.
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[:1024])
        with contextlib.suppress(OSError):  # refused before it was read
            connection.sendall(body[1024:])
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    found = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    return int(first.split()[1]), found, content


def test_models(client, world):
    models = {model.id: model for model in client.models.list()}
    name = world.base.name
    assert set(models) == {name, "fruits", "fruits:1", "fruits:2", "writer", "writer:1", "pair", "pair:1", "raw", "raw:1"}
    assert models["fruits"].soft_prompt == "fruits:1"  # the champion, not the newest
    assert models["fruits"].labels == ["fruit", "tool"] and models["fruits"].template == LABELS.input
    assert models["fruits"].content_hash != models["fruits:2"].content_hash
    assert client.models.retrieve("fruits:2").id == "fruits:2"
    assert models[name].soft_prompt is None and models[name].owned_by == "ptuning"


def test_chat_says_the_label_and_who_said_it(client):
    answer = chat(client)
    assert answer.choices[0].message.content in LABELS.labels and answer.choices[0].finish_reason == "stop"
    assert answer.model == "fruits:1" and answer.answered_by["soft_prompt"] == "fruits:1"
    assert answer.system_fingerprint == answer.answered_by["content_hash"][:16]
    assert chat(client, model="fruits:2").model == "fruits:2"
    used = answer.usage
    assert used.prompt_tokens > 3 and used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert used.prompt_tokens_details.virtual_tokens > 4  # the soft prompt's own tokens are told apart
    two = chat(client, json.dumps({"first": "saw", "second": "drill"}), "pair")
    assert two.choices[0].message.content in LABELS.labels


def test_the_user_message_fills_the_template(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "the old "}, {"type": "text", "text": "hammer"}]}]
    answer = client.chat.completions.create(model="fruits", messages=messages)
    assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens
    assert answer.choices[0].message.content == chat(client).choices[0].message.content


@pytest.mark.parametrize("model", ["writer", "fruits", "raw"])
@pytest.mark.parametrize("stop", [None, ["e"], ["zz", " o"]])
def test_a_stream_is_the_plain_answer(client, model, stop):
    more: dict[str, Any] = {"model": model, "max_tokens": 20, "seed": 3, "temperature": 1.5, "stop": stop, "logprobs": 2}
    if model == "fruits":
        more["constrain"] = False
    more["extra_body"] = {"constrain": more.pop("constrain")} if "constrain" in more else {}
    plain = client.completions.create(prompt="Text: the old hammer\nKind:", **more)
    chunks = list(
        client.completions.create(
            prompt="Text: the old hammer\nKind:", stream=True, stream_options={"include_usage": True}, **more
        )
    )
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == plain.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [
        plain.choices[0].finish_reason
    ]
    assert last.usage.completion_tokens == plain.usage.completion_tokens and not last.choices
    told = [value for part in parts for value in part.choices[0].logprobs.token_logprobs]
    assert told == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-5)
    if stop:
        assert not any(word in plain.choices[0].text for word in stop)


def test_a_chat_stream_is_the_plain_answer(client):
    for model, more in (("fruits", {}), ("writer", {"temperature": 1.0, "seed": 5, "max_tokens": 12})):
        plain = chat(client, model=model, n=3, **more)
        texts, ends, roles = ["", "", ""], [0, 0, 0], 0
        for chunk in chat(client, model=model, n=3, stream=True, **more):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends[choice.index] += choice.finish_reason is not None
                roles += choice.delta.role == "assistant"
        assert texts == [choice.message.content for choice in plain.choices]
        assert ends == [1, 1, 1] and roles == 3


def test_seeds_and_n(client):
    def ask(**more: Any) -> list[str]:
        answer = chat(client, model="writer", temperature=1.5, max_tokens=15, **more)
        return [choice.message.content for choice in answer.choices]

    assert ask(n=4, seed=1) == ask(n=4, seed=1)
    assert len(set(ask(n=4, seed=1))) > 1
    assert len({tuple(ask(seed=seed)) for seed in range(8)}) > 1
    assert len({choice.message.content for choice in chat(client, model="writer", temperature=0, n=4).choices}) == 1


def test_stop_and_length(client):
    whole = client.completions.create(model="raw", prompt="Text: the old", max_tokens=30, temperature=0).choices[0]
    assert whole.finish_reason in ("stop", "length") and len(whole.text) > 3
    word = whole.text[2:4]
    cut = client.completions.create(model="raw", prompt="Text: the old", max_tokens=30, temperature=0, stop=word).choices[0]
    assert cut.text == whole.text[: whole.text.index(word)] and cut.finish_reason == "stop"
    short = client.completions.create(model="raw", prompt="Text: the old", max_tokens=1, temperature=0)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1
    assert len(chat(client, max_tokens=1).choices[0].message.content) < len("fruit")  # a label is cut as any answer


@given(
    st.text("ab\u00e9\u4e16 ", max_size=30),
    st.lists(st.text("ab\u00e9 ", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_what_is_sent_is_the_text_up_to_the_first_stop(tiny_tokenizer, text, stops, strip):
    """Whole characters only, nothing of a stop string ever, nothing lost: for any text, token by token."""
    whole = text.lstrip() if strip else text
    expected = whole[: min([at for stop in stops if (at := whole.find(stop)) >= 0], default=len(whole))]
    stream, sent = TextStream(tiny_tokenizer, stops, strip), ""
    for token in tiny_tokenizer(text, add_special_tokens=False).input_ids:
        sent += stream.push(token)
        assert expected.startswith(sent)
        if stream.stopped:
            break
    else:
        sent += stream.flush()
    assert sent == expected == stream.text


def test_logprobs(client):
    choice = chat(client, model="writer", temperature=0, logprobs=True, top_logprobs=5).choices[0]
    assert choice.logprobs.content
    for token in choice.logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 5 and token.top_logprobs[0].token == token.token
        assert bytes(token.bytes).decode() == token.token
    assert "".join(token.token for token in choice.logprobs.content).lstrip() == choice.message.content
    label = chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(token.token for token in label.logprobs.content).lstrip() == label.message.content
    plain = client.completions.create(model="writer", prompt="Text: a", temperature=0, logprobs=3, max_tokens=5).choices[0]
    assert "".join(plain.logprobs.tokens) == plain.text and plain.logprobs.text_offset[0] == 0
    assert all(len(top) <= 3 for top in plain.logprobs.top_logprobs)


def test_prompts_as_lists_and_as_tokens(client, world):
    tokenizer = world.service.base.tokenizer
    texts = ["Text: the old", "Text: a plum"]
    ids = [tokenizer(text).input_ids for text in texts]
    more: dict[str, Any] = {"model": "writer", "temperature": 0, "max_tokens": 6}
    one = [client.completions.create(prompt=text, **more).choices[0].text for text in texts]
    assert [choice.text for choice in client.completions.create(prompt=texts, **more).choices] == one
    assert [choice.text for choice in client.completions.create(prompt=ids, **more).choices] == one
    assert client.completions.create(prompt=ids[0], **more).choices[0].text == one[0]


def test_classification_through_http_is_evaluation(client, world, tmp_path):
    """Law 6: the same labels, and the same likelihoods, as `evaluate` finds on the same rows."""
    rows = toy_rows(48, seed=5)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base, served = world.service.base, world.service.models.find("fruits")
    encoder = Encoder(LABELS, base.tokenizer, base.context - served.length)
    vectors = world.service.engine._bank.vectors(served.handle.ids)
    model = PromptedModel(base.load(torch.float32))
    (expected,) = evaluate(model, [vectors], load_split("test", str(file), encoder), encoder, Workers())
    labels = [prediction["prediction"] for prediction in expected.predictions]
    assert len(set(labels)) == 2, "a soft prompt that always says the same proves nothing"

    for start in range(0, 48, 12):
        texts = [row["text"] for row in rows[start : start + 12]]
        found = classify(client, texts)["data"]
        assert [entry["label"] for entry in found] == labels[start : start + 12]
        for entry, row in zip(found, rows[start:], strict=False):
            assert math.isclose(sum(entry["probabilities"].values()), 1) and entry["probability"] >= 0.5
            place = start + entry["index"]
            assert entry["probability"] == pytest.approx(expected.predictions[place]["probability"], abs=1e-5)
            if entry["index"] < 4:
                assert entry["probabilities"] == pytest.approx(plain_probabilities(base, vectors, encoder, row), abs=1e-5)
        assert [chat(client, text).choices[0].message.content for text in texts] == labels[start : start + 12]
    one = classify(client, rows[0]["text"])
    assert one["answered_by"]["soft_prompt"] == "fruits:1" and one["usage"]["prompt_tokens"] > 3
    assert classify(client, {"first": "saw", "second": "axe"}, "pair")["data"][0]["label"] in LABELS.labels


def plain_probabilities(base: Base, vectors: torch.Tensor, encoder: Encoder, row: dict[str, str]) -> dict[str, float]:
    """Label -> probability in plain torch: the product of the shares among the tokens with which any label may go on."""
    model = base.load(torch.float32)
    labels = dict(zip(LABELS.labels, encoder.label_ids, strict=True))
    found = {}
    for label, ids in labels.items():
        text = model.get_input_embeddings()(torch.tensor([*encoder.input_ids(row), *ids]))
        with torch.no_grad():
            logits = model(inputs_embeds=torch.cat([vectors, text])[None]).logits[0]
        found[label] = 1.0
        for depth, token in enumerate(ids):
            allowed = sorted({other[depth] for other in labels.values() if other[:depth] == ids[:depth]})
            shares = torch.softmax(logits[depth - len(ids) - 1][allowed].double(), -1)
            found[label] *= float(shares[allowed.index(token)])
    return found


def classify(client: OpenAI, texts: Any, model: str = "fruits", **more: Any) -> Any:
    return client.post("/classify", cast_to=object, body={"model": model, "input": texts, **more})


def test_generated_labels_without_constraint_are_the_text_of_the_base(client):
    free = client.completions.create(
        model="fruits", prompt="Text: the old hammer\nKind:", max_tokens=5, extra_body={"constrain": False}
    )
    bound = client.completions.create(model="fruits", prompt="Text: the old hammer\nKind:", max_tokens=5)
    assert bound.choices[0].text in (" fruit", " tool") and free.choices[0].text  # greedy by default, both
    assert free.model == bound.model


BAD = [
    ({"model": "nobody"}, openai.NotFoundError, "the names are fruits, pair, raw, tiny-llama, writer"),
    ({"model": "fruits:9"}, openai.NotFoundError, "no such model"),
    ({"model": "fruits~promotions"}, openai.NotFoundError, "no such model"),
    ({"messages": []}, openai.BadRequestError, "messages: "),
    ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "no user message"),
    ({"messages": [{"role": "user", "content": ""}], "model": "tiny-llama"}, openai.BadRequestError, "no chat template"),
    ({"temperature": -1}, openai.BadRequestError, "temperature: must be at least 0, not -1"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: "),
    ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens: 1000000 is more than the 1024"),
    ({"n": 17}, openai.BadRequestError, "n: 17 answers, at most 16 to a prompt"),
    ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs: is only used with logprobs"),
    ({"store": True}, openai.BadRequestError, "store: is not supported at true; send false, or leave it out"),
    ({"service_tier": "flex"}, openai.BadRequestError, 'service_tier: is not supported at "flex"; send "auto" or "default"'),
    ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty: has no effect on an answer that is a label"),
    ({"max_tokens": 1.5}, openai.BadRequestError, "max_tokens: must be an integer, not 1.5"),
    ({"n": 0}, openai.BadRequestError, "n: must be at least 1, not 0"),
    ({"extra_body": {"surprise": 1}}, openai.BadRequestError, "surprise: is not supported; remove it"),
    ({"extra_body": {"top_k": "many"}}, openai.BadRequestError, "top_k: must be an integer"),
    ({"logit_bias": {"-1": 3}}, openai.BadRequestError, "logit_bias: must be an object whose keys are token ids"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        openai.BadRequestError,
        r"messages.0.content.0: must be of a type among 'text', 'refusal'",
    ),
    (
        {"messages": [{"role": "user", "content": None}]},
        openai.BadRequestError,
        "messages.0.content: is missing; send the text",
    ),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages.0.content: is missing; send the text"),
    ({"messages": [{"content": "a"}]}, openai.BadRequestError, "messages.0.role: is missing; send it"),
    ({"extra_body": {"constrain": True}, "model": "writer"}, openai.BadRequestError, "constrain: writer:1 has no labels"),
    ({"extra_body": {"prompt_embeds": "aGk="}}, openai.BadRequestError, "prompt_embeds: is not supported"),
    ({"messages": [{"role": "user", "content": "a"}], "model": "pair"}, openai.BadRequestError, "fields first, second"),
    (
        {"messages": [{"role": "user", "content": "the " * 300}], "model": "writer"},
        openai.BadRequestError,
        r"the text has \d+ tokens, \d+ fit",
    ),
    ({"messages": [{"role": "user", "content": "the " * 300}]}, openai.BadRequestError, r"the text has \d+ tokens, \d+ fit"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(client, change, kind, words, stream):
    good = {"model": "fruits", "messages": [{"role": "user", "content": "the old hammer"}], "stream": stream}
    with pytest.raises(kind, match=words) as caught:
        client.chat.completions.create(**good | change)
    assert caught.value.body["type"] == "invalid_request_error"
    if words.partition(":")[0] in change:
        assert caught.value.body["param"] == words.partition(":")[0]


@pytest.mark.parametrize("strange", [-1, 320, 10**6, 2**40])
def test_token_ids_of_soft_prompts_are_nobodys_to_send(client, world, strange):
    assert world.service.engine.vocabulary == 320
    for prompt in ([5, strange], [[5], [6, strange]]):
        with pytest.raises(openai.BadRequestError, match=f"token {strange} is not in the vocabulary of 320"):
            client.completions.create(model="raw", prompt=prompt)


def test_too_long_a_text_may_be_cut_as_in_training(client, world):
    text = "the old hammer " * 60
    answer = chat(client, text, extra_body={"truncate": True})
    encoder = world.service.models.find("fruits").encoder
    assert answer.usage.prompt_tokens == len(encoder.fitted_ids({"text": text})) <= encoder.input_room
    assert classify(client, [text], truncate=True)["data"][0]["label"] == answer.choices[0].message.content


def test_keys(world):
    def status(header: str | None, path: str = "/v1/models") -> int:
        asked = urllib.request.Request(world.url.removesuffix("/v1") + path)
        if header is not None:
            asked.add_header("authorization", header)
        try:
            with urllib.request.urlopen(asked) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.read()
            return error.code

    for wrong in (None, "", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY):
        assert status(wrong) == 401, wrong
    assert 400 <= status("Bearer " + "k" * 60_000) < 500
    assert status(f"Bearer {KEY}") == status(f"bearer {ADMIN}") == 200
    assert status(f"Bearer {KEY}", "/metrics") == 403 and status(f"Bearer {ADMIN}", "/metrics") == 200
    assert status(None, "/livez") == status(None, "/readyz") == 200
    with pytest.raises(openai.AuthenticationError), OpenAI(base_url=world.url, api_key="wrong", max_retries=0) as client:
        client.models.list()
    stored = json.dumps(world.service.keys)
    assert KEY not in stored and ADMIN not in stored  # hashes only


GOOD = json.dumps({"model": "fruits", "messages": [{"role": "user", "content": "a"}]}).encode()
HOSTILE = {
    "no JSON": (b"{", 400),
    "empty": (b"", 400),
    "an array": (b"[1]", 400),
    "deep": (b'{"a":' * 10_000, 400),
    "not UTF-8": (GOOD.replace(b'"a"', b'"\xff"'), 400),
    "a lone surrogate": (GOOD.replace(b'"a"', b'"\\ud800"'), 400),
    "a surrogate as a key": (b'{"\\ud800": 1}', 400),
    "NUL": (GOOD.replace(b'"a"', b'"a\\u0000b"'), 200),
    "only NUL": (GOOD.replace(b'"a"', b'"\\u0000"'), 200),
    "NaN": (GOOD[:-1] + b', "temperature": NaN}', 400),
    "a huge number": (GOOD[:-1] + b', "max_tokens": ' + b"9" * 5000 + b"}", 400),
    "a float": (GOOD[:-1] + b', "max_tokens": 1.5}', 400),
    "a boolean": (GOOD[:-1] + b', "max_tokens": true}', 400),
    "many stops": (GOOD[:-1] + b', "stop": [' + b'"a",' * 10_000 + b'"a"]}', 400),
    "an empty stop": (GOOD[:-1] + b', "stop": [""]}', 400),
    "an unknown key with line breaks": (GOOD[:-1] + b', "a\\n\\u202eb": 1}', 400),
    "too large": (GOOD + b" " * 70_000, 413),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bodies(world, case):
    body, expected = HOSTILE[case]
    status, headers, content = raw(world.url, "/v1/chat/completions", body)
    assert status == expected, content
    assert headers["content-type"] == "application/json"
    if expected != 200:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def test_hostile_requests(world):
    post = "/v1/chat/completions"
    assert raw(world.url, post, GOOD, **{"content-type": "text/plain"})[0] == 415
    assert raw(world.url, post, GOOD, **{"content-encoding": "gzip"})[0] == 415
    assert raw(world.url, post, GOOD, **{"content-length": str(10**9)})[0] == 413  # before any of it is read
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    host, port = world.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as endless:
        head = f"POST {post} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
        with contextlib.suppress(ConnectionError):  # it may be cut off before the answer is read
            endless.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk * 300)
            answer = endless.recv(1000)
            assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
            endless.settimeout(60)
            endless.sendall(chunk)  # what comes behind the answer keeps no connection open
            while endless.recv(65536):
                pass
    status, _, content = raw(world.url, "/v1/nowhere", GOOD)
    assert status == 404 and "error" in json.loads(content)


def test_more_than_fits_is_429(world):
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=30) as client:
        streams = [
            client.completions.create(
                model="raw", prompt="Text: the", max_tokens=80, temperature=2, n=8, stream=True, seed=1, logprobs=20
            )
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError, match="ask again later") as caught:
            for _ in range(8):
                streams.append(client.completions.create(model="raw", prompt="Text: the", max_tokens=80, n=8, stream=True))
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        wait_until_idle(world)
        assert chat(client).choices


def test_when_all_places_are_taken_no_body_is_read(world, monkeypatch):
    """What is refused costs next to nothing: not even that it is nonsense is found out."""
    monkeypatch.setattr(type(world.service.engine), "full", True)
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, headers, _ = raw(world.url, path, b"nonsense")
        assert status == 429 and headers[proxy.BUSY.decode()] == "1"
        assert raw(world.url, path, b"nonsense", key="nobody")[0] == 401
    assert raw(world.url, "/v1/classify", b"nonsense")[0] == 400

    def refused() -> float:
        text = exposition([world.service.metrics.collect()]).decode()
        return float(
            re.findall(r'ptuning_requests_total\{model="none",replica="\w+",route="chat",status="429"\} (\S+)', text)[0]
        )

    before = refused()
    raw(
        world.url, "/v1/chat/completions", b"nonsense", **{proxy.REFUSED.decode(): "40"}
    )  # the proxy has refused so many by itself
    assert refused() == before + 41


def wait_until_idle(world: SimpleNamespace, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while world.service.engine.busy:
        assert time.monotonic() < deadline, f"{world.service.engine.busy} requests still run"
        time.sleep(0.01)


def test_a_client_that_leaves_frees_its_place(client, world):
    """Seen while the engine stands still: nothing but the cancellation can end these requests."""
    with world.service.engine.paused():
        for _ in range(10):
            chat(client, model="writer", max_tokens=50, stream=True).close()
        wait_until_idle(world)


def test_the_deadline_is_kept_here(client, world):
    """Seen while the engine stands still: it may be done with a few tokens in a millisecond."""
    short = world.service.limits.model_copy(update={"deadline_s": 0.001})
    app = build_app(SimpleNamespace(**vars(world.service) | {"limits": short, "alive": True}))
    running = Running(app)
    try:
        hurried = OpenAI(base_url=running.url, api_key=KEY, max_retries=2, timeout=30)
        with hurried, world.service.engine.paused():
            began = time.monotonic()
            with pytest.raises(openai.APIStatusError, match="longer than this server allows") as caught:
                headers = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
                hurried.completions.create(model="raw", prompt="Text:", max_tokens=90, temperature=2, extra_headers=headers)
            assert caught.value.status_code == 408 and time.monotonic() - began < 5  # and not repeated
            with pytest.raises(
                openai.APIError, match="longer than this server allows"
            ):  # said by an event, the status being sent
                list(hurried.completions.create(model="raw", prompt="Text:", max_tokens=90, temperature=2, stream=True))
    finally:
        running.stop()
    wait_until_idle(world)


def test_promotion_refusal_and_rollback(client, world, tmp_path):
    """The alias moves, the replica looks, the next answer is the new one's; what fails a check is refused and the old stays."""
    catalogue, registry = world.service.models, world.registry
    ledger = PromotionLog(registry, "fruits")
    held = catalogue.find("fruits")
    ledger.promote(2, ledger.state())
    assert chat(client).model == "fruits:1"  # nobody has looked yet
    assert catalogue.sync() and chat(client).model == "fruits:2" and chat(client, model="fruits:1").model == "fruits:1"
    assert held.id == "fruits:1"  # whoever had it keeps it

    scratch, other = tmp_path / "scratch", {"config": "0" * 64, "tokenizer": "0" * 64, "weights": "0" * 64}
    for card, words in (
        ({"base_fingerprint": other}, "made for"),
        ({"template": Template(input="{text}", target=" {label}", labels=("a" * 200, "b"))}, "exceed the 128 positions"),
    ):
        bad = publish_soft_prompt(registry, world.base, scratch, "fruits", 7, **card)
        ledger.promote(int(bad.partition(":")[2]), ledger.state())
        assert catalogue.sync()
        assert chat(client).model == "fruits:2" and words in catalogue.refused[bad]
        with pytest.raises(openai.NotFoundError):
            chat(client, model=bad)
        told = client.post("/admin/reload", cast_to=object, options={"headers": {"authorization": f"Bearer {ADMIN}"}})
        assert bad in told["refused"] and not told["changed"]

    ledger.promote(1, ledger.state())
    assert catalogue.sync() and chat(client).model == "fruits:1"
    assert not catalogue.sync(), "nothing has changed"


def test_what_diverges_or_is_damaged_is_refused(tmp_path, tiny_tokenizer):
    """Vectors that are finite but answer nothing that is a number, and files that changed behind the registry's back."""
    folder = tmp_path / "gpt2"
    tiny_base("gpt2", vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    registry, base = fill_empty(tmp_path / "runs"), find_base(ModelConfig(path=str(folder)))
    engine = TransformersEngine(
        base.load(torch.float32), 2, EngineConfig(running=2, waiting=4, cache_bytes=1 << 20, context=128)
    )
    catalogue = ServedModels(base, engine, registry, str(tmp_path / "served"))
    try:
        publish_soft_prompt(registry, folder, tmp_path / "scratch", "task", 1)
        ledger = PromotionLog(registry, "task")
        assert catalogue.sync() and catalogue.find("task").id == "task:1"
        with pytest.raises(UserError, match="gpt2: is the name of the base on a server; choose another name"):
            publish_soft_prompt(registry, folder, tmp_path / "scratch", "gpt2", 2)
        alike = publish_soft_prompt(registry, folder, tmp_path / "scratch", "gpt2", 2, base="elsewhere")  # of another machine
        assert catalogue.sync() and catalogue.find("gpt2").handle is None and alike not in catalogue.names
        assert catalogue.refused[alike].endswith("has the name of the base on this server; publish it under another name")
        enormous = torch.full((4, 32), 3e38) * torch.tensor([1.0, -1.0]).repeat(16)
        about = {"base": str(folder), "base_fingerprint": base.fingerprint.parts(), "template": LABELS}
        make(enormous, **about).save(str(tmp_path / "enormous"), layers=2, heads=4)
        assert str(put(registry, "task", str(tmp_path / "enormous"))) == "task:2"
        publish_soft_prompt(registry, folder, tmp_path / "scratch", "task", 3)
        damage(registry, "task:3")
        for version, words in ((2, "diverged"), (3, "adapter_model.safetensors")):
            ledger.promote(version, ledger.state())
            catalogue.sync()
            assert catalogue.find("task").id == "task:1" and words in catalogue.refused[f"task:{version}"]
        assert engine.residents == 1
    finally:
        engine.close()


def damage(registry: Registry, version: str) -> None:
    """Flip a byte of a published soft prompt."""
    run = registry.client.get_run(registry.find(version).run_id)
    path = Path(run.info.artifact_uri.removeprefix("file://")) / "soft_prompt" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_last_good_set_outlives_the_registry(world, tiny_base_folder, tmp_path):
    storage = tmp_path / "runs"
    shutil.copytree(world.storage, storage)
    tables = settings(storage, tiny_base_folder) | {"tracking": {"uri": "http://127.0.0.1:9"}}  # nothing listens there
    service = Service(parse_experiment(tables), {}, "second")
    try:
        assert {name for name in service.models.names if ":" not in name} >= {"fruits", "writer", "pair", "raw"}
        assert service.models.find("fruits").handle.content_hash == world.service.models.find("fruits").content_hash
    finally:
        service.close()


def test_compare_asks_everybody_the_same(world, client, tmp_path):
    """What the command says of a version is what the server says; a version for another base is named, not asked."""
    registry, _ = fill_empty(tmp_path / "runs"), (tmp_path / "scratch").mkdir()
    written = {"prompt": {"init": "text", "init_text": "Text: sort"}, "data": {"teacher": "sort " * 20}}
    other = {"config": "0" * 64, "tokenizer": "0" * 64, "weights": "0" * 64}
    for seed, card in ((1, {"experiment": written}), (2, {"base_fingerprint": other}), (2, {})):
        publish_soft_prompt(registry, world.base, tmp_path / "scratch", "fruits", seed, **card)
    command = ["compare", "fruits", "--text", "the old hammer", "--storage", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    base, text, teacher, first, stranger, third = json.loads(done.stdout)["opinions"]
    assert (base["who"], text["who"]) == ("the base alone", "the text 'Text: sort'")
    assert teacher["who"] == f"the text '{'sort ' * 12}...'" and stranger["tokens"] == 0
    assert first["tokens"] - base["tokens"] == 12 and teacher["tokens"] > base["tokens"] + 20 and teacher["seconds"] > 0
    assert first["who"] == "fruits:1" and stranger["who"] == "fruits:2" and "made for" in stranger["answer"]
    for mine, model in ((first, "fruits:1"), (third, "fruits:2")):
        (served,) = classify(client, ["the old hammer"], model)["data"]
        assert mine["answer"] == served["label"]
        assert mine["probability"] == pytest.approx(served["probability"], abs=1e-4)
    lines = CliRunner().invoke(app, command).stdout.splitlines()
    assert len(lines) == 6 and lines[3].startswith("fruits:1 ") and re.search(r" \d+ tokens, \d+ ms$", lines[3])
    wrong = CliRunner().invoke(app, ["compare", "nobody", "--text", "x", "--storage", str(tmp_path / "runs")])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("ptuning: nobody: no soft prompt of this name")


def test_openapi_holds_against_invention(world):
    """No question is a 5xx, and every answer is one that is described. `test_openapi` asks the other routes."""
    others = ("/v1/files", "/v1/fine_tuning/", "/v1/batches", "/v1/admin/")
    known = {"model": ["fruits", "pair:1", "writer", "raw"], "name": ["fruits:2", "writer"]}
    told = invent(world.url, ADMIN, EXAMPLES // 2, lambda path: not path.startswith(others), lambda: known)
    assert len({operation for operation, _ in told}) >= 7


def health(world: SimpleNamespace) -> dict[str, Any]:
    with urllib.request.urlopen(world.url.removesuffix("/v1") + "/readyz") as response:
        found: dict[str, Any] = json.load(response)
        return found


def test_soft_prompts_that_do_not_all_fit_into_memory(client, world):
    """Answered as before, from memory or from disk; health and metrics tell how many are there."""
    models, texts = ["fruits:1", "fruits:2"], ["the old hammer", "a plum"]
    residency = world.service.models.residency
    before = {model: classify(client, texts, model)["data"] for model in models}
    ready = health(world)
    assert ready["resident"] == ready["soft_prompts"] == world.service.models.versions
    brought, one = residency.brought, world.service.models.find("fruits:1").prompt.bytes
    residency.limit = one
    try:
        for _ in range(3):
            for model in models:
                assert classify(client, texts, model)["data"] == before[model]
                assert health(world)["resident"] == 1
        assert residency.brought >= brought + 5
        collected = {sample.name: sample.value for metric in world.service.metrics.collect() for sample in metric.samples}
        assert collected["ptuning_soft_prompts_read_total"] >= 5 and collected["ptuning_soft_prompts"] == 1
        assert collected["ptuning_served_versions"] == world.service.models.versions
    finally:
        residency.limit = None
        for name in world.service.models.names:
            if name != world.service.models.base_id and ":" in name:
                client.completions.create(model=name, prompt="a", max_tokens=1, extra_body={"constrain": False})
