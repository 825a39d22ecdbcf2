"""A search from its first trial to its winner: worker groups in threads, Tune in the main thread, then the finals."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.train
from ray import tune
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.callback import Callback
from ray.tune.execution import class_cache

from ptuning import environment, storage
from ptuning.cluster.connection import beside_driver
from ptuning.cluster.failures import explain
from ptuning.config import Experiment
from ptuning.errors import RunFailed
from ptuning.model.base import Base
from ptuning.searching.dispatcher import DispatcherActor
from ptuning.searching.finals import Finals, Outcome
from ptuning.searching.listener import Listener
from ptuning.searching.monitor import SearchMonitor, Show
from ptuning.searching.report import write_report
from ptuning.searching.result import SearchResult
from ptuning.searching.searcher import OptunaSearcher, make_scheduler
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.tracking.tracker import Status, Tracker
from ptuning.training.ray_trainer import for_workers, make_trainer

SPARE = 0.25
"""Share of a worker's CPUs that stays free for the trials, which do nothing but wait."""

TRIAL_CPU = 0.01

HUNG = 60.0
"""Seconds without any trial in training or waiting after which those that Tune still waits for count as hung."""

SAVING = 60.0
"""Seconds to wait for the soft prompts of stopped trials."""

AHEAD = 1
"""Trials that are started before a slot is free, where a trial cannot take over the process of one that has ended: it costs 2 s
of CPU, and 200 MB."""


