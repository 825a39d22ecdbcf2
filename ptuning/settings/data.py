"""[data]: the rows of a task, and how a row becomes text."""

from __future__ import annotations

import string
from typing import Any, Literal

from pydantic import field_validator, model_validator

from ptuning.settings.fields import NonBlank, Positive, Table


class Template(Table):
    """How a row becomes text. Stored in the card: training, evaluation and serving see the same tokens."""

    input: str
    """Text before the target, with fields of the row in braces: "Message: {text}\\nLabel:"."""
    target: str
    """Text to predict, for example " {label}". The end token is appended."""
    labels: tuple[str, ...] | None = None
    """All labels of a classification task. Without labels the target is free text."""
    max_tokens: Positive | None = None
    """Maximum tokens of input + target. Default: the base's context minus the soft prompt."""
    truncate: Literal["left", "right", "error"] = "right"
    """How an input that is too long is shortened: its longest field is truncated on this side, the template's own words stay;
    error: the row is refused (a training row is dropped)."""
    special_tokens: Literal["text", "tokens"] = "text"
    """Special tokens of the base, such as </s>, in the fields of a row. text: they are read as text like any other, so a text
    cannot end the input or write another turn; tokens: they become the tokens themselves. Those in the template's own words are
    always tokens."""

    @classmethod
    def of_card(cls, template: Any) -> Any:
        """The template as a card has it. A card of an earlier version without `special_tokens` keeps its tokens."""
        return {"special_tokens": "tokens", **template} if isinstance(template, dict) else template

    @field_validator("input", "target")
    @classmethod
    def _fields_are_plain_names(cls, template: str) -> str:
        template_fields(template)
        return template

    @model_validator(mode="after")
    def _labels_fit_the_target(self) -> Template:
        if self.labels is None:
            if not template_fields(self.target):
                raise ValueError('target: contains no field of the row; write, for example, " {label}"')
            return self
        if len(template_fields(self.target)) != 1:
            raise ValueError('target: must contain exactly one field if there are labels; write, for example, " {label}"')
        if len(self.labels) < 2:
            raise ValueError("labels: has fewer than two labels; list at least two")
        twins = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twins:
            raise ValueError(f"labels: {twins[0]!r} is listed twice; list each label once")
        return self


class DataConfig(Template):
    """The task. A split is a file (.jsonl, .csv, .parquet), "hub:org/name:split", or "builtin:task/split"."""

    train: NonBlank
    """Rows to train on."""
    validation: NonBlank | None = None
    """Rows that select the best step. Without them the last step is kept."""
    test: NonBlank | None = None
    """Rows on which the best soft prompt is evaluated once, at the end."""


def template_fields(template: str) -> list[str]:
    """The fields of a template in order of appearance, each once.

    Raises:
        ValueError: unbalanced braces, or anything but a plain name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r} is not a valid template ({error}); write literal braces as {{{{ and }}}}") from None
    fields: dict[str, None] = {}
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{template!r}: {{{name}}} is not a plain field name; write literal braces as {{{{ and }}}}")
        fields[name] = None
    return list(fields)
