"""The actor that owns the jobs of a storage folder: one detached process per cluster, which Ray starts again when it dies.

It is the driver of the standing group, the dispatcher that its workers ask, and the only process that writes jobs. Replicas
reach it by name. A new one reads everything back from the storage; the workers of an old one end with it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.model.base import Base
from ptuning.redaction import logger, placeless
from ptuning.registry.registry import Registry
from ptuning.tracking import uploader
from ptuning.tracking.client import artifact_root, tracking_uri
from ptuning.training import lease
from ptuning.training.dispatcher import Dispatcher, DispatcherService
from ptuning.training.messages import Fields, Leaving
from ptuning.training.run_tracking import outbox_folder
from ptuning.tuning.actor_name import NAMESPACE, actor_name
from ptuning.tuning.answers import JobAnswers
from ptuning.tuning.group import GROUP, StandingGroup
from ptuning.tuning.publication import Publisher
from ptuning.tuning.runner import Runner
from ptuning.tuning.service import Jobs, TuningService

log = logger(__name__)

LOOK, WRITE = 0.2, 0.5
"""Seconds between looks at the workers' events, and between writes of the jobs that they change."""
LONGEST_PAUSE = 60.0
"""Seconds between two starts of a group whose workers fail, at most."""
AGAIN = 10.0
"""Seconds until jobs that could not be owned are tried again."""
BEGINNING = 60.0
"""Seconds to wait for the service at its start; it waits half as long for the lease of one on another machine."""
ENDING = 20.0
"""Seconds in which the workers end, and MLflow takes what it can."""


