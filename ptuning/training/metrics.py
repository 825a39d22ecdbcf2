"""Metrics: pure functions of predictions and true targets.

Every metric is between 0 and 1, BLEU included (sacrebleu's own scale is 0 to 100). Metrics come from established libraries
where possible: scikit-learn, rouge-score, sacrebleu. They are imported in the functions that use them, because together they
take two seconds, which would delay every worker's first step.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import TypedDict

import numpy as np

BINS = 15
"""Bins of the expected calibration error and of the reliability diagram (Guo et al. 2017, section 4)."""


class LabelRow(TypedDict):
    """One line of the table per label."""

    label: int
    precision: float
    recall: float
    f1: float
    rows: int
    """Rows whose true label it is."""


class Bin(TypedDict):
    """A bin of the reliability diagram: rows whose predicted label has a probability in one of the equal intervals of 0 to
    1."""

    confidence: float
    """Mean probability of the predicted label."""
    accuracy: float
    rows: int


class Classification(TypedDict):
    loss: float
    """Mean negative log-likelihood (NLL) of the true label, in nats per row."""
    accuracy: float
    macro_f1: float
    ece: float
    """Expected calibration error: the mean difference between confidence and accuracy over the rows (Guo et al. 2017, equation
    3)."""
    confusion: list[list[int]]
    """`[L][L]`, rows: truth, columns: prediction."""
    per_label: list[LabelRow]
    reliability: list[Bin]
    """Non-empty bins, ascending."""


def classification(scores: np.ndarray, truth: np.ndarray) -> Classification:
    """Metrics of the distribution over labels. `scores` [n, L] are log-probabilities, `truth` [n] label indices.

    Macro-F1 is the mean over all L labels; a label that is neither true nor predicted anywhere counts as 0.

    Raises:
        ValueError: there are no rows, or a score is NaN, which cannot be ordered.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    if not len(scores):
        raise ValueError("no rows to measure")
    if np.isnan(scores).any():
        raise ValueError(f"scores of row {np.isnan(scores).any(axis=1).argmax()} are NaN")
    predicted = scores.argmax(axis=1)
    labels = np.arange(scores.shape[1])
    columns = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    confidence = np.exp(scores[np.arange(len(scores)), predicted])
    bins = reliability(confidence, predicted == truth)
    return {
        "loss": float(-scores[np.arange(len(scores)), truth].mean()),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(np.mean(columns[2])),
        "ece": sum(each["rows"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / len(scores),
        "confusion": confusion_matrix(truth, predicted, labels=labels).tolist(),
        "per_label": [
            {"label": at, "precision": float(p), "recall": float(r), "f1": float(f1), "rows": int(rows)}
            for at, (p, r, f1, rows) in enumerate(zip(*columns, strict=True))
        ],
        "reliability": bins,
    }


def agreement(scores: np.ndarray, teacher: np.ndarray, truth: np.ndarray | None) -> dict[str, float]:
    """How close distributions over labels are to a teacher's, log-probabilities `[n, L]` both: `agreement`, the fraction of
    rows with the same choice, and `divergence`, the mean Kullback-Leibler divergence from the teacher in nats; with true labels
    `[n]` also `teacher_accuracy`."""
    chosen = teacher.argmax(axis=1)
    divergence = cross_entropy(scores, teacher) - cross_entropy(teacher, teacher)
    found = {"agreement": float((scores.argmax(axis=1) == chosen).mean()), "divergence": divergence}
    return found | ({"teacher_accuracy": float((chosen == truth).mean())} if truth is not None else {})


def cross_entropy(scores: np.ndarray, teacher: np.ndarray) -> float:
    """Mean cross-entropy of distributions over labels to a teacher's in nats: what distilling minimises. `[n, L]`
    log-probabilities both."""
    shares = np.exp(teacher)
    return float(-np.where(shares > 0, shares * scores, 0).sum(axis=1).mean())


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    """Accuracy of predictions by confidence, in `BINS` equal intervals of 0 to 1; empty ones are left out.

    `confidence` [n] probability of the predicted label, `right` [n] whether it is the true one.
    """
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found: list[Bin] = []
    for place in range(BINS):
        here = places == place
        if here.any():
            found.append(
                {
                    "confidence": float(confidence[here].mean()),
                    "accuracy": float(right[here].mean()),
                    "rows": int(here.sum()),
                }
            )
    return found


def generation(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match`, `token_f1`, `rouge_l` and `bleu` of texts; `references[n]` are all correct answers of row n.

    The best reference of a row counts for exact match, token F1 and ROUGE-L, which are means over the rows. BLEU is
    one number for the whole corpus.

    Raises:
        ValueError: there are no rows, or a row has no reference.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    if not predictions:
        raise ValueError("no rows to measure")
    for row, answers in enumerate(references):
        if not answers:
            raise ValueError(f"row {row} has no reference")
    rows = list(zip(predictions, references, strict=True))
    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    return {
        "exact_match": _mean([text.strip() in [answer.strip() for answer in answers] for text, answers in rows]),
        "token_f1": _mean([max(token_f1(text, answer) for answer in answers) for text, answers in rows]),
        "rouge_l": _mean([rouge.score_multi(answers, text)["rougeL"].fmeasure for text, answers in rows]),
        # Reference streams: the first reference of every row, the second ..., None for rows with fewer. force: no warning at
        # every evaluation if the texts look tokenised ("word .").
        "bleu": BLEU(force=True).corpus_score(list(predictions), list(zip_longest(*references))).score / 100,
    }


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that two texts share, as SQuAD counts it (Rajpurkar et al. 2016): case, punctuation and articles
    do not matter. Two texts without any word are equal."""
    predicted, expected = _squad_words(prediction), _squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _squad_words(text: str) -> list[str]:
    letters = (c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return re.sub(r"\b(a|an|the)\b", " ", "".join(letters)).split()


class _Words:
    """For ASCII text the words of rouge-score's own tokenizer, which drops all other letters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
