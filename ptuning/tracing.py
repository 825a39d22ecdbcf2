"""Traces of requests and runs in OpenTelemetry's format. The only module that knows OpenTelemetry.

Off, and not even imported, unless one of its standard variables names an endpoint (OTEL_EXPORTER_OTLP_ENDPOINT or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT). The other variables of its specification apply, too: headers, sampling, attributes of the
resource, OTEL_SDK_DISABLED. Spans are made when what they describe is over, from times that are measured anyway, and a thread
sends them.

No span contains a text of a request or an answer, a key, or a path.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

from ptuning.redaction import logger

log = logger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Values = Mapping[str, str | int | float | bool | None]
"""Attributes; None: it is not known, and left out."""


@dataclass(frozen=True)
class Span:
    """A piece of time, in Unix seconds."""

    name: str
    began: float
    ended: float
    values: Values = field(default_factory=dict)
    parts: Sequence[Span] = ()
    failed: bool = False


def enabled() -> bool:
    """Whether traces are wanted."""
    wanted = any(os.environ.get(name) for name in ENDPOINTS)
    return (
        wanted
        and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
        and os.environ.get("OTEL_TRACES_EXPORTER") != "none"
    )


def wall(monotonic: float) -> float:
    """The Unix time of a time of `time.monotonic`."""
    return time.time() - (time.monotonic() - monotonic)


def send(span: Span, headers: Mapping[str, str] | None = None) -> None:
    """Hand a span and its parts to the thread that exports them. `headers`: of a request, whose `traceparent` names the trace
    that the span is a part of."""
    if enabled() and (tracer := _tracer()):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        _make(tracer, span, TraceContextTextMapPropagator().extract(dict(headers or {})))


def flush(seconds: float = 5.0) -> None:
    """Wait until what was handed over is sent, before the process ends."""
    if enabled() and (provider := _provider()):
        provider.force_flush(int(seconds * 1000))


def _make(tracer: Any, span: Span, context: Any) -> None:
    from opentelemetry.trace import Status, StatusCode, set_span_in_context

    known = {name: value for name, value in span.values.items() if value is not None}
    made = tracer.start_span(span.name, context, attributes=known, start_time=int(span.began * 1e9))
    if span.failed:
        made.set_status(Status(StatusCode.ERROR))
    for part in span.parts:
        _make(tracer, part, set_span_in_context(made, context))
    made.end(int(max(span.began, span.ended) * 1e9))


_lock = threading.Lock()


def _tracer() -> Any:
    provider = _provider()
    return provider.get_tracer("ptuning", metadata.version("ptuning")) if provider else None


def _provider() -> Any:
    with _lock:  # two requests may be the first one
        return _new_provider()


@cache
def _new_provider() -> Any:
    """One of our own: MLflow (3.17) has its own, too, and neither must see the other's spans."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(
            "traces are wanted (%s), but the exporter is missing; install it with: pip install 'ptuning[tracing]'", ENDPOINTS[1]
        )
        return None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "ptuning"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
