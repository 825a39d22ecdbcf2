"""A teacher: the frozen base behind a text. What it says about a row is what a soft prompt learns to say without the text.

The text is a soft prompt that is not trained: its embeddings (golden law: the same predictions). So a teacher is asked by the
passes of evaluation, once per row that a run reads, however many steps and slots read it again.

Of labels it gives the whole distribution. Of free text it gives its greedy answer, if the row has none (sequence-level
distillation, Kim and Rush 2016), and the `CANDIDATES` most likely tokens at each token of the answer.

Shapes: n rows, L labels, T tokens of an answer, C candidates, V vocabulary, H width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptuning.config import Experiment
from ptuning.data.batch_sampler import BatchSampler
from ptuning.data.dataset import Answer, Split, Teaching
from ptuning.data.encoder import Encoder
from ptuning.data.task import Task
from ptuning.model.packing import TokenShares, TurnsRow, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import generate_rows, label_scores, passes

CANDIDATES = 20
"""As many as cartridges are distilled from (Eyuboglu et al. 2025): they have nearly all of the probability."""


class Teacher:
    """Asks the base behind the teacher's text, on all workers together."""

    def __init__(self, model: PromptedModel, workers: Workers, embed: Callable[[list[int]], Tensor]) -> None:
        """`embed`: rows of the base's input embedding, fp32."""
        self._model = model
        self._workers = workers
        self._embed = embed
        self._known: dict[tuple[int, bytes | None], tuple[Split, Split]] = {}

    def teach(self, task: Task, experiment: Experiment) -> Task:
        """The task with what the teacher says about the rows that the experiment trains on, and about all others. Experiments
        that read the same rows get the same splits."""
        train = experiment.train
        order = BatchSampler(task.train.lengths, train.batch_size, train.seed)

        read = np.unique(np.concatenate([order.batch(step) for step in range(train.steps)]))
        validation, test = (split and self._once(split, task.encoder) for split in (task.validation, task.test))
        return replace(task, train=self._once(task.train, task.encoder, read), validation=validation, test=test)

    def _once(self, split: Split, encoder: Encoder, rows: NDArray[np.int64] | None = None) -> Split:
        """A split with what the teacher says about some rows; default: all."""
        key = id(split), None if rows is None else hashlib.sha256(rows.tobytes()).digest()
        if key not in self._known:
            asked = np.arange(len(split)) if rows is None else rows
            self._known[key] = split, self._taught(split, encoder, asked)  # the split, too: no other may get its id
        return self._known[key][1]

    def _taught(self, split: Split, encoder: Encoder, rows: NDArray[np.int64]) -> Split:
        asked = _Asked.of(split, rows)
        prompt = self._embed(asked.shared)
        if encoder.template.labels:
            scores = label_scores(self._model, [prompt], asked, encoder, self._workers)[0].numpy()
            found = np.full((len(split), scores.shape[1]), np.nan)
            found[rows] = scores
            answers = {} if split.answered else _chosen(encoder, rows, scores)
            return split.taught(Teaching(labels=found), answers)
        answers = {}
        if not split.answered:
            assert encoder.teacher
            written = generate_rows(self._model, [prompt], asked, encoder, self._workers, encoder.teacher.answer)[0]
            texts = encoder.texts_of(written)
            answers = {int(row): Answer(-1, ids, text) for row, ids, text in zip(rows, written, texts, strict=True)}
            asked = replace(asked, answers=written)
        shares: list[TokenShares | None] = [None] * len(split)
        for row, found_shares in zip(rows, self._token_shares(prompt, asked), strict=True):
            shares[row] = found_shares
        return split.taught(Teaching(tokens=shares), answers)

    @torch.no_grad()
    def _token_shares(self, prompt: Tensor, asked: _Asked) -> list[TokenShares]:
        """The most likely tokens at every token of the answers."""
        own: list[tuple[int, TokenShares]] = []
        vocabulary = int(self._model.base.config.get_text_config().vocab_size)
        longest = max(len(answer) for answer in asked.answers)
        for rows, real in passes(self._model, asked, self._workers, 1, 0, longest * vocabulary):
            plan = pack_targets([len(prompt)], [[asked.row(row) for row in rows]])
            logits = self._model.text_logits([prompt], plan).float()
            likeliest = torch.log_softmax(logits, -1).topk(min(CANDIDATES, logits.shape[1]))
            if real:
                shares = torch.softmax(likeliest.values, -1).cpu().numpy()
                sizes = np.cumsum([len(asked.answers[row]) for row in rows])[:-1]
                parts = zip(np.split(likeliest.indices.cpu().numpy(), sizes), np.split(shares, sizes), strict=True)
                own += list(zip(rows, parts, strict=True))
        everything = sorted((each for part in self._workers.all_gather(own) for each in part), key=lambda each: each[0])
        return [shares for _, shares in everything]


@dataclass(frozen=True, eq=False)
class _Asked:
    """Rows as the teacher reads them, without the ids that all begin with."""

    shared: list[int]
    inputs: list[list[int]]
    answers: list[list[int]]
    """Empty where there is none."""

    @staticmethod
    def of(split: Split, rows: Iterable[int]) -> _Asked:
        inputs = [split.teacher_row(row) for row in rows]
        # Every row keeps a token of its own: it is where the answer is predicted.
        shared = inputs[0][: min(len(os.path.commonprefix(inputs)), min(map(len, inputs)) - 1)]
        return _Asked(shared, [ids[len(shared) :] for ids in inputs], [split.row(row)[1] for row in rows])

    @property
    def lengths(self) -> NDArray[np.int32]:
        both = zip(self.inputs, self.answers, strict=True)
        return np.array([len(ids) + len(answer) for ids, answer in both], dtype=np.int32)

    def row(self, index: int) -> TurnsRow:
        return self.inputs[index], self.answers[index]


def _chosen(encoder: Encoder, rows: Sequence[int] | NDArray[np.int64], scores: NDArray[np.float64]) -> dict[int, Answer]:
    """The teacher's choice for every row."""
    names = encoder.template.labels or ()
    best = scores.argmax(1).tolist()
    return {int(row): Answer(label, encoder.label_ids[label], names[label]) for row, label in zip(rows, best, strict=True)}
