"""From the events of a run to its MLflow record and its summary."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
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
from ptuning.training.messages import Event
from ptuning.training.watchdog import diagnose

LOSS_CURVE, METRIC_CURVE, CONFUSION, RELIABILITY, WORDS = (
    f"plots/{name}.png" for name in ("loss", "validation", "confusion", "reliability", "words")
)

LABELS = "labels.json"
"""Table per label of the test rows."""


class Recorder:
    """Logs every event of one run and fills `summary` with what the run reached."""

    def __init__(self, tracker: Tracker, summary: dict[str, Any], pictures: bool = True, base: Base | None = None) -> None:
        """`pictures`: curves, confusion matrix and, of a `base`, the words nearest to the result, beside MLflow's own."""
        self._pictures = pictures
        self._base = base
        self._tracker = tracker
        self._summary = summary
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._places: dict[int, list[str]] = {}
        self._reports: dict[int, dict[int, Any]] = {}
        self.hang: str | None = None
        """Which worker hung last, if the workers have not come back since."""

    def __call__(self, event: Event) -> None:
        getattr(self, f"_{event.kind}")(event)

    def _loading(self, event: Event) -> None:
        """For the screen only."""

    def _loaded(self, event: Event) -> None:
        self.hang = None
        self._summary["workers"] = event.details["workers"]
        shares = event.details["shares"]
        self._tracker.params(
            {
                "dtype": event.details["dtype"],
                "workers": event.details["workers"],
                "shared_prefix": event.details["shared_prefix"],
            }
        )
        held = {f"system/base_share_rank{rank}": share["held"] / share["whole"] for rank, share in enumerate(shares)}
        self._tracker.metrics(held, 0, event.time_ms)

        group = event.details["group"]
        self._places[group], self._reports[group] = event.details["places"], {}

    def _stuck(self, event: Event) -> None:
        """The watchdogs of all workers speak at about the same time; one that says its last word ends them all."""
        group, told = event.details["group"], self._reports.setdefault(event.details["group"], {})
        told[event.details["rank"]] = event.details
        if event.details["last"] and not any(each.get("judged") for each in told.values()):
            self.hang = diagnose(self._places.get(group, []), told)
            event.details.update(judged=True, message=self.hang)
            self._tracker.tags({"hang": self.hang})

    def _broken(self, event: Event) -> None:
        if not self.hang:  # which is why, and has been said
            event.details["message"] = cause(event.details["workers"])
            self._tracker.tags({"broken": event.details["message"]})

    def _start(self, event: Event) -> None:
        if event.step:
            self._tracker.tags({"resumed_at_step": str(event.step)})

    def _step(self, event: Event) -> None:
        self._log("train", event)

    def _evaluation(self, event: Event) -> None:
        self._log("validation", event)
        used = {f"system/memory_bytes_rank{rank}": value for rank, value in enumerate(event.details["memory"])}
        self._tracker.metrics(used, event.step, event.time_ms)

    def _log(self, prefix: str, event: Event) -> None:
        named = {f"{prefix}/{name}": value for name, value in event.values.items()}
        for name, value in named.items():
            self._history.setdefault(name, []).append((event.step, value))
        self._tracker.metrics(named, event.step, event.time_ms)

    def _failed(self, event: Event) -> None:
        self._summary["message"] = event.details["message"]
        self._tracker.tags({"failure": event.details["message"]})

    def _finished(self, event: Event) -> None:
        details = event.details
        folder = details["soft_prompt"]
        self._summary |= {
            "soft_prompt": folder,
            "steps": event.step,
            "best_step": details["best_step"],
            "metrics": event.values,
            "peak_bytes": details["peak_bytes"],
        }
        final = {name.replace("_", "/", 1): value for name, value in event.values.items()}
        peaks = {f"system/peak_bytes_rank{rank}": peak for rank, peak in enumerate(details["peak_bytes"])}
        self._tracker.metrics({f"final/{name}": value for name, value in final.items()} | peaks, event.step, event.time_ms)
        self._tracker.tags({"content_hash": details["content_hash"], "best_step": str(details["best_step"])})
        if details.get("predictions"):
            columns = [name for name in ("text", "target", "prediction", "probability") if name in details["predictions"][0]]
            rows = [[row[column] for column in columns] for row in details["predictions"]]
            self._tracker.table("predictions.json", columns, rows)
        if details.get("classification"):
            columns = ["label", "precision", "recall", "f1", "rows"]
            rows = [
                [details["labels"][row["label"]], *(row[column] for column in columns[1:])]
                for row in details["classification"]["per_label"]
            ]
            self._tracker.table(LABELS, columns, rows)
        if self._pictures:
            self._plot(event)
        for name, content in storage.read_folder(folder).items():
            self._tracker.artifact_bytes(f"soft_prompt/{name}", content)

    def _plot(self, event: Event) -> None:
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
        found = event.details.get("classification")
        if found:
            self._tracker.artifact_bytes(CONFUSION, plots.confusion(found["confusion"], event.details["labels"]))
            self._tracker.artifact_bytes(RELIABILITY, plots.reliability(found["reliability"], found["ece"], event.run))
        if self._base:
            from ptuning.model.nearest_tokens import (
                nearest_words,  # the code of models: seconds that no command should begin with
            )

            with suppress(UserError):  # an embedding that is not found in the base's files; `prompts show` says so
                words = nearest_words(soft_prompt.load(event.details["soft_prompt"]).vectors, self._base)
                self._tracker.artifact_bytes(WORDS, plots.neighbours(words, event.run))


def start_tracker(experiment: Experiment, folder: str, task: Task, base: Base) -> Tracker:
    """The MLflow run of an experiment, with everything that is known before it starts."""
    store = experiment.compute.storage
    uri = experiment.tracking.uri or tracking_client.default_uri(store)
    local = outbox_folder(store)
    leftovers = threading.Thread(target=uploader.ship_leftovers, args=(local, uri), daemon=True)
    leftovers.start()  # what earlier runs could not send
    tracker = open_tracker(experiment, experiment.name, experiment.name)
    tracker.params(experiment.model_dump(mode="json", include={"model", "prompt", "data", "train", "zero", "compute"}))
    tracker.tags(provenance.provenance() | {f"base.{part}": value for part, value in base.fingerprint.model_dump().items()})
    tracker.json("experiment.json", experiment.model_dump(mode="json"))
    contexts: tuple[Literal["training", "validation", "test"], ...] = ("training", "validation", "test")
    for split, context in zip((task.train, task.validation, task.test), contexts, strict=True):
        if split:
            tracker.dataset(split.name, split.source, split.fingerprint, context, len(split))
    return tracker


def open_tracker(experiment: Experiment, name: str, folder: str, parent: str | None = None) -> Tracker:
    """A run where the experiment is tracked; its outbox lies below `folder` in the storage."""
    store = experiment.compute.storage
    uri = experiment.tracking.uri or tracking_client.default_uri(store)
    outbox = outbox_folder(store) / folder / "tracking"
    root = tracking_client.default_artifact_root(store)
    return Tracker(uri, experiment.tracking.experiment, root, outbox, name, parent)


def outbox_folder(store: str) -> Path:
    """Where outboxes lie: plain local files, since an object store cannot append."""
    return Path(store) if storage.is_local(store) else Path.home() / ".cache" / "ptuning" / quote(store, safe="")
