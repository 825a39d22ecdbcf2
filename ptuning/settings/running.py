"""[serve], [tracking] and [compute]: the server, MLflow, workers and storage."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ptuning.settings.fields import Count, NonBlank, Number, Positive, PositiveNumber, Table

_ORIGIN = re.compile(r"https?://[\w.-]+(:\d{1,5})?|https?://\[[\da-fA-F:]+\](:\d{1,5})?")


class ServeConfig(Table):
    """The server."""

    host: NonBlank = "127.0.0.1"
    """Address to listen on. Any address but loopback requires API keys."""
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 8000
    """Port of the API."""
    keys: NonBlank | None = None
    """File with one API key per line, "KEY", "KEY tuning" or "KEY admin". Default: the variable PTUNING_API_KEYS, separated by
    commas."""
    cors_origins: tuple[NonBlank, ...] = ()
    """Origins (https://host or http://host:port) whose web pages may use the API. Requires API keys."""
    soft_prompts: tuple[NonBlank, ...] = ()
    """Registered names to serve. Empty: every soft prompt trained for this base."""
    refresh_s: PositiveNumber = 2.0
    """Seconds between two checks of the registry: the maximum delay until a replica serves a promoted version."""
    replicas: Positive | tuple[Count, Positive] = 1
    """Number of replicas, each with its own copy of the base; [min, max] scales with the number of requests. With min 0 there
    are none without requests: the first ones wait until a replica has started."""
    idle_s: PositiveNumber = 600.0
    """Seconds with fewer requests after which replicas end, where their number scales."""
    cpus_per_replica: PositiveNumber = 1.0
    """CPU cores per replica."""
    gpus_per_replica: Number | None = None
    """Default: `tensor_parallel` if the cluster has GPUs, else 0. With a fraction several replicas share a GPU; 0 hides the
    GPUs of a node."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What computes the answers. transformers takes every base; vllm is for GPUs and needs the extra `ptuning[vllm]`.
    auto: vllm if it is installed, the replica has a GPU and vllm takes the base; else transformers."""
    rows: Positive = 4096
    """Virtual tokens of all served soft prompts together. For vllm; transformers has no limit."""
    tensor_parallel: Positive = 1
    """GPUs over which a replica distributes its base. More than 1 only for vllm."""
    chat: Literal["whole", "last"] = "whole"
    """What a soft prompt with a plain template takes of a conversation. whole: one user message, anything more is answered with
    400; last: only the last user message, the rest is ignored. Soft prompts trained on conversations always take the whole."""
    running: Positive = 32
    """Maximum requests in one batch of a replica."""
    waiting: Positive = 256
    """Maximum requests that wait in a replica. Further ones are answered with 429."""
    cache_mb: Positive = 512
    """Size of a replica's key-value cache in MB."""
    resident_mb: Positive | None = None
    """Memory of a replica's soft prompts in MB. Above it the least used leave, and are read from disk when they are asked.
    Default: no limit (with vllm `rows`)."""
    max_new_tokens: Positive = 1024
    """Maximum tokens of one answer."""
    max_answers: Positive = 16
    """Maximum answers to one prompt (n). The answers to all prompts of a request are limited by `running` plus `waiting`, texts
    to classify by `waiting`."""
    max_body_kb: Positive = 1024
    """Maximum size of a request body in KiB. Larger ones are answered with 413."""
    deadline_s: PositiveNumber = 120.0
    """Seconds after which an answer is aborted. Clients cannot extend it."""
    metrics_models: Positive = 100
    """Maximum versions with series of their own in /metrics. Further ones count as "other"."""
    drain_s: PositiveNumber = 30.0
    """Seconds that a stopping replica waits for requests in flight."""

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        wrong = next((origin for origin in origins if not _ORIGIN.fullmatch(origin)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is not an origin; write https://host or http://host:port, without a path")
        return origins

    @field_validator("replicas")
    @classmethod
    def _min_to_max(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(replicas, tuple) and replicas[0] > replicas[1]:
            raise ValueError(f"[{replicas[0]}, {replicas[1]}] is not a valid range; write [min, max] with min <= max")
        return replicas

    @model_validator(mode="after")
    def _ranks_have_gpus(self) -> ServeConfig:
        many = self.tensor_parallel
        if many > 1 and self.engine == "transformers":
            raise ValueError(f"tensor_parallel: {many} GPUs share a base in vllm only; set engine to it")
        if many > 1 and self.gpus_per_replica and self.gpus_per_replica != many:
            raise ValueError(f"gpus_per_replica: is {self.gpus_per_replica:g}, and tensor_parallel {many}; leave the first out")
        return self


class TrackingConfig(Table):
    """MLflow."""

    uri: NonBlank | None = None
    """Tracking server or database. Default: MLFLOW_TRACKING_URI, else SQLite in the storage folder."""
    experiment: NonBlank | None = None
    """MLflow experiment that the runs belong to. Default: MLFLOW_EXPERIMENT_NAME, else "ptuning"."""


class ComputeConfig(Table):
    """Workers and storage."""

    workers: Positive | tuple[Positive, Positive] | None = None
    """Data-parallel workers; [min, max]: as many as the cluster has resources for, and more as soon as it has more. Default:
    one for each GPU of the cluster, at most `train.batch_size`; without GPUs 1."""
    cpus_per_worker: PositiveNumber | None = None
    """Default: the machine's cores divided by the number of workers, at least 1 (on a cluster: 1)."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1, strict=True)] | None = None
    """1 or 0. Default: 1 if the cluster has GPUs, else 0. 0 hides the GPUs of a node."""
    storage: NonBlank = "runs"
    """Folder or s3://bucket/folder for checkpoints, soft prompts and, by default, the tracking store."""
    address: NonBlank | None = None
    """Ray cluster to connect to. Default: RAY_ADDRESS, else a cluster on this machine that ends with the command."""
    max_failures: Count = 3
    """Maximum worker failures of a run. Each restart continues from the newest checkpoint; one failure more fails the run."""
    wait_s: PositiveNumber = 900.0
    """Seconds to wait for resources that the cluster's autoscaler has to start. Without an autoscaler nothing is waited for."""
    hang_s: PositiveNumber | None = None
    """Seconds without progress after which hung workers are restarted. Default: 20 times the longest step, at least 60."""

    @field_validator("workers")
    @classmethod
    def _min_to_max(cls, workers: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"[{workers[0]}, {workers[1]}] is not a valid range; write [min, max] with min <= max")
        return workers

    @property
    def most_workers(self) -> int:
        """As far as the file says; the default is 1 until the cluster is known."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers or 1
