"""Records the events of a run in MLflow, and builds its summary."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ptuning import storage
from ptuning.cluster.failures import cause
from ptuning.config import Experiment
from ptuning.data.task import Task
from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.tracking import client as tracking_client
from ptuning.tracking import plots, provenance, uploader
from ptuning.tracking.tracker import Tracker
from ptuning.training.messages import (
    Broken,
    Evaluated,
    Event,
    Failed,
    Finished,
    Loaded,
    Started,
    Stepped,
    Stuck,
    StuckReport,
)
from ptuning.training.result import PLOTS
from ptuning.training.watchdog import diagnose

LOSS_CURVE, METRIC_CURVE, CONFUSION, RELIABILITY, WORDS = (
    f"{PLOTS}/{name}.png" for name in ("loss", "validation", "confusion", "reliability", "words")
)

LABELS = "labels.json"
"""Table per label of the test rows."""


class Recorder:
    """Logs every event of one run and keeps what the run reached."""

    def __init__(self, tracker: Tracker, pictures: bool = True, base: Base | None = None) -> None:
        """`pictures`: curves, confusion matrix and, of a `base`, the words nearest to the result, beside MLflow's own."""
        self._pictures = pictures
        self._base = base
        self._tracker = tracker
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._places: dict[int, list[str]] = {}
        self._reports: dict[int, dict[int, StuckReport]] = {}
        self.workers: int | None = None
        """How many have loaded the base."""
        self.finished: Finished | None = None
        self.failed: str | None = None
        """Why the run ended without a result."""
        self.hang: str | None = None
        """Which worker hung last, if the workers have not come back since."""

    def __call__(self, event: Event) -> str | None:
        """Returns what people should be warned of, if there is anything."""
        match event:
            case Loaded():
                self._loaded(event)
            case Stuck():
                return self._stuck(event)
            case Broken():
                return self._broken(event)
            case Started(step=step) if step:
                self._tracker.tags({"resumed_at_step": str(step)})
            case Stepped():
                self._log("train", event, event.values)
            case Evaluated():
                self._log("validation", event, event.values)
                used = {f"system/memory_bytes_rank{rank}": value for rank, value in enumerate(event.memory)}
                self._tracker.metrics(used, event.step, event.time_ms)
            case Failed(message=message):
                self.failed = message
                self._tracker.tags({"failure": message})
            case Finished():
                self._finished(event)
                self.finished = event
        return None

    def _loaded(self, event: Loaded) -> None:
        self.hang = None
        self.workers = event.workers
        self._tracker.params({"dtype": event.dtype, "workers": event.workers, "shared_prefix": event.shared_prefix})
        held = {f"system/base_share_rank{rank}": share.held / share.whole for rank, share in enumerate(event.shares)}
        self._tracker.metrics(held, 0, event.time_ms)
        self._places[event.group], self._reports[event.group] = event.places, {}

    def _stuck(self, event: Stuck) -> str | None:
        """The watchdogs of all workers report at about the same time; the first last report ends them all and is told."""
        reports = self._reports.setdefault(event.group, {})
        told = any(report.last for report in reports.values())
        reports[event.rank] = event.report
        if not event.report.last or told:
            return None
        self.hang = diagnose(self._places.get(event.group, []), reports)
        self._tracker.tags({"hang": self.hang})
        return self.hang

    def _broken(self, event: Broken) -> str | None:
        if self.hang:  # which is why, and has been said
            return None
        message = cause(event.workers)
        self._tracker.tags({"broken": message})
        return message

    def _log(self, prefix: str, event: Event, values: dict[str, float]) -> None:
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._history.setdefault(name, []).append((event.step, value))
        self._tracker.metrics(named, event.step, event.time_ms)

    def _finished(self, event: Finished) -> None:
        final = {f"final/{name.replace('_', '/', 1)}": value for name, value in event.values.items()}
        peaks = {f"system/peak_bytes_rank{rank}": peak for rank, peak in enumerate(event.peak_bytes)}
        self._tracker.metrics(final | peaks, event.step, event.time_ms)
        self._tracker.tags({"content_hash": event.content_hash, "best_step": str(event.best_step)})
        if event.predictions:
            columns = [name for name in ("text", "target", "prediction", "probability") if name in event.predictions[0]]
            rows = [[row[column] for column in columns] for row in event.predictions]
            self._tracker.table("predictions.json", columns, rows)
        if event.classification:
            measured = [
                [event.labels[row["label"]], row["precision"], row["recall"], row["f1"], row["rows"]]
                for row in event.classification["per_label"]
            ]
            self._tracker.table(LABELS, ["label", "precision", "recall", "f1", "rows"], measured)
        if self._pictures:
            self._plot(event)
        for name, content in storage.read_folder(event.soft_prompt).items():
            self._tracker.artifact_bytes(f"soft_prompt/{name}", content)

    def _plot(self, event: Finished) -> None:
        loss = {name: points for name, points in self._history.items() if name.endswith("/loss")}
        if loss:
            self._tracker.artifact_bytes(LOSS_CURVE, plots.curves(loss, event.run, "loss"))
        rates = {
            name: points
            for name, points in self._history.items()
            if name.startswith("validation/") and not name.endswith(("loss", "perplexity"))
        }
        if rates:
            self._tracker.artifact_bytes(METRIC_CURVE, plots.curves(rates, event.run, "validation metric"))
        found = event.classification
        if found:
            self._tracker.artifact_bytes(CONFUSION, plots.confusion(found["confusion"], event.labels))
            self._tracker.artifact_bytes(RELIABILITY, plots.reliability(found["reliability"], found["ece"], event.run))
        if self._base:
            from ptuning.model.nearest_tokens import (
                nearest_words,  # the code of models: seconds that no command should begin with
            )

            with suppress(UserError):  # an embedding that is not found in the base's files; `prompts show` says so
                result = soft_prompt.load(event.soft_prompt)
                if result.card.kind == "embedding":
                    words = nearest_words(result.vectors, self._base)
                    self._tracker.artifact_bytes(WORDS, plots.neighbours(words, event.run))


