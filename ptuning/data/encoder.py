"""Rows -> token ids, in the same way for training, evaluation and serving.

Input and target are tokenised separately and joined as ids. So no token crosses the boundary between them, and serving sees the
tokens of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import transformers
from transformers import PreTrainedTokenizerBase

from ptuning.data.row import texts_of
from ptuning.data.sources import FORMAT
from ptuning.data.special_tokens import TextTokenizer
from ptuning.errors import DataError, suggest
from ptuning.model.fingerprint import json_hash, tokenizer_fingerprint
from ptuning.model.label_trie import LabelTrie, nested_labels
from ptuning.settings.data import Template
from ptuning.settings.label_values import canonical, spellings
from ptuning.settings.template import fill, literal, template_fields


class UnusableRow(DataError):
    """A row that cannot be used. In the train split it is dropped and counted, elsewhere it is an error."""


@dataclass(frozen=True)
class Teacher:
    """The text that a teacher reads in front of every input."""

    text: str
    limit: int
    """Maximum tokens of its text, input and answer."""
    answer: int
    """Of these, maximum tokens of an answer that it gives itself."""

    def before(self, text: str) -> str:
        """Its text in front of another one: white space separates them."""
        return self.text if self.text[-1:].isspace() else f"{self.text}{text}"


@dataclass(frozen=True)
class Example:
    """A row as token ids."""

    input_ids: list[int]
    target_ids: list[int]
    """With the end token; empty for a row without an answer."""
    label: int
    """-1 without labels or an answer."""
    text: str
    """The whole input, even if its ids were truncated."""
    target_text: str
    cut: bool
    """The input was truncated."""
    earlier: tuple[int, ...] = ()
    """Places in `input_ids` that are predicted, too: earlier answers of a conversation."""
    blank: bool = False
    """All fields of the input are blank."""
    teacher_ids: list[int] = field(default_factory=list)
    """The input as a teacher reads it, with its text; empty without one."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """Rows -> token ids. The same object for training, evaluation and serving.

    Raises:
        DataError: the tokenizer has no end token, or two labels have the same tokens.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    limit: int
    """Maximum tokens of input + target: the base's context minus the soft prompt, or the template's max_tokens if smaller."""
    teacher: Teacher | None = None
    """Who reads the rows, too."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token; set eos_token in the base's tokenizer_config.json")
        object.__setattr__(self, "limit", min(self.limit, self.template.max_tokens or self.limit))

    @cached_property
    def fields(self) -> list[str]:
        """All fields of the template."""
        return sorted({*template_fields(self.template.input), *template_fields(self.template.target)})

    @cached_property
    def label_ids(self) -> list[list[int]]:
        """Token ids of every label as a target, end token included; empty without labels."""
        ids = [self._label_target(label) for label in self.template.labels or ()]
        labels = dict(zip(map(tuple, ids), self.template.labels or (), strict=True))
        for label, tokens in zip(self.template.labels or (), ids, strict=True):
            if labels[tuple(tokens)] != label:
                raise DataError(
                    f"the labels '{label}' and '{labels[tuple(tokens)]}' have the same tokens; rename one in data.labels"
                )
        nested = nested_labels(labels)
        if nested:  # an end token in the middle of a label
            shorter, longer = (labels[each] for each in nested)
            raise DataError(f"the label '{longer}' contains the end token after '{shorter}'; rename one in data.labels")
        return ids

    @cached_property
    def label_trie(self) -> LabelTrie:
        """The labels as a trie of their tokens; only with labels."""
        return LabelTrie(tuple(map(tuple, self.label_ids)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the tokens of a row."""
        template = self.template.model_dump(include=set(Template.model_fields))
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        teacher = asdict(self.teacher) if self.teacher else None
        return json_hash([FORMAT, transformers.__version__, template, self.limit, tokenizer, teacher])

    @property
    def input_room(self) -> int:
        """Maximum tokens of an input if it does not depend on the row: with labels, the longest label still fits."""
        return self.limit - max(map(len, self.label_ids), default=1)

    @property
    def end(self) -> int:
        """The token that ends a target."""
        return int(self.tokenizer.eos_token_id)

    def examples(self, rows: Sequence[Mapping[str, object]], answered: bool = True) -> Iterator[Example | DataError]:
        """Every row as token ids, or the reason why it cannot be used. `answered`: the rows have targets."""
        names = template_fields(self.template.input)
        target_ids = self._targets(rows) if answered and not self.template.labels else [[] for _ in rows]
        for at, (row, whole) in enumerate(zip(rows, self._inputs(rows), strict=True)):
            try:
                label = self.label_of(row) if answered else -1
                target = target_ids[at] if label < 0 else self.label_ids[label]
                room = self.input_room if self.template.labels else self.limit - max(1, len(target))
                ids, read = self._fit(row, whole, room)
                blank = not any(str(row[name]).strip() for name in names)
                written = self.target_text(row) if answered else ""
                found = Example(ids, target, label, self.input_text(row), written, cut=ids is not whole, blank=blank)
                yield self._taught(found, self.teacher_ids(read)) if self.teacher else found
            except DataError as error:
                yield error

    def teacher_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The whole input as the teacher reads it."""
        return self._teacher_encoder.input_ids(fields)

    @cached_property
    def _teacher_encoder(self) -> Encoder:
        """The same rows after the teacher's text, as one text."""
        assert self.teacher
        whole = literal(self.teacher.before("\n")) + self.template.input
        return replace(self, template=self.template.model_copy(update={"input": whole}), teacher=None)

    def _taught(self, example: Example, ids: list[int]) -> Example:
        """An example with the ids that the teacher reads.

        Raises:
            UnusableRow: they do not fit.
        """
        assert self.teacher
        answer = max(map(len, self.label_ids), default=0) or len(example.target_ids) or self.teacher.answer
        if len(ids) + answer > self.teacher.limit:
            raise UnusableRow(
                f"the text of data.teacher and the input have {len(ids)} tokens, of {self.teacher.limit} that fit, {answer} of "
                "them for the answer; shorten one of them"
            )
        return replace(example, teacher_ids=ids)

    def input_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The whole input with the special tokens that the tokenizer prepends, without those that it appends."""
        return self._inputs([fields])[0]

    def target_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The target and the end token."""
        return self._targets([fields])[0]

    def texts_of(self, answers: Sequence[list[int]]) -> list[str]:
        """Generated answers as stripped texts, without special tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(list(answers), skip_special_tokens=True)]

    def input_text(self, fields: Mapping[str, object]) -> str:
        return fill(self.template.input, self._texts(fields, self.template.input))

    def target_text(self, fields: Mapping[str, object]) -> str:
        """The target of a row; with labels, its label's."""
        return fill(self.template.target, self._target_texts(fields))

    def fitted_ids(self, fields: Mapping[str, object], room: int | None = None) -> list[int]:
        """The input in at most `room` tokens (default: `input_room`). The longest field is truncated as the template says.

        Raises:
            DataError: the input does not fit, or no text would be left.
        """
        return self._fit(fields, self.input_ids(fields), self.input_room if room is None else room)[0]

    def fitted(self, rows: Sequence[Mapping[str, object]], room: int) -> Iterator[list[int] | DataError]:
        """`fitted_ids` of many rows, tokenised together: the ids of each, or the reason why it does not fit.

        Raises:
            DataError: a row lacks a field.
        """
        for row, whole in zip(rows, self._inputs(rows), strict=True):
            try:
                yield self._fit(row, whole, room)[0]
            except DataError as error:
                yield error

    def label_of(self, fields: Mapping[str, object]) -> int:
        """The index of the row's label in the template's labels; -1 if the template has none.

        Raises:
            DataError: the value is not one of the labels.
        """
        if self.template.labels is None:
            return -1
        return self.label_index(texts_of(fields, self._label_field)[self._label_field[0]])

    def label_index(self, value: str) -> int:
        """The index of a label. White space around it counts only where labels differ by nothing else.

        Raises:
            DataError: the value is not one of the labels.
        """
        label = None
        for written in (value, value.strip()):
            label = label or self._labels_of_values.get(written) or self._spellings.get(canonical(written))
        if label is None:
            values = list(self._labels_of_values)
            listed = ", ".join(f"'{each}'" for each in values[:20])
            listed += f", ... ({len(values)} in all)" if len(values) > 20 else ""
            place = "data.labels" if self.template.label_values is None else "the table data.labels"
            fix = suggest(value, values, f"correct the row or {place}", shown=lambda each: f"'{each}'")
            raise DataError(f"'{value}' is not one of the labels {listed}; {fix}")
        return (self.template.labels or ()).index(label)

    @cached_property
    def _labels_of_values(self) -> dict[str, str]:
        """Value of a row -> label."""
        return dict(self.template.label_values or ((label, label) for label in self.template.labels or ()))

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """The same for all spellings of numbers and truth values."""
        return spellings(self._labels_of_values)

    def _texts(self, fields: Mapping[str, object], template: str) -> dict[str, str]:
        return texts_of(fields, template_fields(template), self.template.defaults)

    def _target_texts(self, fields: Mapping[str, object]) -> dict[str, str]:
        label = self.label_of(fields)
        if label < 0:
            return self._texts(fields, self.template.target)
        return dict.fromkeys(self._label_field, (self.template.labels or ())[label])

    def _label_target(self, label: str) -> list[int]:
        return self._target_ids([dict.fromkeys(self._label_field, label)])[0]

    @property
    def _label_field(self) -> list[str]:
        return template_fields(self.template.target)

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer prepends and appends to a text."""
        (bare,), (full,) = self._tokens(["a"], special=False), self._tokens(["a"], special=True)
        if not bare:
            return full, []
        front = next(at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return full[:front], full[front + len(bare) :]

    def _inputs(self, rows: Sequence[Mapping[str, object]]) -> list[list[int]]:
        front, behind = self._added
        if self.template.special_tokens == "text":
            reader = TextTokenizer.of(self.tokenizer)
            marked = reader.template(self.template.input)
            found = reader.ids([fill(marked, self._texts(fields, self.template.input)) for fields in rows])
            return [[*front, *ids] for ids in found]
        texts = [self.input_text(fields) for fields in rows]
        return [ids[: len(ids) - len(behind)] for ids in self._tokens(texts, special=True)]

    def _targets(self, rows: Sequence[Mapping[str, object]]) -> list[list[int]]:
        return self._target_ids([self._target_texts(fields) for fields in rows])

    def _target_ids(self, texts: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """The token ids of targets with these texts in their fields, end token included."""
        if self.template.special_tokens == "text":
            reader = TextTokenizer.of(self.tokenizer)
            marked = reader.template(self.template.target)
            found = reader.ids([fill(marked, each) for each in texts])
        else:
            found = self._tokens([fill(self.template.target, each) for each in texts], special=False)
        return [[*ids, self.tokenizer.eos_token_id] for ids in found]

    def _tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        # verbose=False: no warning about texts longer than the base's context; they are truncated or refused later.
        return self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    def _fit(self, fields: Mapping[str, object], ids: list[int], room: int) -> tuple[list[int], Mapping[str, object]]:
        """`ids` (the whole input) and `fields` if they fit, else both after truncating the longest field as little as
        possible."""
        front = len(self._added[0])
        if len(ids) <= front:
            raise UnusableRow("the input has no text; fill the row or remove it")
        if len(ids) <= room:
            return ids, fields
        size = f"the input has {len(ids)} tokens, {room} fit (limit {self.limit}, {self.limit - room} for the target)"
        if self.template.truncate == "error":
            raise DataError(f'{size}; shorten the text, raise data.max_tokens or set data.truncate = "right"')
        texts = self._texts(fields, self.template.input)
        longest = max(texts, key=lambda field: len(texts[field]), default=None)
        best: list[int] = []
        read: Mapping[str, object] = fields
        # Binary search over the number of kept characters: fewer than low fit, more than high do not.
        low, high = 0, len(texts[longest]) - 1 if longest else -1
        while low <= high:
            kept = (low + high) // 2
            shorter = self._cut(texts, str(longest), kept)
            cut = self.input_ids(shorter)
            if len(cut) <= room:
                best, read, low = cut, shorter, kept + 1
            else:
                high = kept - 1
        if len(best) <= front:
            raise UnusableRow(f"{size}, and truncating a field is not enough; shorten the row, the template or the soft prompt")
        return best, read

    def _cut(self, texts: dict[str, str], field: str, kept: int) -> dict[str, str]:
        text = texts[field]
        return {**texts, field: text[:kept] if self.template.truncate == "right" else text[len(text) - kept :]}
