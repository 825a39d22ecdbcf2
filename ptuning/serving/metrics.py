"""Metrics of a replica for Prometheus, by its naming conventions, and one text for all replicas.

The set is that of vLLM. Counters and histograms are per version that answers, with a limited number of versions. Every series
has the label `replica`: sums over replicas are right, and a replica that ends takes only its own series along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
"""The label of all versions beyond the limit."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Definition:
    """A metric. Its labels, besides `replica`, are in the order in which values are given."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    per_token: bool = False
    """Observed for every token, which is too often for Ray's metrics."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names in the text format."""
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.buckets else (self.name,)


def _counter(name: str, text: str, *labels: str) -> Definition:
    return Definition("counter", f"ptuning_{name}_total", text, labels)


def _gauge(name: str, text: str) -> Definition:
    return Definition("gauge", f"ptuning_{name}", text)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str, per_token: bool = False) -> Definition:
    return Definition("histogram", f"ptuning_{name}", text, labels, buckets, per_token)


REQUESTS = _counter(
    "requests",
    "HTTP requests by status. 499: the client has left. A stream that fails has the status of its error.",
    *("model", "route", "status"),
)
LATENCY = _histogram("e2e_request_latency_seconds", "Time from the request to the last byte.", SECONDS, "model", "route")
FIRST = _histogram("time_to_first_token_seconds", "Time from the request to the first token of an answer.", SECONDS, "model")
BETWEEN = _histogram(
    "inter_token_latency_seconds", "Time between two generated tokens of an answer.", SHORT, "model", per_token=True
)
QUEUE = _histogram("request_queue_time_seconds", "Time that an answer has waited for its first step.", SECONDS, "model")
PROMPT = _histogram("request_prompt_tokens", "Tokens of a prompt, without virtual tokens.", TOKENS, "model")
GENERATED = _histogram("request_generation_tokens", "Tokens of an answer.", TOKENS, "model")
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of prompts, without virtual tokens.", "model")
CACHED_TOKENS = _counter("cached_prompt_tokens", "Tokens of prompts that were found in the cache.", "model")
GENERATION_TOKENS = _counter("generation_tokens", "Tokens of answers.", "model")
ANSWERS = _counter("answers", "Answers by the reason of their end: stop, length, abort, error.", "model", "finish_reason")

RUNNING = _gauge("requests_running", "Requests in the batch.")
WAITING = _gauge("requests_waiting", "Requests that wait for a place in the batch.")
ROWS = _gauge("rows_waiting", "Texts that wait for labels or log-probabilities.")
CACHE = _gauge("kv_cache_usage_ratio", "Part of the key-value cache that running requests use, 0 to 1.")
STEPS = _counter("engine_steps", "Steps of generation.")
STEP_REQUESTS = _counter("engine_step_requests", "Requests in all steps together: divided by the steps, the mean batch.")
QUERIES = _counter("prefix_cache_queries", "Tokens, virtual ones included, that were looked up in the key-value cache.")
HITS = _counter("prefix_cache_hits", "Of these, tokens that were found.")
SERVED = _gauge("served_versions", "Versions of soft prompts that are served, in memory or not.")
SOFT_PROMPTS = _gauge("soft_prompts", "Resident soft prompts.")
BROUGHT = _counter("soft_prompts_read", "How often a soft prompt that had left the memory was read from disk again.")
BYTES = _gauge("soft_prompt_bytes", "Memory of the resident soft prompts.")
REFUSED = _gauge("refused_versions", "Versions that failed a check.")
REGISTRY = _gauge("registry_read_timestamp_seconds", "When the registry was last read, in Unix seconds.")
REPLICAS = _gauge("replicas", "Replicas whose metrics are in this text.")

OBSERVED = (
    *(REQUESTS, LATENCY, FIRST, BETWEEN, QUEUE, PROMPT, GENERATED),
    *(PROMPT_TOKENS, CACHED_TOKENS, GENERATION_TOKENS, ANSWERS),
)
READ = (
    RUNNING,
    WAITING,
    ROWS,
    CACHE,
    STEPS,
    STEP_REQUESTS,
    QUERIES,
    HITS,
    SERVED,
    SOFT_PROMPTS,
    BROUGHT,
    BYTES,
    REFUSED,
    REGISTRY,
)
"""Evaluated when they are read."""
DEFINITIONS = (*OBSERVED, *READ, REPLICAS)

Observer = Callable[[Definition, Sequence[str], Sequence[float]], None]
"""Hears what histograms observe: the values of the labels, and the numbers."""


class Metrics:
    """The metrics of one replica. `models`: the maximum number of versions with series of their own."""

    def __init__(self, replica: str, models: int) -> None:
        self.observer: Observer | None = None
        self._replica = replica
        self._most = models
        self._models: set[str] = {OTHER}
        self._registry = CollectorRegistry()
        self._read: dict[Definition, Callable[[], float]] = {}
        self._made: dict[Definition, Counter | Histogram] = {each: self._make(each) for each in OBSERVED}

    def watch(self, read: Mapping[Definition, Callable[[], float]]) -> None:
        """What is evaluated when the metrics are read."""
        self._read |= read

    def label(self, model: str) -> str:
        """The label of a version: itself, or, beyond the limit, `other`."""
        if model not in self._models:
            if len(self._models) > self._most:
                return OTHER
            self._models.add(model)
        return model

    def add(self, definition: Definition, value: float, *labels: str) -> None:
        """Increment a counter."""
        counter = self._made[definition]
        assert isinstance(counter, Counter)
        counter.labels(self._replica, *labels).inc(value)

    def observe(self, definition: Definition, values: Sequence[float], *labels: str) -> None:
        """Observe values of a histogram."""
        if not values:
            return
        histogram = self._made[definition]
        assert isinstance(histogram, Histogram)
        series = histogram.labels(self._replica, *labels)
        for value in values:
            series.observe(value)
        if self.observer and not definition.per_token:
            self.observer(definition, labels, values)

    def collect(self) -> list[Metric]:
        """All metrics of this replica now."""
        found = list(self._registry.collect())
        for metric in found:  # when each series began, as a gauge of its own: Prometheus has no use for it in this format
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        for definition, read in self._read.items():
            kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
            metric = kind(definition.name, definition.text, labels=["replica"])
            metric.add_metric([self._replica], read())
            found.append(metric)
        return found

    def _make(self, definition: Definition) -> Counter | Histogram:
        labels = ["replica", *definition.labels]
        if definition.kind == "counter":
            return Counter(definition.name, definition.text, labels, registry=self._registry)
        return Histogram(definition.name, definition.text, labels, registry=self._registry, buckets=definition.buckets)


class _Merged(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def exposition(replicas: Sequence[Sequence[Metric]]) -> bytes:
    """The metrics of all replicas in Prometheus' text format, each metric once."""
    merged: dict[str, Metric] = {}
    for metrics in replicas:
        for metric in metrics:
            known = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            known.samples += metric.samples
    many = GaugeMetricFamily(REPLICAS.name, REPLICAS.text, value=len(replicas))
    return generate_latest(_Merged([*merged.values(), many]))
