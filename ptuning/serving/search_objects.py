"""Requests and answers about the searches in the server's storage. Imports only pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ptuning.serving.protocol import Shape

Trial = Annotated[str, Field(min_length=1, max_length=64)]
Setting = Annotated[str, Field(min_length=1, max_length=64)]


class SearchInstruction(Shape):
    action: Literal["stop", "clone", "extend"]
    """stop: end a trial and keep its best soft prompt; clone: add a trial with the settings of another, changed; extend: add
    trials."""
    trial: Trial | None = None
    """The trial to stop or to clone, t003."""
    changes: dict[Setting, float | int | str] = Field(default={}, max_length=64)
    """What differs in the clone: {"train.learning_rate": 0.1}."""
    warm: bool = False
    """The clone continues from the trial's newest checkpoint."""
    more: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Further trials, for extend."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class SearchSummary(_Answer):
    """A search."""

    name: str
    object: Literal["search"] = "search"
    status: Literal["running", "interrupted", "finished"]
    """interrupted: no driver is there; one continues with `ptuning search --resume`."""
    metric: str
    """What trials are compared by."""
    trials: int
    """Trials and finalists so far."""
    ended: int
    best: float | None
    """The best value of the metric on the validation rows so far."""
    best_trial: str | None


class SearchList(_Answer):
    object: Literal["list"] = "list"
    data: list[SearchSummary]


class SearchTrial(_Answer):
    """A trial, or the further seed of a finalist."""

    run: str
    status: Literal["running", "finished", "stopped", "failed"]
    finalist: bool
    step: int
    settings: dict[str, Any]
    origin: str | None
    """The trial that it is a clone of."""
    curve: list[tuple[int, float]]
    """Step and value of the metric of each evaluation."""
    message: str | None


class SearchIntervention(_Answer):
    """What a person told a search, and what became of it."""

    id: str
    object: Literal["search.intervention"] = "search.intervention"
    action: Literal["stop", "clone", "extend"]
    by: str
    created_at: int
    trial: str | None
    changes: dict[str, Any]
    warm: bool
    more: int
    taken: bool | None
    """null: no driver has seen it yet; false: it was refused."""
    answer: str


class SearchDetails(SearchSummary):
    """A search with its trials."""

    data: list[SearchTrial]
    interventions: list[SearchIntervention]
    """The oldest first; those that no driver has seen yet are last."""
