"""What a soft prompt is asked about a row of a table, and the row's true answer if it has one. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ptuning.data.conversations import MESSAGES, ChatRows, read, recognise
from ptuning.data.row import look_up, missing, root, texts_of
from ptuning.errors import DataError
from ptuning.settings.data import DataConfig, MessagesConfig, Template
from ptuning.settings.template import fill, template_fields


@dataclass(frozen=True)
class RowTexts:
    """Rows -> the fields of a soft prompt's template, as training made them."""

    template: Template
    messages: MessagesConfig | None = None
    """Where the messages of its training rows were; None: recognised from the rows."""

    @staticmethod
    def of_card(template: Template, experiment: Mapping[str, Any] | None) -> RowTexts:
        """For a template, and the experiment of its card."""
        given = (experiment or {}).get("data", {}).get("messages") if template.is_chat else None
        return RowTexts(template, MessagesConfig.model_validate(given) if given else None)

    @cached_property
    def required(self) -> list[str]:
        """The fields that a row needs; of conversations, `for_columns` says it."""
        if self.template.is_chat:
            return []
        return [name for name in template_fields(self.template.input) if name not in self.template.defaults]

    @cached_property
    def fields(self) -> list[str]:
        """All fields that are read: those of the input, and those of the target, which hold the true answer."""
        if self.template.is_chat:
            own = [self.messages.column] if self.messages else ["messages", "conversations", "conversation"]
            return [*own, "prompt", "completion", "system", "tools"]
        return list(dict.fromkeys([*template_fields(self.template.input), *template_fields(self.template.target)]))

    def check_columns(self, columns: Collection[str], row: Mapping[str, Any], source: str) -> None:
        """Check that a table can be answered at all. `row`: its first one.

        Raises:
            DataError: it lacks a column, or its rows are not conversations.
        """
        for name in self.required:
            if root(name, columns) is None:
                raise DataError(f"{source}: {missing(name, columns)}")
        if self.template.is_chat and not self._only_prompt(row):
            self._recognised(row, source)

    def asked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The texts of the template's fields; of a conversation, its messages as JSON text.

        Raises:
            DataError: a field is missing, or is not a text. The message does not name the row.
        """
        if self.template.is_chat:
            before, _ = self._conversation(row)
            if not any(message["content"].strip() for message in before):
                raise DataError("the conversation has no text to answer; fill the row or remove it")
            return {MESSAGES: json.dumps(before, ensure_ascii=False)}
        return texts_of(row, template_fields(self.template.input), self.template.defaults)

    def truth(self, row: Mapping[str, Any]) -> list[str]:
        """The true answers of a row, as its columns say; empty if it has none."""
        try:
            if self.template.is_chat:
                answer = self._conversation(row)[1]
                return [answer.strip()] if answer.strip() else []
            fields = template_fields(self.template.target)
            if self.template.labels:
                return [text for text in texts_of(row, fields).values() if text.strip()]
            if len(fields) == 1 and isinstance(value := look_up(row, fields[0]), list):
                return [text for text in value if isinstance(text, str) and text.strip()]
            texts = texts_of(row, fields, self.template.defaults)
            known = any(text.strip() for text in texts.values())
            return [fill(self.template.target, texts).lstrip()] if known and not self._is_raw else []
        except (DataError, KeyError):
            return []

    @property
    def _is_raw(self) -> bool:
        """Text as it is: the soft prompt knows no template, and its target names the field of its input."""
        return template_fields(self.template.target) == template_fields(self.template.input)

    def _conversation(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """The messages that wait for an answer, and the answer that follows them, or ""."""
        if self._only_prompt(row):
            return [{"role": "user", "content": str(row["prompt"])}], ""
        messages = read(self._recognised(row, "the row").texts(row)[MESSAGES])
        if messages[-1]["role"] == "assistant":
            return messages[:-1], str(messages[-1]["content"])
        return messages, ""

    def _only_prompt(self, row: Mapping[str, Any]) -> bool:
        return self.messages is None and isinstance(row.get("prompt"), str) and row.get("completion") in (None, "")

    def _recognised(self, row: Mapping[str, Any], source: str) -> ChatRows:
        there = {name: value for name, value in row.items() if value is not None}
        try:
            found = recognise(DataConfig(train=source, messages=self.messages), there, source)
        except DataError:
            names = ", ".join(f"'{name}'" for name in sorted(there)) or "none"
            wanted = f"'{self.messages.column}'" if self.messages else "messages, conversations, or prompt"
            raise DataError(
                f"{source}: the soft prompt was trained on conversations, and there is no column {wanted} with one (found: "
                f"{names}); name the column as in training"
            ) from None
        return found or ChatRows(("prompt", "completion"))
