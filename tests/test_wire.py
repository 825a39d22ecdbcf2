"""What clients rely on beyond the answer itself: usage, routes, headers, streams, neutral parameters, structured answers."""

from __future__ import annotations

import enum
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import openai
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from openai import OpenAI
from pydantic import BaseModel
from test_http_api import ADMIN, GOOD, KEY, Running, chat, classify, raw, serving

from ptuning.config import parse_experiment
from ptuning.errors import UserError
from ptuning.inference.types import EngineStopped
from ptuning.serving import neutral
from ptuning.serving.answers import ChatChunk, CompletionChunk
from ptuning.serving.app import build_app
from ptuning.serving.auth import check_origins
from ptuning.serving.http_request import NEUTRAL
from ptuning.serving.structured import instances

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMPT = "Text: the old hammer\nKind:"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("wire") / "runs", tiny_base_folder) as served:
        yield served


@pytest.fixture(scope="module")
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ask(world: SimpleNamespace, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(world.url.removesuffix("/v1") + path, method=method)
    for name, value in ({"authorization": f"Bearer {ADMIN}"} | headers).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, {name.lower(): value for name, value in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def lines(world: SimpleNamespace, path: str, **body: Any) -> list[Any]:
    """The events of a stream; the last one must be [DONE]."""
    status, _, content = raw(world.url, path, json.dumps(body | {"stream": True}).encode())
    assert status == 200, content
    events = [
        line.removeprefix(b"data: ") for line in content.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")
    ]
    assert events.pop() == b"[DONE]"
    return [json.loads(event) for event in events]


# -- usage


@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["fruits", "writer", "raw", "tiny-llama"]),
    st.lists(st.sampled_from([PROMPT, "Text: a plum", "Text: a plum and the old saw and more"]), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_usage_adds_up(world, client, model, prompts, n, most, streamed, as_ids):
    """Cached tokens are a part of the prompt's, and virtual ones are apart, whatever is asked."""
    tokenizer = world.service.base.tokenizer
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    asked: dict[str, Any] = {"model": model, "prompt": ids if as_ids else prompts, "n": n, "max_tokens": most}
    if streamed:
        *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        used, choices = last.usage, {choice.index for chunk in chunks for choice in chunk.choices}
    else:
        answer = client.completions.create(**asked)
        used, choices = answer.usage, {choice.index for choice in answer.choices}
    assert len(choices) == n * len(prompts)
    assert used.prompt_tokens == sum(map(len, ids)) and used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert 0 <= used.prompt_tokens_details.cached_tokens <= used.prompt_tokens
    assert used.completion_tokens <= most * n * len(prompts)
    assert used.prompt_tokens_details.virtual_tokens == len(prompts) * world.service.models.find(model).length


def test_cached_tokens_are_those_of_the_text(client):
    long = "Text: " + "the old hammer and the saw " * 6
    found = [client.completions.create(model="raw", prompt=long, max_tokens=2).usage for _ in range(3)]
    last = found[-1]
    assert 16 <= last.prompt_tokens_details.cached_tokens <= last.prompt_tokens
    assert classify(client, ["a", "b"])["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "virtual_tokens": 2 * last.prompt_tokens_details.virtual_tokens,
    }


# -- routes and headers


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/chat/completions", "POST /v1/chat/completions is meant: the client's base_url must end with /v1, once"),
        ("/v1/v1/completions", "POST /v1/completions is meant"),
        ("/openai/models", "GET /v1/models is meant"),
        ("/v1/embeddings", "the routes are /v1/completions, /v1/chat/completions,"),
        ("/v2", "the routes are /v1/completions"),
    ],
)
def test_an_unknown_route_is_not_an_unknown_model(world, path, words):
    for method in ("GET", "POST"):
        status, _, content = ask(world, method, path)
        error = json.loads(content)["error"]
        assert status == 404 and error["code"] == "unknown_url" and words in error["message"], error


