"""What a job tells its client: events, the metrics of checkpoints, and the file with its results."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any, Literal

from ptuning.tuning.ids import new_id
from ptuning.tuning.job_store import Progress
from ptuning.tuning.jobs import now

COLUMNS = (
    *("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"),
    *("full_valid_loss", "full_valid_mean_token_accuracy"),
)
"""Of the file with a job's results: OpenAI's names. All validation rows are read each time, so `valid_` and `full_valid_` are
the same; accuracies are those of the labels, and empty without labels. That of training rows is empty: a step keeps no
logits."""
EVENTS, POINTS = 50, 500
"""Events with metrics, and points of the learning curve, of a trial at most, besides its evaluations."""


def event(
    message: str,
    level: Literal["info", "warn", "error"] = "info",
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.event`."""
    return {
        "id": new_id("ftevent"),
        "object": "fine_tuning.job.event",
        "created_at": now(),
        "level": level,
        "message": message,
        "type": "metrics" if data else "message",
        "data": dict(data or {}),
    }


def validation_metrics(step: int, values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an evaluation, with OpenAI's names in front of our own."""
    found = {"step": float(step)}
    for ours, theirs in (("loss", "loss"), ("accuracy", "mean_token_accuracy")):
        if ours in values:
            found |= {f"valid_{theirs}": values[ours], f"full_valid_{theirs}": values[ours]}
    return {key: value for key, value in {**found, **values}.items() if math.isfinite(value)}


def due(step: int, steps: int, most: int) -> bool:
    """Whether a step is one of at most `most` that are spread over all."""
    return step == steps or step % max(1, math.ceil(steps / most)) == 0


def result_file(progress: Progress, trial: int) -> bytes:
    """The learning curve of a trial as CSV: a line per step that was kept."""
    losses = {int(step): loss for step, loss in progress.curves[trial]}
    evaluations = {each["step"]: validation_metrics(each["step"], each["values"]) for each in progress.evaluations[trial]}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for step in sorted({*losses, *evaluations}):
        writer.writerow({"train_loss": losses.get(step, ""), **evaluations.get(step, {}), "step": step})
    return text.getvalue().encode()
