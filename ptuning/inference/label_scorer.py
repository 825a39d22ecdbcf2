"""Log-probabilities of labels, and the choice among them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ptuning.inference.jobs import Job, LabelJob, TextJob
from ptuning.inference.sampling import Sampling, Token, draw
from ptuning.inference.text_scorer import score_text
from ptuning.inference.types import AnswerFailed, ResidentPrompt
from ptuning.inference.virtual_tokens import VirtualTokens
from ptuning.model.label_trie import LabelTrie
from ptuning.model.limits import LOGITS
from ptuning.model.packing import kv_slots, pack_labels
from ptuning.model.prompted_model import PromptedModel
from ptuning.redaction import logger

log = logger(__name__)

LABEL_TOKENS = 4096
"""Approximate number of tokens in one pass over labels; it limits how long generation waits."""


_Row = tuple[ResidentPrompt | None, Sequence[int]]
"""A soft prompt, and the tokens after it."""


class LabelScorer:
    """Scores labels in its own thread, between two steps of generation: one pass for all labels of all waiting rows. Texts
    whose own tokens are to be scored take turns with them."""

    def __init__(
        self,
        model: PromptedModel,
        bank: VirtualTokens,
        pause: Callable[[], AbstractContextManager[Any]],
        scored: Callable[[Sequence[Job]], None],
    ) -> None:
        """`pause` blocks generation steps; `scored` is called with finished jobs before their futures complete."""
        self._model = model
        self._vocabulary = int(model.base.config.get_text_config().vocab_size)
        self._bank = bank
        self._pause = pause
        self._scored = scored
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ptuning-labels", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def close(self) -> None:
        """Stop after the waiting jobs."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Score the waiting jobs, pass by pass; each pass takes all jobs that have arrived since the last one."""
        while True:
            job = self._jobs.get()
            if job is None:
                return
            jobs = [job, *self._more_jobs(job)]
            claimed = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            outcomes: list[tuple[Job, Any]] = []
            outcomes += [(job, self._score_text(job)) for job in claimed if isinstance(job, TextJob)]
            labelled = [job for job in claimed if isinstance(job, LabelJob)]
            for trie in dict.fromkeys(job.trie for job in labelled):
                together = [job for job in labelled if job.trie == trie]
                try:
                    outcomes += zip(together, self._score_together(together), strict=True)
                except Exception as error:  # any error must reach the waiting callers, and the next jobs must run
                    log.exception("labels could not be scored")
                    outcomes += [(job, error) for job in together]
            self._scored(jobs)  # before the callers are notified, who may send the next job immediately
            for job, outcome in outcomes:
                if isinstance(outcome, Exception):
                    job.future.set_exception(outcome)
                else:
                    job.future.set_result(outcome)

    def _more_jobs(self, first: Job) -> Iterator[Job]:
        tokens = first.positions
        while tokens < LABEL_TOKENS:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is None:
                self._jobs.put(None)  # ends the loop
                return
            tokens += job.positions
            yield job

    def _score_text(self, job: TextJob) -> list[Token] | Exception:
        empty = torch.empty(0, self._bank.weight.shape[1])
        try:
            vectors = self._bank.vectors(job.handle.ids) if job.handle else empty
            with self._pause():
                return score_text(self._model, vectors, job.ids, job.top, self._vocabulary)
        except Exception as error:  # any error must reach the waiting caller, and the next jobs must run
            log.exception("a text could not be scored")
            return error

    def _score_together(self, jobs: list[LabelJob]) -> list[list[list[float]]]:
        """Jobs with the same labels, in passes of a limited size: a request may have hundreds of rows."""
        trie = jobs[0].trie
        rows = [(job.handle, row) for job in jobs for row in job.rows]
        scores = iter([each for part in self._parts(rows, trie) for each in self._pass(part, trie)])
        return [[next(scores) for _ in job.rows] for job in jobs]

    def _parts(self, rows: Sequence[_Row], trie: LabelTrie) -> Iterator[list[_Row]]:
        """The rows of each pass: at most `LABEL_TOKENS` tokens, and `LOGITS` logits."""
        columns = len(trie.ids) if self._model.head.limited else self._vocabulary
        most = max(1, LOGITS // (len(trie.nodes) * columns))
        part: list[_Row] = []
        tokens = 0
        for row in rows:
            many = len(row[1]) + len(trie.tokens)
            if part and (tokens + many > LABEL_TOKENS or len(part) == most):
                yield part
                part, tokens = [], 0
            part.append(row)
            tokens += many
        yield part

    @torch.no_grad()
    def _pass(self, part: Sequence[_Row], trie: LabelTrie) -> list[list[float]]:
        """One pass, with one slot per soft prompt: the scores of each row."""
        handles = list(dict.fromkeys(handle for handle, _ in part))
        empty = torch.empty(0, self._bank.weight.shape[1])
        vectors = [self._bank.vectors(handle.ids) if handle else empty for handle in handles]
        rows: list[list[list[int]]] = [[list(row) for owner, row in part if owner == handle] for handle in handles]
        # A step and a pass must not run at the same time: both may modify state of the base (rotary tables).
        with self._pause():
            plan = pack_labels([len(each) for each in vectors], rows, trie, kv_slots(vectors))
            nll = self._model(vectors, plan).double().cpu()
        scores = trie.label_logprobs(-nll.view(-1, len(trie.edges)))
        answers = {
            handle: iter(own.tolist()) for handle, own in zip(handles, scores.split([len(each) for each in rows]), strict=True)
        }
        return [next(answers[handle]) for handle, _ in part]


def draw_label(scores: Sequence[float], sampling: Sampling) -> int:
    """The chosen label, given the log-probabilities of all labels: the most likely one, or a sampled one."""
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
        AnswerFailed: a log-probability is NaN.
    """
    return dict(zip(labels, _finite(scores).exp().tolist(), strict=True))


def _finite(scores: Sequence[float]) -> Tensor:
    totals = torch.tensor(scores, dtype=torch.float64)
    if not bool(torch.isfinite(totals).all()):
        raise AnswerFailed("the answer is not a number: this soft prompt has diverged")
    return totals