def test_health_head_and_allow(world, client):
    for path in ("/health", "/livez", "/v1/models", "/metrics"):
        status, headers, content = ask(world, "HEAD", path)
        assert status == 200 and content == b"", path
        length = int(ask(world, "GET", path)[1]["content-length"])
        assert path == "/metrics" or int(headers["content-length"]) == length
    for method, path, allowed in (("DELETE", "/v1/models", {"GET", "HEAD"}), ("GET", "/v1/completions", {"POST"})):
        status, headers, _ = ask(world, method, path)
        assert status == 405 and set(headers["allow"].split(", ")) == allowed
    engine = world.service.engine
    assert {model.id: model.max_model_len for model in client.models.list()}["tiny-llama"] == engine.longest
    assert client.models.retrieve("raw").max_model_len == engine.longest - world.service.models.find("raw").length


def test_a_request_has_an_id_in_the_log(world, client, monkeypatch, caplog):
    assert ask(world, "GET", "/v1/models")[1]["x-request-id"] != ask(world, "GET", "/v1/models")[1]["x-request-id"]

    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("something")

    monkeypatch.setattr(world.service.engine, "submit", fail)
    monkeypatch.setattr(logging.getLogger("ptuning.serving.http_request"), "propagate", True)
    for given_id, known in (("mine-1", True), ("no good\tid", False)):
        caplog.clear()
        body = json.dumps({"model": "raw", "prompt": "a"}).encode()
        status, headers, _ = raw(world.url, "/v1/completions", body, **{"x-request-id": given_id})
        assert status == 500 and "x-request-id" not in headers, "the proxy that gave it also returns it"
        assert (f"request {given_id} failed" in caplog.text) == known
    monkeypatch.undo()


# -- streams


