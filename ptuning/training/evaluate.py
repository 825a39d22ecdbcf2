"""Evaluation of soft prompts: label likelihoods, generated text, loss on targets. Rows are split over the workers.

All workers run the same number of passes, because a partitioned base needs all of them in every layer, and get the same
results.

Shapes: K soft prompts, n rows of the split, L labels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptuning.data.dataset import Split
from ptuning.data.encoder import Encoder
from ptuning.model.limits import LOGITS, TOKENS, scored_tokens
from ptuning.model.packing import TurnsRow, kv_slots, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.training import metrics
from ptuning.training.distributed import Workers
from ptuning.training.generation import Greedy
from ptuning.training.metrics import Classification


class Rows(Protocol):
    """Rows that are read, as a `Split`'s."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """`[n]` tokens of input + target."""

    def row(self, index: int) -> TurnsRow:
        """Token ids of one row."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one soft prompt on one split; predictions row by row, as `text`, `target`, `prediction`, and with labels
    `probability`."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    classification: Classification | None = None
    """Detailed results of a classification task."""


@torch.no_grad()
def evaluate(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    split: Split,
    encoder: Encoder,
    workers: Workers,
    max_new_tokens: int | None = None,
) -> list[Evaluation]:
    """Evaluate K soft prompts side by side.

    A classification task gives loss (NLL of the label), accuracy, macro-F1 and expected calibration error. A generation task
    gives loss and perplexity, and with `max_new_tokens` also greedy text and its metrics.
    """
    if encoder.template.labels:
        return _classify(model, soft_prompts, split, encoder, workers)
    return _generate(model, soft_prompts, split, encoder, workers, max_new_tokens)


@torch.no_grad()
def label_scores(
    model: PromptedModel, soft_prompts: Sequence[Tensor], split: Rows, encoder: Encoder, workers: Workers
) -> Tensor:
    """Log-probability of every label after every row's input: `[K, n, L]` float64."""
    trie = encoder.label_trie
    scores = torch.zeros(len(soft_prompts), len(split.lengths), len(trie.labels), dtype=torch.float64)
    sizes = [len(soft_prompt) for soft_prompt in soft_prompts]
    numbers = len(trie.nodes) * len(trie.ids)
    for rows, real in passes(model, split, workers, len(sizes), len(trie.tokens), numbers):
        inputs = [split.row(row)[0] for row in rows]
        nll = model(soft_prompts, pack_labels(sizes, [inputs] * len(sizes), trie, kv_slots(soft_prompts))).double().cpu()
        if real:
            scores[:, rows] = trie.label_logprobs(-nll.view(len(sizes), len(rows), -1))
    return workers.all_reduce(scores)


def _classify(
    model: PromptedModel, soft_prompts: Sequence[Tensor], split: Split, encoder: Encoder, workers: Workers
) -> list[Evaluation]:
    scores = label_scores(model, soft_prompts, split, encoder, workers).numpy()
    columns = split.rows.select_columns(["text", "label"])[:]  # iterating a column decodes row by row
    truth = np.asarray(columns["label"])
    teacher = split.teaching.labels if split.teaching else None
    names = encoder.template.labels or ()
    evaluations = []
    for slot in scores:
        if not np.isfinite(slot).all():  # this soft prompt has diverged; the others are not affected
            evaluations.append(Evaluation({"loss": math.nan, "accuracy": 0.0, "macro_f1": 0.0, "ece": math.nan}))
            continue
        measured = metrics.classification(slot, truth)
        predicted = slot.argmax(1)
        predictions = [
            {"text": text, "target": names[label], "prediction": names[guess], "probability": math.exp(logprob)}
            for text, label, guess, logprob in zip(columns["text"], truth, predicted, slot.max(1), strict=True)
        ]
        numbers = {
            "loss": measured["loss"],
            "accuracy": measured["accuracy"],
            "macro_f1": measured["macro_f1"],
            "ece": measured["ece"],
        }
        if teacher is not None:
            numbers |= metrics.agreement(slot, teacher, truth if split.answered else None)
            numbers |= {"loss": metrics.cross_entropy(slot, teacher), "nll": measured["loss"]}
        evaluations.append(Evaluation(numbers, predictions, measured))
    return evaluations


