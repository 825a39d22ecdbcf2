"""The chat template of a merged export: with the virtual tokens in front, it renders to the ids of ptuning's own pass.

It is that of the card, or puts the last user message into the field of the card's plain template.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.conversations import MESSAGES, Message
from ptuning.data.encoder import Encoder
from ptuning.settings.data import Template
from ptuning.settings.template import fill, template_fields

PROBES = ("This is a test.", "a", "Two  words, 3 numbers\nand äöü!")
"""Texts that are compared."""


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase, template: Template | None, front: Sequence[str],
    ids: list[int],
) -> bool:  # fmt: skip
    """Set a chat template that renders to the ids of ptuning's own pass; False if that is impossible."""
    tokenizer.chat_template = None
    if template is None:
        return False
    if template.is_chat:
        return _conversations(tokenizer, plain, template, front[: len(ids)], ids)
    encoder = Encoder(template, plain, 2**31)
    fields = template_fields(template.input)
    for space in ("", " "):  # some tokenizers prepend a space to a text, but not after a special token
        tokenizer.chat_template = _jinja("".join(front) + space, template)
        if all(
            _rendered(tokenizer, _message(template, text)) == [*ids, *encoder.input_ids(dict.fromkeys(fields, text))]
            for text in PROBES
        ):
            return True
    tokenizer.chat_template = None
    return False


def _conversations(
    tokenizer: PreTrainedTokenizerBase,
    plain: PreTrainedTokenizerBase,
    template: Template,
    tokens: Sequence[str],
    ids: list[int],
) -> bool:
    """The same for a soft prompt that takes conversations: the card's own chat template, behind the virtual tokens."""
    encoder = make_encoder(template, plain, 2**31)
    chats = [[{"role": "user", "content": text}] for text in PROBES]
    chats.append([*chats[0], {"role": "assistant", "content": PROBES[0]}, *chats[1]])
    for space in ("", " "):
        tokenizer.chat_template = _behind("".join(tokens) + space, template)
        if all(_rendered_chat(tokenizer, chat) == [*ids, *encoder.input_ids({MESSAGES: chat})] for chat in chats):
            return True
    tokenizer.chat_template = None
    return False


def _behind(front: str, template: Template) -> str:
    """The card's chat template with a text in front, its arguments as defaults, and its system message."""
    parts = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif -%}}"
        for name, value in (template.chat_template_kwargs or {}).items()
    ]
    if template.system:
        system = _literal([{"role": "system", "content": template.system}])
        known = "messages[0]['role'] in ['system', 'developer']"
        parts.append(f"{{%- if not {known} %}}{{% set messages = {system} + messages %}}{{% endif -%}}")
    return f"{''.join(parts)}{{{{- {_literal(front)} }}}}{template.chat_template}"


def _literal(value: Any) -> str:
    """A value as Jinja writes it: as JSON does, but for null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _message(template: Template, text: str) -> str:
    fields = template_fields(template.input)
    return text if len(fields) == 1 else fill(template.input, dict.fromkeys(fields, text))


def _rendered(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    return _rendered_chat(tokenizer, [{"role": "user", "content": message}])


def _rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _jinja(front: str, template: Template) -> str:
    """The chat template: the last user message replaces the field; with several fields it is the whole input."""
    before, behind = "", ""
    fields = template_fields(template.input)
    if len(fields) == 1:
        mark = uuid.uuid4().hex
        before, _, behind = fill(template.input, {fields[0]: mark}).partition(mark)
        behind = behind.replace(mark, "")
    return (
        "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}"
        f"{{{{- {json.dumps(front + before, ensure_ascii=False)} + last['content']"
        f" + {json.dumps(behind, ensure_ascii=False)} -}}}}"
    )