def test_chunks_are_small_and_begin_with_the_text(world):
    messages = [{"role": "user", "content": "the old hammer"}]
    for path, shape, asked in (
        ("/v1/chat/completions", ChatChunk, {"model": "writer", "messages": messages, "n": 2}),
        ("/v1/completions", CompletionChunk, {"model": "writer", "prompt": PROMPT}),
    ):
        more = {"max_tokens": 8, "temperature": 0, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        events = lines(world, path, **asked, **more)
        assert [shape.model_validate_json(json.dumps(event)) for event in events]
        assert [index for index, event in enumerate(events) if "answered_by" in event] == [0]
        assert all(event["usage"]["prompt_tokens"] > 3 for event in events)
        made = [event["usage"]["completion_tokens"] for event in events]
        assert made == sorted(made) and made[0] >= 1
        small = [len(json.dumps(event, separators=(",", ":"))) for event in lines(world, path, **asked, max_tokens=8)[1:]]
        assert max(small) < 260, "about 450 bytes before"
    first: dict[int, Any] = {}
    for event in lines(world, "/v1/chat/completions", model="writer", messages=messages, n=2, max_tokens=8, temperature=0):
        for choice in event["choices"]:
            first.setdefault(choice["index"], choice["delta"])
    assert all(delta["role"] == "assistant" and delta["content"] for delta in first.values()), "no chunk before the first text"


def test_the_sampled_token_is_among_the_likeliest(client):
    for top in (1, 3):
        answer = chat(client, model="writer", temperature=2, seed=3, max_tokens=12, logprobs=True, top_logprobs=top)
        for token in answer.choices[0].logprobs.content:
            assert (token.token, token.logprob) in {(each.token, each.logprob) for each in token.top_logprobs}
            assert top <= len(token.top_logprobs) <= top + 1
    plain = client.completions.create(model="writer", prompt=PROMPT, temperature=2, seed=3, logprobs=0, max_tokens=5)
    found = plain.choices[0].logprobs
    assert [list(top.values()) for top in found.top_logprobs] == [[logprob] for logprob in found.token_logprobs]


# -- neutral parameters


PATHS = {
    "CompletionRequest": "/v1/completions",
    "ChatRequest": "/v1/chat/completions",
    "ClassifyRequest": "/v1/classify",
    "ResponsesRequest": "/v1/responses",
}
ANSWERING = {shape: table for shape, table in NEUTRAL.items() if shape.__name__ in PATHS}
"""Without those of jobs and batches, which ask for no answer."""
ASKED: dict[str, dict[str, Any]] = {
    "ResponsesRequest": {"model": "writer", "input": "a", "max_output_tokens": 2},
    "CompletionRequest": {"model": "writer", "prompt": PROMPT, "max_tokens": 2},
    "ChatRequest": {"model": "writer", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "ClassifyRequest": {"model": "fruits", "input": "a"},
}
SAMPLES = {str: "anything", dict: {"a": "b"}, bool: True}


def test_neutral_parameters_change_nothing(world):
    for shape, table in ANSWERING.items():
        asked = ASKED[shape.__name__]
        for at in range(max(map(len, table.values()))):
            given = {name: values[at % len(values)] if values else None for name, values in table.items()}
            given = {name: SAMPLES[value] if isinstance(value, type) else value for name, value in given.items()}
            status, _, content = raw(world.url, PATHS[shape.__name__], json.dumps(given | asked).encode())
            assert status == 200, content
        status, _, content = raw(world.url, PATHS[shape.__name__], json.dumps(dict.fromkeys(table) | asked).encode())
        assert status == 200, content
        for name, values in table.items():
            for other in ("strange", 7, True, {"x": 1}, [1]):
                if neutral.is_neutral(other, values) or name in shape.model_fields:
                    continue
                status, _, content = raw(world.url, PATHS[shape.__name__], json.dumps({name: other} | asked).encode())
                error = json.loads(content)["error"]
                assert status == 400 and error["param"] == name and neutral.shown(other) in error["message"], error


def test_what_is_neutral_is_unlike_what_only_looks_like_it():
    assert neutral.is_neutral(1, (1,)) and neutral.is_neutral(1.0, (1,)) and neutral.is_neutral(None, ())
    assert not neutral.is_neutral(True, (1,)) and not neutral.is_neutral(0, (False,)) and not neutral.is_neutral("0", (0,))


def test_how_tokens_are_chosen(client, world):
    tokenizer = world.service.base.tokenizer
    z = tokenizer("z", add_special_tokens=False).input_ids[-1]
    ends = world.service.engine.ends

    def text(**more: Any) -> Any:
        named = {"logit_bias", "frequency_penalty", "presence_penalty"}
        own = {name: more.pop(name) for name in list(more) if name in named}
        answer = client.completions.create(
            **{"model": "raw", "prompt": PROMPT, "max_tokens": 6, "temperature": 0} | own, extra_body=more
        )
        return answer.choices[0]

    assert text(logit_bias={str(z): 100}).text == "z" * 6
    once = text(logit_bias={str(z): 100}, frequency_penalty=2, repetition_penalty=10)
    assert once.text.startswith("z") and once.text != "z" * 6
    stopped = text(logit_bias={str(z): 100}, stop_token_ids=[z])
    assert stopped.text == "" and stopped.finish_reason == "stop"
    assert text(logit_bias={str(z): 100}, stop_token_ids=[z], min_tokens=2).text != ""
    assert text(logit_bias={str(z): 100}, stop="z", min_tokens=3).text == "z" * 3
    ended = text(logit_bias={str(ends[0]): 100})
    assert ended.text == "" and ended.finish_reason == "stop"
    assert text(logit_bias={str(ends[0]): 100}, min_tokens=6).finish_reason == "length"
    whole = client.completions.create(
        model="raw", prompt=PROMPT, max_tokens=6, logit_bias={str(ends[0]): 100}, extra_body={"ignore_eos": True}
    )
    assert whole.usage.completion_tokens == 6 and whole.choices[0].finish_reason == "length"
    same = {text(temperature=2.0, top_k=1, seed=seed).text for seed in range(3)} | {text().text}
    assert len(same) == 1 and text(temperature=2.0, min_p=1.0, seed=1).text in same
    assert text(top_k=-1, min_p=0, repetition_penalty=1, stop_token_ids=[], ignore_eos=False).text in same
    for wrong, words in (
        ({"stop_token_ids": [999]}, "token 999 is not in the vocabulary"),
        ({"min_p": 2}, "min_p: must be at most 1"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            text(**wrong)


# -- structured answers


class Kind(enum.Enum):
    fruit = "fruit"
    tool = "tool"


class Classified(BaseModel):
    """What something is."""

    version: Literal["1"] = "1"
    kind: Kind


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["tool", "fruit"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "the old hammer"}]


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def tool(schema: dict[str, Any], name: str = "sort") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema, "strict": True}}


def test_the_label_in_the_form_that_is_asked_for(client, world):
    label = chat(client).choices[0].message.content
    parsed = client.chat.completions.parse(model="fruits", messages=ASK, response_format=Classified)
    assert parsed.choices[0].message.parsed == Classified(kind=Kind(label))
    answer = chat(client, response_format=json_schema({"enum": ["fruit", "tool"]}), logprobs=True, top_logprobs=2)
    assert json.loads(answer.choices[0].message.content) == label and answer.choices[0].finish_reason == "stop"
    assert "".join(token.token for token in answer.choices[0].logprobs.content).strip() == label
    assert answer.usage.completion_tokens == chat(client).usage.completion_tokens
    asked = {"structured_outputs": {"choice": ["tool", "fruit"]}}
    assert chat(client, extra_body=asked).choices[0].message.content == label
    completed = client.completions.create(model="fruits", prompt=PROMPT, extra_body=asked)
    assert completed.choices[0].text.strip() == label
    (only,) = [each for each in ("fruit", "tool") if each != label]
    assert chat(client, extra_body={"structured_outputs": {"choice": [only]}}).choices[0].message.content == only


@pytest.mark.parametrize("named", [True, False])
def test_a_forced_tool_gets_the_label(client, world, named):
    label = chat(client).choices[0].message.content
    choice: Any = {"type": "function", "function": {"name": "sort"}} if named else "required"
    asked: dict[str, Any] = {"tools": [tool(SCHEMA)], "tool_choice": choice, "parallel_tool_calls": False}
    answer = chat(client, **asked).choices[0]
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments) == {"kind": label} and call.function.name == "sort" and call.id
    assert answer.message.content is None and answer.finish_reason == ("stop" if named else "tool_calls")
    events = lines(world, "/v1/chat/completions", model="fruits", messages=ASK, **asked)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant" and deltas[0]["tool_calls"][0]["function"]["name"] == "sort"
    assert json.loads("".join(each["tool_calls"][0]["function"]["arguments"] for each in deltas)) == {"kind": label}


