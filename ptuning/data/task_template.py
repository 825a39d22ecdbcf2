"""The template of a task: as the experiment says, or recognised from the columns of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ptuning.data.chat_encoder import chat_template_of
from ptuning.data.conversations import KNOWN, MESSAGES, ChatRows, pairs, read, recognise
from ptuning.data.row import look_up
from ptuning.data.sources import first_row, shown
from ptuning.errors import DataError
from ptuning.paths import locate
from ptuning.settings.data import DataConfig, Template
from ptuning.settings.template import template_fields

LARGEST = 1 << 20
"""Maximum size of a chat template in bytes."""


@dataclass(frozen=True)
class TaskTemplate:
    """How the rows of a task become text."""

    template: Template
    rows: ChatRows | None = None
    """How its rows become conversations; None: they are plain fields."""
    note: str = ""
    """What was recognised, for people."""


def task_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, base: str) -> TaskTemplate:
    """The template of a task.

    Raises:
        DataError: the rows are not recognised, or there is no chat template.
    """
    values = {name: getattr(config, name) for name in Template.model_fields}
    if not config.is_chat:
        return TaskTemplate(Template(**values))
    rows = recognised(config)
    file = config.chat_template_file
    jinja = _text(file) if file else config.chat_template or chat_template_of(tokenizer)
    if rows is None and jinja is None and not any((config.system, config.chat_template_kwargs, config.loss)):
        plain = {"input": "{prompt}", "target": "{completion}"}
        note = "prompt and completion as plain text, because the base has no chat template"
        return TaskTemplate(Template(**{**values, **plain}), None, note)
    if jinja is None:
        raise DataError(
            f"data.chat_template: {base} has no chat template, which rows with messages need; set data.chat_template to a "
            "Jinja template or to a file that contains one"
        )
    found = rows or pairs()
    whose = "data.chat_template" if config.chat_template else "the base's chat template"
    what = " and ".join(found.columns)
    keys = "" if (found.role, found.content) == ("role", "content") else f" ({found.role}/{found.content})"
    trained = "the label in the last answer" if config.labels else "all answers" if config.loss == "all" else "the last answer"
    note = f"conversations in {what}{keys}, written by {whose}; trained: {trained}"
    if "strftime_now" in jinja and "date_string" not in (config.chat_template_kwargs or {}):
        note += '; the template may write the date of today, fix it with data.chat_template_kwargs.date_string = "26 Jul 2024"'
    return TaskTemplate(Template(**{**values, "chat_template": jinja}), found, note)


def has_answers(source: str | Sequence[str], found: TaskTemplate) -> bool:
    """Whether the first row of a source has what a target needs, or ends with an answer.

    Raises:
        DataError: the source is missing, unreadable or broken.
    """
    row = first_row(source, found.rows.columns if found.rows else template_fields(found.template.target))
    if found.rows:
        return read(found.rows.texts(row)[MESSAGES])[-1]["role"] == "assistant"
    try:
        values = [look_up(row, name) for name in template_fields(found.template.target)]
    except KeyError:
        return False
    return all(value is not None and value != "" for value in values)


def conversations(config: DataConfig) -> ChatRows | None:
    """How the rows of a task become conversations, for any base; None: they are plain fields.

    Raises:
        DataError: they are not recognised.
    """
    return (recognised(config) or pairs()) if config.is_chat else None


def recognised(config: DataConfig) -> ChatRows | None:
    """What the rows of a task are that has no `data.input`, as `recognise`.

    Raises:
        DataError: neither conversations nor pairs, or there are no rows.
    """
    known = (*KNOWN, config.messages.column) if config.messages else KNOWN
    return recognise(config, first_row(config.train, known), shown(config.train))


def _text(given: str) -> str:
    """The chat template in a file.

    Raises:
        DataError: there is no such file, or it is not a text.
    """
    path = locate(given)
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"data.chat_template: {given} is larger than {LARGEST >> 20} MiB; give a chat template")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"data.chat_template: {given} cannot be read ({reason}); give a Jinja template, or a file that contains one"
        ) from None
    if not text.strip():
        raise DataError(f"data.chat_template: {given} is empty; write the template into it")
    return text
