"""Text of a request -> token ids: templates, fields, conversations. Tokenised by the `Encoder` that training uses."""

from __future__ import annotations

from typing import Literal

from ptuning.data.chat_text import ChatText
from ptuning.data.conversations import MESSAGES, Message
from ptuning.inference.inputs import fields_of, row_ids, too_long
from ptuning.inference.types import RequestError
from ptuning.serving.loading import Served
from ptuning.serving.protocol import ChatRequest

ChatUse = Literal["whole", "last"]
"""`serve.chat`."""


def chat_ids(served: Served, request: ChatRequest, messages: list[Message], room: int, use: ChatUse) -> list[int]:
    """The token ids of a request's conversation. `messages`: as a chat template takes it; `use`: what a soft prompt with a
    plain template takes of it.

    Raises:
        RequestError, DataError: the conversation does not fit, or does not match the template.
    """
    if served.encoder is not None and served.conversation is None:
        given: list[Message] = [{"role": message.role, "content": message.text} for message in request.messages]
        text = _last(given) if use == "last" else _only(served.id, given)
        return row_ids(served.encoder, fields_of(served.encoder, text), room, request.truncate)
    if served.conversation is None:
        raise RequestError("this model has no chat template; use /v1/completions, or a soft prompt with a template")
    continued = bool(request.continue_final_message)
    last = messages[-1]["role"]
    if last == "assistant" and not continued:
        raise RequestError(
            "messages: the last one is of the assistant; end with a message of the user, or send continue_final_message = true "
            "to have it continued"
        )
    if continued and last != "assistant":
        raise RequestError("continue_final_message: the last message is not of the assistant; send the begin of an answer")
    if served.encoder is not None and not continued:
        return row_ids(served.encoder, {MESSAGES: messages}, room, request.truncate)
    return _fitting(served.conversation, messages, continued, room)


def text_ids(served: Served, text: str, room: int) -> list[int]:
    """The token ids of text without a template; of a soft prompt that takes conversations, as one message of the user.

    Raises:
        RequestError, DataError: the text is too long or empty.
    """
    if served.encoder is not None and served.conversation is not None:
        return row_ids(served.encoder, fields_of(served.encoder, text), room, truncate=False)
    return row_ids(served.raw, {"text": text}, room, truncate=False)


def _fitting(conversation: ChatText, messages: list[Message], continued: bool, room: int) -> list[int]:
    ids = conversation.ids(messages, continued=continued)
    if len(ids) > room:
        raise too_long(len(ids), room)
    return ids


def _last(messages: list[Message]) -> str:
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise RequestError("messages: there is no user message; send one")
    return str(users[-1]["content"])


def _only(name: str, messages: list[Message]) -> str:
    """The text of a conversation that is one message of the user.

    Raises:
        RequestError: it is more, for which a plain template has no place.
    """
    roles = [message["role"] for message in messages]
    if roles == ["user"]:
        return str(messages[0]["content"])
    if "user" not in roles:
        raise RequestError("messages: there is no user message; send one")
    systems = [role for role in roles if role in ("system", "developer")]
    more = (
        f"a {systems[0]} message" if systems else "the begin of an answer" if roles[-1] == "assistant" else "earlier messages"
    )
    raise RequestError(
        f"messages: {name} was trained on single texts and has no place for {more}; send one user message, have the server use "
        'the last one only with serve.chat = "last", or train a soft prompt on conversations'
    )