def start_tracker(experiment: Experiment, folder: str, task: Task, base: Base) -> Tracker:
    """The MLflow run of an experiment, with everything that is known before it starts."""
    store = experiment.compute.storage
    uri = tracking_client.tracking_uri(experiment)
    local = outbox_folder(store)
    leftovers = threading.Thread(target=uploader.ship_leftovers, args=(local, uri), daemon=True)
    leftovers.start()  # what earlier runs could not send
    tracker = open_tracker(experiment, experiment.name, experiment.name)
    tracker.params(experiment.model_dump(mode="json", include={"model", "prompt", "data", "train", "zero", "compute"}))
    tracker.tags(provenance.provenance() | {f"base.{part}": value for part, value in base.fingerprint.parts().items()})
    tracker.json("experiment.json", experiment.model_dump(mode="json"))
    contexts: tuple[Literal["training", "validation", "test"], ...] = ("training", "validation", "test")
    for split, context in zip((task.train, task.validation, task.test), contexts, strict=True):
        if split:
            tracker.dataset(split.name, split.source, split.fingerprint, context, len(split))
    return tracker


def open_tracker(experiment: Experiment, name: str, folder: str, parent: str | None = None) -> Tracker:
    """A run where the experiment is tracked; its outbox lies below `folder` in the storage."""
    store = experiment.compute.storage
    uri = tracking_client.tracking_uri(experiment)
    outbox = outbox_folder(store) / folder / "tracking"
    root = tracking_client.artifact_root(uri, store)
    return Tracker(uri, tracking_client.experiment_name(experiment), root, outbox, name, parent)


def outbox_folder(store: str) -> Path:
    """Where outboxes lie: plain local files, since an object store cannot append."""
    return Path(store) if storage.is_local(store) else Path.home() / ".cache" / "ptuning" / quote(store, safe="")
