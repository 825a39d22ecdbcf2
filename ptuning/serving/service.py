"""One replica: the base, the engine, the served versions, and the thread that updates them. Without HTTP and Ray."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptuning import storage, tracing
from ptuning.config import Experiment
from ptuning.errors import TrackingError, UserError
from ptuning.inference.open_engine import open_engine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.model.base import find_base
from ptuning.redaction import logger
from ptuning.registry.registry import Registry
from ptuning.serving import metrics
from ptuning.serving.auth import Scope
from ptuning.serving.batch_lane import BatchLane
from ptuning.serving.metrics import Metrics
from ptuning.serving.served_models import ServedModels
from ptuning.tracking.client import tracking_uri

log = logger(__name__)


@dataclass(frozen=True)
class Reloaded:
    """What a replica serves after it has checked the registry."""

    reached: bool
    """The registry has responded."""
    changed: bool
    served: frozenset[str]
    refused: dict[str, str]
    """Versions with reasons."""


class Service:
    """Everything of a replica but HTTP. `experiment` has absolute paths.

    Raises:
        UserError: the base cannot be served.
    """

    def __init__(self, experiment: Experiment, keys: Mapping[str, Scope], replica: str) -> None:
        self.limits = experiment.serve
        self.tuning = experiment.tuning
        self.runs = experiment.compute.storage
        """The storage: runs and searches by name, and what the server keeps itself."""
        self.storage = storage.join(self.runs, "tuning")
        """The folder of files, jobs and batches."""
        self.keys = dict(keys)
        self.base = find_base(experiment.model)
        config = EngineConfig(
            running=self.limits.running,
            waiting=self.limits.waiting,
            cache_bytes=self.limits.cache_mb << 20,
            context=self.base.context,
            name=self.base.name,
        )
        dtype = self.base.dtype(experiment.model.dtype)
        self.engine = open_engine(self.base, dtype, config, self.limits.engine, self.limits.rows, self.limits.tensor_parallel)
        log.info("%s computes", self.engine.kind)
        registry = Registry(tracking_uri(experiment))
        cache = (
            storage.join(self.runs, "served")
            if storage.is_local(self.runs)
            else str(Path.home() / ".cache" / "ptuning" / "served")
        )
        limit = self.limits.resident_mb
        self.models = ServedModels(
            self.base, self.engine, registry, cache, self.limits.soft_prompts, limit << 20 if limit else None
        )
        self.metrics = Metrics(replica, self.limits.metrics_models)
        engine, models = self.engine, self.models
        self.metrics.watch(
            {
                metrics.RUNNING: lambda: engine.load.running,
                metrics.WAITING: lambda: engine.load.waiting,
                metrics.ROWS: lambda: engine.load.waiting_rows,
                metrics.CACHE: lambda: engine.load.cache_used,
                metrics.STEPS: lambda: engine.stats.steps,
                metrics.STEP_REQUESTS: lambda: engine.stats.batched,
                metrics.QUERIES: lambda: engine.stats.prompt_tokens,
                metrics.HITS: lambda: engine.stats.cached_tokens,
                metrics.SERVED: lambda: models.versions,
                metrics.SOFT_PROMPTS: lambda: engine.residents,
                metrics.BROUGHT: lambda: models.residency.brought,
                metrics.BYTES: lambda: engine.resident_bytes,
                metrics.REFUSED: lambda: len(models.refused),
                metrics.REGISTRY: lambda: models.looked,
            }
        )
        self.ready = False
        self.draining = False
        """True while the replica is stopping and refuses new requests."""
        self.open = 0
        """HTTP requests whose answer is not yet complete."""
        self.lane = BatchLane(max(1, self.limits.running // 2))
        self._stopped = threading.Event()
        self._look(first=True)
        *_, end = self.engine.generate(Request([self.base.tokenizer.eos_token_id], None, 1, ignore_end=True))
        if not isinstance(end, End) or end.reason != "length":
            raise UserError(f"model.path: {self.base.name} generated nothing ({end}); choose another base")
        self.ready = True
        self._watcher = threading.Thread(target=self._watch, name="ptuning-registry", daemon=True)
        self._watcher.start()

    @property
    def alive(self) -> bool:
        """False if this replica must be replaced."""
        return self.engine.alive and self._watcher.is_alive()

    def reload(self) -> Reloaded:
        """Check the registry now."""
        try:
            changed, reached = self.models.sync(), True
        except UserError as error:
            log.warning("the registry does not respond, the served versions stay: %s", error)
            changed, reached = False, False
        return Reloaded(reached, changed, frozenset(self.models.names), dict(self.models.refused))

    def close(self) -> None:
        """Stop at once."""
        self._stopped.set()
        self._watcher.join()
        self.models.save(now=True)
        self.engine.close()
        tracing.flush()

    def _watch(self) -> None:
        while not self._stopped.wait(self.limits.refresh_s):
            self._look()

    def _look(self, first: bool = False) -> None:
        """Poll the registry. If it does not respond, the served versions stay, or are loaded from disk."""
        try:
            if self.models.sync() | (not first and self.models.survey()):
                log.info("serving %d versions", self.models.versions)
        except TrackingError as error:
            log.warning("the registry does not respond, the served versions stay: %s", error)
            if first and not self.models.restore():
                log.error("no soft prompts are served until the registry responds")
        except Exception:  # no error must end the thread: the next poll may succeed
            log.exception("the served versions could not be updated")
