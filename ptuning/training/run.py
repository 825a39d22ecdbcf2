"""A run from the command to the soft prompt: everything is checked, then Ray Train starts the workers, and what they report
reaches the screen and the tracker while they train.

Resuming does not rest on Ray Train's own records: each start is a new Ray run that finds our newest checkpoint by itself. So a
damaged snapshot file of Ray's cannot block a run, and the number of workers may change.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from urllib.parse import quote

import psutil
import ray
import ray.train
from ray.exceptions import OutOfMemoryError, RayError
from ray.job_config import JobConfig
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import BackendSetupCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ptuning import storage, sys_path
from ptuning.cluster.failures import RunFailed, disk_full, explain
from ptuning.config import Experiment, UserError
from ptuning.model.base import Base, find_base
from ptuning.redaction import logger, redacted
from ptuning.registry.publish import bring_parent, pin_parent, publish_run
from ptuning.tracking import tracker as tracking
from ptuning.training import lease
from ptuning.training.event_queue import Mailbox
from ptuning.training.messages import Event, Task
from ptuning.training.run_setup import absolute, check_name, describe, load_task, write_run
from ptuning.training.run_tracking import Recorder

log = logger(__name__)

Show = Callable[[Event], None]


def run_training(
    experiment: Experiment, *, resume: bool, show: Show, say: Callable[[str], None], register: str | None = None
) -> dict[str, Any]:
    """Train one soft prompt on a Ray cluster and return its summary: name, run_id, soft_prompt, steps, seconds, metrics.

    `show` gets every event of the run, `say` lines about the data. With `register` the result becomes the newest version of
    that name, and the summary says which (`registered`).

    Raises:
        UserError: something in the experiment or its surroundings is wrong; nothing was started or written.
        RunFailed: the training did not reach its end, or its result could not be registered.
    """
    began = time.monotonic()
    written = absolute(experiment)
    folder = storage.join(written.compute.storage, written.name)
    experiment = pin_parent(written, folder)
    finished = check_name(experiment, folder, resume)
    if finished:
        return finished | registered(experiment, finished, register)
    lease.check(folder, say)
    base = find_base(experiment.model)
    storage.check_writable(experiment.compute.storage)
    bring_parent(written, experiment, base)
    task = load_task(experiment, base)
    for line in describe(task):
        say(line)
    started_here = start_ray(experiment)
    try:
        scaling = scale(experiment)
        with holding(folder, say):
            finished = check_name(experiment, folder, resume)  # another driver may have ended it just now
            if finished:
                return finished | registered(experiment, finished, register)
            write_run(folder, experiment, "running")
            say(starting(experiment))
            tracker = start_tracker(experiment, folder, task, base)
            summary = _fit(experiment, base, folder, scaling, tracker, show)
            if "message" in summary:
                write_run(folder, experiment, "failed")
                raise RunFailed(summary["message"])
            summary["seconds"] = round(time.monotonic() - began, 1)
            write_run(folder, experiment, "finished", summary)
    finally:
        if started_here:
            leave_ray()
    return summary | registered(experiment, summary, register)


@contextmanager
def holding(folder: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease of a run.

    Raises:
        UserError: another driver has it.
        RunFailed: another driver took it meanwhile, or the driver's disk is full.
    """
    try:
        with lease.held(folder, say):
            yield
    except lease.LeaseLost as error:
        raise RunFailed(str(error)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailed(disk_full(folder)) from None


def starting(experiment: Experiment) -> str:
    """What is said before some seconds of silence."""
    many = experiment.compute.most_workers
    return f"starting {many} worker{'s' if many > 1 else ''}"


def registered(experiment: Experiment, summary: dict[str, Any], name: str | None) -> dict[str, str]:
    """Publish what a run made under a name; what the summary says about it.

    Raises:
        RunFailed: it could not be published. The run itself is finished and complete.
    """
    if name is None:
        return {}
    try:
        return {"registered": str(publish_run(experiment, name, summary["soft_prompt"], summary["run_id"]))}
    except UserError as error:
        raise RunFailed(
            f"the run is finished but not registered ({error}); register it with: "
            f"ptuning prompts import {summary['soft_prompt']} --name {name}"
        ) from None


class _Trainer(TorchTrainer):
    """Ray Train without helpers that have nothing to do here: each is a process of 2 s and 200 MB."""

    own_cluster = False
    """The cluster is this command's own and ends with it: no placement group outlives a controller, and nobody adds nodes."""

    def _create_default_callbacks(self) -> list[Any]:
        # Private (2.60, train/v2/api/data_parallel_trainer.py): a version without it does not call ours either.
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # V2's, which ray's types do not know
        idle = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if self.own_cluster else set())
        used = [each for each in callbacks if type(each).__name__ not in idle]
        for each in used:
            if isinstance(each, BackendSetupCallback):
                each.__class__ = _forgiving()
        return used

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        policy = given.get("scaling_policy")
        if self.own_cluster and type(policy) is FixedScalingPolicy:
            policy.__class__ = _asking_nobody()
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]


