"""A search: Ray Tune decides, trials attach to the slots of worker groups that are already running.

    Chooser (Optuna) -> Tune trial (light) -> Hub -> slot of a worker group -> Hub -> trial -> Tune's scheduler
                                               \\-> Desk (driver) -> ledger, MLflow, screen

Ray Train runs in threads of the driver, Tune in its main thread. Then the finalists are trained with several seeds in the same
slots, and the winner reads the test rows once.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
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

from ptuning import storage
from ptuning.cluster.failures import RunFailed, explain
from ptuning.config import Experiment, ExperimentError
from ptuning.model.base import Base, find_base
from ptuning.registry.publish import bring_parent, pin_parent
from ptuning.searching import report, space
from ptuning.searching.dispatcher import Hub
from ptuning.searching.monitor import Desk, Show
from ptuning.searching.searcher import Chooser, make_scheduler
from ptuning.searching.space import LENGTH
from ptuning.searching.trial_store import Entry, Ledger
from ptuning.tracking import plots
from ptuning.tracking.tracker import Status, Tracker
from ptuning.training import lease
from ptuning.training.messages import Task
from ptuning.training.run import (
    beside_driver,
    for_workers,
    holding,
    leave_ray,
    make_trainer,
    registered,
    scale,
    start_ray,
    start_tracker,
    starting,
)
from ptuning.training.run_setup import absolute, check_name, describe, load_task, write_run

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
    finished = check_name(experiment, folder, resume, search=True)
    if finished:
        return finished | registered(experiment, finished, register)
    lease.check(folder, say)
    base = find_base(experiment.model)
    storage.check_writable(experiment.compute.storage)
    bring_parent(written, experiment, base)
    trained, task = prepare(experiment, base)
    for line in describe(task):
        say(line)
    started_here = start_ray(experiment)
    try:
        scaling = scale(experiment, experiment.search.groups, SPARE)
        with holding(folder, say):
            finished = check_name(experiment, folder, resume, search=True)  # another driver may have ended it just now
            if finished:
                return finished | registered(experiment, finished, register)
            write_run(folder, experiment, "running", kind="search")
            say(starting(experiment))
            tracker = start_tracker(experiment, folder, task, base)
            tracker.params({"search": experiment.search.model_dump(mode="json")})
            try:
                summary = _Search(trained, base, folder, tracker, show, say).run(scaling)
            except RayError as error:  # the hub's, or one of Tune's own
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


class _Free(Callback):
    """A trial that Tune has stopped gives back its slot. Its own end may never run: Tune kills its actor."""

    def __init__(self, release: Callable[[str, str | None], None]) -> None:
        self._release = release

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._release(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._release(trial.trial_id, str(trial.get_error() or "unknown error").strip().splitlines()[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it is given; nobody reads it


class _Hung(tune.Stopper):
    """Ends Tune's part when nobody trains any more and yet a trial's own process does not end: Tune would wait for ever."""

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


class _Search:
    """One life of a search, from the ledger to the winner."""

    def __init__(
        self, experiment: Experiment, base: Base, folder: str, tracker: Tracker, show: Show, say: Callable[[str], None]
    ) -> None:
        self.experiment = experiment
        self.tables = for_workers(experiment)
        self.folder = folder
        self.tracker = tracker
        self.say = say
        self.ledger = Ledger(folder)
        self.hub = beside_driver(Hub).remote()
        self.desk = Desk(experiment, base, self.hub, self.ledger, tracker, show, say)
        self.broken: str | None = None
        self.threads: list[threading.Thread] = []
        self._runs: dict[str, str] = {}
        """Run name of each Tune trial."""
        self._leaving: set[str] = set()
        """Runs that Tune has stopped in their slots: they end by saving their soft prompts."""

    def run(self, scaling: ray.train.ScalingConfig) -> dict[str, Any]:
        status: Status = "FAILED"
        summary: dict[str, Any] = {}
        try:
            for group in range(self.experiment.search.groups):
                thread = threading.Thread(target=self._train, args=(group, scaling), name=f"group {group}", daemon=True)
                thread.start()
                self.threads.append(thread)
            self._choose()
            summary = self._finals() if not self.broken else {}
            status = "FINISHED" if "message" not in summary and not self.broken else "FAILED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            with suppress(RayError):  # the hub has gone: said already
                ray.get(self.hub.close.remote())
            unsent = 0
            with suppress(OSError):  # said already: the disk is full
                unsent = self.desk.stop(30)
                self._report()  # while the workers end, which takes Ray Train some seconds
            for thread in self.threads:
                thread.join(60)
            ray.kill(self.hub)
            with suppress(OSError):
                self.tracker.finish(status)
            unsent += self.tracker.close(deadline_s=30)
            if storage.is_local(self.folder):
                shutil.rmtree(storage.join(self.folder, "ray"), ignore_errors=True)
        if self.broken:
            summary["message"] = self.broken
        return summary | {"name": self.experiment.name, "run_id": self.tracker.run_id, "unsent": unsent}

    def _train(self, group: int, scaling: ray.train.ScalingConfig) -> None:
        """A worker group, in a thread, for as long as the search takes."""
        resources: Any = scaling.resources_per_worker
        cpus = resources["CPU"] / (1 - SPARE)
        config = {"hub": self.hub, "group": group, "threads": max(1, int(cpus))}
        try:
            make_trainer(self.experiment, storage.join(self.folder, "ray"), scaling, config).fit()
            if "message" in self.desk.summary:
                self.broken = self.desk.summary["message"]
        except (TrainingFailedError, RayError) as error:
            self.broken = explain(error, self.folder, self.desk.hang)
        finally:
            if self.broken:
                with suppress(RayError):  # the hub itself has gone
                    ray.get(self.hub.close.remote(self.broken))

    def _alive(self) -> bool:
        return self.broken is None and all(thread.is_alive() for thread in self.threads)

    def _choose(self) -> None:
        """Let Tune run the trials that are not in the ledger yet, or not to their end."""
        search = self.experiment.search
        open_trials = search.trials - sum(entry.status != "running" for entry in self.ledger.trials())
        if open_trials <= 0:
            return
        slots = search.slots if isinstance(search.slots, int) else None
        at_once = search.groups * slots if slots else self._measured()
        if not at_once:
            return
        checkpoints = search.scheduler == "pbt"
        processes = at_once + (AHEAD if checkpoints else 0)
        os.environ |= {
            "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box even at verbose=0
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Tune's own CSV, JSON and TensorBoard files
            "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search, it does not wait for the trials
            "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a process that does not end in order
            "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the ledger is what a search is resumed from
            "TUNE_MAX_PENDING_TRIALS_PG": str(processes),
        }
        # A failed trial is told by the leaderboard, not by a traceback.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # Tune would give them to every trial (2.60), and Ray logs and shows what it gives. Nodes have their own.
        class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
        hub, tables = self.hub, self.tables

        def trial(values: dict[str, Any]) -> None:
            # Travels by value and imports on the trial's side: neither loads what only the other needs.
            from ptuning.searching.trial import run_trial

            run_trial(values, hub, tables, checkpoints)

        hung = _Hung(lambda: ray.get(hub.call.remote("busy")))
        chooser = Chooser(self.experiment, self.tables, self.folder, self.ledger, self._announce)
        threading.Thread(target=self._watch, args=(chooser,), daemon=True).start()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consider boosting PBT")  # with reuse_actors
            tuner = tune.Tuner(
                tune.with_resources(trial, {"cpu": TRIAL_CPU}),
                tune_config=tune.TuneConfig(
                    search_alg=chooser,
                    scheduler=make_scheduler(self.experiment, self.ledger),
                    num_samples=open_trials,
                    max_concurrent_trials=processes,
                    reuse_actors=not checkpoints,  # PBT's trials come again while they still listen
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=storage.join(self.folder, "ray"),
                    callbacks=[_Free(self._release)],
                    stop=hung,
                    verbose=0,
                ),
            )
            try:
                tuner.fit()
            except Exception:
                # On a full disk Tune reads back errors that it could not write (2.60, experiment/trial.py): what is wrong is
                # known better here.
                self.desk.wait(lambda: False, self._alive, 5)
                if not self.broken:
                    raise
        if hung.stop_all():
            for entry in self.ledger.trials():
                self.desk.then(entry.run, lambda entry: _end(entry, "its process gave no sign of life"))
        # What Tune has stopped still saves its soft prompt; what failed has told the desk.
        # Not for ever: workers that were just then started again have forgotten who was to leave.
        self.desk.wait(lambda: all(self._settled(entry) for entry in self.ledger.trials()), self._alive, SAVING)

    def _measured(self) -> int:
        """Slots of all groups together, once the workers have measured them."""
        while self._alive():
            places = ray.get(self.hub.joined.remote(self.experiment.search.groups))
            if len(places) == self.experiment.search.groups:
                total = sum(places.values())
                self.say(f"{total} soft prompts train side by side" if total > 1 else "one soft prompt trains at a time")
                return total
        return 0

    def _watch(self, chooser: Chooser) -> None:
        """Workers that are gone for good end the search: no new trials."""
        for thread in self.threads:
            thread.join()
        chooser.stop = True

    def _announce(self, trial: str, entry: Entry) -> None:
        self._runs[trial] = entry.run
        known = [{"kind": "evaluation", "run": entry.run, "details": {}} | result for result in entry.results]
        ray.get(self.hub.call.remote("announce", trial, entry.run, entry.folder, known))

    def _release(self, trial: str, error: str | None) -> None:
        """`error`: what the trial's own process died of, not its soft prompt; that one has told the desk itself."""
        left = ray.get(self.hub.call.remote("release", trial, error is None))
        if left == "slot" and error is None:
            self._leaving.add(self._runs[trial])
        if left or error:  # it may have died before it asked for a slot
            self.desk.then(self._runs[trial], lambda entry: _end(entry, error))

    def _settled(self, entry: Entry) -> bool:
        return entry.status != "running" and (entry.run not in self._leaving or entry.soft_prompt is not None)

    def _finals(self) -> dict[str, Any]:
        """Train the best configurations with several seeds, choose by mean, read the test rows once."""
        trials = self.ledger.trials()
        best = report.ranked(self.experiment, trials)
        if not best:
            reason = next((entry.message for entry in trials if entry.message), "none was evaluated")
            return {"message": f"all {len(trials)} trials failed, the first with: {reason}"}
        # A schedule that PBT found cannot be repeated from its last values.
        finalists = best[: self.experiment.search.finalists] if self.experiment.search.scheduler != "pbt" else []
        seeds = {entry.run: self._train_seeds(entry) for entry in finalists} or {best[0].run: [best[0]]}
        everyone = {entry.run for group in seeds.values() for entry in group}
        self.desk.wait(lambda: all(self.ledger.entries[run].status != "running" for run in everyone), self._alive)
        if self.broken:
            return {}
        means = {run: found for run, group in seeds.items() if (found := self._mean(group))}
        if not means:
            return {"message": f"all {len(everyone)} runs of the finalists failed; lower search.learning_rate"}
        winner = max(means, key=lambda run: means[run]["order"])
        return self._test(winner, means)

    def _train_seeds(self, entry: Entry) -> list[Entry]:
        """The runs of a finalist: the trial itself if it was trained to its end, and one for each further seed."""
        group = []
        for number in range(self.experiment.search.seeds):
            if number == 0 and entry.status == "finished":
                group.append(entry)
                continue
            run = f"{entry.run}.s{number}"
            tables = space.trial_tables(self.tables, run, entry.values)
            tables["train"]["seed"] += number
            if run not in self.ledger.entries:
                folder = storage.join(self.folder, "trials", run)
                self.ledger.add(Entry(run, space.key_of(tables), entry.values, folder, finalist=True))
            known = self.ledger.entries[run]
            if known.status == "running":
                self._attach(run, known.folder, tables, known)
            group.append(known)
        return group

    def _attach(self, run: str, folder: str, tables: dict[str, Any], entry: Entry) -> None:
        ray.get(self.hub.call.remote("announce", run, run, folder, []))
        ray.get(self.hub.call.remote("enter", run))
        ray.get(self.hub.call.remote("attach", run, run, folder, tables, entry.values))

    def _mean(self, group: list[Entry]) -> dict[str, Any] | None:
        found = [(value, entry) for entry in group if (value := report.value_of(self.experiment, entry))]
        whole = [(value, entry) for value, entry in found if entry.status == "finished"]
        if not whole:
            return None
        scores = [value[0] for value, _ in whole]
        losses = [value[1] for value, _ in whole]
        mean = statistics.fmean(scores)
        return {
            "order": (len(whole) == len(group), mean, statistics.fmean(losses)),
            "mean": mean,
            "spread": statistics.pstdev(scores),
            "seeds": len(whole),
            "run": max(whole, key=lambda pair: pair[0])[1].run,
        }

    def _test(self, winner: str, means: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The winner's best seed goes once more into a slot, trained as it is, to read the test rows."""
        chosen = self.ledger.entries[means[winner]["run"]]
        name = self.experiment.name
        tables = space.trial_tables(self.tables, name, chosen.values)
        tables["data"]["test"] = self.tables["data"]["test"]
        if chosen.finalist:
            tables["train"]["seed"] += int(chosen.run.rpartition("s")[2])
        self._attach(name, chosen.folder, tables, chosen)
        found = self.desk.summary
        self.desk.wait(lambda: "soft_prompt" in found or "message" in found, self._alive)
        if "soft_prompt" not in found:
            return {"message": found.get("message") or self.broken or "the workers ended before the winner was tested"}
        target = storage.join(self.folder, "soft_prompt")
        files = storage.read_folder(found["soft_prompt"])
        storage.write_folder(target, {file: content for file, content in files.items() if file != storage.MANIFEST})
        states = [entry.status for entry in self.ledger.trials()]
        finalists = [
            {"trial": run, "values": self.ledger.entries[run].values} | {key: mean[key] for key in ("mean", "spread", "seeds")}
            for run, mean in sorted(means.items(), key=lambda pair: pair[1]["order"], reverse=True)
        ]
        return {
            "soft_prompt": target,
            "steps": found["steps"],
            "best_step": found["best_step"],
            "metrics": found["metrics"],
            "peak_bytes": found["peak_bytes"],
            "workers": found.get("workers"),
            "winner": finalists[0],
            "finalists": finalists,
            "trials": {state: states.count(state) for state in sorted(set(states))},
            "trial_steps": sum(entry.step for entry in self.ledger.entries.values()),
        }

    def _report(self) -> None:
        """Leaderboard, pictures and figures of what is known so far: to the parent run and the search's folder."""
        trials, experiment = self.ledger.trials(), self.experiment
        columns, rows = report.table(experiment, list(self.ledger.entries.values()))
        if not rows:
            return
        self.tracker.table("leaderboard.json", columns, rows)
        curve = report.budget_curve(experiment, trials)
        correlation = report.early_late(experiment, trials)
        files = {
            "leaderboard.csv": report.as_csv([dict(zip(columns, row, strict=True)) for row in rows]).encode(),
            "budget.csv": report.as_csv(curve).encode(),
        }
        points = []
        for entry in report.ranked(experiment, trials):
            best = space.best_result(experiment, entry.results, entry.values[LENGTH])
            assert best is not None
            values = entry.values
            points.append((values[LENGTH], values[space.RATE], best["values"][experiment.metric], values[space.INIT]))
        if points:
            best_so_far = {"best so far": [(int(row["trial_steps"]), row["best"]) for row in curve]}
            files["landscape.png"] = plots.landscape(points, experiment.metric, f"{experiment.name}: {len(points)} trials")
            files["budget.png"] = plots.curves(
                best_so_far, experiment.name, f"best validation {experiment.metric}", "steps of all trials", stairs=True
            )
        for name, content in files.items():
            storage.write_file(storage.join(self.folder, "report"), name, content)
            self.tracker.artifact_bytes(f"report/{name}", content)
        numbers = [{"step": step, "spearman": value, "trials": many} for step, (value, many) in correlation.items()]
        self.tracker.json("report/early_late.json", numbers)
        for step, (value, _) in correlation.items():
            self.tracker.metrics({"search/early_late_spearman": value}, step)


def _end(entry: Entry, error: str | None) -> None:
    if entry.status == "running":
        entry.status, entry.message = ("failed", f"{entry.run}: its Tune trial failed: {error}") if error else ("stopped", None)
