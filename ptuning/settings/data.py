"""[data]: the rows of a task, and how a row becomes text."""

from __future__ import annotations

import string
from typing import Any, Literal

from pydantic import JsonValue, field_validator, model_validator

from ptuning.settings.fields import NonBlank, Positive, Table

RESERVED = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Names that transformers' `apply_chat_template` (5.23) does not pass on to a template."""


class Template(Table):
    """How a row becomes text: by plain templates (`input`, `target`) or, if both are empty, by a chat template. Stored in the
    card: training, evaluation and serving see the same tokens."""

    input: str = ""
    """Text before the target, with fields of the row in braces: "Message: {text}\\nLabel:". Without `input` and `target`, rows
    are conversations or pairs of prompt and completion, recognised from their columns."""
    target: str = ""
    """Text to predict, for example " {label}". The end token is appended."""
    chat_template: NonBlank | None = None
    """Chat template for rows that are conversations: Jinja text, or a file that contains it. Default: the base's own."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Arguments of the chat template, for example { enable_thinking = false }."""
    system: NonBlank | None = None
    """System message of conversations that begin without one."""
    loss: Literal["last", "all"] | None = None
    """What is trained of a conversation: its last answer (the default) or all its answers. Answers with `weight` 0 are not."""
    labels: tuple[str, ...] | None = None
    """All labels of a classification task. Without labels the target is free text."""
    max_tokens: Positive | None = None
    """Maximum tokens of input + target. Default: the base's context minus the soft prompt."""
    truncate: Literal["left", "right", "error"] = "right"
    """How an input that is too long is shortened: its longest field is truncated on this side, the template's own words stay;
    error: the row is refused (a training row is dropped)."""
    special_tokens: Literal["text", "tokens"] = "text"
    """Special tokens of the base, such as </s>, in the fields of a row. text: they are read as text like any other, so a text
    cannot end the input or write another turn; tokens: they become the tokens themselves. Those in the template's own words are
    always tokens."""

    @classmethod
    def of_card(cls, template: Any) -> Any:
        """The template as a card has it. A card of an earlier version without `special_tokens` keeps its tokens."""
        return {"special_tokens": "tokens", **template} if isinstance(template, dict) else template

    @field_validator("chat_template_kwargs")
    @classmethod
    def _arguments_of_the_template(cls, arguments: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        wrong = sorted(name for name in arguments or () if name in RESERVED or not name.isidentifier())
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not an argument of a chat template; leave it out")
        return arguments

    @field_validator("input", "target")
    @classmethod
    def _fields_are_plain_names(cls, template: str) -> str:
        template_fields(template)
        return template

    @model_validator(mode="after")
    def _labels_fit_the_target(self) -> Template:
        if self.input or self.target:
            self._check_plain()
        elif self.labels is not None and self.loss == "all":
            raise ValueError('loss: "all" has no meaning with labels, of which the last answer is one; leave it out')
        if self.labels is None:
            return self
        if len(self.labels) < 2:
            raise ValueError("labels: has fewer than two labels; list at least two")
        twins = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twins:
            raise ValueError(f"labels: {twins[0]!r} is listed twice; list each label once")
        return self

    def _check_plain(self) -> None:
        for key in ("input", "target"):
            if not getattr(self, key):
                raise ValueError(f"{key}: is missing; set it")
        for key in ("chat_template", "chat_template_kwargs", "system", "loss"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: is for conversations, and has no effect with input and target; keep one of them")
        many = len(template_fields(self.target))
        if self.labels is None and not many:
            raise ValueError('target: contains no field of the row; write, for example, " {label}"')
        if self.labels is not None and many != 1:
            raise ValueError('target: must contain exactly one field if there are labels; write, for example, " {label}"')

    @property
    def is_chat(self) -> bool:
        """Rows are conversations, and `chat_template` is the text of their template. Only of a template that is resolved."""
        return not self.input


class MessagesConfig(Table):
    """Where the messages of a row are."""

    column: NonBlank = "messages"
    """Column with the list of messages."""
    role: NonBlank = "role"
    """Key of a message's role: system, user (human) or assistant (gpt, model, bot)."""
    content: NonBlank = "content"
    """Key of a message's text."""


class DataConfig(Template):
    """The task. A split is a file (.jsonl, .csv, .parquet), "hub:org/name:split", or "builtin:task/split"."""

    train: NonBlank
    """Rows to train on."""
    validation: NonBlank | None = None
    """Rows that select the best step. Without them the last step is kept."""
    test: NonBlank | None = None
    """Rows on which the best soft prompt is evaluated once, at the end."""
    messages: MessagesConfig | None = None
    """Conversations in other columns: { column = "dialog", role = "from", content = "value" }. Recognised without it:
    `messages` and `conversations` with role/content or from/value, and `prompt` with `completion`."""

    @model_validator(mode="after")
    def _messages_or_fields(self) -> DataConfig:
        if self.messages and self.input:
            raise ValueError("messages: is for conversations, and has no effect with input and target; keep one of them")
        return self


def template_fields(template: str) -> list[str]:
    """The fields of a template in order of appearance, each once.

    Raises:
        ValueError: unbalanced braces, or anything but a plain name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r} is not a valid template ({error}); write literal braces as {{{{ and }}}}") from None
    fields: dict[str, None] = {}
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{template!r}: {{{name}}} is not a plain field name; write literal braces as {{{{ and }}}}")
        fields[name] = None
    return list(fields)