def test_tools_that_need_not_be_called_are_not(client):
    for choice in ("none", "auto", openai.NOT_GIVEN):
        for model in ("fruits", "writer"):
            answer = chat(client, model=model, tools=[tool(SCHEMA)], tool_choice=choice, max_tokens=4).choices[0].message
            assert answer.tool_calls is None and answer.content is not None
    assert chat(client, extra_body={"tools": []}).choices


def test_a_share_of_the_labels_is_chosen_by_their_probabilities(client, world):
    """With a temperature, the answers are drawn from the labels' own distribution, restricted to what is asked for."""
    fruit = classify(client, "the old hammer")["data"][0]["probabilities"]["fruit"]
    drawn = [
        json.loads(
            chat(client, response_format=json_schema(SCHEMA), temperature=1.0, seed=seed, n=16).choices[at].message.content
        )["kind"]
        for seed in range(0, 800, 100)
        for at in range(16)
    ]
    assert abs(drawn.count("fruit") / len(drawn) - fruit) < 0.2


WRONG_FORMS: list[tuple[dict[str, Any], str]] = [
    (
        {"response_format": json_schema({"type": "string"})},
        "response_format: fruits:1 answers with one of its labels, so the schema",
    ),
    ({"response_format": {"type": "json_object"}}, "answers with one of its labels"),
    ({"response_format": json_schema({"enum": ["fruit", "animal"]})}, "a value is not one of the labels of fruits:1"),
    ({"extra_body": {"structured_outputs": {"choice": ["animal"]}}}, "a value is not one of the labels"),
    (
        {"tools": [tool(SCHEMA)], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "does not contain the function",
    ),
    (
        {"tools": [tool(SCHEMA), tool(SCHEMA, "b")], "tool_choice": "required"},
        "required is supported with one tool only, not 2",
    ),
    ({"tools": [tool(SCHEMA)], "tool_choice": "required", "response_format": json_schema(SCHEMA)}, "cannot be combined with"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: is missing"),
    ({"extra_body": {"structured_outputs": {"regex": "a"}}}, "structured_outputs.regex: is not supported"),
    ({"extra_body": {"min_tokens": 3}}, "min_tokens: has no effect on an answer that is a label"),
]


@pytest.mark.parametrize(("change", "words"), WRONG_FORMS, ids=range(len(WRONG_FORMS)))
def test_a_form_that_cannot_be_had_is_refused(client, change, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, **change)


def test_choices_that_are_no_labels(client, world):
    """Of a model without labels: the most likely of the texts, as its own tokens say."""
    asked = {"structured_outputs": {"choice": ["a plum", "a", "the saw"]}}
    answer = chat(client, model="writer", temperature=0, extra_body=asked)
    assert answer.choices[0].message.content in asked["structured_outputs"]["choice"]
    served = world.service.models.find("writer")
    ids = served.encoder.input_ids({"text": "the old hammer"})
    from ptuning.model.label_trie import LabelTrie

    trie = LabelTrie(
        tuple(tuple(served.encoder.target_ids({"answer": text})) for text in asked["structured_outputs"]["choice"])
    )
    (scores,) = world.service.engine.choose(served.handle, [ids], trie).result(30)
    assert answer.choices[0].message.content == asked["structured_outputs"]["choice"][scores.index(max(scores))]
    one = client.completions.create(model="raw", prompt=PROMPT, extra_body={"structured_outputs": {"choice": ["only this"]}})
    assert one.choices[0].text == "only this"


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"enum": ["a", "b"]}, {"a": "a", "b": "b"}),
        ({"anyOf": [{"const": "a"}, {"const": "b"}, {"type": "null"}]}, {"a": "a", "b": "b"}),
        (
            Classified.model_json_schema(),
            {"fruit": {"version": "1", "kind": "fruit"}, "tool": {"version": "1", "kind": "tool"}},
        ),
        (
            {"$ref": "#/$defs/X", "$defs": {"X": {"properties": {"y": {"type": "boolean"}}}}},
            {True: {"y": True}, False: {"y": False}},
        ),
        (
            {"properties": {"y": {"allOf": [{"$ref": "#/$defs/E"}]}}, "$defs": {"E": {"enum": [1, 2]}}},
            {1: {"y": 1}, 2: {"y": 2}},
        ),
        ({"type": "string"}, None),
        ({"properties": {"a": {"enum": [1, 2]}, "b": {"enum": [1, 2]}}}, None),
        ({"properties": {"a": {"enum": [1, 2]}, "b": {"type": "string"}}}, None),
        ({"$ref": "#/$defs/X"}, None),
        ({"$ref": "https://x/y"}, None),
        ({}, None),
    ],
)
def test_instances_of_a_schema(schema, values):
    found = instances(schema)
    assert (found and {value: json.loads(text) for value, text in found}) == values


