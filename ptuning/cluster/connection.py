"""The connection of this process to a Ray cluster: an existing one, or one that it starts."""

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

from ptuning import environment, sys_path
from ptuning.cluster.surroundings import check_cluster, temporary_folder
from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.redaction import first_line

_own = False


class _Job(JobConfig):
    """A job config whose workers import installed packages (`sys_path`) and nothing from the driver's working folder.

    Ray (2.60, _private/worker.py: connect) puts the driver's working folder and its script's folder first on their import path.
    """

    def _serialize(self) -> str:
        self._py_driver_sys_path = []
        return super()._serialize()


def start_ray(experiment: Experiment) -> bool:
    """Connect to the experiment's cluster, or start one on this machine; True if it was started.

    Raises:
        UserError: as `join_ray`.
    """
    return join_ray(experiment.compute.address)


def join_ray(address: str | None, name: str = "compute.address") -> bool:
    """Connect to a cluster (default: RAY_ADDRESS), or without an address start one on this machine. True if this process was
    not connected before. `name`: where the address was given.

    Raises:
        UserError: there is no cluster, it refuses the connection, or none can start here.
    """
    if ray.is_initialized():
        return False
    check_cluster(address, name)
    address = address or os.environ.get("RAY_ADDRESS")
    address = None if address == "local" else address
    environment.apply("ray")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not (address or "").startswith("ray://"):  # Ray's client sends no folders to its workers
        options["job_config"] = _Job()
    if sys_path.carried:
        options["runtime_env"] = {"py_modules": [sys_path.PACKAGE], "excludes": ["__pycache__"]}
    global _own
    _own = not address
    if address:
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray raises many types: another version, a wrong token, no node of the cluster here
            with suppress(Exception):
                ray.shutdown()
            raise UserError(
                f"{name}: {address} refuses the connection ({first_line(error, 300)}); check the address, the token "
                "(RAY_AUTH_TOKEN), and the versions of Ray and Python"
            ) from None
    else:
        environment.apply("own cluster")
        # Not the address that the last `ray start` recorded here: that cluster may have ended, and Ray would wait for it.
        try:
            with _not_interrupted():
                ray.init(address="local", include_dashboard=False, **options)
        except KeyboardInterrupt:
            ray.shutdown()
            raise
        except Exception as error:  # as above
            with suppress(Exception):
                ray.shutdown()
            if isinstance(error, OSError) and error.filename:
                raise UserError(
                    f"{error.filename}: cannot be created ({error.strerror}), and Ray keeps its token there; set HOME to a "
                    "folder that can be written, or RAY_AUTH_TOKEN to a secret"
                ) from None
            raise UserError(
                f"Ray cannot start on this machine ({first_line(error, 300)}); see its logs in "
                f"{temporary_folder()[0]}/ray/session_latest/logs, and ptuning doctor"
            ) from None
    return True


def own_cluster() -> bool:
    """True if the cluster was started by this command and ends with it: placement groups do not outlive a controller, and no
    nodes are added."""
    return _own


def leave_ray() -> None:
    """End the cluster that this process started, with all its processes.

    A process may hang at its end (2.60: a Ray Train controller, about once in sixty runs) after the raylet has stopped tracking
    it.
    """
    raylets = [each for each in psutil.Process().children() if each.name() == "raylet"]
    workers = [worker for raylet in raylets for worker in raylet.children(recursive=True)]
    ray.shutdown()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Ctrl-C waits until the start is complete, unless pressed twice: agents of a half-started cluster live for a minute
    (2.60)."""
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
    """An actor class whose instances run on the driver's node, so that losing another node costs only its workers."""
    here = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
