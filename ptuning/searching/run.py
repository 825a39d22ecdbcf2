"""A search: Ray Tune decides, trials attach to the slots of worker groups that are already running.

    searcher (Optuna) -> Tune trial (light) -> dispatcher -> slot of a worker group -> dispatcher -> trial -> Tune's scheduler
                                                                       \\-> monitor (driver) -> trial store, MLflow, screen

Ray Train runs in threads of the driver, Tune in its main thread. Then the finalists are trained with several seeds in the same
slots, and the winner reads the test rows once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from ptuning import storage
from ptuning.cluster.connection import leave_ray, start_ray
from ptuning.cluster.failures import explain
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, ExperimentError
from ptuning.data.task import Task, describe_task, load_task
from ptuning.errors import RunFailed
from ptuning.model.base import Base, find_base
from ptuning.searching import space
from ptuning.searching.monitor import Show
from ptuning.searching.tuning import SPARE, Search
from ptuning.training import lease
from ptuning.training.ray_trainer import scale
from ptuning.training.run import hold_lease, registered, starting
from ptuning.training.run_setup import bring_parent, check_run_name, pin_parent, write_run
from ptuning.training.run_tracking import start_tracker


def run_search(
    experiment: Experiment, *, resume: bool, show: Show, say: Callable[[str], None], register: str | None = None
) -> dict[str, Any]:
    """Search on a Ray cluster and return a summary: name, run_id, soft_prompt, steps, seconds, metrics, winner, trials.

    With `register` the winner becomes the newest version of that name, and the summary says which (`registered`).

    Raises:
        UserError: something in the experiment or its surroundings is wrong; nothing was started or written.
        RunFailed: no trial could be trained, the workers failed, or the winner could not be registered.
    """
    began = time.monotonic()
    written = absolute(experiment)
    space.check(written)
    folder = storage.join(written.compute.storage, written.name)
    experiment = pin_parent(written, folder)
    finished = check_run_name(experiment, folder, resume, search=True)
    if finished:
        return finished | registered(experiment, finished, register)
    lease.check(folder, say)
    base = find_base(experiment.model)
    storage.check_writable(experiment.compute.storage)
    bring_parent(written, experiment, base)
    trained, task = prepare(experiment, base)
    for line in describe_task(task):
        say(line)
    started_here = start_ray(experiment)
    try:
        scaling = scale(experiment, experiment.search.groups, SPARE)
        with hold_lease(folder, say):
            finished = check_run_name(experiment, folder, resume, search=True)  # another driver may have ended it just now
            if finished:
                return finished | registered(experiment, finished, register)
            write_run(folder, experiment, "running", kind="search")
            say(starting(experiment))
            tracker = start_tracker(experiment, folder, task, base)
            tracker.params({"search": experiment.search.model_dump(mode="json")})
            try:
                summary = Search(trained, base, folder, tracker, show, say).run(scaling)
            except RayError as error:  # the dispatcher's, or one of Tune's own
                summary = {"message": explain(error, folder)}
            if "message" in summary:
                write_run(folder, experiment, "failed", kind="search")
                raise RunFailed(summary["message"])
            summary["seconds"] = round(time.monotonic() - began, 1)
            write_run(folder, experiment, "finished", summary, kind="search")
    finally:
        if started_here:
            leave_ray()
    return summary | registered(experiment, summary, register)


def prepare(experiment: Experiment, base: Base) -> tuple[Experiment, Task]:
    """The experiment that trials are made from, and its rows as the longest soft prompt leaves room for them.

    Raises:
        UserError: the longest does not fit, or the rows are wrong.
    """
    longest = max(experiment.search.length)
    if base.context - longest < 2:
        raise ExperimentError(
            f"search.length: {longest} virtual tokens leave no room in the {base.context} positions of {base.name}; remove it"
        )
    # All trials see the same rows, cut at the same place, whatever their length.
    data = experiment.data.model_copy(update={"max_tokens": experiment.data.max_tokens or base.context - longest})
    train = experiment.train
    if experiment.search.scheduler == "pbt":  # a trial may go on from another one's last evaluation
        train = train.model_copy(update={"checkpoint_every": train.evaluate_every})
    prompt = experiment.prompt.model_copy(update={"length": longest})
    trained = experiment.model_copy(update={"data": data, "train": train, "prompt": prompt})
    return trained, load_task(trained, base)
