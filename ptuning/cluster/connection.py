"""The connection of this process to a Ray cluster: its own, or one that is there."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil
import ray
import ray.train
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ptuning import sys_path
from ptuning.config import Experiment
from ptuning.errors import UserError

_own = False


class _Job(JobConfig):
    """A job whose workers import what is installed (`import_path`), and nothing from where the command was typed.

    Ray (2.60, _private/worker.py: connect) has them look into the driver's working folder and its script's before all else.
    """

    def _serialize(self) -> str:
        self._py_driver_sys_path = []
        return super()._serialize()


def start_ray(experiment: Experiment) -> bool:
    """Connect to the experiment's cluster, or start one of this machine only; True if it was started here."""
    return join_ray(experiment.compute.address or os.environ.get("RAY_ADDRESS"))


def join_ray(address: str | None) -> bool:
    """Connect to a cluster; without an address start one of this machine only. True if this process was in none before.

    Raises:
        UserError: Ray's token is nowhere to be kept.
    """
    if ray.is_initialized():
        return False
    # uv's hook would start every worker through `uv run` and upload the working directory.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # How often the controller looks at its workers; the default of 2 s is waited for at the end of every run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # After so many seconds a process that does not answer at all is taken for dead; the default is 600.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not (address or "").startswith("ray://"):  # Ray's client tells its workers no folders
        options["job_config"] = _Job()
    if sys_path.carried:
        options["runtime_env"] = {"py_modules": [sys_path.PACKAGE], "excludes": ["__pycache__"]}
    global _own
    _own = not address
    if address:
        ray.init(address=address, **options)
    else:
        # An actor that asks whether a cloud will take the machine away: a second of every start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Not what the last `ray start` here has noted, which may be long gone: Ray would wait for it.
        try:
            with _not_interrupted():
                ray.init(address="local", include_dashboard=False, **options)
        except KeyboardInterrupt:
            ray.shutdown()
            raise
        except OSError as error:
            if not error.filename:
                raise
            raise UserError(
                f"{error.filename}: cannot be created ({error.strerror}), and Ray keeps its token there; set HOME to a folder "
                "that can be written, or RAY_AUTH_TOKEN to a secret"
            ) from None
    return True


def own_cluster() -> bool:
    """Whether the cluster is this command's own and ends with it: no placement group outlives a controller, and nobody adds
    nodes."""
    return _own


def leave_ray() -> None:
    """End the cluster that this process has started, with all its processes.

    One may lock up at its end (2.60: a controller of Train's, once in some sixty runs), when the raylet no longer counts it.
    """
    raylets = [each for each in psutil.Process().children() if each.name() == "raylet"]
    workers = [worker for raylet in raylets for worker in raylet.children(recursive=True)]
    ray.shutdown()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Ctrl-C waits for the end, unless it comes twice: of a cluster that is half there, agents live on for a minute (2.60)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def beside_driver(actor: Any) -> Any:
    """An actor class whose instances live on the driver's node: to lose another node must not cost more than its workers."""
    here = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
