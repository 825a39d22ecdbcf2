"""Text of a request -> token ids: templates, fields, conversations. Tokenised by the `Encoder` that training uses."""

from __future__ import annotations

import json
from typing import Any

from jinja2.exceptions import TemplateError

from ptuning.config import template_fields
from ptuning.data.encoder import Encoder
from ptuning.inference.types import RequestError
from ptuning.serving.protocol import ChatRequest
from ptuning.serving.served_models import Served


def chat_ids(served: Served, request: ChatRequest, room: int) -> list[int]:
    """The token ids of a conversation.

    Raises:
        RequestError, DataError: the conversation does not fit, or does not match the template.
    """
    if served.encoder is None:
        return _conversation(served, request, room)
    users = [message for message in request.messages if message.role == "user"]
    if not users:
        raise RequestError("messages: there is no user message; send one")
    return row_ids(served.encoder, fields_of(served.encoder, users[-1].text), room, request.truncate)


def fields_of(encoder: Encoder, text: str | dict[str, str]) -> dict[str, str]:
    """A text, or an object as a dict or as JSON text -> the template's fields.

    Raises:
        RequestError: the fields are not those of the template.
    """
    wanted = template_fields(encoder.template.input)
    if isinstance(text, str) and len(wanted) <= 1:
        return dict.fromkeys(wanted, text)
    fields: Any = text
    if isinstance(text, str):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
    if (
        not isinstance(fields, dict)
        or set(fields) != set(wanted)
        or not all(isinstance(value, str) for value in fields.values())
    ):
        raise RequestError(f"the template has the fields {', '.join(wanted)}; send a JSON object with a text for each")
    return fields


def row_ids(encoder: Encoder, fields: dict[str, str], room: int, truncate: bool) -> list[int]:
    """The token ids of a row in at most `room` tokens.

    Raises:
        RequestError, DataError: the row is too long and must not be truncated, or has no text.
    """
    if not truncate or encoder.template.truncate == "error":
        size = len(encoder.input_ids(fields))
        if size > room:
            raise too_long(size, room)
    return encoder.fitted_ids(fields, room)


def raw_ids(served: Served, text: str, room: int) -> list[int]:
    """The token ids of text without a template.

    Raises:
        RequestError, DataError: the text is too long or empty.
    """
    return row_ids(served.raw, {"text": text}, room, truncate=False)


def _conversation(served: Served, request: ChatRequest, room: int) -> list[int]:
    tokenizer = served.raw.tokenizer
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template; use /v1/completions, or a soft prompt with a template")
    messages = [{"role": message.role, "content": message.text} for message in request.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise any error about roles that it does not support
        said = f" ({' '.join(str(error).split())[:200]})" if type(error) is TemplateError else ""  # the message of its author
        raise RequestError(f"messages: the chat template refuses them{said}; change their order or roles") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > room:
        raise too_long(len(ids), room)
    return ids


def too_long(size: int, room: int) -> RequestError:
    return RequestError(f"the text has {size} tokens, {room} fit; shorten the text or lower max_tokens")
