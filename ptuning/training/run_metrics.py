"""What Ray exports of the runs of a cluster, for alerts. Ray's port needs no key, so no run is named there."""

from __future__ import annotations

import time

from ray.util.metrics import Gauge

PROGRESS = "ptuning_run_progress_timestamp_seconds"


class RunMetrics:
    """Of one driver. Ray adds the prefix `ray_` and the driver's node and process."""

    def __init__(self) -> None:
        self._progress = Gauge(PROGRESS, "When the workers of a run or a search were last heard of, in Unix seconds.")
        self.progress()

    def progress(self) -> None:
        """The workers have reported something."""
        self._progress.set(time.time())