class _FreeSlots(Callback):
    """A trial that Tune has stopped gives back its slot. Its own end may never run: Tune kills its actor."""

    def __init__(self, release: Callable[[str, str | None], None]) -> None:
        self._release = release

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._release(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._release(trial.trial_id, str(trial.get_error() or "unknown error").strip().splitlines()[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object, but the pickle is never read


class _Hung(tune.Stopper):
    """Stops Tune if no trial trains any more but a trial's process does not end: Tune would wait for ever."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._asked_at = self._busy_at = 0.0
        self._begun = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now = time.monotonic()
        if now - self._asked_at > 1:
            self._asked_at = now
            busy = self._busy()
            if busy or not self._begun:
                self._busy_at = now
            self._begun = self._begun or busy
        return self._begun and now - self._busy_at > HUNG

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Search:
    """One life of a search, from the store to the winner."""

    def __init__(
        self, experiment: Experiment, base: Base, folder: str, tracker: Tracker, show: Show, say: Callable[[str], None]
    ) -> None:
        self.experiment = experiment
        self.tables = for_workers(experiment)
        self.folder = folder
        self.tracker = tracker
        self.say = say
        self.store = TrialStore(folder)
        self.dispatcher = beside_driver(DispatcherActor).remote()
        self.monitor = SearchMonitor(experiment, base, self.dispatcher, self.store, tracker, show, say)
        self.listener = Listener(folder, self.tables, self.store, self._withdraw, say)
        self.broken: str | None = None
        self.threads: list[threading.Thread] = []
        self._runs: dict[str, str] = {}
        """Run name of each Tune trial."""
        self._leaving: set[str] = set()
        """Runs that Tune has stopped in their slots: they end by saving their soft prompts."""

    def run(self, scaling: ray.train.ScalingConfig) -> SearchResult:
        """Search, train the finalists, test the winner.

        Raises:
            RunFailed: the workers failed, or no trial could be trained.
        """
        status: Status = "FAILED"
        outcome: Outcome | None = None
        failure: str | None = None
        try:
            for group in range(self.experiment.search.groups):
                thread = threading.Thread(target=self._train, args=(group, scaling), name=f"group {group}", daemon=True)
                thread.start()
                self.threads.append(thread)
            self.listener.start()
            self._choose()
            if not self.broken:
                outcome = self._finals().run()
            status = "FINISHED" if outcome and not self.broken else "FAILED"
        except RunFailed as error:
            failure = str(error)
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.listener.stop()
            with suppress(RayError):  # the dispatcher was lost, which is already reported
                ray.get(self.dispatcher.close.remote())
            unsent = 0
            with suppress(OSError):  # said already: the disk is full
                unsent = self.monitor.stop(30)
                write_report(
                    self.experiment, self.store, self.tracker, self.folder
                )  # while the workers end, which takes Ray Train some seconds
            for thread in self.threads:
                thread.join(60)
            ray.kill(self.dispatcher)
            with suppress(OSError):
                self.tracker.finish(status)
            unsent += self.tracker.close(deadline_s=30)
            if storage.is_local(self.folder):
                shutil.rmtree(storage.join(self.folder, "ray"), ignore_errors=True)
        if self.broken or failure or outcome is None:
            raise RunFailed(self.broken or failure or "the workers ended before there was a winner; continue with --resume")
        states = [entry.status for entry in self.store.trials()]
        return SearchResult(
            experiment=self.experiment,
            run_id=self.tracker.run_id,
            folder=outcome.folder,
            steps=outcome.tested.step,
            best_step=outcome.tested.best_step,
            metrics=outcome.tested.values,
            workers=self.monitor.parent.workers,
            peak_bytes=outcome.tested.peak_bytes,
            unsent=unsent,
            winner=outcome.finalists[0],
            finalists=outcome.finalists,
            trials={state: states.count(state) for state in sorted(set(states))},
            trial_steps=sum(entry.step for entry in self.store.entries.values()),
        )

    def _finals(self) -> Finals:
        return Finals(
            self.experiment,
            self.tables,
            self.folder,
            self.store,
            self.dispatcher,
            self.monitor,
            self._alive,
            lambda: self.broken,
        )

    def _train(self, group: int, scaling: ray.train.ScalingConfig) -> None:
        """A worker group, in a thread, for as long as the search takes."""

        def work(config: dict[str, Any]) -> None:
            from ptuning.imports import quick_imports

            with quick_imports():
                from ptuning.searching import worker
            worker.work(config)

        resources: Any = scaling.resources_per_worker
        cpus = resources["CPU"] / (1 - SPARE)
        config = {"events": self.dispatcher, "group": group, "threads": max(1, int(cpus))}
        try:
            make_trainer(self.experiment, storage.join(self.folder, "ray"), scaling, work, config).fit()
            self.broken = self.broken or self.monitor.parent.failed
        except (TrainingFailedError, RayError) as error:
            self.broken = explain(error, self.folder, self.monitor.hang)
        finally:
            if self.broken:
                with suppress(RayError):  # the dispatcher itself was lost
                    ray.get(self.dispatcher.close.remote(self.broken))

    def _alive(self) -> bool:
        return self.broken is None and all(thread.is_alive() for thread in self.threads)

    def _choose(self) -> None:
        """Let Tune run the trials that are not in the store yet, or not to their end."""
        search = self.experiment.search
        with self.store.lock:
            ended = sum(entry.status != "running" for entry in self.store.trials())
            self.store.complete = ended >= search.trials + self.store.added()
            if self.store.complete:
                return
        slots = search.slots if isinstance(search.slots, int) else None
        at_once = search.groups * slots if slots else self._measured()
        if not at_once:
            return
        checkpoints = search.scheduler == "pbt"
        processes = at_once + (AHEAD if checkpoints else 0)
        environment.apply("search")
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(processes)
        # A failed trial is told by the leaderboard, not by a traceback.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # Tune would give them to every trial (2.60), and Ray logs and shows what it gives. Nodes have their own.
        class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
        dispatcher, tables = self.dispatcher, self.tables

        def trial(values: dict[str, Any]) -> None:
            # Travels by value and imports on the trial's side: neither loads what only the other needs.
            from ptuning.searching.trial import run_trial

            run_trial(values, dispatcher, tables, checkpoints)

        hung = _Hung(lambda: ray.get(dispatcher.busy.remote()))
        searcher = OptunaSearcher(self.experiment, self.tables, self.folder, self.store, self._announce)
        threading.Thread(target=self._watch, args=(searcher,), daemon=True).start()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consider boosting PBT")  # with reuse_actors
            tuner = tune.Tuner(
                tune.with_resources(trial, {"cpu": TRIAL_CPU}),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=make_scheduler(self.experiment, self.store),
                    num_samples=-1,  # the searcher knows how many there are, and may hear of more
                    max_concurrent_trials=processes,
                    reuse_actors=not checkpoints,  # PBT's trials come again while they still listen
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=storage.join(self.folder, "ray"),
                    callbacks=[_FreeSlots(self._release)],
                    stop=hung,
                    verbose=0,
                ),
            )
            try:
                tuner.fit()
            except Exception:
                # On a full disk Tune reads back errors that it could not write (2.60, experiment/trial.py): what is wrong is
                # known better here.
                self.monitor.wait(lambda: False, self._alive, 5)
                if not self.broken:
                    raise
        self.store.complete = True
        if hung.stop_all():
            for entry in self.store.trials():
                self.monitor.then(entry.run, lambda entry: _end(entry, "its process did not respond"))
        # What Tune has stopped still saves its soft prompt; what failed has told the monitor.
        # Not for ever: workers that were just then started again have forgotten who was to leave.
        self.monitor.wait(lambda: all(self._settled(entry) for entry in self.store.trials()), self._alive, SAVING)

    def _measured(self) -> int:
        """Slots of all groups together, once the workers have measured them."""
        while self._alive():
            places = ray.get(self.dispatcher.joined.remote(self.experiment.search.groups))
            if len(places) == self.experiment.search.groups:
                total = sum(places.values())
                self.say(f"{total} soft prompts train side by side" if total > 1 else "one soft prompt trains at a time")
                return total
        return 0

    def _watch(self, searcher: OptunaSearcher) -> None:
        """Workers that are gone for good end the search: no new trials."""
        for thread in self.threads:
            thread.join()
        searcher.stop = True

    def _announce(self, trial: str, entry: TrialRecord) -> None:
        self._runs[trial] = entry.run
        known = [
            {"kind": "evaluation", "run": entry.run, "details": {"best": result.get("best", False)}, **result}
            for result in entry.results
        ]
        ray.get(self.dispatcher.register.remote(trial, entry.run, entry.folder, known))

    def _release(self, trial: str, error: str | None) -> None:
        """`error`: what the trial's own process died of, not its soft prompt; that one has told the monitor itself."""
        left = ray.get(self.dispatcher.release.remote(trial, error is None))
        if left == "slot" and error is None:
            self._leaving.add(self._runs[trial])
        if left or error:  # it may have died before it asked for a slot
            self.monitor.then(self._runs[trial], lambda entry: _end(entry, error))

    def _withdraw(self, run: str) -> None:
        """A person stops a run. Finalists, and trials that Tune has not heard of, have their own name at the dispatcher."""
        trial = next((trial for trial, known in self._runs.items() if known == run), run)
        with suppress(RayError):  # the dispatcher was lost: the search ends, and says so
            if ray.get(self.dispatcher.withdraw.remote(trial)) == "slot":
                self._leaving.add(run)

    def _settled(self, entry: TrialRecord) -> bool:
        return entry.status != "running" and (entry.run not in self._leaving or entry.soft_prompt is not None)


def _end(entry: TrialRecord, error: str | None) -> None:
    if entry.status == "running":
        entry.status, entry.message = ("failed", f"{entry.run}: its Tune trial failed: {error}") if error else ("stopped", None)
