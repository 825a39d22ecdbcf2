"""Rows become token ids, in one way for training, evaluation and serving.

`Encoder` holds the template and the tokenizer: input and target are tokenised apart and joined as ids, so no token
spans the seam and the served tokens are the trained ones. `load_split` runs it over a whole split once and keeps the
result as a memory-mapped Arrow file, found again by what decides it: the texts, the template, the limit, the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import transformers
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ptuning.config import Template, suggest, template_fields
from ptuning.data.sources import FORMAT, DataError, cache_folder, fingerprint, quiet, read_source, texts_of
from ptuning.model.label_trie import LabelTrie, nested_labels

_COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "target_ids": List(Value("int32")),
        "label": Value("int32"),
        "text": Value("string"),
        "target_text": Value("string"),
        "references": List(Value("string")),
        "length": Value("int32"),
        "cut": Value("bool"),
    }
)


class _Unusable(DataError):
    """A row that cannot become an example. Train rows are dropped and counted, others are refused."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """Rows -> token ids. The same object for training, evaluation and serving.

    Raises:
        DataError: the tokenizer has no end token, or cannot tell two labels apart.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    limit: int
    """Most tokens of input + target. Given: what the base's context leaves beside the soft prompt; the template's
    max_tokens lowers it."""

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
        ids = [self.target_ids({field: label}) for label in self.template.labels or () for field in self._label_field]
        labels = dict(zip(map(tuple, ids), self.template.labels or (), strict=True))
        for label, tokens in zip(self.template.labels or (), ids, strict=True):
            if labels[tuple(tokens)] != label:
                raise DataError(
                    f"the labels '{label}' and '{labels[tuple(tokens)]}' are the same tokens; rename one in data.labels"
                )
        nested = nested_labels(labels)
        if nested:  # an end token in the middle of a label
            shorter, longer = (labels[each] for each in nested)
            raise DataError(f"the label '{longer}' goes on behind the end of '{shorter}'; rename one in data.labels")
        return ids

    @cached_property
    def label_trie(self) -> LabelTrie:
        """The labels as a choice among their tokens; only with labels."""
        return LabelTrie(tuple(map(tuple, self.label_ids)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the tokens of a row."""
        template = self.template.model_dump(include=set(Template.model_fields))
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        return fingerprint([FORMAT, transformers.__version__, template, self.limit, tokenizer])

    @property
    def input_room(self) -> int:
        """Most tokens of an input, where that does not depend on the row: with labels, every label fits behind it."""
        return self.limit - max(map(len, self.label_ids), default=1)

    def input_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The whole input, with the special tokens that the tokenizer puts in front (and without those behind)."""
        return self._inputs([self.input_text(fields)])[0]

    def target_ids(self, fields: Mapping[str, object]) -> list[int]:
        """The target and the end token."""
        return self._targets([self.target_text(fields)])[0]

    def input_text(self, fields: Mapping[str, object]) -> str:
        return self.template.input.format_map(texts_of(fields, template_fields(self.template.input)))

    def target_text(self, fields: Mapping[str, object]) -> str:
        return self.template.target.format_map(texts_of(fields, template_fields(self.template.target)))

    def fitted_ids(self, fields: Mapping[str, object], room: int | None = None) -> list[int]:
        """The input in at most `room` tokens (default: `input_room`): the longest field is cut as the template says.

        Raises:
            DataError: it does not fit, or nothing is left of it.
        """
        return self._fit(fields, self.input_ids(fields), self.input_room if room is None else room)

    def label_of(self, fields: Mapping[str, object]) -> int:
        """The row's place in the template's labels; -1 if the template has none.

        Raises:
            DataError: the value is no label.
        """
        labels = self.template.labels
        if labels is None:
            return -1
        value = texts_of(fields, self._label_field)[self._label_field[0]]
        if value not in labels:
            listed = ", ".join(f"'{label}'" for label in labels[:20])
            listed += f", ... ({len(labels)} in all)" if len(labels) > 20 else ""
            fix = suggest(value, labels, "correct the row or data.labels", shown=lambda label: f"'{label}'")
            raise DataError(f"'{value}' is not one of the labels {listed}; {fix}")
        return labels.index(value)

    @property
    def _label_field(self) -> list[str]:
        return template_fields(self.template.target)

    @cached_property
    def _added(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts in front of and behind a text."""
        (bare,), (full,) = self._tokens(["a"], special=False), self._tokens(["a"], special=True)
        if not bare:
            return len(full), 0
        front = next(at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return front, len(full) - len(bare) - front

    def _inputs(self, texts: Sequence[str]) -> list[list[int]]:
        _, behind = self._added
        return [ids[: len(ids) - behind] for ids in self._tokens(texts, special=True)]

    def _targets(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, self.tokenizer.eos_token_id] for ids in self._tokens(texts, special=False)]

    def _tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        # verbose warns of texts longer than the base's context: here they are cut or refused.
        return self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    def _fit(self, fields: Mapping[str, object], ids: list[int], room: int) -> list[int]:
        """`ids`, the fields' whole input, or those of the longest beginning or end of the longest field that fits."""
        front, _ = self._added
        if len(ids) <= front:
            raise _Unusable("the input has no text; fill the row or remove it")
        if len(ids) <= room:
            return ids
        size = f"{len(ids)} tokens of input where {room} fit (limit {self.limit}, {self.limit - room} for the target)"
        if self.template.truncate == "error":
            raise DataError(f'{size}; shorten the text, raise data.max_tokens or set data.truncate = "right"')
        texts = texts_of(fields, template_fields(self.template.input))
        longest = max(texts, key=lambda field: len(texts[field]), default=None)
        best: list[int] = []
        # Characters kept: fewer than low fit, more than high do not.
        low, high = 0, len(texts[longest]) - 1 if longest else -1
        while low <= high:
            kept = (low + high) // 2
            cut = self._cut(texts, str(longest), kept)
            if len(cut) <= room:
                best, low = cut, kept + 1
            else:
                high = kept - 1
        if len(best) <= front:
            raise _Unusable(f"{size}, and no cut makes it fit; shorten the row, the template or the soft prompt")
        return best

    def _cut(self, texts: dict[str, str], field: str, kept: int) -> list[int]:
        text = texts[field]
        part = text[:kept] if self.template.truncate == "right" else text[len(text) - kept :]
        return self._inputs([self.template.input.format_map({**texts, field: part})])[0]


@dataclass(frozen=True, eq=False)
class Split:
    """The tokenised rows of one split, memory-mapped."""

    name: str
    """train, validation or test."""
    source: str
    """As written in the experiment."""
    rows: Dataset
    """input_ids, target_ids (with end token), label (-1 without labels), text (the whole rendered input), target_text,
    references (list of texts), length (tokens of input + target), cut."""
    lengths: NDArray[np.int32]
    """[rows] tokens of input + target."""
    cut: int
    """Rows whose input was cut to fit."""
    dropped: int
    """Train rows that were left out: no text, or too long even without it."""
    fingerprint: str
    """sha256 of the texts of all rows, dropped ones too, in order; the same for every file format."""

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids of one example: input, target (with the end token)."""
        row = self._ids[int(index)]
        return row["input_ids"], row["target_ids"]

    @cached_property
    def target_lengths(self) -> NDArray[np.int32]:
        """[rows] tokens of the target, end token included."""
        ids = self.rows.with_format("arrow")["target_ids"][:]
        return np.asarray(pc.list_value_length(ids), dtype=np.int32)

    def frequent_tokens(self, most: int = 5000, rows: int = 5000) -> list[int]:
        """Tokens of the first rows' inputs, the most frequent first; equally frequent ones by id."""
        counts = Counter(token for ids in self._ids[:rows]["input_ids"] for token in ids)
        return [token for token, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:most]]

    @cached_property
    def _ids(self) -> Dataset:
        return self.rows.select_columns(["input_ids", "target_ids"])


def load_split(name: str, source: str, encoder: Encoder) -> Split:
    """Read and tokenise the rows of `source`, or find them tokenised. In "train" unusable rows are dropped and counted.

    Raises:
        DataError: anything wrong with the source or one of its rows.
    """
    texts = read_source(source, encoder.fields, references=encoder.template.labels is None)
    drop = name == "train"
    key = fingerprint([texts.fingerprint, encoder.fingerprint, drop])[:32]
    with quiet():
        rows = texts.rows.map(
            _encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"encoder": encoder, "source": source, "drop": drop},
            features=_COLUMNS,
            remove_columns=texts.rows.column_names,
            # An explicit key instead of a pickle of the function: the same in every process and for equal files.
            new_fingerprint=key,
            cache_file_name=str(cache_folder() / f"{key}.arrow"),
            load_from_cache_file=True,
        )
    if not len(rows):
        raise DataError(
            f"{source}: none of its {len(texts.rows)} rows has a text that fits into {encoder.limit} tokens; "
            "raise data.max_tokens"
        )
    columns = rows.with_format("numpy")
    return Split(
        name=name,
        source=source,
        rows=rows,
        lengths=np.asarray(columns["length"][:], dtype=np.int32),
        cut=int(np.sum(columns["cut"][:])),
        dropped=len(texts.rows) - len(rows),
        fingerprint=texts.fingerprint,
    )


def leaked(train: Split, other: Split) -> int:
    """How many rows of `train` have an input that also stands in `other`."""
    seen = set(_input_hashes(other))
    return sum(digest in seen for digest in _input_hashes(train))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's ids, the same in every process and after saving and loading."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # What the last call left behind, not part of the tokenizer.
        del rules["truncation"], rules["padding"]
    return fingerprint([rules, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def _encode(
    columns: dict[str, list[Any]], indices: list[int], encoder: Encoder, source: str, drop: bool
) -> dict[str, list[Any]]:
    """One batch of rows of texts -> the same rows as `_COLUMNS`, without those that were dropped."""
    references = columns.pop("references", [None] * len(indices))
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    inputs = [encoder.input_text(row) for row in rows]
    targets = [encoder.target_text(row) for row in rows]
    target_ids = [] if encoder.template.labels else encoder._targets(targets)
    encoded: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for at, whole in enumerate(encoder._inputs(inputs)):
        try:
            label = encoder.label_of(rows[at])
            target = target_ids[at] if label < 0 else encoder.label_ids[label]
            ids = encoder._fit(rows[at], whole, encoder.limit - len(target) if label < 0 else encoder.input_room)
        except DataError as error:
            if drop and isinstance(error, _Unusable):
                continue
            raise DataError(f"{source}, row {indices[at] + 1}: {error}") from None
        row = {
            "input_ids": ids,
            "target_ids": target,
            "label": label,
            "text": inputs[at],
            "target_text": targets[at],
            "references": references[at] or [targets[at].lstrip()],
            "length": len(ids) + len(target),
            "cut": ids is not whole,
        }
        for name, value in row.items():
            encoded[name].append(value)
    return encoded


def _input_hashes(split: Split) -> Iterator[bytes]:
    for batch in split.rows.select_columns(["text"]).iter(1000):
        for text in batch["text"]:
            yield hashlib.blake2b(text.encode(), digest_size=16).digest()
