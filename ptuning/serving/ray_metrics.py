"""The metrics of a replica in Ray's own export: at the metrics port of every node, in Ray's and Serve's dashboards.

Ray (2.60) adds the tags `application`, `deployment` and `replica`, and the prefix `ray_`. Its port needs no key, so the
versions that answer are not named there. A record takes it 11 microseconds, so counters and gauges are passed on every few
seconds, and what is observed for every token is not. It estimates the sums of histograms from their buckets.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from ptuning.redaction import logger
from ptuning.serving.metrics import OBSERVED, READ, Definition, Metrics

log = logger(__name__)

PERIOD_S = 5.0
"""Seconds between two exports; Ray's nodes report every 10."""

_HIDDEN = ("model", "replica")
"""Labels that are not passed on: Ray has a tag of its own for the replica."""

_KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge}


class RayMetrics:
    """Passes metrics on, in a thread of its own."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._made = {each.name: _make(each) for each in (*OBSERVED, *READ) if not each.per_token}
        self._counted: dict[tuple[str, ...], float] = {}
        """The value of each series that was passed on."""
        self._observed: queue.SimpleQueue[tuple[Definition, Sequence[str], Sequence[float]]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        metrics.observer = lambda *observed: self._observed.put(observed)
        self._thread = threading.Thread(target=self._run, name="ptuning-ray-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what is left."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._stopped.wait(PERIOD_S)
            try:
                self._export()
            except Exception:  # the server answers without Ray's metrics, too
                log.exception("the metrics could not be passed on to Ray")

    def _export(self) -> None:
        for _ in range(self._observed.qsize()):
            definition, values, numbers = self._observed.get()
            tags = _tags(dict(zip(definition.labels, values, strict=True)))
            for number in numbers:
                self._made[definition.name].observe(number, tags=tags)
        for metric in self._metrics.collect():
            for sample in metric.samples if metric.type in _KINDS else ():
                tags = _tags(sample.labels)
                if metric.type == "gauge":
                    self._made[sample.name].set(sample.value, tags=tags)
                    continue
                key = (sample.name, *sample.labels.values())
                more = sample.value - self._counted.get(key, 0.0)
                self._counted[key] = sample.value
                if more > 0:
                    self._made[sample.name].inc(more, tags=tags)


def _tags(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name not in _HIDDEN}


def _make(definition: Definition) -> Any:
    labels: Any = tuple(name for name in definition.labels if name not in _HIDDEN)  # Ray's type allows only one
    if definition.kind == "histogram":
        return Histogram(definition.name, definition.text, list(definition.buckets), labels)
    return _KINDS[definition.kind](definition.name, definition.text, labels)
