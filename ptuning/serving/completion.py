"""Answers to a request: generation or label choice, decoding, stop strings, log-probabilities.

An `Answer` is one of the `n` answers to one prompt. It starts immediately, so that errors are known before the first byte is
sent, and is then read piece by piece. Text is tokenised by the `Encoder` that training uses.

An answer that is constrained to labels is the label that evaluation would choose: the most likely whole label, end token
included, not the one with the most likely first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from ptuning.inference.engine import Engine
from ptuning.inference.label_scorer import draw_label
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.types import AnswerFailed, End, Request
from ptuning.model.label_trie import LabelTrie
from ptuning.serving.detokenizer import TextStream, TokenText, token_text
from ptuning.serving.served_models import Served


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one has a finish reason."""

    text: str = ""
    tokens: tuple[TokenText, ...] = ()
    """With log-probabilities only."""
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """The properties that all answers to one prompt share."""

    served: Served
    ids: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    constrain: bool = False
    strip: bool = False
    """Strip leading white space, as in chat messages."""
    ends: tuple[int, ...] = ()
    """Tokens that end the answer, besides those of the base."""


class Generation:
    """One answer. It must always be closed, which frees its place in the batch."""

    def __init__(self, engine: Engine, question: GenerationRequest, number: int = 0) -> None:
        self.prompt_tokens = len(question.ids)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._engine = engine
        self._question = question
        self._id: str | None = None
        self._scores: Future[list[list[float]]] | None = None
        self._events: asyncio.Queue[Token | End] = asyncio.Queue()
        sampling = question.sampling
        if sampling.seed is not None:  # each of the n answers has its own
            sampling = replace(sampling, seed=(sampling.seed + number) & (2**63 - 1))
        self._sampling = sampling
        handle = question.served.handle
        if question.constrain:
            self._scores = engine.choose(handle, [question.ids], _trie(question.served))
        else:
            loop = asyncio.get_running_loop()
            request = Request(question.ids, handle, question.max_tokens, sampling, ends=question.ends)

            def deliver(event: Token | End) -> None:
                loop.call_soon_threadsafe(self._events.put_nowait, event)

            self._id = engine.submit(request, deliver)

    def close(self) -> None:
        """Free the place in the batch; no effect if the answer is complete."""
        if self._id:
            self._engine.cancel(self._id)
        if self._scores:
            self._scores.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of the answer as they are generated.

        Raises:
            AnswerFailed: the engine failed.
        """
        tokenizer = self._question.served.raw.tokenizer
        ends = {tokenizer.eos_token_id, *self._engine.ends, *self._question.ends}
        told = self._sampling.top is not None
        text = TextStream(tokenizer, self._question.stops, self._question.strip)
        waiting: list[TokenText] = []
        async for event in self._tokens():
            if isinstance(event, Token):
                self.completion_tokens += 1
                if event.id in ends:
                    continue
                before = len(text.text)
                new = text.push(event.id)
                if told:
                    waiting.append(token_text(tokenizer, event, text.added, before))
                if text.stopped:
                    self.close()
                    yield Piece(new, tuple(token for token in waiting if token.offset < len(text.text)), "stop")
                    return
                if new:
                    yield Piece(new, tuple(waiting))
                    waiting = []
            elif event.reason in ("stop", "length"):
                self.cached_tokens = event.cached
                rest = text.flush()
                if waiting and text.added:  # of a character that is not complete
                    waiting[-1] = replace(waiting[-1], text=waiting[-1].text + text.added)
                yield Piece(rest, tuple(waiting), "stop" if text.stopped else event.reason)
            else:
                raise AnswerFailed(event.message or "the answer was cancelled")

    async def _tokens(self) -> AsyncIterator[Token | End]:
        if self._scores is not None:
            (scores,) = await asyncio.wrap_future(self._scores)
            for event in self._label(scores):
                yield event
            return
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, End):
                return

    def _label(self, scores: list[float]) -> Iterator[Token | End]:
        """The tokens of the chosen label, as if they had been generated."""
        trie, sampling = _trie(self._question.served), self._sampling
        chosen = draw_label(scores, sampling)
        siblings = trie.token_logprobs(scores, chosen)
        for place, token in enumerate(trie.labels[chosen]):
            if place == self._question.max_tokens:
                yield End("length")
                return
            top = sorted(siblings[place].items(), key=lambda pair: -pair[1])[: sampling.top or 0]
            yield Token(token, siblings[place][token], tuple(top))
        yield End("stop")


def _trie(served: Served) -> LabelTrie:
    assert served.encoder is not None
    return served.encoder.label_trie
