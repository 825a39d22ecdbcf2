"""A search: Ray Tune decides, trials attach to the slots of worker groups that are already running.

    searcher (Optuna) -> Tune trial (light) -> dispatcher -> slot of a worker group -> dispatcher -> trial -> Tune's scheduler
                                                                       \\-> monitor (driver) -> trial store, MLflow, screen

Ray Train runs in threads of the driver, Tune in its main thread. Then the finalists are trained with several seeds in the same
slots, and the winner reads the test rows once.
"""

from __future__ import annotations

from dataclasses import replace

from ray.exceptions import RayError

from ptuning.cluster.failures import explain
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, ExperimentError
from ptuning.errors import RunFailed
from ptuning.model.base import Base
from ptuning.searching import space
from ptuning.searching.monitor import Show
from ptuning.searching.result import SearchResult
from ptuning.searching.tuning import SPARE, Search
from ptuning.training.run_execution import Run, Say, execute_run


def run_search(
    experiment: Experiment,
    *,
    resume: bool = False,
    show: Show = lambda entries: None,
    say: Say = lambda line: None,
    register: str | None = None,
) -> SearchResult:
    """Search on a Ray cluster.

    `show` gets the records of all trials whenever they change, `say` lines for people. With `register` the winner becomes the
    newest version of that name.

    Raises:
        UserError: something in the experiment or its surroundings is wrong; nothing was started or written.
        RunFailed: no trial could be trained, the workers failed, or the winner could not be registered.
    """
    space.check(absolute(experiment))
    return execute_run(
        experiment,
        "search",
        SearchResult,
        lambda run: _search(run, show, say),
        resume=resume,
        say=say,
        register=register,
        configure=trial_experiment,
        groups=experiment.search.groups,
        spare=SPARE,
    )


def _search(run: Run, show: Show, say: Say) -> SearchResult:
    run.tracker.params({"search": run.experiment.search.model_dump(mode="json")})
    try:
        found = Search(run.trained, run.base, run.folder, run.tracker, show, say).run(run.scaling)
    except RayError as error:  # the dispatcher's, or one of Tune's own
        raise RunFailed(explain(error, run.folder)) from None
    return replace(found, experiment=run.experiment)


def trial_experiment(experiment: Experiment, base: Base) -> Experiment:
    """The experiment that trials are made from, with the rows that the longest soft prompt leaves room for.

    Raises:
        UserError: the longest does not fit.
    """
    longest = max(experiment.search.length)
    if base.context - longest < 2:
        raise ExperimentError(
            f"search.length: {longest} virtual tokens leave no space in the {base.context} positions of {base.name}; remove it"
        )
    # All trials see the same rows, truncated at the same position, regardless of their length.
    data = experiment.data.model_copy(update={"max_tokens": experiment.data.max_tokens or base.context - longest})
    train = experiment.train
    if experiment.search.scheduler == "pbt":  # a trial may go on from another one's last evaluation
        train = train.model_copy(update={"checkpoint_every": train.evaluate_every})
    prompt = experiment.prompt.model_copy(update={"length": longest})
    return experiment.model_copy(update={"data": data, "train": train, "prompt": prompt})
