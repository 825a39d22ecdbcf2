"""[tuning]: training as a service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ptuning.settings.fields import Count, Positive, PositiveNumber, Table

Slots = Annotated[int, Field(gt=0, le=32, strict=True)]
"""At most as many as train side by side (`model.limits.MOST_SLOTS`)."""


class TuningConfig(Table):
    """Training as a service: the server takes jobs from clients, which train side by side over the base that it serves."""

    workers: Count = 0
    """Data-parallel workers of the group that trains the jobs, beside the server's replicas. 0: the server takes no jobs. The
    group starts with the first job."""
    slots: Slots = 8
    """Soft prompts that train side by side. Further ones wait."""
    trials: Slots = 3
    """Soft prompts of a job that leaves the learning rate to the server: their learning rates are spread over
    `search.learning_rate`, and the one that is best on the validation rows is kept."""
    idle_s: PositiveNumber = 300.0
    """Seconds without a job after which the group ends."""
    jobs_per_key: Positive = 16
    """Maximum jobs of one API key that have not ended."""
    slots_per_key: Positive | None = None
    """Maximum slots of one API key. Default: no limit; waiting jobs of the key with the fewest slots come first in any case."""
    file_mb: Positive = 512
    """Maximum size of an uploaded file in MB."""
    files_mb_per_key: Positive = 10_240
    """Maximum size of all uploaded files of one API key together in MB."""
