"""Rows that are conversations -> messages in one form: `messages`, ShareGPT's `conversations`, `prompt` with `completion`.

A conversation is a list of messages with the keys `role` (system, developer, user, assistant), `content` (text) and, if they
differ from the default, `weight` (0: this answer is not trained) and `reasoning_content`. Further keys of a message are ignored
like further columns of a row, except those that change its meaning (tools, images).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptuning.errors import DataError
from ptuning.settings.data import DataConfig, MessagesConfig

Message = dict[str, Any]

MESSAGES = "messages"
"""Field of a row that holds its conversation as JSON text."""

ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant")),
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
}
"""Names of roles, with their usual names where these differ."""

_TOOLS = ("tool_calls", "function_call", "tool_call_id")
_COLUMNS = ("messages", "conversations", "conversation")
_PAIR = ("prompt", "completion")
KNOWN = (*_COLUMNS, *_PAIR)
"""Columns of conversations that are recognised."""


@dataclass(frozen=True)
class ChatRows:
    """How the rows of a source become conversations."""

    columns: tuple[str, ...]
    """Columns with messages, in order: one, or prompt and completion."""
    role: str = "role"
    content: str = "content"
    optional: tuple[str, ...] = ()
    """Of `system` and `tools` the columns that the first row has."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (MESSAGES,)

    @property
    def key(self) -> list[Any]:
        """Everything that determines the result for a row."""
        return [1, self.columns, self.role, self.content, self.optional]

    def texts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The conversation of a row, as JSON text in the field `messages`.

        Raises:
            DataError: it is not a conversation that can be trained. The message does not name the row.
        """
        found: list[Message] = []
        for column, role in zip(self.columns, ("user", "assistant") if len(self.columns) > 1 else ("",), strict=True):
            found += self._messages(column, row.get(column), role)
        if _listed(row.get("tools")):
            raise DataError("the field 'tools' is not empty, and tools are not supported; leave the row out")
        system = row.get("system")
        if isinstance(system, str) and system.strip() and found[0]["role"] not in ("system", "developer"):
            found.insert(0, {"role": "system", "content": system})
        return {MESSAGES: json.dumps(found, ensure_ascii=False)}

    def _messages(self, column: str, value: Any, role: str) -> list[Message]:
        if role and isinstance(value, str) and not isinstance(_listed(value), list):
            return [{"role": role, "content": value}]
        messages = _listed(value)
        if not isinstance(messages, list) or not messages:
            kind = "empty" if messages in (None, [], "") else f"a {type(messages).__name__}"
            raise DataError(f"the field '{column}' is {kind}, not a list of messages; write a list of objects")
        return [self._message(each, f"message {place} of '{column}'") for place, each in enumerate(messages, 1)]

    def _message(self, message: Any, place: str) -> Message:
        if not isinstance(message, Mapping):
            raise DataError(f"{place} is not an object; write it with {self.role} and {self.content}")
        used = [key for key in _TOOLS if message.get(key)]
        if used:
            raise DataError(f"{place} has '{used[0]}', and tools are not supported; leave the row out")
        role = message.get(self.role)
        if role not in ROLES:
            raise DataError(f"{place}: its role {role!r} is not system, user or assistant; correct it")
        text = text_of(message.get(self.content), f"{place}: '{self.content}'")
        found: Message = {"role": ROLES[role] or role, "content": text}
        weight = message.get("weight")
        if weight is not None:
            if weight not in (0, 1) or found["role"] != "assistant":
                raise DataError(f"{place}: its weight is {weight!r}; write 0 or 1, in messages of the assistant only")
            found |= {} if weight else {"weight": 0}
        thought = message.get("reasoning_content")
        return found | ({"reasoning_content": thought} if isinstance(thought, str) and thought else {})


def text_of(content: Any, place: str) -> str:
    """The text of a message: a string, or a list of parts of the type text.

    Raises:
        DataError: it is something else.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise DataError(f"{place} has parts that are not texts; keep its texts only")
    kind = "null" if content is None else f"a {type(content).__name__}"
    raise DataError(f"{place} is {kind}, not a text; fill it or remove the row")


def recognise(config: DataConfig, row: Mapping[str, Any], source: str) -> ChatRows | None:
    """What the rows of a task are that has no `data.input`, from its first row; None: `prompt` and `completion` as texts.

    Raises:
        DataError: neither conversations nor pairs.
    """
    optional = tuple(name for name in ("system", "tools") if name in row)
    if config.messages:
        if config.messages.column not in row:
            raise DataError(f"{source}: has no column '{config.messages.column}' ({_names(row)}); correct data.messages")
        return ChatRows((config.messages.column,), config.messages.role, config.messages.content, optional)
    for column in _COLUMNS:
        messages = _listed(row.get(column))
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            usual = MessagesConfig(column=column)
            keys = ("from", "value") if "from" in messages[0] and "role" not in messages[0] else (usual.role, usual.content)
            return ChatRows((column,), *keys, optional)
    if set(_PAIR) <= set(row):
        texts = all(not isinstance(_listed(row[column]), list) for column in _PAIR)
        return None if texts else ChatRows(_PAIR, optional=optional)
    raise DataError(
        f"{source}: data.input and data.target are missing, and its rows have neither messages, nor conversations, nor prompt "
        f"and completion ({_names(row)}); set data.input and data.target, or data.messages"
    )


def pairs() -> ChatRows:
    """Rows with `prompt` and `completion` as texts: one message of the user, and the answer."""
    return ChatRows(_PAIR)


def read(value: object) -> list[Message]:
    """The conversation in a field: a list of messages, or `ChatRows.texts`' JSON text."""
    found: Sequence[Any] = json.loads(value) if isinstance(value, str) else value  # type: ignore[assignment]
    return list(found)


def answer_of(messages: Sequence[Message]) -> str:
    """The last answer that is trained; "" if there is none."""
    last = _last_answer(messages)
    return "" if last is None else str(messages[last]["content"])


def asked(messages: Sequence[Message]) -> str:
    """What stands before the last answer, as a text that is the same for equal conversations."""
    before = messages[: _last_answer(messages)]
    if len(before) == 1 and before[0]["role"] == "user":
        return str(before[0]["content"])
    return json.dumps(before, ensure_ascii=False)


def _last_answer(messages: Sequence[Message]) -> int | None:
    answers = (at for at, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight", 1))
    return max(answers, default=None)


def _listed(value: Any) -> Any:
    """A value, with a list that is written as JSON text as this list: CSV has no lists."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ ", "[\n", "[]"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _names(row: Mapping[str, Any]) -> str:
    return f"found: {', '.join(repr(name) for name in sorted(row))}"