def _generate(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    split: Split,
    encoder: Encoder,
    workers: Workers,
    max_new_tokens: int | None,
) -> list[Evaluation]:
    losses = _target_losses(model, soft_prompts, split, workers)
    if max_new_tokens is None:
        return [Evaluation({"loss": loss, "perplexity": _perplexity(loss)}) for loss in losses]
    evaluations = []
    answers = generate_rows(model, soft_prompts, split, encoder, workers, max_new_tokens)
    for ids, loss in zip(answers, losses, strict=True):
        texts = encoder.texts_of(ids)
        measured = metrics.generation(texts, split.rows["references"][:])
        predictions = [
            {"text": text, "target": target.strip(), "prediction": guess}
            for text, target, guess in zip(split.rows["text"][:], split.rows["target_text"][:], texts, strict=True)
        ]
        evaluations.append(Evaluation({"loss": loss, "perplexity": _perplexity(loss), **measured}, predictions))
    return evaluations


def _target_losses(model: PromptedModel, soft_prompts: Sequence[Tensor], split: Split, workers: Workers) -> list[float]:
    """Mean negative log-likelihood per target token of each soft prompt."""
    sums = torch.zeros(len(soft_prompts) + 1, dtype=torch.float64)
    sizes = [len(soft_prompt) for soft_prompt in soft_prompts]
    longest = int(split.lengths.max())
    for rows, real in passes(model, split, workers, len(sizes), 0, longest * _vocabulary(model)):
        batch = [split.row(row) for row in rows]
        plan = pack_targets(sizes, [batch] * len(sizes), kv=kv_slots(soft_prompts))
        nll = model(soft_prompts, plan).double().cpu()
        if real:
            sums[:-1] += torch.stack([part.sum() for part in nll.split(plan.per_slot)])
            sums[-1] += plan.per_slot[0]
    totals = workers.all_reduce(sums).tolist()
    return [total / totals[-1] for total in totals[:-1]]


def generate_rows(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    split: Rows,
    encoder: Encoder,
    workers: Workers,
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """Greedy token ids of each soft prompt for every row, as `Greedy.ids`, in the order of the split.

    The rows of several soft prompts are one batch: a token takes about as long for all of them as for one, and a partitioned
    base is gathered once for it.
    """
    together = max(1, TOKENS // (int(split.lengths.max()) + max_new_tokens))
    greedy = Greedy(model, encoder, max_new_tokens, together=workers.size > 1)
    own: list[tuple[int, int, list[int]]] = []
    for first in range(0, len(soft_prompts), together):
        some = list(enumerate(soft_prompts))[first : first + together]
        for rows, real in passes(model, split, workers, len(some), max_new_tokens, _vocabulary(model), TOKENS):
            wanted = [(slot, row) for slot, _ in some for row in rows]
            found = greedy.ids([soft_prompts[slot] for slot, _ in wanted], [split.row(row)[0] for _, row in wanted])
            if real:
                own += [(*where, ids) for where, ids in zip(wanted, found, strict=True)]
    everything = sorted(each for part in workers.all_gather(own) for each in part)
    return [[ids for at, _, ids in everything if at == slot] for slot in range(len(soft_prompts))]


def passes(
    model: PromptedModel, split: Rows, workers: Workers, slots: int, extra: int, logits: int, most: int | None = None
) -> Iterator[tuple[list[int], bool]]:
    """This worker's rows in each pass, longest rows first; False for a pass without rows of its own, which the other workers
    need.

    `extra`: additional tokens per row; `logits`: logits computed per row; `most`: tokens of a pass, default: `scored_tokens`.
    """
    most = most or scored_tokens(model.base.device.type != "cpu")
    order = np.argsort(-split.lengths, kind="stable")
    start = 0
    while start < len(order):
        tokens = slots * (int(split.lengths[order[start]]) + extra)
        fitting = max(1, min(most // tokens, LOGITS // (slots * logits)))
        chunk = order[start : start + fitting * workers.size]
        start += len(chunk)
        mine = chunk[workers.rank :: workers.size].tolist()
        yield (mine, True) if mine else ([int(chunk[0])], False)


def _vocabulary(model: PromptedModel) -> int:
    return int(model.base.config.get_text_config().vocab_size)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
