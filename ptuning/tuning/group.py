"""The standing group: the workers that train the jobs, in a thread of the actor, for as long as there are any."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from ptuning import storage
from ptuning.cluster.failures import explain, is_permanent
from ptuning.config import Experiment
from ptuning.data.task import load_task
from ptuning.errors import UserError
from ptuning.model.base import Base
from ptuning.redaction import logger
from ptuning.training.base_placement import place_base
from ptuning.training.ray_trainer import gpus_per_worker, make_trainer, remove_placement_groups, scale
from ptuning.tuning.actor_name import actor_name

log = logger(__name__)

NAME = "tuning"
"""Name of the group in the events of its workers."""
GROUP = 0
"""Its number for the dispatcher."""
RESTARTS = 1_000_000
"""Worker failures after which Ray Train gives up: the jobs decide how often is too often."""


class StandingGroup:
    """The worker group of one storage folder."""

    def __init__(self, server: Experiment, folder: str, ended: Callable[[str | None, bool], None]) -> None:
        """`ended` is called in the group's thread when its workers have ended: the reason, unless they were to end, and whether
        it would be the same again."""
        self._server = server
        self._folder = folder
        self._placement = actor_name(server.compute.storage)
        self._ended = ended
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, events: Any, job: Experiment, base: Base) -> None:
        """Start the workers. `events`: the actor that they ask; `job`: an experiment that they will train, for which the base
        is placed."""
        self._thread = threading.Thread(target=self._run, args=(events, job, base), name="tuning group", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        if self._thread:
            self._thread.join(seconds)

    def _run(self, events: Any, job: Experiment, base: Base) -> None:
        failure, again = None, False
        attempt = storage.join(self._folder, "ray")
        try:
            experiment = group_experiment(self._server)
            scaling = scale(experiment)
            task = load_task(job, base)
            zero, line = place_base(job, base, task, scaling, slots=self._server.tuning.slots)
            if line:
                log.info("%s", line)
            experiment = experiment.model_copy(update={"zero": zero})
            resources: Any = scaling.resources_per_worker
            config = {"events": events, "group": GROUP, "threads": max(1, int(resources["CPU"]))}
            remove_placement_groups(self._placement)
            make_trainer(experiment, attempt, scaling, _work(), config, self._placement).fit()
        except (TrainingFailedError, RayError) as error:
            failure, again = explain(error, self._folder), is_permanent(error)
        except UserError as error:
            failure, again = str(error), True
        except BaseException as error:  # a thread that ends without a word would leave the jobs waiting
            log.exception("the group of workers could not start")
            failure = f"the workers could not start ({type(error).__name__}); see the server's log"
        finally:
            if storage.is_local(attempt):
                shutil.rmtree(attempt, ignore_errors=True)
            self._ended(failure, again)


def per_worker(server: Experiment) -> dict[str, float]:
    """What each worker of the group needs."""
    gpus = gpus_per_worker(server, ray.cluster_resources() if ray.is_initialized() else {})
    return {"CPU": server.compute.cpus_per_worker or 1.0, "GPU": float(gpus)}


def group_experiment(server: Experiment) -> Experiment:
    """What the workers need: the base, and their number."""
    compute = server.compute.model_copy(
        update={
            "workers": server.tuning.workers,
            "cpus_per_worker": per_worker(server)["CPU"],
            "max_failures": RESTARTS,
        }
    )
    return server.model_copy(update={"name": NAME, "compute": compute})


def _work() -> Callable[[dict[str, Any]], None]:
    """The function that each worker calls: a local function, as `make_trainer` requires."""

    def work(config: dict[str, Any]) -> None:
        from ptuning.imports import quick_imports

        with quick_imports():
            from ptuning.tuning import worker
        worker.work(config)

    return work
