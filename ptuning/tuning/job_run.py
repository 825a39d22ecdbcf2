"""The MLflow run of a job: settings, data sets, metrics of every step of every trial, and the result."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.tracking.tracker import Status, Tracker
from ptuning.training.messages import Evaluated, Event, Finished, Stepped
from ptuning.training.run_tracking import open_tracker
from ptuning.tuning.jobs import JobRecord

log = logger(__name__)
FLUSH = 30.0
"""Seconds to wait for MLflow before a result is published without its run."""


class JobRun:
    """The run of one job. Losing MLflow never hurts a job: records wait on disk."""

    def __init__(self, record: JobRecord, server: Experiment) -> None:
        self._many = len(record.trials) > 1
        self._tracker: Tracker | None = None
        try:
            self._tracker = open_tracker(server, record.served_as, f"tuning/jobs/{record.id}")
            tables: dict[str, Any] = {key: record.trials[0].experiment[key] for key in ("prompt", "data", "train")}
            self._tracker.params(tables | {"job": record.id, "trials": len(record.trials)})
            self._tracker.tags({"ptuning.job": record.id, "ptuning.owner": record.owner})
        except (UserError, OSError) as error:
            log.warning("%s is not tracked: %s", record.id, error)

    def record(self, trial: int, event: Event) -> None:
        """Log an event of a trial."""
        if self._tracker is None:
            return
        prefix = f"trial_{trial}/" if self._many else ""
        kinds = {Stepped: "train", Evaluated: "validation", Finished: "final"}
        split = kinds.get(type(event))
        values: dict[str, float] | None = getattr(event, "values", None)
        if split is None or not values:
            return
        with suppress(OSError):  # the disk is full; the job's own record says what it has reached
            self._tracker.metrics(
                {f"{prefix}{split}/{name}": value for name, value in values.items()}, event.step, event.time_ms
            )

    def run_id(self) -> str | None:
        """MLflow's id; None if it does not respond."""
        if self._tracker is None:
            return None
        if self._tracker.run_id is None:
            self._tracker.flush(FLUSH)
        return self._tracker.run_id

    def end(self, status: Status, tags: dict[str, str]) -> None:
        """Close the run. What MLflow has not taken yet is sent later."""
        if self._tracker is None:
            return
        with suppress(OSError):
            self._tracker.tags(tags)
            self._tracker.finish(status)
        self._tracker.close(deadline_s=FLUSH)
        self._tracker = None
