"""The metrics of a server: what each request adds, names, labels, all replicas in one text, the dashboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from conftest import REPOSITORY
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from serving_world import metrics
from test_http_api import KEY, chat, serving, wait_until_idle

from ptuning.model.limits import PAGE
from ptuning.serving.metrics import DEFINITIONS, REQUESTS, Metrics, exposition

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("metrics") / "runs", tiny_base_folder) as served:
        yield served


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def counted(world: SimpleNamespace, name: str, **labels: str) -> float:
    """The sum of the series of this name with these labels."""
    families = text_string_to_metric_families(exposition([world.service.metrics.collect()]).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@dataclass
class Expected:
    """What a request adds to the metrics of its version."""

    ask: Callable[[OpenAI, SimpleNamespace], Any]
    status: int = 200
    model: str = "writer:1"
    answers: Mapping[str, int] = field(default_factory=dict)
    """Finish reason -> answers."""
    prompts: int = 1
    tokens: int = 0
    between: int = 0
    """Intervals between tokens."""


def text(client: OpenAI, tokens: int = 4, **more: Any) -> Any:
    options = {"model": "writer", "prompt": "the old", "max_tokens": tokens, "extra_body": {"ignore_eos": True}} | more
    return client.completions.create(**options)


def failing_stream(client: OpenAI, world: SimpleNamespace) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptuning.serving.detokenizer.TextStream.push", lambda *arguments, **more: 1 / 0)
        with pytest.raises(openai.APIError):
            list(text(client, stream=True))


def stopped(client: OpenAI, world: SimpleNamespace) -> None:
    """A stop string: what was found in the cache is told, too."""
    prompt = "Text: " + "the old " * 40
    whole = text(client, 12, prompt=prompt, temperature=0).choices[0].text
    found = text(client, 12, prompt=prompt, temperature=0, stop=whole[-1])
    assert found.choices[0].finish_reason == "stop" and found.usage.prompt_tokens_details.cached_tokens >= PAGE


def left(client: OpenAI, world: SimpleNamespace) -> None:
    with world.service.engine.paused():
        text(client, 50, stream=True).close()
        wait_until_idle(world)


EXPECTED = {
    "n answers": Expected(lambda client, _: text(client, n=3), answers={"length": 3}, tokens=12, between=9),
    "a stream": Expected(lambda client, _: list(text(client, stream=True)), answers={"length": 1}, tokens=4, between=3),
    "two prompts": Expected(
        lambda client, _: text(client, prompt=["a", "b"]), answers={"length": 2}, prompts=2, tokens=8, between=6
    ),
    "a label": Expected(lambda client, _: chat(client), model="fruits:1", answers={"stop": 1}, tokens=2),
    "classification": Expected(
        lambda client, _: client.post("/classify", cast_to=object, body={"model": "fruits", "input": ["a", "b", "c"]}),
        model="fruits:1",
        prompts=3,
    ),
    "a stream that fails": Expected(failing_stream, 500, answers={"error": 1}, tokens=1),
    "a client that leaves": Expected(left, 499, answers={"abort": 1}),
}


@pytest.mark.parametrize("case", EXPECTED.values(), ids=EXPECTED)
def test_what_a_request_adds_to_the_metrics(client, world, case):
    """Every answer and every prompt counts once, whatever the form of the request."""

    def numbers() -> dict[str, float]:
        names = {
            "time": "ptuning_e2e_request_latency_seconds_count",
            "prompts": "ptuning_request_prompt_tokens_count",
            "tokens": "ptuning_generation_tokens_total",
            "first": "ptuning_time_to_first_token_seconds_count",
            "between": "ptuning_inter_token_latency_seconds_count",
            "finished": "ptuning_request_generation_tokens_count",
        }
        found = {key: counted(world, name, model=case.model) for key, name in names.items()}
        found |= {"status": counted(world, "ptuning_requests_total", model=case.model, status=str(case.status))}
        reasons = ("stop", "length", "abort", "error")
        return found | {each: counted(world, "ptuning_answers_total", model=case.model, finish_reason=each) for each in reasons}

    wait_until_idle(world)
    before = numbers()
    case.ask(client, world)
    began = sum(case.answers.values()) - case.answers.get("abort", 0)
    expected = {
        "time": case.status == 200,
        "prompts": case.prompts,
        "tokens": case.tokens,
        "first": began,
        "between": case.between,
        "finished": began,
        "status": 1,
    } | {each: case.answers.get(each, 0) for each in ("stop", "length", "abort", "error")}
    until = time.monotonic() + 5
    while (found := {key: value - before[key] for key, value in numbers().items()}) != expected:  # after the last byte
        assert time.monotonic() < until, (found, expected)
        time.sleep(0.01)


def test_the_metrics_are_those_that_are_defined(client, world):
    """A parser takes the text; names are by Prometheus' conventions, and a client cannot add series."""
    stopped(client, world)
    chat(client)
    with pytest.raises(openai.NotFoundError):
        chat(client, model="x" * 100)
    told = metrics(world)
    families = {family.name: family for family in text_string_to_metric_families(told)}
    kinds = {each.name.removesuffix("_total"): each.kind for each in DEFINITIONS}
    assert {name: family.type for name, family in families.items()} == kinds
    for each in DEFINITIONS:
        assert (each.kind == "counter") == each.name.endswith("_total") and each.name.startswith("ptuning_")
        names = {sample.name for sample in families[each.name.removesuffix("_total")].samples}
        assert names <= set(each.series), each
    assert "x" * 100 not in told and counted(world, "ptuning_requests_total", status="404", model="none") >= 1
    assert counted(world, "ptuning_soft_prompts") == 5 and counted(world, "ptuning_requests_running") == 0
    assert counted(world, "ptuning_prefix_cache_hits_total") > 0 and counted(world, "ptuning_cached_prompt_tokens_total") > 0


