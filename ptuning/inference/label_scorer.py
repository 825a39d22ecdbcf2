"""Log-probabilities of labels, and the choice among them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptuning.inference.sampling import Sampling, draw
from ptuning.inference.types import AnswerFailed, ResidentPrompt
from ptuning.inference.virtual_tokens import VirtualTokens
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import pack_labels
from ptuning.model.prompted_model import PromptedModel
from ptuning.redaction import logger

log = logger(__name__)

LABEL_TOKENS = 4096
"""Tokens in one pass over labels, about: what generation waits for at most."""


@dataclass
class LabelJob:
    """Rows behind a soft prompt (None: behind nothing), and the labels to be scored behind each of them."""

    handle: ResidentPrompt | None
    rows: Sequence[Sequence[int]]
    trie: LabelTrie
    future: Future[list[list[float]]] = field(default_factory=Future)

    @property
    def positions(self) -> int:
        """Tokens of text and labels in its pass."""
        return sum(map(len, self.rows)) + len(self.rows) * len(self.trie.tokens)


class LabelScorer:
    """Scores labels in a thread of its own, between two steps of generation: one pass for all labels of all waiting rows."""

    def __init__(
        self,
        model: PromptedModel,
        bank: VirtualTokens,
        pause: Callable[[], AbstractContextManager[Any]],
        scored: Callable[[Sequence[LabelJob]], None],
    ) -> None:
        """`pause` keeps generation from taking a step; `scored` hears of jobs that have ended, before their futures do."""
        self._model = model
        self._bank = bank
        self._pause = pause
        self._scored = scored
        self._jobs: queue.SimpleQueue[LabelJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ptuning-labels", daemon=True)
        self._thread.start()

    def submit(self, job: LabelJob) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def close(self) -> None:
        """Stop after the jobs that wait."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Label what waits, one pass after another; each pass takes whatever has come meanwhile."""
        while True:
            job = self._jobs.get()
            if job is None:
                return
            jobs = [job, *self._more_jobs(job)]
            claimed = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            outcomes: list[tuple[LabelJob, list[list[float]] | Exception]] = []
            for trie in dict.fromkeys(job.trie for job in claimed):
                together = [job for job in claimed if job.trie == trie]
                try:
                    outcomes += zip(together, self._score_together(together), strict=True)
                except Exception as error:  # whatever it is, those who wait must hear of it and the next jobs must be tried
                    log.exception("labels could not be scored")
                    outcomes += [(job, error) for job in together]
            self._scored(jobs)  # before anybody is told, who might ask again at once
            for job, outcome in outcomes:
                if isinstance(outcome, Exception):
                    job.future.set_exception(outcome)
                else:
                    job.future.set_result(outcome)

    def _more_jobs(self, first: LabelJob) -> Iterator[LabelJob]:
        tokens = first.positions
        while tokens < LABEL_TOKENS:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is None:
                self._jobs.put(None)  # for the loop, which ends on it
                return
            tokens += job.positions
            yield job

    @torch.no_grad()
    def _score_together(self, jobs: list[LabelJob]) -> list[list[list[float]]]:
        """One pass for jobs with the same labels, a slot for each soft prompt."""
        trie = jobs[0].trie
        handles = list(dict.fromkeys(job.handle for job in jobs))
        empty = torch.empty(0, self._bank.weight.shape[1])
        vectors = [self._bank.vectors(handle.ids) if handle else empty for handle in handles]
        rows: list[list[list[int]]] = [
            [list(row) for job in jobs if job.handle == handle for row in job.rows] for handle in handles
        ]
        with self._pause():  # a step and a pass never run at once: both may change what the base keeps (rotary tables)
            nll = self._model(vectors, pack_labels([len(rows) for rows in vectors], rows, trie)).double().cpu()
        scores = trie.label_logprobs(-nll.view(-1, len(trie.edges)))
        answers = {
            handle: iter(part.tolist())
            for handle, part in zip(handles, scores.split([len(part) for part in rows]), strict=True)
        }
        return [[next(answers[job.handle]) for _ in job.rows] for job in jobs]


def draw_label(scores: Sequence[float], sampling: Sampling) -> int:
    """The label, given all their log-probabilities: the likeliest, or one drawn."""
    totals = _finite(scores)
    if sampling.temperature == 0:
        return int(totals.argmax())
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return draw(totals, sampling, generator)


def probabilities(scores: Sequence[float], labels: Sequence[str]) -> dict[str, float]:
    """Label -> probability; they sum to 1.

    Raises:
        AnswerFailed: the log-probabilities are not numbers.
    """
    return dict(zip(labels, _finite(scores).exp().tolist(), strict=True))


def _finite(scores: Sequence[float]) -> Tensor:
    totals = torch.tensor(scores, dtype=torch.float64)
    if not bool(torch.isfinite(totals).all()):
        raise AnswerFailed("the answer is not a number: this soft prompt has diverged")
    return totals
