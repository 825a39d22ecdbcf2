"""Traces of requests and runs, in a real MLflow server; off by default, and never with a text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from openai import OpenAI
from test_http_api import KEY, chat
from test_http_api import client as client  # fixtures
from test_http_api import world as world
from test_tracking import client as mlflow_client
from test_tracking import free_port, server, wait_until

from ptuning import tracing
from ptuning.training.messages import Evaluated, Failed, Finished, Loaded, Loading, Started, Stepped
from ptuning.training.run_trace import RunTrace

pytestmark = pytest.mark.slow

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
"""A `traceparent`: the trace of a client, and its span."""


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("mlflow"), free_port()) as uri:
        yield uri


@pytest.fixture
def traced(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The id of a new MLflow experiment that receives the traces of this process."""
    experiment = mlflow_client(mlflow_server).create_experiment(f"traces-{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{mlflow_server}/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", f"x-mlflow-experiment-id={experiment}")
    tracing._new_provider.cache_clear()
    yield experiment
    if provider := tracing._provider():
        provider.shutdown()
    tracing._new_provider.cache_clear()


def found(uri: str, experiment: str, many: int) -> list[Any]:
    """The traces that MLflow holds, once there are as many."""
    tracing.flush()
    mlflow = mlflow_client(uri)
    traces: list[Any] = []

    def there() -> bool:
        traces[:] = mlflow.search_traces(locations=[experiment])
        return len(traces) >= many

    wait_until(there, 30, f"{len(traces)} traces")
    return traces


def test_a_request_in_mlflow(mlflow_server: str, traced: str, client: OpenAI) -> None:
    answer = chat(client, "the old hammer", max_tokens=3)
    chat(client, "the old hammer", model="writer", max_tokens=3)
    with pytest.raises(Exception, match="there is no such model"):
        chat(client, model="nobody")
    spans = {trace.data.spans[0].name: trace.data.spans for trace in found(mlflow_server, traced, 3)}
    request = next(parts for name, parts in spans.items() if name.startswith("chat fruits"))
    root = next(span for span in request if not span.parent_id)
    assert {span.name for span in request} == {root.name, "admission and queue", "prefill", "decode"}
    assert root.attributes["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
    assert root.attributes["gen_ai.usage.input_tokens"] <= answer.usage.prompt_tokens
    assert root.attributes["gen_ai.response.model"].startswith("fruits") and root.attributes["http.response.status_code"] == 200
    assert all(root.start_time_ns <= span.start_time_ns <= span.end_time_ns <= root.end_time_ns + 5e6 for span in request)
    assert spans["chat"][0].attributes["http.response.status_code"] == 404, "nobody answered"
    written = str([[span.to_dict() for span in parts] for parts in spans.values()])
    assert "hammer" not in written and KEY not in written


def test_the_trace_of_the_client_goes_on(traced: str, world: SimpleNamespace) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    tracing._provider().add_span_processor(SimpleSpanProcessor(kept))
    body = {"model": "fruits", "max_tokens": 2, "messages": [{"role": "user", "content": "the old hammer"}]}
    headers = {"authorization": f"Bearer {KEY}", "traceparent": CLIENT}
    assert requests.post(f"{world.url}/chat/completions", json=body, headers=headers, timeout=30).status_code == 200
    wait_until(lambda: any(span.name.startswith("chat") for span in kept.get_finished_spans()), 10, "no span")
    root = next(span for span in kept.get_finished_spans() if span.name.startswith("chat"))
    assert root.context and root.parent
    assert f"{root.context.trace_id:032x}" == CLIENT.split("-")[1] and f"{root.parent.span_id:016x}" == CLIENT.split("-")[2]


def test_a_run_in_mlflow(mlflow_server: str, traced: str) -> None:
    trace = RunTrace("train toy", {"ptuning.run": "toy"})
    times = iter(range(0, 10_000))

    def at() -> int:
        return int(trace._began * 1000) + next(times)

    trace(Loading("toy", 0, 0.5, time_ms=at()))
    trace(Loading("toy", 0, 1.0, time_ms=at()))
    trace(Loaded("toy", 0, "float32", True, [], [], 0, time_ms=at()))
    trace(Started("toy", 0, 250, time_ms=at()))
    for step in range(1, 251):
        trace(Stepped("toy", step, {"loss": 1.0}, time_ms=at()))
        if step == 250:
            trace(Evaluated("toy", step, {"accuracy": 0.5}, time_ms=at()))
    trace(Finished("toy", 250, {"test_accuracy": 0.5}, 250, False, "/secret/place", "hash", [], time_ms=at()))
    trace.send(failed=False)
    [told] = found(mlflow_server, traced, 1)
    names = [span.name for span in sorted(told.data.spans, key=lambda span: (span.start_time_ns, span.end_time_ns))]
    assert sorted(names) == sorted(["train toy", "start", "load", "prepare", "steps", "steps", "steps", "evaluation", "test"])
    steps = [span.attributes for span in told.data.spans if span.name == "steps"]
    pairs = {(each["ptuning.first_step"], each["ptuning.last_step"]) for each in steps}
    assert pairs == {(1, 100), (101, 200), (201, 250)}
    assert "/secret/place" not in str(told.to_dict())


@pytest.mark.fast
def test_nothing_is_imported_or_sent_when_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    code = """
import sys
from ptuning import tracing
tracing.send(tracing.Span("x", 0.0, 1.0))
tracing.flush()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:1")
    assert tracing.enabled()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not tracing.enabled()


@pytest.mark.fast
def test_a_failed_run_says_so() -> None:
    trace = RunTrace("train toy", {})
    trace(Failed("toy", 3, "loss nan"))
    assert trace._parts == [], "traces are off"
