"""Training, validation and test rows from one source: the same on every machine, and no input is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ptuning.data.conversations import MESSAGES, ChatRows, answer_of, asked, read
from ptuning.data.readers import Columns
from ptuning.data.sources import FORMAT, ROW, Stored, Texts, read_source, shown, stored, stored_bytes
from ptuning.errors import DataError
from ptuning.model.fingerprint import json_hash
from ptuning.settings.data import DataConfig, Template
from ptuning.settings.label_values import canonical
from ptuning.settings.template import fill, template_fields


def training_texts(config: DataConfig, template: Template, chat: ChatRows | None, answered: bool = True) -> dict[str, Texts]:
    """The rows of `data.train` by split: "train", and those that a fraction takes from them.

    Equal inputs stay together. With labels, every label has the same fraction in every split, as far as whole rows allow; at
    least one input of every label is trained on. `template`, `chat`: how a row becomes text (`TaskTemplate`); `answered`: the
    rows have targets.

    Raises:
        DataError: the source is invalid, or too small for the fractions.
    """
    columns = Columns.of_template(template, config.references if answered else None, chat, answered)
    texts = read_source(config.train, columns)
    shares = {"test": config.held_out, "validation": config.validation_share}
    if not any(shares.values()):
        return {"train": texts}
    reading = _Reading(template, chat, str(config.split_seed), answered)

    @cache
    def parts() -> list[str]:
        return _parts(texts, reading, shares)

    found = {}
    for split in ("train", *(name for name, share in shares.items() if share)):
        key = json_hash([FORMAT, texts.fingerprint, reading.key, shares, split])
        names = [name for name in texts.rows.column_names if name in columns.names]
        schema = texts.rows.features.arrow_schema.remove_metadata().append(pa.field(ROW, pa.int64()))
        names += ["references"] if columns.free else []

        def rows(split: str = split) -> Iterator[Stored]:
            return _rows(texts, parts(), split)

        try:
            path = stored(key[:32], shown(config.train), names, schema, rows)
        except _Empty:
            few, share = f"the {len(texts.rows)} rows of {shown(config.train)}", shares.get(split, 0)
            raise DataError(
                f"data.{split}: a fraction of {share:g} of {few} leaves it empty; raise it, or give a file"
            ) from None
        found[split] = Texts(Dataset.from_file(str(path)), path.stem.rpartition("-")[2], texts.notes)
    return found


class _Empty(Exception):
    """No row belongs to a split."""


@dataclass(frozen=True)
class _Reading:
    """What is asked in a row, and its label."""

    template: Template
    chat: ChatRows | None
    seed: str
    answered: bool = True

    @property
    def key(self) -> list[Any]:
        template = self.template
        return [
            template.input,
            template.target,
            template.defaults,
            bool(template.labels),
            bool(self.chat),
            self.seed,
            self.answered,
        ]

    def digest(self, row: Mapping[str, Any]) -> bytes:
        """Of the input, which is the same for equal inputs."""
        text = asked(read(row[MESSAGES])) if self.chat else fill(self.template.input, row)
        return hashlib.blake2b(text.encode(), digest_size=16, key=self.seed.encode()).digest()

    def label(self, row: Mapping[str, Any]) -> str:
        """The same for all rows without labels."""
        if not (self.template.labels and self.answered):
            return ""
        if self.chat:
            return canonical(answer_of(read(row[MESSAGES])).strip())
        return canonical(row[template_fields(self.template.target)[0]])


def _parts(texts: Texts, reading: _Reading, shares: dict[str, float]) -> list[str]:
    """The split of every row. The inputs of a label are in the order of their digests."""
    digests: list[bytes] = []
    labels: dict[bytes, str] = {}
    for row in _each(texts):
        digests.append(reading.digest(row))
        if digests[-1] not in labels:
            labels[digests[-1]] = reading.label(row)
    counts = Counter(digests)
    strata: dict[str, list[bytes]] = defaultdict(list)
    for digest in sorted(counts, reverse=True):
        strata[labels[digest]].append(digest)
    sizes = {value: sum(counts[digest] for digest in inputs) for value, inputs in strata.items()}
    parts = dict.fromkeys(counts, "train")
    for split, share in shares.items():
        owed = 0.0  # rows that rounding has left to the next label
        for value in sorted(strata):
            inputs = strata[value]
            wanted, taken = share * sizes[value] + owed, 0
            while share and len(inputs) > 1 and taken + counts[inputs[-1]] / 2 <= wanted:
                digest = inputs.pop()
                parts[digest] = split
                taken += counts[digest]
            owed = min(1.0, max(-1.0, wanted - taken))
    return [parts[digest] for digest in digests]


def _each(texts: Texts) -> Iterator[dict[str, Any]]:
    """Every row. In batches: `datasets` takes ten times as long row by row."""
    for batch in texts.rows.iter(1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _rows(texts: Texts, parts: Sequence[str], split: str) -> Iterator[Stored]:
    if split not in parts:
        raise _Empty
    for number, (row, part) in enumerate(zip(_each(texts), parts, strict=True)):
        if part == split:
            yield {**row, ROW: number}, stored_bytes(list(row.values()))