def test_an_answer_can_be_sent_back(world, client):
    """Clients append the whole message of an answer, with its nulls, and the result of a tool."""
    forced = chat(client, tools=[tool(SCHEMA)], tool_choice="required").choices[0].message
    free = chat(client, model="writer", max_tokens=3).choices[0].message
    served = world.service.models.find("fruits")
    from ptuning.serving.protocol import ChatRequest

    result = {"role": "tool", "tool_call_id": forced.tool_calls[0].id, "content": "done"}
    messages = [
        *ASK,
        forced.model_dump(),
        result,
        free.model_dump(),
        {"role": "user", "content": "more", "cache_control": {"type": "x"}},
    ]
    kept = neutral.without_neutral({"model": "m", "messages": messages}, neutral.CHAT, ChatRequest.model_fields)
    spoken = [message.spoken for message in ChatRequest.model_validate(kept).messages]
    assert [each["role"] for each in spoken] == ["user", "assistant", "user", "assistant", "user"]
    assert spoken[1]["content"] == forced.tool_calls[0].function.arguments and spoken[2]["content"] == "done"
    with pytest.raises(openai.BadRequestError, match="no place for earlier messages"):  # a plain template, as ever
        client.chat.completions.create(model=served.id, messages=messages)
    for name, value in (("refusal", "no"), ("audio", {"id": "x"}), ("prefix", True)):
        with pytest.raises(openai.BadRequestError, match=f"messages.0.{name}: is not supported at"):
            client.chat.completions.create(model="fruits", messages=[ASK[0] | {name: value}])


