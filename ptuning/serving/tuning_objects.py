"""Requests and answers about tuning jobs: OpenAI's, with settings of this product beside theirs. Imports only pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ptuning.serving.protocol import Name, Shape

Auto = Literal["auto"]
File = Annotated[str, Field(min_length=1, max_length=64)]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Label = Annotated[str, Field(min_length=1, max_length=1000)]
Labels = Annotated[list[Label], Field(min_length=2, max_length=1000)]
Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class OpenAIHyperparameters(Shape):
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] | None = None
    """Rows per step."""
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Factor of the server's learning rate. auto: several soft prompts train side by side with different ones."""
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] | None = None
    """Passes over the training rows. auto: as many steps as the server's experiment has, but at most 5 passes or 50 steps."""


class Hyperparameters(OpenAIHyperparameters):
    trials: Auto | Annotated[int, Field(ge=1, le=32)] | None = None
    """Soft prompts that are trained with different learning rates if the learning rate is auto. auto: the server's choice, and
    1 if any hyperparameter of OpenAI's is given."""
    prompt_length: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Virtual tokens."""
    prompt_kind: Literal["embedding", "kv"] | None = None
    init: Literal["random", "vocabulary", "text", "labels"] | None = None
    init_text: Text | None = None
    """Text for init = "text"."""
    objective: Literal["choice", "text"] | None = None
    """choice: the labels are compared; text: every token of the answer is trained. Default: choice if there are labels."""


class RowTemplate(Shape):
    input: Text
    """Text before the answer, with fields of the row in braces."""
    target: Text
    """The answer, for example " {label}"."""


class Supervised(Shape):
    hyperparameters: Hyperparameters | None = None
    labels: Literal["auto", "none"] | Labels | dict[str, Label] | None = None
    """All labels of a classification task, or a table from values of the rows to labels. auto (the default): the answers, if
    there are few different ones; none: the answers are free text."""
    template: RowTemplate | None = None
    """How rows with plain fields become text."""
    system: Text | None = None
    """System message of conversations that begin without one."""


class Method(Shape):
    type: Literal["supervised"]
    supervised: Supervised | None = None


class JobRequest(Shape):
    model: Name
    """The base's name, or a soft prompt to begin with: name:3, or the name of a job's result."""
    training_file: File
    validation_file: File | None = None
    """Rows that choose the best step. Default: a tenth of the training rows."""
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Name of the result in the registry."""
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: OpenAIHyperparameters | None = None
    """As `method.supervised.hyperparameters`, for older clients."""

    @model_validator(mode="after")
    def _said_once(self) -> JobRequest:
        if self.hyperparameters and self.method and self.method.supervised and self.method.supervised.hyperparameters:
            raise ValueError("hyperparameters: are in method, too; send them once")
        return self


class JobQuery(Shape):
    after: Annotated[str, Field(max_length=64)] | None = None
    """The last id of the page before."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 20


METADATA: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    "description": "Only jobs with these values, as metadata[key]=value; metadata=null: jobs without any.",
}
"""A filter of the list, for an OpenAPI document."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class JobFailure(_Answer):
    code: str
    message: str
    param: str | None


class Job(_Answer):
    """A job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    estimated_finish: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    integrations: None
    metadata: dict[str, str] | None
    error: JobFailure | None
    user_provided_suffix: str | None
    soft_prompt: str | None
    """The result in the registry, name:3."""


class JobList(_Answer):
    object: Literal["list"]
    data: list[Job]
    has_more: bool


class JobEvent(_Answer):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobEventList(_Answer):
    object: Literal["list"]
    data: list[JobEvent]
    has_more: bool


class JobCheckpoint(_Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class JobCheckpointList(_Answer):
    object: Literal["list"]
    data: list[JobCheckpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None
