"""[search]: the search over soft prompts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError, field_validator

from ptuning.errors import suggest
from ptuning.settings.fields import Count, Init, Kind, Number, Positive, PositiveNumber, Table
from ptuning.settings.training import TrainConfig


class SearchConfig(Table):
    """The search over soft prompts."""

    trials: Positive = 16
    """Number of configurations to try."""
    kind: tuple[Kind, ...] | None = None
    """Values of prompt.kind to choose from: soft prompts of both kinds train side by side. Default: prompt.kind alone."""
    length: tuple[Positive, ...] = (10, 20, 50, 100)
    """Values of prompt.length to choose from."""
    learning_rate: tuple[PositiveNumber, PositiveNumber] = (0.01, 1.0)
    """[low, high], sampled log-uniformly."""
    init: tuple[Init, ...] = ("random", "vocabulary")
    """Values of prompt.init to choose from."""
    space: dict[str, tuple[float | str, ...]] = {}
    """Further settings of [train] to search: "train.warmup" = [low, high] is a range; three or more numbers, and words as in
    "train.optimizer" = ["adamw", "adafactor"], are choices."""
    slots: Positive | Literal["auto"] = "auto"
    """Soft prompts that train side by side over one base. auto: as many as fit into memory and raise the throughput."""
    groups: Positive = 1
    """Groups of workers. Each group loads a base of its own."""
    scheduler: Literal["asha", "fifo", "pbt"] = "asha"
    """asha: stop weak trials early; fifo: train every trial to the end; pbt: weak trials continue from strong ones."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How configurations are chosen."""
    finalists: Positive = 3
    """Number of best configurations that are trained again with several seeds."""
    seeds: Positive = 3
    """Seeds per finalist. The winner is the finalist with the best mean."""
    prefer_short: Number = 0.0
    """Bonus in units of the metric for halving the length: a shorter soft prompt is cheaper to serve."""
    seed: Count = 0
    """Seed of the search: it determines the configurations."""

    @field_validator("kind", "length", "init")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None and not values:
            raise ValueError("is empty; list at least one value")
        return values

    @field_validator("learning_rate")
    @classmethod
    def _low_to_high(cls, values: tuple[float, float]) -> tuple[float, float]:
        if not 0 < values[0] <= values[1]:
            raise ValueError(f"[{values[0]}, {values[1]}] is not a valid range; write [low, high] with 0 < low <= high")
        return values

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, tables: Any) -> Any:
        """`search.space.train.warmup=...` on the command line creates nested tables."""
        if not isinstance(tables, dict):
            return tables
        flat: dict[str, Any] = {}
        for key, value in tables.items():
            flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        return flat

    @field_validator("space")
    @classmethod
    def _searchable(cls, space: dict[str, tuple[float | str, ...]]) -> dict[str, tuple[float | str, ...]]:
        for key, values in space.items():
            table, _, name = key.partition(".")
            known = SEARCHABLE.get(table, {})
            if name not in known:
                names = sorted(f"{table}.{name}" for table, fields in SEARCHABLE.items() for name in fields)
                fix = suggest(key, names, f"use one of {', '.join(names)}")
                raise ValueError(f"{key!r} is not a searchable setting; {fix}")
            if takes_words(key):
                if len(values) < 2 or len(set(values)) < len(values):
                    raise ValueError(f'"{key}" = {list(values)} is not a choice; list two or more different words')
            elif len(values) < 2 or (len(values) == 2 and not _rises(*values)):
                raise ValueError(
                    f'"{key}" = {list(values)} is not a valid range; write [low, high] with low < high, or three or more values'
                )
            for value in values:
                whole = isinstance(value, float) and is_whole(key) and value == int(value)
                try:
                    known[name].model_validate({name: int(value) if whole else value})
                except ValidationError as error:
                    message = error.errors()[0]["msg"]
                    got, fix = (repr(value), "change it") if isinstance(value, str) else (f"{value:g}", "change the range")
                    raise ValueError(f'"{key}": {message[0].lower()}{message[1:]} (got {got}); {fix}') from None
        return space

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # the space is a dict


SEARCHABLE: dict[str, dict[str, type[Table]]] = {
    "train": dict.fromkeys(
        ("weight_decay", "warmup", "batch_size", "patience", "clip", "text_weight", "average_decay", "optimizer", "schedule"),
        TrainConfig,
    ),
}
"""Settings that `search.space` may contain. Length and learning rate have keys of their own; steps are the budget."""


def _rises(low: float | str, high: float | str) -> bool:
    return isinstance(low, str) or isinstance(high, str) or low < high  # a word is refused as a value


def takes_words(key: str) -> bool:
    """True if the values of a searchable setting are words, which are choices."""
    return key in ("train.optimizer", "train.schedule")


def is_whole(key: str) -> bool:
    """True if a searchable setting accepts only whole numbers."""
    return key in ("train.batch_size", "train.patience")