def test_openapi_describes_streams_keys_and_neutral_parameters(world):
    document = json.loads(ask(world, "GET", "/openapi.json")[2])
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert "text/event-stream" in operation["responses"]["200"]["content"] and operation["security"] == [{"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    schemas = document["components"]["schemas"]
    assert "ChatChunk" in schemas and "store" in schemas["ChatRequest"]["properties"]
    assert "security" not in document["paths"]["/livez"]["get"]


def test_a_failed_stream_says_so_in_an_event(world, client, monkeypatch):
    def stopped(*arguments: Any, **more: Any) -> Any:
        raise EngineStopped("the engine has stopped; restart it")

    monkeypatch.setattr(world.service.engine, "submit", stopped)
    status, _, content = raw(world.url, "/v1/chat/completions", GOOD.replace(b"fruits", b"writer"))
    assert status == 503 and b"restart it" in content


# -- JSON of any schema


ORDER = {
    "type": "object",
    "properties": {
        "many": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2},
        "kind": {"anyOf": [{"const": "a"}, {"type": "null"}]},
        "ok": {"type": "boolean"},
    },
    "required": ["many", "kind", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 2])
def test_free_text_follows_a_schema(client, world, temperature):
    def check(text: str) -> None:
        found = json.loads(text)
        assert list(found) == ["many", "kind", "ok"] and set(found["many"]) <= {1, 2} and found["kind"] in ("a", None)
        assert text == json.dumps(found)

    more = {"max_tokens": 60, "temperature": temperature, "seed": 1}
    answer = chat(client, model="writer", response_format=json_schema(ORDER), n=3, **more)
    for choice in answer.choices:
        check(choice.message.content)
        assert choice.finish_reason == "stop"
    check(chat(client, extra_body={"constrain": False}, response_format=json_schema(ORDER), **more).choices[0].message.content)
    check(
        client.completions.create(model="raw", prompt=PROMPT, extra_body={"structured_outputs": {"json": ORDER}}, **more)
        .choices[0]
        .text
    )
    forced: dict[str, Any] = {"tools": [tool(ORDER)], "tool_choice": "required"}
    check(chat(client, model="writer", **forced, **more).choices[0].message.tool_calls[0].function.arguments)
    events = lines(world, "/v1/chat/completions", model="writer", messages=ASK, **forced, **more)
    check("".join(event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] for event in events))
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert (
        chat(client, model="writer", response_format={"type": "json_object"}, max_tokens=9).choices[0].message.content[0] == "{"
    )
    short = chat(client, model="writer", response_format=json_schema(ORDER), max_tokens=3).choices[0]
    assert short.finish_reason == "length"


@pytest.mark.parametrize("schema", [{"type": "strange"}, {"$ref": "https://x/y"}, {"pattern": "(?=a)", "type": "string"}])
def test_a_schema_that_is_not_supported_is_refused(client, schema):
    with pytest.raises(openai.BadRequestError, match="response_format: the JSON schema is not supported") as refused:
        chat(client, model="writer", response_format=json_schema(schema))
    assert refused.value.body["param"] == "response_format"
    with pytest.raises(openai.BadRequestError, match="min_tokens: has no effect on an answer that is JSON of a schema"):
        chat(client, model="writer", response_format=json_schema(ORDER), extra_body={"min_tokens": 2})


# -- echo


