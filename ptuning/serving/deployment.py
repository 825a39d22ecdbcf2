"""The Ray Serve deployment: the replica, and the application of an experiment."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from itertools import islice
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, read_experiment
from ptuning.errors import UserError
from ptuning.inference.types import EngineBusy, EngineStopped
from ptuning.serving.api import Api
from ptuning.serving.app import build_app
from ptuning.serving.auth import Scope, check_address, check_origins, read_keys
from ptuning.serving.brought import UnknownModel
from ptuning.serving.http_request import REQUEST_ID
from ptuning.serving.ray_metrics import RayMetrics
from ptuning.serving.request_record import LEFT, Record
from ptuning.serving.service import Reloaded, Service
from ptuning.serving.status import Method
from ptuning.settings.running import ServeConfig
from ptuning.tuning import batch_actor
from ptuning.tuning.actor_name import actor_name
from ptuning.tuning.batch_runner import Unreachable
from ptuning.tuning.batch_store import BatchStore
from ptuning.tuning.remote_jobs import RemoteJobs

DEPLOYMENT = "replica"
TOLD = 200
"""Names that are told to who starts a server."""
HEALTH_S = 2.0
"""Seconds between two health checks. A replica whose engine has stopped is replaced after three of them (Ray 2.60)."""
REPLICAS_S = 20.0
"""Seconds in which all replicas must answer a request for their metrics, or to check the registry."""
BATCHES_S = 10.0
"""Seconds for which a replica that starts waits for the runner of batches."""


@serve.ingress()
class Replica:
    """A replica: one copy of the base with all soft prompts."""

    def __init__(self, experiment: dict[str, Any], keys: dict[str, Scope]) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        settings = Experiment.model_validate(experiment)
        self._tuning = actor_name(settings.compute.storage)
        self._service = Service(settings, keys, replica)
        self._exported = RayMetrics(self._service.metrics)
        self._api = Api(self._service)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        if BatchStore(self._service.storage).has_open:  # of a server that was killed
            # It may hang, or not start; the next look at one of them tries again.
            with suppress(ray.exceptions.RayError, TimeoutError, Unreachable):
                await asyncio.wait_for(self._wake(), BATCHES_S)
        jobs = RemoteJobs(self._tuning) if self._service.tuning.workers else None
        return build_app(self._service, self._replicas, jobs, self._wake)

    async def _wake(self) -> None:
        """Have the batches of the storage run."""
        limits = self._service.limits
        most = limits.replicas if isinstance(limits.replicas, int) else limits.replicas[1]
        await batch_actor.wake(self._service.storage, most * self._service.lane.places)

    async def answer_line(self, endpoint: str, content: bytes) -> tuple[int, str, bytes]:
        """The answer to a line of a batch: HTTP status, an id, and the body."""
        record, request_id = Record(), uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        status = LEFT
        try:
            response = await self._api.line(endpoint, content, record)
            status = response.status_code
            return status, request_id, bytes(response.body)
        finally:
            record.end(self._service.metrics, status)

    async def unknown_models(self, models: list[str]) -> list[str]:
        """Those that are not served."""
        return await asyncio.to_thread(self._unknown, models)

    def _unknown(self, models: list[str]) -> list[str]:
        return [model for model in models if not self._knows(model)]

    def _knows(self, model: str) -> bool:
        try:
            self._service.models.find(model)
        except UnknownModel:
            return False
        except (UserError, EngineBusy, EngineStopped):  # it is there, though not now
            return True
        return True

    async def _replicas(self, method: Method) -> list[Any]:
        """Call a method of every replica that runs, this one included."""
        return list(await self._handle.broadcast(method).results_async(timeout_s=REPLICAS_S))

    @cached_property
    def _handle(self) -> Any:
        return serve.get_deployment_handle(DEPLOYMENT, serve.get_replica_context().app_name)

    def collect(self) -> list[Any]:
        """The metrics of this replica."""
        return list(self._service.metrics.collect())

    def reload(self) -> Reloaded:
        """Check the registry now."""
        return self._service.reload()

    async def check_health(self) -> None:
        """Health check of Serve; if it raises, the replica is replaced."""
        if not self._service.alive:
            raise RuntimeError("the engine has stopped")

    async def drain(self) -> int:
        """Refuse new requests (503). Returns the number of requests in flight."""
        self._service.draining = True
        return self._service.open

    def state(self) -> dict[str, Any]:
        """The served names with their versions, and the refused versions with reasons; at most `TOLD` of each."""
        models = self._service.models
        named = ((name, str(entry)) for name, entry, _ in models.listed() if ":" not in name)
        served = {models.base_id: models.base_id} | dict(islice(named, TOLD))
        return {"served": served, "refused": dict(islice(models.refused.items(), TOLD))}

    def __del__(self) -> None:
        for part in ("_exported", "_service"):
            if made := getattr(self, part, None):
                made.close()


def gpus_per_replica(limits: ServeConfig) -> float:
    """`serve.gpus_per_replica`: by default one for each part of the base if the cluster has any."""
    if limits.gpus_per_replica is not None:
        return limits.gpus_per_replica
    there = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1
    return float(limits.tensor_parallel) if there else 0.0


def gpu_options(limits: ServeConfig) -> dict[str, Any]:
    """The options of an actor with this many GPUs. One without GPUs on a node with some would use them uncounted: Ray (2.60) no
    longer hides them."""
    many = gpus_per_replica(limits)
    hidden = not many and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    return {"num_gpus": many} | ({"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}} if hidden else {})


def application(experiment: Experiment, keys: Mapping[str, Scope], surge: int = 0) -> serve.Application:
    """The application of an experiment with absolute paths. `surge`: additional replicas during a rollout, in percent."""
    limits = experiment.serve
    places = limits.running + limits.waiting
    scaled: dict[str, Any] = {"num_replicas": limits.replicas}
    if isinstance(limits.replicas, tuple):
        least, most = limits.replicas
        scaled = {
            "autoscaling_config": {
                "min_replicas": least,
                "initial_replicas": max(1, least),  # what cannot start is told at once
                "max_replicas": most,
                "target_ongoing_requests": limits.running,
                "downscale_delay_s": limits.idle_s,
            }
        }
    deployment: Any = serve.deployment(  # its type allows only a class
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": limits.cpus_per_replica} | gpu_options(limits),
        # A full replica answers 429 itself; this limit is for requests that do not reach it.
        max_ongoing_requests=2 * places,
        max_queued_requests=2 * places,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=limits.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_S,
        max_constructor_retry_count=2,
        max_surge_percent=surge,
        logging_config=LoggingConfig(enable_access_log=False),
        **scaled,
    )(Replica)
    return deployment.bind(experiment.model_dump(mode="json"), dict(keys))


def build(args: dict[str, Any]) -> serve.Application:
    """For Serve's config files: `import_path: ptuning.serving.deployment:build` with the args `experiment` (a path on
    the cluster's nodes) and `overrides`.

    Raises:
        UserError: the experiment or the keys are invalid. Keys are required, because a cluster does not listen on loopback.
    """
    experiment = absolute(read_experiment(args["experiment"], args.get("overrides", ())))
    keys = read_keys(experiment.serve.keys)
    check_address("0.0.0.0", keys, bool(args.get("insecure")))
    check_origins(experiment.serve.cors_origins, keys)
    return application(experiment, keys)
