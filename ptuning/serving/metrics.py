"""Prometheus metrics of a replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one replica. The label `model` is always a known version, so clients cannot add series."""

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        self._requests = self._counter("requests", "Requests by model, route and status.", "model", "route", "status")
        self._tokens = self._counter("tokens", "Tokens by kind: prompt, completion, cached.", "model", "kind")
        self._first = self._histogram("time_to_first_token_seconds", "Time from the request to its first text.", "model")
        self._each = self._histogram("time_per_token_seconds", "Time per token after the first.", "model")

    def watch(self, read: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Gauges that are evaluated when they are scraped: name -> (description, function)."""
        for name, (text, function) in read.items():
            gauge = Gauge(f"ptuning_{name}", text, ["replica"], registry=self._registry)
            gauge.labels(self._replica).set_function(function)

    def answered(self, model: str, route: str, status: int, times: int = 1) -> None:
        self._requests.labels(self._replica, model, route, str(status)).inc(times)

    def tokens(self, model: str, **counts: int) -> None:
        for kind, many in counts.items():
            self._tokens.labels(self._replica, model, kind).inc(many)

    def timing(self, model: str, first_s: float, whole_s: float, tokens: int) -> None:
        """Record the seconds to the first and to the last token of an answer."""
        self._first.labels(self._replica, model).observe(first_s)
        if tokens > 1:
            self._each.labels(self._replica, model).observe((whole_s - first_s) / (tokens - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ptuning_{name}", text, ["replica", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"ptuning_{name}", text, ["replica", *labels], registry=self._registry, buckets=SECONDS)
