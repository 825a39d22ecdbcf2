"""The record of a tuning job: what its client asked for, where it is, and what came of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ptuning.records import restored
from ptuning.registry.names import ORGANISATION, checkpoints_name, result_name, tuned_name

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
AUTO = "auto"


@dataclass
class Trial:
    """One soft prompt of a job: a slot of the standing group."""

    run: str
    """Name of its run, the job's id with its number."""
    experiment: dict[str, Any]
    """The tables that decide its result."""
    steps: int
    multiplier: float = 1.0
    """Of the server's learning rate."""
    status: Literal["open", "finished", "failed"] = "open"
    begun: bool = False
    """It has had a slot."""
    step: int = 0
    evaluated: int = 0
    """Step of the last evaluation."""
    measured: dict[str, float] = field(default_factory=dict)
    """Metrics of the result, as `validation_loss`."""
    soft_prompt: str | None = None
    """Folder of the result, relative to the job's."""
    content_hash: str | None = None
    message: str | None = None
    """Why it has no result."""


@dataclass
class Checkpoint:
    """An evaluation that was the best of the job, published under a name of its own."""

    id: str
    step: int
    created_at: int
    metrics: dict[str, float]
    folder: str
    """Relative to the job's."""
    version: str | None = None
    """In the registry; None: not yet."""
    withdrawn: bool = False
    """Newer ones have taken its place."""


@dataclass
class JobRecord:
    """A job, as its record holds it."""

    id: str
    owner: str
    created_at: int
    model: str
    """The base or soft prompt, as the client named it."""
    base: str
    """Public name of the base."""
    training_file: str
    seed: int
    hyperparameters: dict[str, Any]
    """n_epochs, batch_size and learning_rate_multiplier, "auto" until they are decided."""
    method: dict[str, Any]
    """As the client sent it."""
    validation_file: str | None = None
    suffix: str = ""
    metadata: dict[str, str] | None = None
    status: Status = "validating_files"
    base_fingerprint: str = ""
    metric: str = "loss"
    """The validation metric that chooses."""
    parent: str | None = None
    """Folder of the soft prompt that it begins with, relative to the job's."""
    finished_at: int | None = None
    fine_tuned_model: str | None = None
    version: str | None = None
    """The result in the registry."""
    result_file: str | None = None
    result_files: list[str] = field(default_factory=list)
    tokens_per_step: float = 0.0
    error: dict[str, Any] | None = None
    trials: list[Trial] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)

    @property
    def code(self) -> str:
        """Eight characters of the id, in the names of its soft prompts."""
        return self.id.rpartition("-")[2][:8]

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def served_as(self) -> str:
        return tuned_name(self.base, self.suffix, self.code)

    @property
    def result_name(self) -> str:
        return result_name(self.suffix, self.code)

    @property
    def checkpoints_name(self) -> str:
        return checkpoints_name(self.suffix, self.code)

    @property
    def trained_tokens(self) -> int:
        """Tokens of the rows of all steps that were computed."""
        return round(self.tokens_per_step * sum(trial.step for trial in self.trials))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, plain: dict[str, Any]) -> JobRecord:
        """The inverse of `as_json`; keys of later versions are ignored."""
        trials = [restored(Trial, each) for each in plain.get("trials", [])]
        checkpoints = [restored(Checkpoint, each) for each in plain.get("checkpoints", [])]
        return restored(cls, plain | {"trials": trials, "checkpoints": checkpoints})

    def wire(self, estimated_finish: int | None = None) -> dict[str, Any]:
        """The job as clients see it: OpenAI's `fine_tuning.job`."""
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "model": self.model,
            "fine_tuned_model": self.fine_tuned_model,
            "organization_id": ORGANISATION,
            "status": self.status,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "result_files": self.result_files,
            "trained_tokens": self.trained_tokens if self.status == "succeeded" else None,
            "estimated_finish": estimated_finish,
            "seed": self.seed,
            "hyperparameters": self.hyperparameters,
            "method": self.method,
            "integrations": None,
            "metadata": self.metadata,
            "error": self.error,
            "user_provided_suffix": self.suffix or None,
            "soft_prompt": self.version,
        }

    def checkpoint_wire(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """OpenAI's `fine_tuning.job.checkpoint`."""
        return {
            "id": checkpoint.id,
            "object": "fine_tuning.job.checkpoint",
            "created_at": checkpoint.created_at,
            "fine_tuned_model_checkpoint": tuned_name(self.base, self.suffix, self.code, checkpoint.step),
            "fine_tuning_job_id": self.id,
            "step_number": checkpoint.step,
            "metrics": checkpoint.metrics,
        }


def now() -> int:
    """Unix seconds."""
    return int(time.time())
