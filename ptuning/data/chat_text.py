"""A conversation -> text and token ids, by a chat template: exactly what `apply_chat_template` of transformers gives.

Templates run in transformers' sandbox (jinja2's `ImmutableSandboxedEnvironment`), which gives them plain data only. Special
tokens that a template writes are tokens; those in messages are text (`special_tokens`).

An answer is what the template writes between the generation prompt, with which a served conversation ends, and the end of the
answer's turn. A template for which these two differ cannot be trained, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from ptuning.data.conversations import Message
from ptuning.data.special_tokens import TextTokenizer
from ptuning.errors import DataError
from ptuning.settings.data import Template

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""A template's mark at the begin of what the assistant writes."""

SHAPES = 4096
"""Sequences of roles that are remembered as checked."""

ASKED, ANSWERED = "qqxaskedxqq", "qqxansweredxqq"
"""Texts of a conversation that tells how a template writes one."""


class ChatError(DataError):
    """The chat template cannot hold a conversation."""


@dataclass(frozen=True)
class Answer:
    """An answer after a conversation that waits for it."""

    input_ids: list[int]
    target_ids: list[int]
    """Up to the end of its turn."""
    text: str
    """Of the conversation that waits."""
    answer_text: str
    """Without the end of its turn."""


@dataclass(frozen=True, eq=False)
class ChatText:
    """A chat template with its tokenizer. Messages have the keys `role` and `content`.

    Raises:
        ChatError: the template cannot be trained: it has no generation prompt, or writes no answers.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    _shapes: set[tuple[str, ...]] = field(default_factory=set)

    def ids(self, messages: Sequence[Message], *, continued: bool = False) -> list[int]:
        """The token ids of a conversation that waits for an answer; `continued`: that ends with the begin of one.

        Raises:
            ChatError: the template refuses it, leaves out a message, or fails.
        """
        how = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
        self._check_shape(messages, how)
        return self._tokens([self._text(messages, **how)])[0]

    def text(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that waits for an answer."""
        return self._render(self._prepared(messages), add_generation_prompt=True)

    def answer(self, before: Sequence[Message], answer: Message) -> Answer:
        """An answer after a conversation. The ids of both together are those of the whole conversation. If a tokenizer merges
        the begin of the answer with the text before it, the two are tokenised separately: a server has the text before it only.

        Raises:
            ChatError: the template writes a conversation differently once it has an answer.
        """
        whole = [*before, answer]
        self._check_shape(whole, {})
        front, full = self._text(before, add_generation_prompt=True), self._text(whole)
        if not full.startswith(front):
            raise ChatError(
                "the chat template writes the text before an answer differently once the answer is there; use another "
                "data.chat_template, or other data.chat_template_kwargs"
            )
        tail, length, end = self._ending
        if not full.endswith(tail):
            raise ChatError("the chat template ends this answer differently from others; use another data.chat_template")
        full = full[: len(full) - len(tail) + length]
        front_ids, full_ids = self._tokens([front, full])
        joined = full_ids[: len(front_ids)] == front_ids
        target = full_ids[len(front_ids) :] if joined else self._apart(full[len(front) :])
        target = target if target[-1:] == [end] else [*target, end]
        text = self.text(before)
        spoken = self._render(self._prepared(whole))[len(text) :].removesuffix(self._plain_tail)
        return Answer(front_ids, target, text, spoken)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self._ending[2]

    @property
    def writes_end(self) -> bool:
        """False: the template writes no end token after an answer; the tokenizer's own is trained."""
        return self._ending[1] > 0

    @cached_property
    def _ending(self) -> tuple[str, int, int]:
        """What the template writes after the last answer, as `_text`; how much of it belongs to the answer; the end token."""
        front, full = self._text(_PROBE[:1], add_generation_prompt=True), self._text(_PROBE)
        before, answer, tail = full.rpartition(ANSWERED)
        if not answer:
            raise ChatError("the chat template does not write the answers of the assistant; use another data.chat_template")
        if self._text(_PROBE[:1]) == front and before.startswith(front) and before[len(front) :].strip():
            raise ChatError("the chat template has no generation prompt (add_generation_prompt); set data.chat_template")
        added = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        added -= {self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id}
        for length in range(1, len(tail) + 1):
            ids = self._tokens([tail[:length]])[0]
            if ids and ids[-1] in added:
                return tail, length, ids[-1]
        assert isinstance(self.tokenizer.eos_token_id, int)
        return tail, 0, self.tokenizer.eos_token_id

    @cached_property
    def _plain_tail(self) -> str:
        return self._render(self._prepared(_PROBE)).rpartition(ANSWERED)[2]

    def check_marks(self, earlier: bool) -> None:
        """Compare the template's generation marks, if it has any, with the difference between its renderings, for the last
        answer of a conversation and for `earlier` ones.

        Raises:
            ChatError: they differ.
        """
        if not MARKS.search(str(self.template.chat_template)) or not self.tokenizer.is_fast:
            return
        found = self._apply(self._prepared(_TWICE), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, marked = list(found["input_ids"]), list(found["assistant_masks"])
        for place in range(1 if earlier else len(_TWICE) - 1, len(_TWICE), 2):
            found_here = self.answer(_TWICE[:place], _TWICE[place])
            target, begin = found_here.target_ids, len(found_here.input_ids)
            end = begin + len(target)
            inside = marked[begin : end - 1]  # whether the end token is marked, too, is a matter of taste
            if ids[begin : end - 1] != target[:-1] or not all(inside) or marked[begin - 1]:
                raise ChatError(
                    "the generation marks of the chat template do not begin where its generation prompt ends; use another "
                    "data.chat_template"
                )

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if self.template.special_tokens == "text":
            return TextTokenizer.of(self.tokenizer).ids(texts)
        # verbose=False: no warning about texts longer than the base's context; they are truncated or refused later.
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _apart(self, text: str) -> list[int]:
        """The ids of a text that follows another one. After a line break, because SentencePiece puts a space in front of the
        first word (as `_encode_chat_piece` of transformers 5.23 does)."""
        alone, behind, line = self._tokens([text, f"\n{text}", "\n"])
        return behind[len(line) :] if behind[: len(line)] == line else alone

    def _text(self, messages: Sequence[Message], **how: Any) -> str:
        """The text of a conversation as `_tokens` takes it."""
        prepared = self._prepared(messages)
        if self.template.special_tokens != "text":
            return self._render(prepared, **how)
        reader = TextTokenizer.of(self.tokenizer)
        hidden = [
            {key: reader.hide(value) if key != "role" and isinstance(value, str) else value for key, value in message.items()}
            for message in prepared
        ]
        return reader.rendered(self._render(hidden, **how))

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template gets them: with the system message, and `developer` named as the template names it."""
        system, whole = self.template.system, [dict(message) for message in messages]
        if system and (not whole or whole[0]["role"] not in ("system", "developer")):
            whole.insert(0, {"role": "system", "content": system})
        knows = "developer" in str(self.template.chat_template)
        return [
            {**message, "role": "system"} if message["role"] == "developer" and not knows else message
            for message in ({key: value for key, value in message.items() if key != "weight"} for message in whole)
        ]

    def _render(self, messages: Sequence[Message], **how: Any) -> str:
        return str(self._apply(messages, tokenize=False, **how))

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        """
        Raises:
            ChatError: with the words of the template's author, if it refuses the conversation.
        """
        arguments: dict[str, Any] = {**(self.template.chat_template_kwargs or {})}
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template.chat_template, **how, **arguments
            )
        except Exception as error:  # a template may raise any error about what it does not support
            if type(error) is TemplateError:  # by `raise_exception`
                said = " ".join(str(error).split())[:200]
                raise ChatError(f"the chat template refuses the messages ({said}); change their order or roles") from None
            raise ChatError(f"the chat template fails on the messages ({type(error).__name__}); change them") from error

    def _check_shape(self, messages: Sequence[Message], how: dict[str, Any]) -> None:
        """Refuse a conversation of which the template leaves out a message, such as a system message that it does not know."""
        shape = (*(message["role"] for message in messages), *how)
        if shape in self._shapes:
            return
        marked = [{"role": message["role"], "content": f"qqx{place}xqq"} for place, message in enumerate(messages)]
        prepared = self._prepared(marked)
        try:
            text = self._render(prepared, **how)
        except ChatError:
            return  # the conversation itself tells why, or passes
        for place, message in enumerate(prepared):
            if message["content"].strip() not in text:
                raise ChatError(
                    f"the chat template leaves out message {place + 1} (role {message['role']}); send none of this role "
                    "there, or use another data.chat_template"
                )
        if len(self._shapes) < SHAPES:
            self._shapes.add(shape)


_PROBE: list[Message] = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
_TWICE: list[Message] = [*_PROBE, *_PROBE]
