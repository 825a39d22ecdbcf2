"""Answers to a request: generation or label choice, decoding, stop strings, log-probabilities.

A `Generation` is one of the `n` answers to one prompt. It starts immediately, so that errors are known before the first byte is
sent, and is then read piece by piece. Text is tokenised by the `Encoder` that training uses.

An answer that is constrained to labels is the label that evaluation would choose: the most likely whole label, end token
included, not the one with the most likely first token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from ptuning.inference.engine import Engine
from ptuning.inference.grammar import Grammar
from ptuning.inference.jobs import Timed
from ptuning.inference.label_scorer import draw_label
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.types import AnswerFailed, End, Request, ResidentPrompt
from ptuning.serving.detokenizer import TextStream, TokenText, token_text
from ptuning.serving.loading import Served
from ptuning.serving.structured import Choice, Form


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
    form: Form = Form()
    strip: bool = False
    """Strip leading white space, as in chat messages."""
    ends: tuple[int, ...] = ()
    """Tokens that end the answer, besides those of the base."""
    ignore_end: bool = False
    """The base's own end tokens do not end it."""
    grammar: Grammar | None = None
    echo: str | None = None
    """The answer begins with this text, which is that of the prompt."""


class Generation:
    """One answer. It must always be closed, which frees its place in the batch."""

    def __init__(self, engine: Engine, question: GenerationRequest, number: int = 0, first: Generation | None = None) -> None:
        """`number`: which of the n answers; `first`: the first one of them, whose scores this one uses, too."""
        self.prompt_tokens = len(question.ids)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finish: Literal["stop", "length", "error"] | None = None
        """How it ended; None: it has not, or was closed before."""
        self.first = 0.0
        """When its first token came, by `time.monotonic`; 0: none has."""
        self.intervals: list[float] = []
        """Seconds between its tokens; none for labels, whose tokens come at once."""
        self.queued_s: float | None = None
        """Seconds until its first step."""
        self.began = time.monotonic()
        self._engine = engine
        self._question = question
        self._id: str | None = None
        self._scores: Timed[list[list[float]]] | None = None
        self._echoed: Future[list[Token]] | None = None
        self._events: asyncio.Queue[Token | End] = asyncio.Queue()
        sampling = question.sampling
        if sampling.seed is not None:  # each of the n answers has its own
            sampling = replace(sampling, seed=(sampling.seed + number) & (2**63 - 1))
        self._sampling = sampling
        handle, choice = question.served.handle, question.form.choice
        if question.echo is not None and sampling.top is not None:
            self._echoed = first._echoed if first else engine.score(handle, question.ids, sampling.top)
        try:
            if question.max_tokens and choice:
                self._scores = first._scores if first else _choose(engine, question, choice)
            elif question.max_tokens:
                self._id = self._submit(handle)
        except BaseException:
            self.close()
            raise

    def _submit(self, handle: ResidentPrompt | None) -> str:
        question, loop = self._question, asyncio.get_running_loop()
        request = Request(
            question.ids,
            handle,
            question.max_tokens,
            self._sampling,
            ignore_end=question.ignore_end,
            ends=question.ends,
            grammar=question.grammar,
        )

        def deliver(event: Token | End) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        return self._engine.submit(request, deliver)

    def close(self) -> None:
        """Free the place in the batch; no effect if the answer is complete."""
        if self._id:
            self._engine.cancel(self._id)
        for future in (self._scores, self._echoed):
            if future:
                future.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of the answer as they are generated.

        Raises:
            AnswerFailed: the engine failed.
        """
        try:
            async for piece in self._pieces():
                self.finish = piece.finish or self.finish
                yield piece
        except Exception:
            self.finish = "error"
            raise

    async def _pieces(self) -> AsyncIterator[Piece]:
        question, choice = self._question, self._question.form.choice
        if question.echo is not None:
            yield Piece(question.echo, await self._prompt())
        if not question.max_tokens:
            yield Piece(finish="length")
            return
        found = self._written(choice, choice.texts) if choice and choice.texts else self._decoded()
        async for piece in found:
            yield piece

    async def _prompt(self) -> tuple[TokenText, ...]:
        """The tokens of the prompt, if log-probabilities are reported. The first one has none."""
        if self._echoed is None:
            return ()
        question = self._question
        tokens = [Token(question.ids[0]), *await asyncio.wrap_future(self._echoed)]
        stream, shown = TextStream(question.served.raw.tokenizer, (), False), []
        for token in tokens:
            before = len(stream.text)
            stream.push(token.id)
            shown.append(token_text(question.served.raw.tokenizer, token, stream.added, before, stream.rest))
        return tuple(shown)

    def _ends(self) -> set[int]:
        """The tokens that end the answer, which are not a part of it."""
        own = () if self._question.ignore_end else (self._question.served.raw.end, *self._engine.ends)
        return {*own, *self._question.ends}

    async def _decoded(self) -> AsyncIterator[Piece]:
        tokenizer, ends = self._question.served.raw.tokenizer, self._ends()
        told, front = self._sampling.top is not None, len(self._question.echo or "")
        text = TextStream(tokenizer, self._question.stops, self._question.strip)
        waiting: list[TokenText] = []
        events = self._tokens()
        async for event in events:
            if isinstance(event, Token):
                self.completion_tokens += 1
                if event.id in ends:
                    continue
                before = len(text.text) + front
                new = text.push(event.id, stop=self.completion_tokens > self._sampling.min_tokens)
                if told:
                    waiting.append(token_text(tokenizer, event, text.added, before, text.rest))
                if text.stopped:
                    self.close()
                    await self._read_end(events)
                    yield Piece(new, tuple(token for token in waiting if token.offset < front + len(text.text)), "stop")
                    return
                if new:
                    yield Piece(new, tuple(waiting))
                    waiting = []
            elif event.reason in ("stop", "length"):
                self._note(event)
                rest = text.flush()
                if waiting and text.added:  # of a character that is not complete
                    waiting[-1] = replace(waiting[-1], text=waiting[-1].text + text.added)
                yield Piece(rest, tuple(waiting), "stop" if text.stopped else event.reason)
            else:
                raise AnswerFailed(event.message or "the answer was cancelled")

    async def _read_end(self, events: AsyncIterator[Token | End]) -> None:
        """Tokens that were generated before the engine heard of the stop string do not count."""
        async for event in events:
            if isinstance(event, End):
                self._note(event)

    def _note(self, end: End) -> None:
        self.cached_tokens = max(0, end.cached - self._question.served.length)
        self.queued_s = self.queued_s if end.queued_s is None else end.queued_s

    async def _written(self, choice: Choice, texts: tuple[str, ...]) -> AsyncIterator[Piece]:
        """A choice that the client is sent as another text, as a whole. The log-probabilities are those of its own tokens."""
        at = await self._chosen(choice)
        tokens = [event for event in self._label(choice, *at) if isinstance(event, Token)]
        self.completion_tokens = len(tokens)
        if len(tokens) < len(choice.labels[at[0]]):
            yield Piece(finish="length")
            return
        tokenizer, shown = self._question.served.raw.tokenizer, []
        stream = TextStream(tokenizer, (), False)
        for token in tokens[:-1]:
            before = len(stream.text)
            stream.push(token.id)
            if self._sampling.top is not None:
                shown.append(token_text(tokenizer, token, stream.added, before, stream.rest))
        yield Piece(texts[at[0]], tuple(shown), "stop")

    async def _tokens(self) -> AsyncIterator[Token | End]:
        choice = self._question.form.choice
        if choice:
            for event in self._label(choice, *await self._chosen(choice)):
                yield event
            return
        before = 0.0
        while True:
            event = await self._events.get()
            now = time.monotonic()
            if before and isinstance(event, Token):
                self.intervals.append(now - before)
            before, self.first = now, self.first or now
            yield event
            if isinstance(event, End):
                return

    async def _chosen(self, choice: Choice) -> tuple[int, list[float]]:
        """The chosen text, and the log-probabilities of all of them."""
        if self._scores is None:
            self.first = time.monotonic()
            return 0, [0.0]
        (scores,) = await asyncio.wrap_future(self._scores)
        self.first, self.queued_s = time.monotonic(), max(0.0, self._scores.began - self.began)
        own = [scores[at] for at in choice.places]
        return draw_label(own, self._sampling), own

    def _label(self, choice: Choice, chosen: int, scores: list[float]) -> Iterator[Token | End]:
        """The tokens of the chosen label, as if they had been generated."""
        tokens = choice.labels[chosen]
        siblings = choice.own.token_logprobs(scores, chosen) if choice.own else [{token: 0.0} for token in tokens]
        for place, token in enumerate(tokens):
            if place == self._question.max_tokens:
                yield End("length")
                return
            top = sorted(siblings[place].items(), key=lambda pair: -pair[1])[: self._sampling.top or 0]
            yield Token(token, siblings[place][token], tuple(top))
        yield End("stop")


def _choose(engine: Engine, question: GenerationRequest, choice: Choice) -> Timed[list[list[float]]] | None:
    return engine.choose(question.served.handle, [question.ids], choice.trie) if choice.trie else None
