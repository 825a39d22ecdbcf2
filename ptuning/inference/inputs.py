"""From a request's text to token ids, by the `Encoder` that training used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ptuning.data.conversations import MESSAGES
from ptuning.data.encoder import Encoder
from ptuning.data.row import look_up, root
from ptuning.inference.types import RequestError
from ptuning.settings.data import Template
from ptuning.settings.template import template_defaults, template_fields

RAW = Template(input="{text}", target="{text}", truncate="error", special_tokens="tokens")
"""Text as it is: the client writes the whole input, special tokens included."""

Text = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A text; the fields of a template with several; for a chat template a conversation, as a list of messages."""


def fields_of(encoder: Encoder, text: Text) -> dict[str, Any]:
    """A text, an object (as a mapping or as JSON text) or a conversation -> the template's fields.

    Raises:
        RequestError: the fields are not those of the template.
    """
    if encoder.template.is_chat:
        return {MESSAGES: _messages(text)}
    wanted = template_fields(encoder.template.input)
    optional = template_defaults(encoder.template.input)
    required = [name for name in wanted if name not in optional] or wanted[:1]
    if isinstance(text, str) and len(wanted) <= 1:
        return dict.fromkeys(wanted, text)
    fields: Any = text
    if isinstance(text, str):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
    if isinstance(fields, Mapping):
        found = {}
        for name in wanted:
            with suppress(KeyError):
                found[name] = look_up(fields, name)
        known = {root(name, fields) for name in wanted}
        if set(fields) <= known and set(required) <= set(found) and all(isinstance(value, str) for value in found.values()):
            return found
    if isinstance(text, str) and len(required) == 1:
        return {required[0]: text}
    listed = ", ".join(f"{name} (optional)" if name in optional else name for name in wanted)
    raise RequestError(f"the template has the fields {listed}; send a JSON object with a text for each")


def _messages(text: Text) -> list[dict[str, str]]:
    """A conversation; a text is one message of the user."""
    if isinstance(text, str):
        return [{"role": "user", "content": text}]
    messages = text.get(MESSAGES) if isinstance(text, Mapping) and set(text) == {MESSAGES} else text
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("a text is neither a string nor a conversation; send a string, or an object with the list messages")
    for message in messages:
        known = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not known or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise RequestError("messages: one has no role (system, user, assistant) or no text; send both with each message")
    if messages[-1]["role"] == "assistant":
        raise RequestError("messages: the last one is of the assistant; end with a message of the user")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def row_ids(encoder: Encoder, fields: Mapping[str, Any], room: int, truncate: bool) -> list[int]:
    """The token ids of a row in at most `room` tokens.

    Raises:
        RequestError, DataError: the row is too long and must not be truncated, or has no text.
    """
    if not truncate or encoder.template.truncate == "error":
        size = len(encoder.input_ids(fields))
        if size > room:
            raise too_long(size, room)
    return encoder.fitted_ids(fields, room)


def too_long(size: int, room: int) -> RequestError:
    return RequestError(f"the text has {size} tokens, {room} fit; shorten the text or lower max_tokens")
