"""What is tried next, and who is stopped: Optuna and Tune's schedulers, set up from experiment and store.

Tune's own saved state is pickle and tied to its version; ours is the store. A fresh sampler and a fresh scheduler are told
what has ended, and configurations that were under way are handed out first.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from ptuning import storage
from ptuning.config import Experiment
from ptuning.searching.space import LENGTH, RATE, best_result, choices, grid, key_of, ranges, score, trial_tables
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.settings.search import is_whole

REDUCTION = 3
"""ASHA lets the best third pass each rung; the rungs are this factor apart."""
TRIES = 30
"""Draws in a row that were all tried before: then there is nothing new in the space."""

Announce = Callable[[str, TrialRecord], None]


class OptunaSearcher(Searcher):
    """Optuna's sampler behind Tune's interface. A trial is in the store before Tune hears of it."""

    def __init__(
        self, experiment: Experiment, tables: dict[str, Any], folder: str, store: TrialStore, announce: Announce
    ) -> None:
        super().__init__(metric="score", mode="max")
        self._experiment = experiment
        self._tables = tables
        self._folder = folder
        self._store = store
        self._announce = announce
        self._asked: dict[str, optuna.Trial | None] = {}
        """Of each Tune trial that has not ended: what the sampler is told; None for what it could not have drawn."""
        self._announced: set[str] = set()
        """Runs that Tune has heard of."""
        self._exhausted = False
        self.stop = False
        trials = store.trials()
        self._distributions = _distributions(experiment)
        self._study = _study(experiment, len(trials))
        if experiment.search.algorithm == "grid":
            combinations = [
                dict(zip(axes, point, strict=True))
                for axes in [grid(experiment)]
                for point in itertools.product(*axes.values())
            ]
            random.Random(experiment.search.seed).shuffle(combinations)
            self._grid: list[dict[str, Any]] | None = combinations
        else:
            self._grid = None
        for entry in trials:
            if entry.status != "running":
                self._replay(entry)

    def suggest(self, trial_id: str) -> Any:
        with self._store.lock:  # a trial that is added comes before the decision that there are no more, or is refused
            found = None if self.stop else self._next()
            if found is None:
                if self._asked and not self.stop:
                    return None  # a trial may still be added, as long as others train
                self._store.complete = True
                return Searcher.FINISHED
            entry, self._asked[trial_id] = found
            self._announced.add(entry.run)
        self._announce(trial_id, entry)
        return dict(entry.values)

    def _next(self) -> tuple[TrialRecord, optuna.Trial | None] | None:
        """A trial that was under way in an earlier life or that a person has added; else a new one, if there is one."""
        trials = self._store.trials()
        for entry in trials:
            if entry.status == "running" and entry.run not in self._announced:
                return entry, self._ask(entry.values)
        if self._exhausted or len(trials) >= self._experiment.search.trials + self._store.added():
            return None
        found = self._new()
        self._exhausted = found is None
        if found:
            self._store.add(found[0])
        return found

    def _ask(self, values: dict[str, Any]) -> optuna.Trial | None:
        """A trial of the sampler with these values; None: they are not in its space."""
        if not _within(values, self._distributions):
            return None
        self._study.enqueue_trial(values)
        return self._study.ask(self._distributions)

    def _new(self) -> tuple[TrialRecord, optuna.Trial] | None:
        known = {entry.key for entry in self._store.trials()}
        run = self._store.next_name()
        for _ in range(TRIES if self._grid is None else len(self._grid)):
            if self._grid is not None:
                if not self._grid:
                    return None
                self._study.enqueue_trial(self._grid.pop(0))
            asked = self._study.ask(self._distributions)
            values = {key: asked.params[key] for key in self._distributions}
            key = key_of(trial_tables(self._tables, run, values))
            if key not in known:
                return TrialRecord(run, key, values, storage.join(self._folder, "trials", run)), asked
            self._study.tell(asked, state=TrialState.FAIL)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked = self._asked.pop(trial_id, None)
        if asked is None:
            return
        if error or not result or "score" not in result:
            self._study.tell(asked, state=TrialState.FAIL)
        elif result["step"] < self._experiment.train.steps:
            asked.report(result["score"], result["step"])
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, result["score"])

    def _replay(self, entry: TrialRecord) -> None:
        """Tell the sampler of a trial that ended before this process began."""
        best = best_result(self._experiment, entry.results, entry.values[LENGTH])
        if best is None or entry.status == "failed" or not _within(entry.values, self._distributions):
            return
        value = score(self._experiment, best["values"], entry.values[LENGTH])
        whole = entry.status == "finished"
        self._study.add_trial(
            optuna.trial.create_trial(
                params=entry.values,
                distributions=self._distributions,
                value=value if whole else None,
                intermediate_values={entry.results[-1]["step"]: value},
                state=TrialState.COMPLETE if whole else TrialState.PRUNED,
            )
        )

    def save(self, checkpoint_path: str) -> None:
        """The trial store is the persistent state; Tune only requires that a file exists."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its store")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object, but the pickle is never read


