"""[data]: the rows of a task, and how a row becomes text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema, field_validator, model_validator

from ptuning.settings.fields import EMPTY, Count, NonBlank, Positive, Table
from ptuning.settings.label_values import canonical, label_text
from ptuning.settings.template import foreign_spelling, in_braces, in_shell_style, template_defaults, template_fields

SPLITS = ("train", "validation", "test")

AUTO = ("auto",)
"""`data.labels` until the labels are found in the training rows. A list of one label is refused otherwise."""


ANSWER = "{answer}"
"""`data.target` for rows whose answers a teacher gives."""

TEACHER_FILES = (".txt", ".md")
"""Ends of a `data.teacher` that names a file."""


RESERVED = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Names that transformers' `apply_chat_template` (5.23) does not pass on to a template."""


_LABEL = {"type": ["string", "number", "boolean"]}
_LABELS = {
    "anyOf": [
        {"type": "array", "items": _LABEL},
        {"type": "object", "additionalProperties": _LABEL},
        {"enum": ["auto", None]},
    ]
}
"""JSON schema of `data.labels`, for editors."""


class Template(Table):
    """How a row becomes text: by plain templates (`input`, `target`) or, if both are empty, by a chat template. Stored in the
    card: training, evaluation and serving see the same tokens."""

    input: str = ""
    """Text before the target, with columns of the row in braces: "Message: {text}\\nLabel:". {answers.text[0]} is a value
    inside a column; {input|} is optional, with the text after the bar in its place. Without `input` and `target`, rows are
    conversations or pairs of prompt and completion, recognised from their columns."""
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
    labels: Annotated[tuple[str, ...] | None, WithJsonSchema(_LABELS)] = None
    """All labels of a classification task: a list; a table {"0" = "negative", "1" = "positive"} from values of the rows to
    labels; or "auto", the values of the training rows. Without labels the target is free text."""
    label_values: tuple[tuple[str, str], ...] | None = None
    """Values of the rows and their labels. Set by a table in `labels`."""
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

    @model_validator(mode="before")
    @classmethod
    def _labels_as_texts(cls, tables: Any) -> Any:
        """Labels as people write them: numbers and truth values, a table, "auto"."""
        if not isinstance(tables, Mapping) or "labels" not in tables:
            return tables
        labels = tables["labels"]
        if isinstance(labels, str) and labels.strip().lower() == "auto":
            return {**tables, "labels": AUTO}
        if isinstance(labels, Mapping):
            pairs = [(str(value), label_text(label)) for value, label in labels.items()]
            return {**tables, "labels": list(dict.fromkeys(label for _, label in pairs)), "label_values": pairs}
        if isinstance(labels, list | tuple):
            return {**tables, "labels": [label_text(label) for label in labels]}
        return tables

    @field_validator("input", "target")
    @classmethod
    def _fields_have_names(cls, template: str) -> str:
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
        if len(self.labels) < 2 and not self._finds_labels:
            raise ValueError("labels: has fewer than two labels; list at least two")
        twins = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twins:
            raise ValueError(f"labels: {twins[0]!r} is listed twice; list each label once")
        unknown = [label for _, label in self.label_values or () if label not in self.labels]
        if unknown:
            raise ValueError(f"label_values: {unknown[0]!r} is not one of the labels; write a table in data.labels instead")
        return self

    def _check_plain(self) -> None:
        for key in ("input", "target"):
            if not getattr(self, key):
                raise ValueError(f"{key}: is missing; set it")
        for key in ("chat_template", "chat_template_kwargs", "system", "loss"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: is for conversations, and has no effect with input and target; keep one of them")
        if self.labels is None:
            try:
                _check_fields(self.target, " {label}")
            except ValueError as error:
                raise ValueError(f"target: {error}") from None
            return
        if len(template_fields(self.target)) != 1:
            raise ValueError('target: must contain exactly one field if there are labels; write, for example, " {label}"')
        if template_defaults(self.target):
            raise ValueError("target: the label must not be optional; write the column without a bar")

    @property
    def is_chat(self) -> bool:
        """Rows are conversations, and `chat_template` is the text of their template. Only of a template that is resolved."""
        return not self.input

    @property
    def _finds_labels(self) -> bool:
        return False

    @property
    def defaults(self) -> dict[str, str]:
        """The optional fields, and the text in place of each."""
        return template_defaults(self.target) | template_defaults(self.input)


def _check_fields(template: str, example: str) -> None:
    """Refuse a template that is the same for every row, or is written for another tool.

    Raises:
        ValueError: it is.
    """
    if not template_fields(template):
        foreign = foreign_spelling(template)
        if foreign:
            raise ValueError(f"contains no field of the row; {foreign[0]} is plain text here, write {foreign[1]}")
        raise ValueError(f'contains no field of the row; write, for example, "{example}"')
    shell = in_shell_style(template)
    if shell is not None:
        field = in_braces(shell)
        raise ValueError(f"${field} puts a dollar sign in front of the field; write {field}, or $ {field} for the dollar sign")


def check_input(template: str) -> None:
    """Refuse the template of an input that is the same for every row, or is written for another tool.

    Raises:
        ValueError: it is.
    """
    _check_fields(template, r"Message: {text}\nLabel:")


def _source(value: Any) -> Any:
    """A source of rows, or a list of them, as texts."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for each in listed:
        if not isinstance(each, str):
            raise ValueError(f"is not a file (got {each!r}); give a path, or a list of paths, in quotes")
        if not each.strip():
            raise ValueError(EMPTY)
    if not listed:
        raise ValueError("is an empty list; name at least one file")
    return tuple(listed) if len(listed) > 1 else listed[0]


def _source_or_share(value: Any) -> Any:
    if isinstance(value, str) and (share := re.fullmatch(r"\s*(?:(0?\.\d+)|(\d\d?)\s*%)\s*", value)):
        number = float(share[1] or int(share[2]) / 100)
        raise ValueError(f"{value!r} is a text; write the fraction as a number, {number:g}, without quotes")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _source(value)
    if not 0 < value < 1:
        raise ValueError(
            f"{value!r} is not a fraction of the training rows; write a number between 0 and 1, such as 0.1, or a file"
        )
    return float(value)


Source = Annotated[NonBlank | tuple[NonBlank, ...], BeforeValidator(_source)]
SourceOrShare = Annotated[NonBlank | tuple[NonBlank, ...] | float, BeforeValidator(_source_or_share)]


class MessagesConfig(Table):
    """Where the messages of a row are."""

    column: NonBlank = "messages"
    """Column with the list of messages."""
    role: NonBlank = "role"
    """Key of a message's role: system, user (human) or assistant (gpt, model, bot)."""
    content: NonBlank = "content"
    """Key of a message's text."""


class DataConfig(Template):
    """The task. A split is a file, a folder, a pattern such as "data/*.csv", an address (https://, s3://),
    "hub:org/name:split", "builtin:task/split", or a list of these. Files are JSON, JSON lines, CSV, TSV, Parquet or Arrow,
    also compressed (.gz, .bz2, .zst). A path is looked for in the working folder, then beside the experiment file."""

    train: Source
    """Rows to train on."""
    validation: SourceOrShare | None = None
    """Rows that select the best step, or a fraction of the training rows such as 0.1, which is then not trained on. Without
    them the last step is kept."""
    test: SourceOrShare | None = None
    """Rows on which the best soft prompt is evaluated once, at the end, or a fraction of the training rows."""
    split_seed: Count = 0
    """Seed of the division into training, validation and test rows. Equal inputs are never divided, and every label has the
    same fraction."""
    held_out: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Fraction of the training rows that belongs to the test rows. Set by a fraction in `test`."""
    references: NonBlank | None = None
    """Column with further correct answers to free text, a text or a list of texts per row. Only metrics use them."""

    teacher: NonBlank | None = None
    """Text whose effect the soft prompt shall have (`train.objective = "distill"`): an instruction, examples, or a file that
    contains them (.txt, .md). The base that reads it in front of a row's input, in a conversation as a system message, is the
    teacher. Rows need no labels or answers: where they have none, the teacher's are used. Without labels and `target`, the
    target is {answer}."""
    teacher_tokens: Positive = 64
    """Maximum tokens of the teacher's answer to a row without one, if there are no labels."""

    messages: MessagesConfig | None = None
    """Conversations in other columns: { column = "dialog", role = "from", content = "value" }. Recognised without it:
    `messages` and `conversations` with role/content or from/value, and `prompt` with `completion`."""

    @model_validator(mode="before")
    @classmethod
    def _test_rows_are_held_out(cls, tables: Any) -> Any:
        """The trials of a search read no test rows, but must not train on them either."""
        if isinstance(tables, Mapping) and not isinstance(tables.get("test"), bool):
            share = tables.get("test")
            if isinstance(share, int | float) and 0 < share < 1:
                return {**tables, "held_out": float(share)}
        return tables

    @model_validator(mode="before")
    @classmethod
    def _answers_may_be_the_teachers(cls, tables: Any) -> Any:
        given = tables if isinstance(tables, Mapping) else {}
        free = given.get("teacher") and given.get("input") and not given.get("labels")
        return {**given, "target": ANSWER} if free and not given.get("target") else tables

    @field_validator("input")
    @classmethod
    def _input_has_a_field(cls, template: str) -> str:
        if template:
            check_input(template)
        return template

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        if self.messages and self.input:
            raise ValueError("messages: is for conversations, and has no effect with input and target; keep one of them")
        if self.validation_share + self.held_out >= 1:
            raise ValueError(
                f"test: {self.held_out:g} and data.validation = {self.validation_share:g} leave no training rows; lower one"
            )
        if self.teacher and self.loss == "all":
            raise ValueError('loss: "all" has no meaning with a teacher, who gives the last answer; leave it out')
        if self.references and self.labels:
            raise ValueError("references: is only used without labels; leave it out")
        values = [value for value, _ in self.label_values] if self.label_values else list(self.labels or ())
        seen: dict[str, str] = {}
        for value in values:
            other = seen.setdefault(canonical(value), value)
            if other != value:
                raise ValueError(
                    f"labels: {other!r} and {value!r} are the same value to JSON, TOML or pandas; keep one of them"
                )
        return self

    @property
    def _finds_labels(self) -> bool:
        return self.labels == AUTO

    @property
    def finds_labels(self) -> bool:
        """The labels are still to be found in the training rows."""
        return self._finds_labels

    @property
    def validation_share(self) -> float:
        """The fraction of the training rows that is used for validation; 0: validation rows are a source of their own."""
        return self.validation if isinstance(self.validation, float) else 0.0

    @property
    def chat_template_file(self) -> str | None:
        """The file that `chat_template` names; None: it is the template itself, or not set."""
        given = self.chat_template
        return None if given is None or "{" in given or "\n" in given else given

    @property
    def teacher_file(self) -> str | None:
        """The file that `teacher` names; None: it is the text itself, or not set."""
        given = self.teacher
        return given if given and given.endswith(TEACHER_FILES) and "\n" not in given else None

    def sources(self) -> Iterator[tuple[str, str | Sequence[str]]]:
        """The splits that are read from files or data sets of their own, and where from."""
        for split in SPLITS:
            source = getattr(self, split)
            if source is not None and not isinstance(source, float):
                yield split, source