class _FromThreads:
    """The dispatcher for threads of the actor: it changes in the actor's event loop only."""

    def __init__(self, service: DispatcherService[Dispatcher], loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop

    def enter(self, order: Fields) -> None:
        self._tell(self._service._tell(lambda dispatcher: dispatcher.enter(order)))

    def leave(self, run: str, how: Leaving) -> Any:
        return self._tell(self._service._tell(lambda dispatcher: dispatcher.leave(run, how)))

    def requeue(self, run: str) -> None:
        self._tell(self._service._tell(lambda dispatcher: dispatcher.requeue(run)))

    def limit(self, most: float) -> None:
        self._tell(self._service._tell(lambda dispatcher: dispatcher.limit(most)))

    def training(self) -> list[str]:
        return list(self._tell(self._service._tell(lambda dispatcher: dispatcher.training())))

    def waiting(self) -> list[str]:
        return list(self._tell(self._service._tell(lambda dispatcher: dispatcher.waiting())))

    def take(self, recorded: int) -> list[Fields]:
        found: list[Fields] = self._tell(self._service.take(recorded))
        return found

    def busy(self) -> bool:
        return bool(self._tell(self._service.busy()))

    def close(self) -> None:
        self._tell(self._service.close())

    def open(self) -> None:
        """The group has ended: its runs wait for the next one."""

        def opened(dispatcher: Dispatcher) -> None:
            dispatcher.closed = False
            dispatcher.remove_group(GROUP)

        self._tell(self._service._tell(opened))

    def _tell(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()


@ray.remote(num_cpus=0, max_restarts=-1)
class TuningActor(DispatcherService[Dispatcher], JobAnswers):
    """See the module."""

    def __init__(self, experiment: dict[str, Any]) -> None:
        server = Experiment.model_validate(experiment)
        most = server.tuning.slots_per_key
        DispatcherService.__init__(self, Dispatcher(most or float("inf")))
        JobAnswers.__init__(self)
        self._server = server
        self._root = storage.join(server.compute.storage, "tuning")
        self._me = ray.get_runtime_context().current_actor
        self._slots = _FromThreads(self, asyncio.get_running_loop())
        self._stopped = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._live, name="tuning", daemon=True).start()

    async def answers(self) -> bool:
        """Whether requests about jobs are answered, or will never be."""
        return self._service is not None or self._unavailable is not None

    async def stop(self) -> None:
        """End the workers and write everything down; jobs continue with the next service."""
        self._stopped.set()
        await asyncio.to_thread(self._over.wait, ENDING + 10)

    # -- the actor's own thread ----------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    with lease.held(self._root, log.info, end=lambda: os._exit(1)):
                        self._serve()
                except UserError as error:  # another cluster owns these jobs, or the storage cannot be read now
                    self._service, self._unavailable = None, placeless(str(error))
                    log.error("there is no tuning service: %s", error)
                    self._stopped.wait(AGAIN)
        except Exception:
            log.exception("the tuning service has failed")
            os._exit(1)  # Ray starts it again
        finally:
            self._over.set()

    def _serve(self) -> None:
        server = self._server
        uri = tracking_uri(server)
        registry = Registry(uri)
        jobs = Jobs(server, self._root)
        publisher = Publisher(registry, artifact_root(uri, server.compute.storage))
        self._wanted: tuple[Experiment, Base] | None = None
        self._pause, self._not_before = 1.0, 0.0
        runner = Runner(jobs, publisher, self._slots, self._wake)
        self._runner = runner
        self._group = StandingGroup(server, self._root, self._group_ended)
        leftovers = (outbox_folder(server.compute.storage), uri)
        threading.Thread(target=uploader.ship_leftovers, args=leftovers, daemon=True).start()
        runner.recover()
        self._service = TuningService(jobs, registry, publisher, self._slots, runner.begin, runner.estimate)
        self._follow(jobs, runner)
        runner.stop()
        if self._group.running:
            self._slots.close()
            self._group.join(ENDING)
        with jobs.lock:
            jobs.flush()

    def _follow(self, jobs: Jobs, runner: Runner) -> None:
        taken = recorded = 0
        wrote_at = idle_since = time.monotonic()
        while not self._stopped.wait(LOOK):
            events = self._slots.take(recorded)
            runner.hear(events)
            taken += len(events)
            now = time.monotonic()
            if now - wrote_at >= WRITE:
                wrote_at = now
                try:
                    with jobs.lock:
                        jobs.flush()
                    recorded = taken
                except (OSError, storage.StorageError) as error:  # the checkpoints keep what is not recorded
                    log.warning("jobs could not be written: %s", error)
            if events:
                self._pause = 1.0
            if self._slots.busy():
                idle_since = now
                self._start_group()
            elif self._group.running and now - idle_since > self._server.tuning.idle_s:
                log.info("no jobs: the workers end")
                self._slots.close()
                idle_since = now

    def _wake(self, experiment: Experiment, base: Base) -> None:
        self._wanted = experiment, base

    def _start_group(self) -> None:
        if not self._group.running and self._wanted and time.monotonic() >= self._not_before:
            self._group.start(self._me, *self._wanted)

    def _group_ended(self, failure: str | None, again: bool) -> None:
        """In the group's thread. `again`: another group would fail for the same reason."""
        self._slots.open()
        if failure and again:
            self._runner.group_failed(failure)
        elif failure:
            self._runner.group_lost(failure)
        if failure:
            log.error("the workers have failed: %s", failure)
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)


def start_tuning(experiment: Experiment) -> Any:
    """Start the tuning service of an experiment with absolute paths, in place of an earlier one on this cluster, and wait until
    it answers."""
    stop_tuning(experiment)
    name = actor_name(experiment.compute.storage)
    made: Any = TuningActor
    actor = made.options(name=name, namespace=NAMESPACE, lifetime="detached").remote(experiment.model_dump(mode="json"))
    until = time.monotonic() + BEGINNING
    with suppress(RayError):  # Ray starts it again; meanwhile clients are told to ask again
        while not ray.get(actor.answers.remote()) and time.monotonic() < until:
            time.sleep(0.1)
    return actor


def stop_tuning(experiment: Experiment) -> None:
    """End the tuning service of an experiment, if there is one on this cluster. Its jobs continue with the next one."""
    name = actor_name(experiment.compute.storage)
    try:
        actor = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return
    try:
        ray.get(actor.stop.remote(), timeout=ENDING + 15)
    except RayError as error:
        log.warning("the tuning service did not stop by itself: %s", type(error).__name__)
    ray.kill(actor, no_restart=True)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
