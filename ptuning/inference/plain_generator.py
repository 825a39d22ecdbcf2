"""Generation by transformers' `generate` with the model's own cache, for bases that a paged cache cannot hold.

State spaces and hybrids keep other states than keys and values of pages. Requests of equal length run as one
batch without padding, which some of these architectures cannot mask. Batches take turns step by step, so a new request does not
wait for the end of the others; a batch's rows stay together until the last of them has ended.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ptuning.inference.generator import Events
from ptuning.inference.sampling import choose_tokens
from ptuning.inference.types import EngineConfig
from ptuning.inference.virtual_tokens import VirtualTokens
from ptuning.model.prompted_model import PromptedModel
from ptuning.redaction import logger

log = logger(__name__)

LONGEST = 1 << 15
"""Maximum positions if the base gives no limit."""


@dataclass
class _Row:
    request_id: str
    ids: tuple[int, ...]
    new: int
    ends: frozenset[int]
    made: int = 0
    done: bool = False


class _Turns:
    """A lock that waiting threads get in the order in which they ask, so batches take turns."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()
        self._held = False

    def acquire(self) -> None:
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            self._condition.wait_for(lambda: not self._held and self._waiting[0] is ticket)
            self._waiting.popleft()
            self._held = True

    def release(self) -> None:
        with self._condition:
            self._held = False
            self._condition.notify_all()

    def pass_on(self) -> None:
        """Let the next batch that waits have a turn."""
        with self._condition:
            if not self._waiting:
                return
        self.release()
        self.acquire()

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


class PlainGenerator:
    """Batches of equal shape through `generate`. The base computes by transformers' own attention, except inside `pause`."""

    kind = "plain"
    largest = 1 << 30
    """Maximum rows of a batch."""

    def __init__(self, model: PromptedModel, config: EngineConfig, events: Events) -> None:
        self._model = model
        self._events = events
        self._running = config.running
        self.longest = min(config.context, LONGEST)
        self._bank = cast(VirtualTokens, model.base.get_input_embeddings())
        self._shared = model.shared_prefix
        model.shared_prefix = False
        self._turns = _Turns()
        self._change = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._rows: dict[str, _Row] = {}
        self._beginning = False
        """A batch waits for its first turn."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ptuning-batches", daemon=True)
        self._thread.start()

    def start(self, request_id: str, ids: Sequence[int], new: int, ends: Sequence[int]) -> None:
        row = _Row(request_id, tuple(ids), new, frozenset(ends))
        with self._change:
            self._rows[request_id] = row
            self._waiting.append(row)
            self._change.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._change:
            row = self._rows.pop(request_id, None)
            if row is not None:
                row.done = True
                if row in self._waiting:
                    self._waiting.remove(row)
                self._change.notify_all()

    @contextmanager
    def pause(self) -> Iterator[None]:
        with self._turns.turn():
            self._model.shared_prefix = self._shared
            try:
                yield
            finally:
                self._model.shared_prefix = False

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def cache_used(self) -> float:
        """Its caches grow with their batches, up to `running` rows."""
        return min(1.0, (len(self._rows) - len(self._waiting)) / self._running)

    def close(self) -> None:
        with self._change:
            self._closed = True
            for row in self._rows.values():
                row.done = True
            self._waiting.clear()
            self._change.notify_all()
        self._thread.join()
        with self._turns.turn():
            self._model.shared_prefix = self._shared

    def _run(self) -> None:
        """Start a batch whenever requests wait and there is room."""
        batches: list[threading.Thread] = []
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or (self._next_batch() and not self._beginning))
                if self._closed:
                    break
                self._beginning = True
            batches = [batch for batch in batches if batch.is_alive()]
            batches.append(threading.Thread(target=self._generate, name="ptuning-batch", daemon=True))
            batches[-1].start()
        for batch in batches:
            batch.join()

    def _next_batch(self) -> list[_Row]:
        """The waiting requests that are as long as the first of them, as many as may run. The lock must be held."""
        room = self._running - (len(self._rows) - len(self._waiting))
        if not self._waiting or room < 1:
            return []
        length = len(self._waiting[0].ids)
        return [row for row in self._waiting if len(row.ids) == length][: min(room, self.largest)]

    def _generate(self) -> None:
        """One batch, from its first turn to the end of its last row."""
        message = ""
        rows: list[_Row] = []
        try:
            with self._turns.turn():
                with self._change:  # only now: more may have come while this batch waited for its turn
                    rows = self._next_batch()
                    for row in rows:
                        self._waiting.remove(row)
                    self._beginning = False
                    self._change.notify_all()
                if not rows:
                    return
                for row in rows:
                    if state := self._events.find(row.request_id):
                        state.compute(len(row.ids))
                self._continue(rows)
        except Exception:  # any error must reach those who wait; the next batch may do better
            log.exception("a batch failed")
            message = "the generation failed; the server's log says why"
        for row in rows:
            if not row.done or message:
                self._finish(row, message)

    def _continue(self, rows: list[_Row]) -> None:
        """All steps of a batch."""
        base: Any = self._model.base
        ids = torch.tensor([row.ids for row in rows], device=base.device)
        # Layers that look up ids see 0 for a virtual token, as in training; the result of the input embedding is replaced.
        self._model.embedding.replace(self._bank(ids))
        ids = torch.where(ids >= self._bank.first, 0, ids)
        base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max(row.new for row in rows), eos_token_id=None, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([_Step(self, rows)]),
            stopping_criteria=StoppingCriteriaList([_Ended(rows)]),
        )

    def choose(self, rows: list[_Row], logits: Tensor) -> None:
        """Choose the next token of every row from logits `[B, V]`, which then have it as maximum; then others have a turn."""
        self._events.stepped(sum(not row.done for row in rows))
        states = [None if row.done else self._events.find(row.request_id) for row in rows]
        for row, token in zip(rows, choose_tokens(logits, states), strict=True):
            if token is None:
                row.done = True
                continue
            row.made += 1
            if token in row.ends or row.made >= row.new:
                self._finish(row, "", stopped=token in row.ends)
        self._turns.pass_on()

    def _finish(self, row: _Row, message: str, stopped: bool = False) -> None:
        row.done = True
        with self._change:
            self._rows.pop(row.request_id, None)
            self._change.notify_all()
        self._events.ended(row.request_id, "failed" if message else "stop" if stopped else "length", message)


class SingleGenerator(PlainGenerator):
    """Every request is a batch of its own, for architectures whose states mix the rows of a batch (RWKV, transformers 5.23)."""

    kind = "single"
    largest = 1


class RecomputingGenerator(SingleGenerator):
    """Every step computes all tokens again, for architectures that compute other numbers with a cache, or with the positions
    that `generate` gives them (RoBERTa, transformers 5.23)."""

    kind = "recomputing"

    @torch.no_grad()
    def _continue(self, rows: list[_Row]) -> None:
        base: Any = self._model.base
        (row,) = rows
        ids = torch.tensor([row.ids], device=base.device)
        while not row.done:
            inputs = self._model.inputs(self._bank(ids), torch.where(ids >= self._bank.first, 0, ids))
            scores = base(**inputs, use_cache=False).logits[:, -1].float()
            self.choose(rows, scores)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)


class _Step(LogitsProcessor):
    """Called by `generate` in every step: chooses the tokens."""

    def __init__(self, generator: PlainGenerator, rows: list[_Row]) -> None:
        self._generator = generator
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().clone()
        self._generator.choose(self._rows, scores)
        return scores


class _Ended(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)
