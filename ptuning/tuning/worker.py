"""What one worker of the standing group does."""

from __future__ import annotations

from typing import Any

from ptuning.training.dispatched import work_dispatched


def work(config: dict[str, Any]) -> None:
    """Train the trials of jobs. `config`: as in `training.worker.run_worker`; `events` is the actor that owns the jobs."""
    work_dispatched(config, lambda pack, experiment: experiment.tuning.slots)
