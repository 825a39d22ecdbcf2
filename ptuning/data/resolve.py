"""What an experiment leaves to files: the labels of `data.labels = "auto"`, the steps of `train.epochs`, and the text of a
`data.teacher` that names a file."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ptuning.config import Experiment, parse_experiment, with_texts
from ptuning.data.conversations import MESSAGES, answer_of, read
from ptuning.data.division import training_texts
from ptuning.data.readers import Columns
from ptuning.data.sources import read_source, shown
from ptuning.data.task_template import TaskTemplate, conversations, has_answers
from ptuning.errors import DataError
from ptuning.settings.label_values import canonical, ordered

MOST_LABELS = 300
"""More different values than this are taken for free text."""


def resolved(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """The experiment with its texts, labels and steps, and lines that report them. Rows are only read if something is left to
    them.

    Raises:
        UserError: the training rows are invalid, or do not look like those of a classification task; or a text is missing.
    """
    experiment = with_texts(experiment)  # one that was made in Python was not read from a file
    lines = []
    if experiment.data.finds_labels:
        labels = _labels(experiment)
        experiment = _changed(experiment, "data", labels=labels)
        lines.append(f"data.labels: {len(labels)} found: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}")
    epochs = experiment.train.epochs
    if epochs is not None:
        found = TaskTemplate(experiment.data, conversations(experiment.data))
        answered = not experiment.data.teacher or has_answers(experiment.data.train, found)
        rows = len(training_texts(experiment.data, found.template, found.rows, answered)["train"].rows)
        steps = max(1, math.ceil(epochs * rows / experiment.train.batch_size - 1e-9))
        experiment = _changed(experiment, "train", epochs=None, steps=steps)
        lines.append(f"train.epochs: {epochs:g} of {rows} rows are {steps} steps")
    return experiment, lines


def _changed(experiment: Experiment, table: str, **values: Any) -> Experiment:
    tables = experiment.model_dump()
    tables[table] |= values
    return parse_experiment(tables)


def _labels(experiment: Experiment) -> list[str]:
    """The values of the target field in the training rows."""
    config = experiment.data
    chat = conversations(config)
    columns = Columns.of_template(config, chat=chat)
    rows = read_source(config.train, columns).rows
    name = MESSAGES if chat else columns.target[0]
    counts: Counter[str] = Counter()
    for batch in rows.select_columns([name]).iter(10_000):
        values: list[str] = batch[name]
        counts.update(filter(None, (answer_of(read(value)).strip() for value in values)) if chat else values)
    spellings: dict[str, list[str]] = {}
    for value in counts:
        spellings.setdefault(canonical(value), []).append(value)
    labels = ordered(written[0] if len(written) == 1 else plain for plain, written in spellings.items())
    where = f"{len(rows)} rows of {shown(config.train)}"
    if len(labels) > MOST_LABELS or (len(labels) > 20 and len(labels) > len(rows) / 2):
        raise DataError(
            f'data.labels: "auto" finds {len(labels)} different values in the {where}, which looks like free text; '
            "list the labels, or leave data.labels out"
        )
    if len(labels) < 2:
        only = repr(labels[0]) if labels else "empty values"
        raise DataError(f'data.labels: "auto" finds only {only} in the {where}; add rows of other labels, or list them')
    return labels