def test_echo_reports_what_generation_would(client, world):
    """The log-probabilities of a prompt are those with which its tokens were generated; without any new token, too."""
    tokenizer = world.service.base.tokenizer
    for model in ("raw", "writer", "tiny-llama"):
        ids = tokenizer(PROMPT).input_ids
        made = client.completions.create(
            model=model, prompt=ids, max_tokens=6, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
        )
        expected = made.choices[0].logprobs
        text = PROMPT + made.choices[0].text
        whole = [*ids, *tokenizer(made.choices[0].text, add_special_tokens=False).input_ids]
        if len(whole) != len(ids) + 6:
            continue  # the text of the answer has other tokens than the answer
        steps = world.service.engine.stats.steps
        scored = client.completions.create(model=model, prompt=whole, echo=True, max_tokens=0, logprobs=2)
        assert world.service.engine.stats.steps == steps, "nothing was generated"
        choice = scored.choices[0]
        assert choice.text == text and choice.finish_reason == "length" and scored.usage.completion_tokens == 0
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(whole) and "".join(choice.logprobs.tokens) == text
        assert choice.logprobs.token_logprobs[-6:] == pytest.approx(expected.token_logprobs, abs=1e-4)
        for mine, theirs in zip(choice.logprobs.top_logprobs[-6:], expected.top_logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
            assert text[offset:].startswith(token)


def test_echo_with_an_answer_and_for_every_prompt(client):
    asked: dict[str, Any] = {"model": "raw", "prompt": [PROMPT, "Text: a plum"], "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**asked, n=2, logprobs=1)
    both = client.completions.create(**asked, n=2, logprobs=1, echo=True)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for choice, alone, prompt in zip(
        both.choices, plain.choices, (PROMPT, PROMPT, "Text: a plum", "Text: a plum"), strict=True
    ):
        assert choice.text == prompt + alone.text
        assert choice.logprobs.tokens[-len(alone.logprobs.tokens) :] == alone.logprobs.tokens
        assert choice.logprobs.text_offset[-len(alone.logprobs.tokens)] == len(prompt)
    assert both.usage.prompt_tokens == plain.usage.prompt_tokens
    streamed = client.completions.create(**asked, echo=True, stream=True)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [both.choices[0].text, both.choices[2].text]
    for body, words in (
        ({"max_tokens": 0}, "0 is only used with echo = true"),
        ({"echo": "yes"}, "echo: must be true or false"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(**asked | body)
    many = [PROMPT] * 17
    with pytest.raises(openai.BadRequestError, match="prompt: 17 answers to 17 prompts, at most 16 per request"):
        client.completions.create(**asked | {"prompt": many})


# -- /v1/responses


def test_responses_are_chat_completions(client, world):
    for model, more in (("fruits", {}), ("writer", {"temperature": 1.0, "max_output_tokens": 8})):
        asked: dict[str, Any] = {"model": model, "input": "the old hammer", "store": False} | more
        answer = client.responses.create(**asked)
        assert answer.status in ("completed", "incomplete") and answer.object == "response" and answer.id.startswith("resp_")
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        assert answer.usage.input_tokens_details.virtual_tokens == world.service.models.find(model).length
        if model == "fruits":
            assert answer.output_text == chat(client).choices[0].message.content and answer.model == "fruits:1"
    seeded = {"temperature": 1.0, "extra_body": {"seed": 5}, "max_output_tokens": 8}
    same = client.responses.create(model="writer", input=ASK, **seeded)
    assert same.output_text == chat(client, model="writer", temperature=1.0, seed=5, max_tokens=8).choices[0].message.content
    if same.status == "incomplete":
        assert same.incomplete_details.reason == "max_output_tokens"
    again = client.responses.create(
        model="fruits", input=[{"role": "user", "content": [{"type": "input_text", "text": "the old hammer"}]}], top_logprobs=2
    )
    (part,) = again.output[0].content
    assert "".join(token.token for token in part.logprobs).strip() == part.text == chat(client).choices[0].message.content
    item = again.output[0].model_dump()
    with pytest.raises(openai.BadRequestError, match="no place for earlier messages"):
        client.responses.create(model="fruits", input=[*ASK, item, *ASK])


def test_events_of_a_response_are_in_order(client):
    seen, texts = [], []
    asked: dict[str, Any] = {"model": "writer", "input": "the old hammer", "max_output_tokens": 8, "extra_body": {"seed": 5}}
    for event in client.responses.create(**asked, stream=True):
        seen.append(event.type)
        texts += [event.delta] if event.type == "response.output_text.delta" else []
    final = event.response
    with client.responses.stream(model="fruits", input="the old hammer") as stream:
        assert list(stream) and stream.get_final_response().output_text in ("fruit", "tool")
    numbers = [event.sequence_number for event in client.responses.create(model="fruits", input="a", stream=True)]
    assert numbers == list(range(len(numbers)))
    assert "".join(texts) == final.output_text and final.usage.output_tokens > 0
    assert seen[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert seen[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert seen[-1] in ("response.completed", "response.incomplete") and seen[-1] == f"response.{final.status}"


def test_a_response_has_the_form_that_is_asked_for(client):
    label = chat(client).choices[0].message.content
    parsed = client.responses.parse(model="fruits", input="the old hammer", text_format=Classified)
    assert parsed.output_parsed == Classified(kind=Kind(label))
    function = {"type": "function", "name": "sort", "parameters": SCHEMA, "strict": True}
    for choice in ({"type": "function", "name": "sort"}, "required"):
        called = client.responses.create(model="fruits", input="the old hammer", tools=[function], tool_choice=choice).output[0]
        assert called.type == "function_call" and json.loads(called.arguments) == {"kind": label} and called.call_id
    events = list(
        client.responses.create(model="fruits", input="the old hammer", tools=[function], tool_choice="required", stream=True)
    )
    assert json.loads("".join(event.delta for event in events if event.type.endswith("arguments.delta"))) == {"kind": label}
    assert client.responses.create(model="fruits", input="a", tools=[function]).output[0].type == "message"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"store": True}, "store: is not supported at true; send false"),
        ({"previous_response_id": "resp_1"}, 'previous_response_id: is not supported at "resp_1"; leave it out'),
        ({"background": True}, "background: is not supported at true"),
        ({"input": []}, "input: must be a string or a list with at least 1 item"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type: must be 'message', 'function_call'"),
        ({"input": [{"role": "user"}]}, "input.0.content: is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: must be 'function'"),
        ({"reasoning": {"effort": "high"}}, "reasoning: is not supported at"),
        ({"text": {"verbosity": "high"}}, "text.verbosity: must be 'medium'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "response_format.json_schema.schema: is missing"),
    ],
)
def test_what_needs_a_memory_is_refused(client, change, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(**{"model": "fruits", "input": "a"} | change)


# -- web pages


def test_web_pages_of_given_origins_may_ask(world):
    limits = world.service.limits.model_copy(update={"cors_origins": ("https://a.example",)})
    running = Running(build_app(SimpleNamespace(**vars(world.service) | {"limits": limits, "alive": True})))
    there = SimpleNamespace(url=running.url)
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    try:
        for origin, status in (("https://a.example", 200), ("https://b.example", 400), ("null", 400)):
            found, headers, _ = ask(there, "OPTIONS", "/v1/chat/completions", origin=origin, **wanted)
            assert found == status and (headers.get("access-control-allow-origin") == origin) == (status == 200)
            code, headers, _ = raw(there.url, "/v1/chat/completions", GOOD, origin=origin)
            assert code == 200 and (headers.get("access-control-allow-origin") == origin) == (status == 200)
        code, headers, _ = raw(there.url, "/v1/chat/completions", GOOD, key=None, origin="https://a.example")
        assert code == 401 and headers["access-control-allow-origin"] == "https://a.example"
    finally:
        running.stop()
    assert ask(world, "OPTIONS", "/v1/chat/completions", origin="https://a.example", **wanted)[0] == 405, "not by default"


def test_origins_need_keys_and_are_origins():
    with pytest.raises(UserError, match="serve.cors_origins: requires API keys"):
        check_origins(["https://a.example"], {})
    check_origins([], {})
    tables = {"name": "a", "data": {"train": "a.jsonl", "input": "{a}", "target": "{b}"}}
    for wrong in ("*", "a.example", "https://a.example/", "https://a.example/x", "ftp://a"):
        with pytest.raises(UserError, match="is not an origin; write https://host"):
            parse_experiment(tables | {"serve": {"cors_origins": [wrong]}})
    for right in ("https://a.example", "http://127.0.0.1:3000", "http://[::1]:3000"):
        assert parse_experiment(tables | {"serve": {"cors_origins": [right]}}).serve.cors_origins == (right,)
