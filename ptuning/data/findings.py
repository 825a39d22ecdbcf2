"""What is remarkable about the rows of a task, as lines for people: nothing of it is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ptuning.data.dataset import Split, leaked
from ptuning.settings.data import Template
from ptuning.settings.template import in_braces, literal_names

_INSIDE = re.compile(r"\w+(?:\.|\[['\"])([\w ]+)(?:['\"]\])?")
"""A column of a row as other tools write it: row.subject, item["subject"]."""

SHOWN = 5
"""Labels that a line names."""


def describe_split(split: Split, limit: int) -> str:
    """Rows, tokens, truncated and dropped rows, and what was found out about the files."""
    notes = [f"{split.name}: {len(split.lengths)} rows, {int(split.lengths.sum())} tokens"]
    notes += [f"{split.cut} cut to {limit} tokens"] if split.cut else []
    notes += [f"{split.dropped} dropped"] if split.dropped else []
    notes += [] if split.answered else ["without answers: the teacher's are used"]
    notes += split.notes if split.name == "train" or split.notes else ()
    return ", ".join(notes)


def of_template(template: Template, columns: Callable[[], Collection[str]]) -> Iterator[str]:
    """Sentences about a template that probably means columns of the rows which it does not read. `columns`: reads their names,
    only if something in the template looks like one."""
    names = literal_names((template.input, template.target))
    there = columns() if names else ()
    for given, written in names.items():
        inside = _INSIDE.fullmatch(given)
        name = next((each for each in (given, inside[1] if inside else "") if each in there), None)
        if name is None:
            continue
        meant = in_braces(name)
        yield f"{written} in the template is plain text, but the rows have a column {name!r}; write {meant} for its value"


def warnings(train: Split, others: Sequence[Split], labels: Sequence[str]) -> Iterator[str]:
    """Sentences about rows that probably are a mistake."""
    for split in (train, *others):
        yield from _of_split(split, labels)
    for split in others:
        if many := leaked(train, split):
            yield f"{many} of the training rows also occur in {split.name}; its metrics are too optimistic"
    if labels and train.answered:
        yield from _of_labels(train, labels)


def _of_split(split: Split, labels: Sequence[str]) -> Iterator[str]:
    rows = len(split)
    table = _inputs(split)
    if rows > 1 and len(table) == 1:
        text = table["text"][0].as_py()
        yield f"all {rows} inputs of {split.name} are equal: {text[:80]!r}; check the template and the column that it names"
        return
    if blank := int(pc.sum(split.rows.with_format("arrow")["blank"][:]).as_py()):
        yield f"{blank} of {rows} rows of {split.name} have an input without text"
    if labels and split.answered:
        contradictory = pc.sum(table.filter(pc.greater(table["labels"], 1))["rows"]).as_py()
        if contradictory:
            yield f"{contradictory} of {rows} rows of {split.name} have the same input as a row with another label"
    if split.name == "train":
        repeated = rows - int(pc.sum(table["labels" if labels else "targets"]).as_py())
        if repeated:
            yield f"{repeated} of {rows} rows of train are repetitions of another row"


def _inputs(split: Split) -> pa.Table:
    """Every different input with its rows, and its different labels and targets."""
    columns = split.rows.with_format("arrow")
    table = pa.table({name: columns[name][:] for name in ("text", "label", "target_text")})
    found = table.group_by("text").aggregate(
        [("text", "count"), ("label", "count_distinct"), ("target_text", "count_distinct")]
    )
    return found.rename_columns(
        {"text_count": "rows", "label_count_distinct": "labels", "target_text_count_distinct": "targets"}
    )


def _of_labels(train: Split, labels: Sequence[str]) -> Iterator[str]:
    counts = pc.value_counts(train.rows.with_format("arrow")["label"][:])
    seen = {entry["values"]: entry["counts"] for entry in counts.to_pylist()}
    if len(seen) == 1:
        (only,) = seen
        yield f"all {len(train)} training rows have the label '{labels[only]}'; nothing else can be learned"
        return
    lacking = [label for index, label in enumerate(labels) if index not in seen]
    if lacking:
        listed = ", ".join(f"'{label}'" for label in lacking[:SHOWN]) + (", ..." if len(lacking) > SHOWN else "")
        yield f"{len(lacking)} of {len(labels)} labels have no training rows: {listed}"
