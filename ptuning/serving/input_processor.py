"""Text of a request -> token ids: templates, fields, conversations. Tokenised by the `Encoder` that training uses."""

from __future__ import annotations

from jinja2.exceptions import TemplateError

from ptuning.inference.inputs import fields_of, row_ids, too_long
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
