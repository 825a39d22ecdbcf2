"""Conversations -> token ids, in the same way for training, evaluation and serving; and which encoder a template needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptuning.data.chat_text import ASKED, ChatError, ChatText
from ptuning.data.conversations import MESSAGES, Message, read
from ptuning.data.encoder import Encoder, Example, Teacher, UnusableRow
from ptuning.errors import DataError
from ptuning.settings.data import Template


def make_encoder(template: Template, tokenizer: PreTrainedTokenizerBase, limit: int, teacher: Teacher | None = None) -> Encoder:
    """The encoder of a template. `teacher`: reads the rows of a task, too.

    Raises:
        DataError: the tokenizer or the chat template cannot be used.
    """
    return (ChatEncoder if template.is_chat else Encoder)(template, tokenizer, limit, teacher)


@dataclass(frozen=True, eq=False)
class ChatEncoder(Encoder):
    """An encoder of conversations. A row has the field `messages`: a list, or JSON text.

    The last answer that is trained is the target, the messages before it are the input. If the input is too long, the oldest
    messages are left out up to a message of the user, and then the last message of the user is truncated; the system message
    stays.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.loss == "all" and not self.chat.writes_end:
            raise ChatError('the chat template writes no end token after an answer, which data.loss = "all" needs; use "last"')
        self.chat.check_marks(earlier=self.template.loss == "all")

    @cached_property
    def chat(self) -> ChatText:
        return ChatText(self.tokenizer, self.template)

    @cached_property
    def fields(self) -> list[str]:
        return [MESSAGES]

    @property
    def end(self) -> int:
        return self.chat.end

    def input_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The ids of a conversation that waits for an answer, as `apply_chat_template` with `add_generation_prompt`."""
        return self.chat.ids(read(fields[MESSAGES]))

    def continued_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The ids of a conversation that ends with the begin of an answer, as with `continue_final_message`."""
        return self.chat.ids(read(fields[MESSAGES]), continued=True)

    def fitted_ids(self, fields: Mapping[str, object], room: int | None = None) -> list[int]:
        messages, room = read(fields[MESSAGES]), self.input_room if room is None else room
        return self.chat.ids(self._shortened(messages, room))

    def fitted(self, rows: Sequence[Mapping[str, object]], room: int) -> Iterator[list[int] | DataError]:
        for row in rows:
            try:
                yield self.fitted_ids(row, room)
            except DataError as error:
                yield error

    def examples(self, rows: Sequence[Mapping[str, object]], answered: bool = True) -> Iterator[Example | DataError]:
        for row in rows:
            try:
                messages = read(row[MESSAGES])
                yield self._example(messages) if answered else self._question(messages)
            except DataError as error:
                yield error

    def _label_target(self, label: str) -> list[int]:
        return self.chat.answer([{"role": "user", "content": ASKED}], {"role": "assistant", "content": label}).target_ids

    def _example(self, messages: list[Message]) -> Example:
        trained = [at for at, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight", 1)]
        if not trained:
            raise UnusableRow("has no answer of the assistant to train on; add one")
        last = trained[-1]
        before, answer = messages[:last], messages[last]
        if not before:
            raise UnusableRow("begins with the answer that is trained; put a message before it")
        if not answer["content"].strip():
            raise UnusableRow("its answer is empty; fill it or remove the row")
        label = self.label_index(answer["content"].strip()) if self.template.labels else -1
        if label >= 0 and self.template.labels:
            answer = {**answer, "content": self.template.labels[label]}  # a row may have other values for it, or white space
        found = self.chat.answer(before, answer)
        target = found.target_ids
        if label >= 0 and target != self.label_ids[label]:
            raise ChatError("the chat template writes the label differently in this row; use another data.chat_template")
        room = self.limit - len(target) if label < 0 else self.input_room
        cut = len(found.input_ids) > room
        if cut:
            before = self._shortened(before, room)
        short = self.chat.answer(before, answer) if cut else found
        if short.target_ids != target:
            raise ChatError('the chat template writes an answer differently after fewer messages; set data.truncate = "error"')
        ids = short.input_ids
        earlier = self._earlier(before, ids) if self.template.loss == "all" else []
        return self._asked(Example(ids, target, label, found.text, found.answer_text, cut, tuple(earlier)), before)

    def _question(self, messages: list[Message]) -> Example:
        """A conversation that waits for an answer."""
        room = self.input_room if self.template.labels else self.limit - 1
        kept = self._shortened(messages, room)
        return self._asked(Example(self.chat.ids(kept), [], -1, self.chat.text(messages), "", cut=kept is not messages), kept)

    def _asked(self, example: Example, before: list[Message]) -> Example:
        """An example whose answer follows these messages, as a teacher reads it, too: its text is a system message."""
        return self._taught(example, self.teacher_ids({MESSAGES: before})) if self.teacher else example

    def teacher_ids(self, fields: Mapping[str, object]) -> list[int]:
        assert self.teacher
        messages, system = read(fields[MESSAGES]), self.template.system or ""
        if messages[0]["role"] in ("system", "developer"):
            system, messages = messages[0]["content"], messages[1:]
        text = f"{self.teacher.before(chr(10) * 2)}{system}" if system else self.teacher.text.rstrip()
        return self.chat.ids([{"role": "system", "content": text}, *messages])

    def _earlier(self, messages: list[Message], ids: list[int]) -> list[int]:
        """The places in `ids` of the answers before the last one that are trained, each with the end of its turn."""
        places: list[int] = []
        for at, message in enumerate(messages):
            if at == 0 or message["role"] != "assistant" or not message.get("weight", 1) or not message["content"].strip():
                continue
            found = self.chat.answer(messages[:at], message)
            begin = len(found.input_ids)
            end = begin + len(found.target_ids)
            if ids[:end] != [*found.input_ids, *found.target_ids]:
                if self.chat.text(messages).startswith(found.text + found.answer_text):
                    raise UnusableRow(
                        f"the tokenizer merges the begin of message {at + 1} with the text before it; "
                        "begin it without white space"
                    )
                raise ChatError(
                    "the chat template writes earlier answers differently from the last one, so that they cannot be trained "
                    'together; set data.loss = "last"'
                )
            places += range(begin, end)
        return places

    def _shortened(self, messages: list[Message], room: int) -> list[Message]:
        """The conversation in at most `room` tokens.

        Raises:
            DataError: it does not fit, and must not or cannot be truncated.
        """
        size = len(self.chat.ids(messages))
        if size <= room:
            return messages
        said = f"the conversation has {size} tokens, {room} fit (limit {self.limit}, {self.limit - room} for the answer)"
        if self.template.truncate == "error":
            raise UnusableRow(f'{said}; shorten it, raise data.max_tokens or set data.truncate = "left"')
        kept = next((at for at, each in enumerate(messages) if each["role"] not in ("system", "developer")), len(messages))
        front, turns = messages[:kept], messages[kept:]
        begins = [at for at, each in enumerate(turns) if each["role"] == "user" and at]
        found = self._most(len(begins), lambda many: [*front, *turns[begins[len(begins) - many] :]] if many else None, room)
        if found:
            return found
        last = begins[-1] if begins else 0
        if not turns or turns[last]["role"] != "user":
            raise UnusableRow(f"{said}; shorten it")
        text = turns[last]["content"]

        def cut(many: int) -> list[Message] | None:
            part = text[:many] if self.template.truncate == "right" else text[len(text) - many :]
            return [*front, {**turns[last], "content": part}, *turns[last + 1 :]] if part.strip() else None

        found = self._most(len(text) - 1, cut, room)
        if not found:
            raise UnusableRow(f"{said}, and truncating its last message is not enough; shorten it or the soft prompt")
        return found

    def _most(self, highest: int, make: Callable[[int], list[Message] | None], room: int) -> list[Message] | None:
        """The conversation of the highest number that fits, by binary search: of fewer parts, all fit."""
        best: list[Message] | None = None
        low = 1
        while low <= highest:
            many = (low + highest) // 2
            made = make(many)
            if made is None or len(self.chat.ids(made)) <= room:
                best, low = made or best, many + 1
            else:
                highest = many - 1
        return best


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's own chat template; of several, the default one."""
    known: Any = tokenizer.chat_template
    if isinstance(known, dict):
        known = known.get("default")
    return known if isinstance(known, str) and known.strip() else None
