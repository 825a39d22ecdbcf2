"""One replica: the base, the engine, the served versions, and the thread that updates them. Without HTTP and Ray."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import TrackingError, UserError
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.model.base import find_base
from ptuning.redaction import logger
from ptuning.registry.registry import Registry
from ptuning.serving.auth import Scope
from ptuning.serving.metrics import Metrics
from ptuning.serving.served_models import ServedModels
from ptuning.tracking.client import tracking_uri

log = logger(__name__)


class Service:
    """Everything of a replica but HTTP. `experiment` has absolute paths.

    Raises:
        UserError: the base cannot be served.
    """

    def __init__(self, experiment: Experiment, keys: Mapping[str, Scope], replica: str) -> None:
        self.limits = experiment.serve
        self.keys = dict(keys)
        self.base = find_base(experiment.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = TransformersEngine(
            self.base.load(self.base.dtype(experiment.model.dtype), device),
            self.base.ends,
            EngineConfig(
                running=self.limits.running,
                waiting=self.limits.waiting,
                cache_bytes=self.limits.cache_mb << 20,
                context=self.base.context,
                name=self.base.name,
            ),
        )
        store = experiment.compute.storage
        registry = Registry(tracking_uri(experiment))
        cache = storage.join(store, "served") if storage.is_local(store) else str(Path.home() / ".cache" / "ptuning" / "served")
        self.models = ServedModels(self.base, self.engine, registry, cache, self.limits.soft_prompts)
        self.metrics = Metrics(replica)
        self.metrics.watch(
            {
                "busy": ("Requests that run or wait, and texts that wait for labels.", lambda: self.engine.busy),
                "soft_prompts": ("Resident soft prompts.", lambda: self.engine.residents),
                "soft_prompt_bytes": ("Memory of the resident soft prompts.", lambda: self.engine.resident_bytes),
                "refused": ("Versions that failed a check.", lambda: len(self.models.refused)),
                "registry_read_seconds": ("When the registry was last read, in Unix seconds.", lambda: self.models.looked),
                "steps_total": ("Steps of the engine.", lambda: self.engine.stats.steps),
                "batched_total": ("Requests in all steps together: divided by the steps, the batch.", self._batched),
                "prompt_tokens_total": ("Tokens of text and soft prompts that requests began with.", self._prompted),
                "cached_tokens_total": ("Of these, tokens that were found in the cache.", self._cached),
            }
        )
        self.ready = False
        self.draining = False
        """True while the replica is stopping and refuses new requests."""
        self.open = 0
        """HTTP requests whose answer is not yet complete."""
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

    def close(self) -> None:
        """Stop at once."""
        self._stopped.set()
        self._watcher.join()
        self.engine.close()

    def _watch(self) -> None:
        while not self._stopped.wait(self.limits.refresh_s):
            self._look()

    def _look(self, first: bool = False) -> None:
        """Poll the registry. If it does not respond, the served versions stay, or are loaded from disk."""
        try:
            if self.models.sync():
                log.info("serving %s", ", ".join(self.models.names))
        except TrackingError as error:
            log.warning("the registry does not respond, the served versions stay: %s", error)
            if first and not self.models.restore():
                log.error("no soft prompts are served until the registry responds")
        except Exception:  # no error must end the thread: the next poll may succeed
            log.exception("the served versions could not be updated")

    def _batched(self) -> float:
        return self.engine.stats.batched

    def _prompted(self) -> float:
        return self.engine.stats.prompt_tokens

    def _cached(self) -> float:
        return self.engine.stats.cached_tokens
