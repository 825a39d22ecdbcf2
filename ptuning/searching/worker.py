"""What one worker of a search does."""

from __future__ import annotations

from typing import Any

from ptuning.searching.slot_count import count_slots
from ptuning.training.dispatched import work_dispatched


def work(config: dict[str, Any]) -> None:
    """Train the trials of a search. `config`: as in `training.worker.run_worker`; `events` is the dispatcher."""
    work_dispatched(config, count_slots)
