"""What came of a table, and how good the answers are where the truth is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptuning.prediction.parts import ERROR, PREDICTION, PROBABILITIES, TRUTH, VERSION
from ptuning.settings.data import Template
from ptuning.settings.label_values import canonical, spellings
from ptuning.training import metrics


@dataclass(frozen=True)
class Answered:
    """How far the stream is."""

    rows: int
    seconds: float
    """From the moment when the first base was loaded to the newest answer."""
    loaded: bool


@dataclass(frozen=True)
class PredictResult:
    """A table with answers."""

    output: str
    rows: int
    errors: int
    """Rows without an answer; their column `error` says why."""
    answered: int
    """Rows that this command has answered: fewer than `rows` if it continued."""
    seconds: float
    """From the moment when the first base was loaded to the last answer."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """By version, over the rows whose true answer is in the table."""
    measured: dict[str, int] = field(default_factory=dict)
    """Number of these rows."""
    notes: tuple[str, ...] = ()

    @property
    def rows_per_second(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """The last line of `--json`."""
        return {**vars(self), "notes": list(self.notes), "rows_per_second": self.rows_per_second}

    def __str__(self) -> str:
        speed = f", {self.answered} of them in {self.seconds:.0f} s ({self.rows_per_second:,.0f} per second)"
        wrong = f", {self.errors} with errors" if self.errors else ""
        lines = [f"{self.output}: {self.rows} rows{wrong}{speed}"]
        for version, values in self.metrics.items():
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            lines.append(f"{version}: {numbers} over {self.measured[version]} rows with a true answer")
        return "\n".join(lines)


class Measured:
    """Collects what the metrics need while answers pass by: a number per label and row, or the text."""

    def __init__(self, templates: Mapping[str, Template]) -> None:
        self._labels = {version: _label_indices(template) for version, template in templates.items() if template.labels}
        self._scores: dict[str, list[np.ndarray]] = {}
        self._truth: dict[str, list[Any]] = {}
        self._texts: dict[str, list[str]] = {}
        self.rows = self.errors = 0
        self._unknown: dict[str, int] = {}

    def passing(self, answers: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The answers, each looked at once."""
        for answer in answers:
            self._look(answer)
            yield answer

    def _look(self, answer: Mapping[str, Any]) -> None:
        self.rows += 1
        if answer[ERROR] is not None:
            self.errors += 1
            return
        version, truth = answer[VERSION], answer[TRUTH]
        if not truth:
            return
        if version not in self._labels:
            self._texts.setdefault(version, []).append(answer[PREDICTION])
            self._truth.setdefault(version, []).append(truth)
            return
        values = self._labels[version]
        label = values.get(truth[0], values.get(canonical(truth[0])))
        if label is None:
            self._unknown[version] = self._unknown.get(version, 0) + 1
            return
        with np.errstate(divide="ignore"):
            scores = np.log(np.asarray(answer[PROBABILITIES]))
        self._scores.setdefault(version, []).append(scores.astype(np.float32))
        self._truth.setdefault(version, []).append(label)

    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of every version."""
        found: dict[str, dict[str, float]] = {}
        for version, scores in self._scores.items():
            values = metrics.classification(np.stack(scores).astype(np.float64), np.asarray(self._truth[version]))
            found[version] = {name: values[name] for name in ("accuracy", "macro_f1", "ece", "loss")}
        for version, texts in self._texts.items():
            found[version] = metrics.generation(texts, self._truth[version])
        return found

    def measured(self) -> dict[str, int]:
        """Rows that the metrics of every version are about."""
        return {version: len(rows) for version, rows in self._truth.items()}

    def notes(self) -> Iterator[str]:
        for version, rows in self._unknown.items():
            yield f"{version}: {rows} rows have a true answer that is not one of its labels; they are not in its metrics"


def _label_indices(template: Template) -> dict[str, int]:
    """Value of a row -> index of its label; also for other spellings of numbers and truth values."""
    labels = list(template.labels or ())
    values = dict(template.label_values or zip(labels, labels, strict=True))
    return {value: labels.index(label) for value, label in (spellings(values) | values).items()}
