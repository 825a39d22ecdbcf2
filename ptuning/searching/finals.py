"""The end of a search: trains the best configurations with several seeds, then evaluates the winner once on the test rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import RunFailed
from ptuning.searching.monitor import SearchMonitor
from ptuning.searching.report import ranked, value_of
from ptuning.searching.result import Finalist
from ptuning.searching.space import key_of, trial_tables
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.training.messages import Finished


@dataclass(frozen=True)
class Outcome:
    """The winner's soft prompt in the search's own folder, its test, and the finalists, highest mean first."""

    folder: str
    tested: Finished
    finalists: list[Finalist]


@dataclass(frozen=True)
class Finals:
    """Trains the finalists in the slots that the trials have left, and tests the winner."""

    experiment: Experiment
    tables: dict[str, Any]
    folder: str
    store: TrialStore
    dispatcher: Any
    monitor: SearchMonitor
    alive: Callable[[], bool]
    """Whether the worker groups still train."""
    broken: Callable[[], str | None]
    """Why they do not."""

    def run(self) -> Outcome | None:
        """Train the best configurations with several seeds, choose by mean, read the test rows once; None: the workers failed
        meanwhile.

        Raises:
            RunFailed: no trial, or no finalist, could be trained.
        """
        trials = self.store.trials()
        best = ranked(self.experiment, trials)
        if not best:
            reason = next((entry.message for entry in trials if entry.message), "none was evaluated")
            raise RunFailed(f"all {len(trials)} trials failed, the first with: {reason}")
        # A schedule that PBT found cannot be repeated from its last values, nor the way of a warm clone.
        whole = [entry for entry in best if not entry.warm or entry.status == "finished"]
        finalists = whole[: self.experiment.search.finalists] if self.experiment.search.scheduler != "pbt" else []
        seeds = {entry.run: self._train_seeds(entry) for entry in finalists} or {best[0].run: [best[0]]}
        everyone = {entry.run for group in seeds.values() for entry in group}
        self.monitor.wait(lambda: all(self.store.entries[run].status != "running" for run in everyone), self.alive)
        if self.broken():
            return None
        means = {run: found for run, group in seeds.items() if (found := self._mean(group))}
        if not means:
            raise RunFailed(f"all {len(everyone)} runs of the finalists failed; lower search.learning_rate")
        winner = max(means, key=lambda run: means[run]["order"])
        return self._test(winner, means)

    def _train_seeds(self, entry: TrialRecord) -> list[TrialRecord]:
        """The runs of a finalist: the trial itself if it was trained to its end, and one for each further seed."""
        group = []
        for number in range(1 if entry.warm else self.experiment.search.seeds):
            if number == 0 and entry.status == "finished":
                group.append(entry)
                continue
            run = f"{entry.run}.s{number}"
            tables = trial_tables(self.tables, run, entry.values)
            tables["train"]["seed"] += number
            if run not in self.store.entries:
                folder = storage.join(self.folder, "trials", run)
                self.store.add(TrialRecord(run, key_of(tables), entry.values, folder, finalist=True))
            known = self.store.entries[run]
            if known.status == "running":
                self._attach(run, known.folder, tables, known)
            group.append(known)
        return group

    def _attach(self, run: str, folder: str, tables: dict[str, Any], entry: TrialRecord) -> None:
        ray.get(self.dispatcher.register.remote(run, run, folder, []))
        ray.get(self.dispatcher.begin.remote(run))
        ray.get(self.dispatcher.attach.remote(run, run, folder, tables, entry.values))

    def _mean(self, group: list[TrialRecord]) -> dict[str, Any] | None:
        found = [(value, entry) for entry in group if (value := value_of(self.experiment, entry))]
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

    def _test(self, winner: str, means: dict[str, dict[str, Any]]) -> Outcome:
        """The winner's best seed goes once more into a slot, trained as it is, to read the test rows."""
        chosen = self.store.entries[means[winner]["run"]]
        name = self.experiment.name
        tables = trial_tables(self.tables, name, chosen.values)
        tables["data"]["test"] = self.tables["data"]["test"]
        if chosen.finalist:
            tables["train"]["seed"] += int(chosen.run.rpartition("s")[2])
        self._attach(name, chosen.folder, tables, chosen)
        parent = self.monitor.parent
        self.monitor.wait(lambda: parent.finished is not None or parent.failed is not None, self.alive)
        if parent.finished is None:
            raise RunFailed(parent.failed or self.broken() or "the workers ended before the winner was tested")
        target = storage.join(self.folder, "soft_prompt")
        files = storage.read_folder(parent.finished.soft_prompt)
        storage.write_folder(target, {file: content for file, content in files.items() if file != storage.MANIFEST})
        finalists = [
            Finalist(run, self.store.entries[run].values, mean["mean"], mean["spread"], mean["seeds"])
            for run, mean in sorted(means.items(), key=lambda pair: pair[1]["order"], reverse=True)
        ]
        return Outcome(target, parent.finished, finalists)