def test_the_versions_with_series_of_their_own_are_limited():
    own = Metrics("one", models=3)
    labels = [own.label(f"name:{number}") for number in range(10)]
    assert labels == ["name:0", "name:1", "name:2", *["other"] * 7] and own.label("name:1") == "name:1"
    for label in labels:
        own.add(REQUESTS, 1, label, "chat", "200")
    both = exposition([own.collect(), Metrics("two", models=3).collect()]).decode()
    samples = [sample for family in text_string_to_metric_families(both) for sample in family.samples]
    assert sum(sample.value for sample in samples if sample.name == "ptuning_requests_total") == 10
    assert both.count("# TYPE ptuning_requests_total") == 1 and "ptuning_replicas 2.0" in both


DASHBOARD = REPOSITORY / "cluster" / "grafana-dashboard.json"


@pytest.mark.fast
def test_the_dashboard_shows_what_the_server_exports():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in shown for target in panel["targets"]]
    variables = {each["name"]: each for each in board["templating"]["list"]}
    asked += [each["definition"] for each in variables.values() if each["type"] == "query"]
    series = {name: each for each in DEFINITIONS for name in each.series}
    used = set()
    for expression in asked:
        names = set(re.findall(r"\bptuning_\w+", expression))
        assert names and names <= set(series), expression
        used |= {series[name] for name in names}
        assert set(re.findall(r"\$(\w+)", expression)) <= {*variables, "__rate_interval"}, expression
        labels = {label for name in names for label in ("replica", "le", *series[name].labels)}
        filtered = re.findall(r"(\w+)=~", expression) + re.findall(r"by \((\w+)\)", expression)
        assert set(filtered) <= labels, expression
        counters = {name for name in names if name.endswith(("_total", "_bucket", "_sum", "_count"))}
        asks_labels = expression.startswith("label_values")
        assert asks_labels or all(f"rate({name}{{" in expression for name in counters), f"a counter only grows: {expression}"
    assert used == set(DEFINITIONS), "a metric that nobody sees"
    places = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in board["panels"]]
    assert len(set(places)) == len(places) == len({each["id"] for each in board["panels"]})