def _distributions(experiment: Experiment) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    if experiment.search.algorithm == "grid":
        return {key: CategoricalDistribution(values) for key, values in grid(experiment).items()}
    for key, values in choices(experiment).items():
        found[key] = CategoricalDistribution(values)
    for key, (low, high) in ranges(experiment).items():
        if low == high:
            found[key] = CategoricalDistribution((low,))
        elif is_whole(key):
            found[key] = IntDistribution(round(low), round(high))
        else:
            found[key] = FloatDistribution(low, high, log=key == RATE)
    return found


def _within(values: dict[str, Any], distributions: dict[str, BaseDistribution]) -> bool:
    """Whether a sampler could have drawn a configuration: a person may leave its space."""

    def fits(value: Any, known: BaseDistribution) -> bool:
        if isinstance(known, CategoricalDistribution):
            return value in known.choices
        assert isinstance(known, (IntDistribution, FloatDistribution))
        return bool(known.low <= value <= known.high)

    return values.keys() == distributions.keys() and all(fits(values[key], known) for key, known in distributions.items())


def _study(experiment: Experiment, before: int) -> optuna.Study:
    """A sampler; `before` trials were drawn in earlier lives of the search, whose draws shall not come again."""
    search = experiment.search
    seed = search.seed + 7919 * before
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler
    if search.algorithm == "tpe" and search.scheduler != "pbt":
        with warnings.catch_warnings():  # constant_liar, which keeps concurrent trials apart, is marked as experimental
            warnings.simplefilter("ignore")
            startup = min(10, max(3, search.trials // 3))
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    return optuna.create_study(direction="maximize", sampler=sampler)


def make_scheduler(experiment: Experiment, store: TrialStore) -> TrialScheduler:
    """The scheduler, as if it had seen the trials that have ended."""
    search, train = experiment.search, experiment.train
    if search.scheduler == "fifo":
        return FIFOScheduler()
    if search.scheduler == "pbt":
        return _population(experiment)
    grace = min(train.evaluate_every, train.steps)
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=train.steps,
        grace_period=grace,
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )
    controller: Any = None  # ASHA does not look at it
    for entry in store.trials():
        if entry.status in ("finished", "stopped"):
            trial: Any = SimpleNamespace(trial_id=entry.run)
            scheduler.on_trial_add(controller, trial)
            for result in running_scores(experiment, entry):
                scheduler.on_trial_result(controller, trial, result)
    return scheduler


def running_scores(experiment: Experiment, entry: TrialRecord) -> list[dict[str, float]]:
    """What a trial reports to Tune at each of its evaluations: the step, and the best score until then."""
    length = entry.values[LENGTH]
    found = []
    for end in range(1, len(entry.results) + 1):
        best = best_result(experiment, entry.results[:end], length)
        assert best is not None
        found.append({"step": entry.results[end - 1]["step"], "score": score(experiment, best["values"], length)})
    return found


class _Population(PopulationBasedTraining):
    """PBT refuses searchers, because their samplers would learn from values that were changed under way. Ours draws blindly
    then, and only keeps the store."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        unsearched: Any = SimpleNamespace(search_alg=None)
        super().on_trial_add(unsearched, trial)


def _population(experiment: Experiment) -> TrialScheduler:
    spans = {key: span for key, span in ranges(experiment).items() if span[0] < span[1]}
    mutations: dict[str, Any] = {}
    for key, (low, high) in spans.items():
        if key == RATE:
            mutations[key] = tune.loguniform(low, high)
        elif is_whole(key):
            mutations[key] = tune.randint(round(low), round(high) + 1)
        else:
            mutations[key] = tune.uniform(low, high)

    def within(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: min(max(values[key], low), high) for key, (low, high) in spans.items()}
        return values | {key: round(value) if is_whole(key) else value for key, value in kept.items()}

    return _Population(
        time_attr="step",
        metric="score",
        mode="max",
        perturbation_interval=experiment.train.evaluate_every,
        hyperparam_mutations=mutations,
        custom_explore_fn=within,
        log_config=False,
    )