def _forgiving() -> type[BackendSetupCallback]:
    """A local class: it travels to Train's controller by value, and that process imports nothing of ours."""

    class Forgiving(BackendSetupCallback):
        def before_execution_group_shutdown(self, execution_group: Any) -> None:
            # Ray's own forgives RayActorError only (2.60). A worker that its memory monitor has ended says OutOfMemoryError:
            # that ended the run as an error of the controller, without another try, and its placement group was never removed.
            with suppress(OutOfMemoryError):
                super().before_execution_group_shutdown(execution_group)

    return Forgiving


def _asking_nobody() -> type[FixedScalingPolicy]:
    """A local class, as in `_forgiving`."""

    class AskingNobody(FixedScalingPolicy):
        # A controller first asks the actor that speaks for all with the autoscaler (2.60), and workers wait until it is there.
        def _send_resource_request(self) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

        def _cancel_resource_request(self) -> None:
            pass

    return AskingNobody


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
    _Trainer.own_cluster = not address
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
                f"{error.filename}: cannot be made ({error.strerror}), and Ray keeps its token there; set HOME to a folder "
                "that can be written, or RAY_AUTH_TOKEN to a secret"
            ) from None
    return True


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


def scale(experiment: Experiment, groups: int = 1, spare: float = 0.0) -> ray.train.ScalingConfig:
    """Workers of a group and their resources; each worker leaves the share `spare` of its CPUs to others.

    Raises:
        UserError: the cluster does not have them. Ray Train would wait for ever.
    """
    compute = experiment.compute
    have = ray.cluster_resources()
    least = compute.workers if isinstance(compute.workers, int) else compute.workers[0]
    gpus = compute.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if have.get("GPU", 0) >= 1 else 0.0
    local = len(ray.nodes()) == 1
    cpus = compute.cpus_per_worker or (max(1, int(have.get("CPU", 1) // (compute.most_workers * groups))) if local else 1)
    for kind, each, fix in (("CPU", cpus, "compute.cpus_per_worker"), ("GPU", gpus, "compute.gpus_per_worker")):
        if groups * least * each > have.get(kind, 0):
            many = f"{least} workers" if groups == 1 else f"{groups} groups of {least} workers"
            raise UserError(
                f"compute.workers: {many} with {each:g} {kind} each need {groups * least * each:g}, the cluster has "
                f"{have.get(kind, 0):g}; lower compute.workers or {fix}"
            )
    if experiment.zero.offload and not gpus:
        raise UserError("zero.offload: the workers have no GPU whose memory it could spare; remove it")
    resources = {"CPU": cpus * (1 - spare)} | ({"GPU": gpus} if gpus else {})
    # ray's types describe Train V1; V2, the default since 2.51, takes (min, max) and more limits on failures.
    scaling: Any = ray.train.ScalingConfig
    return scaling(num_workers=compute.workers, use_gpu=bool(gpus), resources_per_worker=resources)


def start_tracker(experiment: Experiment, folder: str, task: Task, base: Base) -> tracking.Tracker:
    """The MLflow run of an experiment, with everything that is known before it starts."""
    store = experiment.compute.storage
    uri = experiment.tracking.uri or tracking.default_uri(store)
    local = _spools(store)
    leftovers = threading.Thread(target=tracking.ship_leftovers, args=(local, uri), daemon=True)
    leftovers.start()  # what earlier runs could not send
    tracker = open_tracker(experiment, experiment.name, experiment.name)
    tracker.params(experiment.model_dump(mode="json", include={"model", "prompt", "data", "train", "zero", "compute"}))
    tracker.tags(tracking.provenance() | {f"base.{part}": value for part, value in base.fingerprint.model_dump().items()})
    tracker.json("experiment.json", experiment.model_dump(mode="json"))
    contexts: tuple[Literal["training", "validation", "test"], ...] = ("training", "validation", "test")
    for split, context in zip((task.train, task.validation, task.test), contexts, strict=True):
        if split:
            tracker.dataset(split.name, split.source, split.fingerprint, context, len(split))
    return tracker


def open_tracker(experiment: Experiment, name: str, folder: str, parent: str | None = None) -> tracking.Tracker:
    """A run where the experiment is tracked; its spool lies below `folder` in the storage."""
    store = experiment.compute.storage
    uri = experiment.tracking.uri or tracking.default_uri(store)
    spool = _spools(store) / folder / "tracking"
    root = tracking.default_artifact_root(store)
    return tracking.Tracker(uri, experiment.tracking.experiment, root, spool, name, parent)


def _spools(store: str) -> Path:
    """Where spools lie: plain local files, since an object store cannot append."""
    return Path(store) if storage.is_local(store) else Path.home() / ".cache" / "ptuning" / quote(store, safe="")


def for_workers(experiment: Experiment) -> dict[str, Any]:
    """The tables of an experiment without passwords: Ray keeps what workers are given, and shows it. They need none."""
    tables = experiment.model_dump(mode="json")
    return tables | {table: redacted(tables[table]) for table in ("tracking", "compute")}


def make_trainer(
    experiment: Experiment, attempt: str, scaling: ray.train.ScalingConfig, config: dict[str, Any]
) -> TorchTrainer:
    """A Ray Train run of workers; `config` says what they train. Ray's own files go to `attempt`."""
    failures: Any = ray.train.FailureConfig

    def work(config: dict[str, Any]) -> None:
        # Travels by value and imports on the worker: neither side loads what only the other needs.
        from ptuning.imports import quick_imports

        with quick_imports():
            from ptuning.training import worker
        worker.work(config)

    return _Trainer(
        work,
        train_loop_config={"experiment": for_workers(experiment), "threads": None} | config,
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=attempt,
            callbacks=[_telling(experiment.name, config.get("mailbox") or config["hub"])],
            failure_config=failures(max_failures=experiment.compute.max_failures, controller_failure_limit=3),
        ),
    )


def _telling(run: str, mailbox: Any) -> Any:  # ray's types know Train V1's callbacks only
    """Workers that fail are told of at once, not only when there is no other try. A local class, as in `_forgiving`."""

    class Telling(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            workers = [str(each) for each in worker_exceptions.values()]
            event = {"kind": "broken", "run": run, "step": 0, "details": {"workers": workers}}
            mailbox.put.remote([event])

    return Telling()


def _fit(
    experiment: Experiment, base: Base, folder: str, scaling: ray.train.ScalingConfig, tracker: tracking.Tracker, show: Show
) -> dict[str, Any]:
    """Run Ray Train in this thread (so that Ctrl-C stops it in order) and follow its events in another."""
    mailbox = beside_driver(Mailbox).remote()
    attempt = storage.join(folder, "ray")
    config = {"folder": folder, "mailbox": mailbox}
    follower = _Follower(mailbox, folder, tracker, show, base)
    status: tracking.Status = "FAILED"
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        make_trainer(experiment, attempt, scaling, config).fit()
        follower.stop()
        status = "FINISHED" if "message" not in follower.summary else "FAILED"
    except (TrainingFailedError, RayError) as error:
        follower.stop()
        follower.summary["message"] = explain(follower.lost or error, folder, follower.hang)
    except (KeyboardInterrupt, SystemExit):  # Train ends a run upon SIGINT with SystemExit(0) (2.60, data_parallel_trainer.py)
        follower.stop()
        status = "KILLED"
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Train's own handler stays otherwise, and keeps its controller alive
        follower.stop()
        ray.kill(mailbox)
        with suppress(OSError):  # said already: the disk is full
            tracker.finish(status)
        unsent = tracker.close(deadline_s=30)
        follower.summary |= {"name": experiment.name, "run_id": tracker.run_id, "unsent": unsent}
        if storage.is_local(attempt):
            shutil.rmtree(attempt, ignore_errors=True)
    return follower.summary


def beside_driver(actor: Any) -> Any:
    """An actor class whose instances live on the driver's node: to lose another node must not cost more than its workers."""
    here = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))


class _Follower:
    """Takes events from the mailbox to the screen and the tracker, in a thread of the driver."""

    def __init__(self, mailbox: Any, folder: str, tracker: tracking.Tracker, show: Show, base: Base) -> None:
        self.summary: dict[str, Any] = {}
        self._folder = folder
        self._mailbox = mailbox
        self._record = Recorder(tracker, self.summary, base=base)
        self._show = show
        self._stopped = threading.Event()
        self.lost: RayError | None = None
        """Why the mailbox answers no more. The workers notice it as well and fail (`mailbox.Post`)."""
        self._thread = threading.Thread(target=self._follow, name="ptuning-events", daemon=True)
        self._thread.start()

    @property
    def hang(self) -> str | None:
        return self._record.hang

    def stop(self) -> None:
        """Take what is left, then end."""
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        taken = 0
        waiting: list[Event] = []
        while not last:
            last = self._stopped.wait(0.2)
            try:
                recorded = taken - len(waiting)
                events = [Event(**fields) for fields in ray.get(self._mailbox.take.remote(recorded))]
            except RayError as error:
                self.lost = error
                return
            taken += len(events)
            waiting += events
            # A full disk: what could not be recorded is kept until there is room. The workers do not wait for it.
            with suppress(OSError):
                while waiting:
                    self._record(waiting[0])
                    waiting.pop(0)
            for event in events:
                self._show(event)
        if waiting:
            self.summary.setdefault("message", disk_full(self._folder))
