"""Types that the fields of several tables share, and the class of all tables."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
"""Names of experiments, runs and soft prompts: safe as a folder name, a registry entry and a model id."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""Ids of bases on the Hugging Face Hub: the oldest have no organisation, as gpt2."""

EMPTY = "is empty (an unset shell variable?); give it a value, or leave it out"
"""The message for a blank setting or command-line option that needs a value."""


def _non_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(EMPTY)
    return text


NonBlank = Annotated[str, AfterValidator(_non_blank)]
"""A path, address, URI or name. A blank one could be taken for the working folder or `/`."""

EightBits = Literal["int8", "fp8"]
Kind = Literal["embedding", "kv"]
Init = Literal["random", "vocabulary", "text", "labels", "soft-prompt"]

Metric = Literal["loss", "accuracy", "macro_f1", "exact_match", "token_f1", "rouge_l", "bleu"]

Share = Annotated[float, Field(ge=0, lt=1, strict=True)]

Positive = Annotated[int, Field(gt=0, strict=True)]

Count = Annotated[int, Field(ge=0, strict=True)]

PositiveNumber = Annotated[float, Field(gt=0, strict=True)]

Number = Annotated[float, Field(ge=0, strict=True)]

CLASSIFICATION_METRICS: tuple[Metric, ...] = ("loss", "accuracy", "macro_f1")

GENERATION_METRICS: tuple[Metric, ...] = ("loss", "exact_match", "token_f1", "rouge_l", "bleu")

MARGIN = 0.01
"""How much worse than the champion's a metric may be: absolute for accuracies and other scores, relative for losses."""


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=False)
