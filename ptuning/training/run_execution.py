"""What a training and a search have in common: everything is checked, then the cluster is joined, the lease held, and beginning
and end are recorded around what the run itself does.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import ray.train

from ptuning import storage
from ptuning.cluster.connection import leave_ray, start_ray
from ptuning.cluster.failures import disk_full
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment
from ptuning.data.resolve import resolved
from ptuning.data.task import describe_task, load_task
from ptuning.errors import RunFailed, UserError
from ptuning.model.base import Base, find_base
from ptuning.registry.publish import check_not_base
from ptuning.settings.training import ZeroConfig
from ptuning.tracking import client as tracking_client
from ptuning.tracking.tracker import Tracker
from ptuning.training import lease
from ptuning.training.base_placement import place_base, record
from ptuning.training.ray_trainer import scale
from ptuning.training.result import TrainResult
from ptuning.training.run_setup import (
    bring_parent,
    check_run_name,
    pin_parent,
    placement_of,
    publish_run,
    run_contents,
    write_run,
)
from ptuning.training.run_tracking import start_tracker

Say = Callable[[str], None]
Kind = Literal["train", "search"]
Result = TypeVar("Result", bound=TrainResult)


@dataclass(frozen=True)
class Run:
    """A run whose workers may start: its lease is held, its cluster is there, its tracker has begun."""

    experiment: Experiment
    """With absolute paths, with its parent in the run's folder, and with a decided `zero.stage`."""
    trained: Experiment
    """What the workers train: the experiment, or what the trials of a search are made from."""
    folder: str
    base: Base
    scaling: ray.train.ScalingConfig
    tracker: Tracker


def execute_run(
    experiment: Experiment,
    kind: Kind,
    result_type: type[Result],
    train: Callable[[Run], Result],
    *,
    resume: bool,
    say: Say,
    register: str | None,
    configure: Callable[[Experiment, Base], Experiment] = lambda experiment, base: experiment,
    groups: int = 1,
    spare: float = 0.0,
) -> Result:
    """What a training and a search have in common: check everything, connect to the cluster, hold the lease, note beginning and
    end, register the result.

    `train` does the rest; it raises RunFailed if there is no result. `configure` makes the experiment that is trained,
    `groups` and `spare` are those of `scale`.

    Raises:
        UserError, RunFailed: as `run_training`.
    """
    if register:
        check_not_base(register, experiment.model.path)
    result = _reach(experiment, kind, result_type, train, resume, say, configure, groups, spare)
    return _registered(result, register) if register else result


def _reach(
    experiment: Experiment,
    kind: Kind,
    result_type: type[Result],
    train: Callable[[Run], Result],
    resume: bool,
    say: Say,
    configure: Callable[[Experiment, Base], Experiment],
    groups: int,
    spare: float,
) -> Result:
    """The result of a run, new or finished before."""
    began = time.monotonic()
    if note := tracking_client.obeyed(experiment):
        say(note)
    written, lines = resolved(absolute(experiment))
    folder = storage.join(written.compute.storage, written.name)
    experiment = pin_parent(written, folder)
    finished = check_run_name(experiment, folder, resume, kind)
    if finished:
        return result_type.read(finished, experiment)
    tracking_client.check_tracking(experiment)
    lease.check(folder, say)
    base = find_base(experiment.model)
    for note in (*(f"base: {note}" for note in base.notes), *lines):
        say(note)
    storage.check_writable(experiment.compute.storage)
    bring_parent(written, experiment, base)
    trained = configure(experiment, base)
    task = load_task(trained, base)
    for line in describe_task(task):
        say(line)
    contents = run_contents(experiment, base, task)
    finished = check_run_name(experiment, folder, resume, kind, contents)
    if finished:
        return result_type.read(finished, experiment)
    started_here = start_ray(experiment)
    try:
        scaling = scale(experiment, groups, spare, say)
        with hold_lease(folder, say):
            finished = check_run_name(experiment, folder, resume, kind, contents)  # another driver may have ended it just now
            if finished:
                return result_type.read(finished, experiment)
            slots = _slots(trained) if kind == "search" else 1
            before = placement_of(folder)
            zero, line = place_base(trained, base, task, scaling, slots=slots, groups=groups, before=before)
            if line:
                say(line)
            placed = record(zero, line, scaling)
            write_run(folder, experiment, "running", kind=kind, contents=contents, placement=placed)
            say(starting(scaling))
            tracker = start_tracker(experiment, folder, task, base)
            run = Run(_placed(experiment, zero), _placed(trained, zero), folder, base, scaling, tracker)
            try:
                result = train(run)
            except RunFailed:
                write_run(folder, experiment, "failed", kind=kind, contents=contents, placement=placed)
                raise
            result = replace(result, experiment=experiment, seconds=round(time.monotonic() - began, 1))
            write_run(folder, experiment, "finished", result.as_json(), kind, contents, placed)
            return result
    finally:
        if started_here:
            leave_ray()


def _slots(experiment: Experiment) -> int:
    """Slots of a search for which its base is placed; those that are measured later are at most about as many."""
    wanted = experiment.search.slots
    return wanted if isinstance(wanted, int) else min(experiment.search.trials, 8)


def _placed(experiment: Experiment, zero: ZeroConfig) -> Experiment:
    return experiment.model_copy(update={"zero": zero})


@contextmanager
def hold_lease(folder: str, say: Callable[[str], None]) -> Iterator[None]:
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


def starting(scaling: ray.train.ScalingConfig) -> str:
    """What is said before some seconds of silence."""
    workers: Any = scaling.num_workers  # its type is that of Train V1
    many = workers[1] if isinstance(workers, tuple) else workers
    return f"starting {many} worker{'s' if many > 1 else ''}"


def _registered(result: Result, name: str) -> Result:
    """Publish what a run made under a name.

    Raises:
        RunFailed: it could not be published. The run itself is finished and complete.
    """
    try:
        return replace(result, registered=str(publish_run(result.experiment, name, result.folder, result.run_id)))
    except UserError as error:
        raise RunFailed(
            f"the run is finished but not registered ({error}); register it with: "
            f"ptuning prompts import {result.folder} --name {name}"
        ) from None
