"""The chat template of an export: with the virtual tokens in front, it renders to the ids of ptuning's own pass.

It is that of the card, or puts the last user message into the field of the card's plain template. For several soft prompts it
selects one by `chat_template_kwargs` of a request.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.conversations import MESSAGES, Message
from ptuning.settings.data import Template
from ptuning.settings.template import fill, template_fields

PROBES = ("This is a test.", "a", "Two  words, 3 numbers\nand äöü!")
"""Texts that are compared."""
CHOICE = "soft_prompt"
"""The argument of a chat template that selects a soft prompt."""
EDGE = "{{ '' }}"
"""Nothing, but blocks beside it trim no white space."""


@dataclass(frozen=True)
class Draft:
    """A tokenizer that has got its virtual tokens, and what its chat template needs."""

    tokenizer: PreTrainedTokenizerBase
    plain: PreTrainedTokenizerBase
    """That of the base."""
    tokens: Mapping[str, list[str]]
    """Virtual tokens by the name of the soft prompt."""
    ids: Mapping[str, list[int]]
    front: list[str]
    """Special tokens of the base before a text; virtual tokens are before them."""


def write_chat_template(draft: Draft, name: str, template: Template | None) -> str | None:
    """A chat template that renders to the ids of ptuning's own pass; None if that is impossible."""
    if template is None:
        return None
    virtual = draft.tokens[name]
    front, write = (virtual, _behind) if template.is_chat else ([*virtual, *draft.front], _jinja)
    for space in ("", " "):  # some tokenizers prepend a space to a text, but not after a special token
        jinja = write("".join(front) + space, template)
        if _renders(draft, name, template, jinja):
            return jinja
    return None


def write_choice(draft: Draft, templates: Mapping[str, Template | None]) -> tuple[str | None, list[str]]:
    """A chat template that selects one of several, and the names that it selects among. One soft prompt is selected by
    default."""
    parts = {name: write_chat_template(draft, name, template) for name, template in templates.items()}
    names = [name for name, part in parts.items() if part is not None]
    while names:
        jinja = _choice({name: parts[name] or "" for name in names}, len(templates) == 1)
        wrong = [name for name in names if not _renders(draft, name, templates[name], jinja, **{CHOICE: name})]
        if not wrong:
            return jinja, names
        names = [name for name in names if name not in wrong]
    return None, []


def _choice(parts: Mapping[str, str], only: bool) -> str:
    default = _literal(next(iter(parts)) if only else "")
    branches = "".join(
        f"{{% {'elif' if at else 'if'} chosen == {_literal(name)} %}}{EDGE}{part.removesuffix(chr(10))}{EDGE}"
        for at, (name, part) in enumerate(parts.items())
    )
    sentence = f"chat_template_kwargs: {CHOICE} has to be one of {', '.join(parts)}"
    return (
        f"{{% set chosen = {CHOICE} if {CHOICE} is defined else {default} %}}{branches}"
        f"{{% else %}}{{{{ raise_exception({_literal(sentence)}) }}}}{{% endif %}}"
    )


def _renders(draft: Draft, name: str, template: Template | None, jinja: str, **arguments: Any) -> bool:
    """Whether a chat template renders to the ids of ptuning's own pass."""
    assert template is not None
    encoder, tokenizer = make_encoder(template, draft.plain, 2**31), draft.tokenizer
    chats: list[list[Message]] = []
    rows: list[dict[str, Any]] = []
    if template.is_chat:
        chats = [[{"role": "user", "content": text}] for text in PROBES]
        chats.append([*chats[0], {"role": "assistant", "content": PROBES[0]}, *chats[1]])
        rows = [{MESSAGES: chat} for chat in chats]
    else:
        chats = [[{"role": "user", "content": _message(template, text)}] for text in PROBES]
        rows = [dict.fromkeys(template_fields(template.input), text) for text in PROBES]
    before, tokenizer.chat_template = tokenizer.chat_template, jinja
    try:
        return all(
            _rendered(tokenizer, chat, **arguments) == [*draft.ids[name], *encoder.input_ids(row)]
            for chat, row in zip(chats, rows, strict=True)
        )
    finally:
        tokenizer.chat_template = before


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


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **arguments: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
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
