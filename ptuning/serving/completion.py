"""From a request's text to token ids and from tokens back to text: templates, labels, stop strings, log-probabilities.

An `Answer` is one of the `n` answers to one prompt: started at once, so that whatever is wrong with it is known before the
first byte is sent, then read piece by piece. Text is tokenised by the `Encoder` that training used (law 6).

An answer that is constrained to labels is the label that evaluation would choose: the likeliest as a whole, end token
included, and not the one whose first token looks best.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptuning.config import template_fields
from ptuning.data.dataset import Encoder
from ptuning.inference.engine import End, Engine, Request, RequestError
from ptuning.inference.sampling import Sampling, Token, draw
from ptuning.model.label_trie import LabelTrie
from ptuning.serving.protocol import ChatRequest
from ptuning.serving.served_models import Served


class AnswerFailed(RuntimeError):
    """The engine could not go on. Not the client's fault."""


@dataclass(frozen=True)
class TokenText:
    """A token as text, and where it begins in the answer."""

    text: str
    offset: int
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What is new of an answer; the last piece has a finish."""

    text: str = ""
    tokens: tuple[TokenText, ...] = ()
    """With log-probabilities only."""
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Question:
    """What all answers to one prompt have in common."""

    served: Served
    ids: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    constrain: bool = False
    strip: bool = False
    """Without the white space in front, as chat messages are."""


class Answer:
    """One answer, from start to finish. Close it, whatever happens: that frees its place in the batch."""

    def __init__(self, engine: Engine, question: Question, number: int = 0) -> None:
        self.prompt_tokens = len(question.ids)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._engine = engine
        self._question = question
        self._id: str | None = None
        self._scores: Future[list[list[float]]] | None = None
        self._events: asyncio.Queue[Token | End] = asyncio.Queue()
        sampling = question.sampling
        if sampling.seed is not None:  # each of n answers its own
            sampling = replace(sampling, seed=(sampling.seed + number) & (2**63 - 1))
        self._sampling = sampling
        handle = question.served.handle
        if question.constrain:
            self._scores = engine.choose(handle, [question.ids], _trie(question.served))
        else:
            loop = asyncio.get_running_loop()
            request = Request(question.ids, handle, question.max_tokens, sampling)

            def deliver(event: Token | End) -> None:
                loop.call_soon_threadsafe(self._events.put_nowait, event)

            self._id = engine.submit(request, deliver)

    def close(self) -> None:
        """Let go of the place in the batch; nothing if the answer is complete."""
        if self._id:
            self._engine.cancel(self._id)
        if self._scores:
            self._scores.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes. Its pieces together are the whole answer.

        Raises:
            AnswerFailed: the engine could not go on.
        """
        tokenizer = self._question.served.raw.tokenizer
        told = self._sampling.top is not None
        text = TextStream(tokenizer, self._question.stops, self._question.strip)
        waiting: list[TokenText] = []
        async for event in self._tokens():
            if isinstance(event, Token):
                self.completion_tokens += 1
                if told and event.id != tokenizer.eos_token_id:
                    waiting.append(_token_text(tokenizer, event, len(text.text)))
                new = text.push(event.id)
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


class TextStream:
    """Tokens -> text that may be sent: whole characters, and nothing that may turn out to be the start of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], strip: bool) -> None:
        self.text = ""
        """All text so far, up to a stop string."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._strip = strip
        self._ids: list[int] = []
        self._context = 0  # tokens before this one no longer change how the next ones read
        self._read = 0  # tokens that are in the text
        self._sent = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that may be sent now."""
        self._ids.append(token)
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith("\ufffd"):  # a character of several tokens, not yet complete
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._take(whole[len(known) :])

    def flush(self) -> str:
        """What is left at the end."""
        known = self._decode(self._ids[self._context : self._read])
        new = self._take(self._decode(self._ids[self._context :])[len(known) :])
        if not self.stopped:
            new += self.text[self._sent :]
            self._sent = len(self.text)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _take(self, new: str) -> str:
        before = len(self.text)
        self.text += new
        if self._strip and not before:
            self.text = self.text.lstrip()
        longest = max(map(len, self._stops), default=1)
        found = [at for stop in self._stops if (at := self.text.find(stop, max(0, before - longest + 1))) >= 0]
        safe = len(self.text)
        if found:
            self.stopped = True
            safe = min(found)
            self.text = self.text[:safe]
        else:
            tails = (self.text[-size:] for size in range(min(longest - 1, len(self.text)), 0, -1))
            held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
            safe -= len(held)
        start, self._sent = self._sent, max(self._sent, safe)
        return self.text[start : self._sent]


def chat_ids(served: Served, request: ChatRequest, room: int) -> list[int]:
    """The token ids of a conversation.

    Raises:
        RequestError, DataError: it does not fit, or is not what the template wants.
    """
    if served.encoder is None:
        return _conversation(served, request, room)
    users = [message for message in request.messages if message.role == "user"]
    if not users:
        raise RequestError("messages: there is no user message; send one")
    return row_ids(served.encoder, fields_of(served.encoder, users[-1].text), room, request.truncate)


def fields_of(encoder: Encoder, text: str | dict[str, str]) -> dict[str, str]:
    """A text, or an object as a dict or as JSON text -> the template's fields.

    Raises:
        RequestError: other fields than the template's.
    """
    wanted = template_fields(encoder.template.input)
    if isinstance(text, str) and len(wanted) <= 1:
        return dict.fromkeys(wanted, text)
    fields: Any = text
    if isinstance(text, str):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
    if (
        not isinstance(fields, dict)
        or set(fields) != set(wanted)
        or not all(isinstance(value, str) for value in fields.values())
    ):
        raise RequestError(f"the template has the fields {', '.join(wanted)}; send a JSON object with a text for each")
    return fields


def row_ids(encoder: Encoder, fields: dict[str, str], room: int, truncate: bool) -> list[int]:
    """The token ids of a row in at most `room` tokens.

    Raises:
        RequestError, DataError: too long and not to be cut, or without text.
    """
    if not truncate or encoder.template.truncate == "error":
        size = len(encoder.input_ids(fields))
        if size > room:
            raise too_long(size, room)
    return encoder.fitted_ids(fields, room)


def raw_ids(served: Served, text: str, room: int) -> list[int]:
    """The token ids of text as it is.

    Raises:
        RequestError, DataError: too long, or no text.
    """
    return row_ids(served.raw, {"text": text}, room, truncate=False)


def _conversation(served: Served, request: ChatRequest, room: int) -> list[int]:
    tokenizer = served.raw.tokenizer
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template; use /v1/completions, or a soft prompt with a template")
    messages = [{"role": message.role, "content": message.text} for message in request.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise what it likes about an order of roles it does not want
        said = f" ({' '.join(str(error).split())[:200]})" if type(error) is TemplateError else ""  # what its author wrote
        raise RequestError(f"messages: the chat template refuses them{said}; change their order or roles") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > room:
        raise too_long(len(ids), room)
    return ids


def too_long(size: int, room: int) -> RequestError:
    return RequestError(f"{size} tokens of text where {room} fit; shorten the text or lower max_tokens")


def _trie(served: Served) -> LabelTrie:
    assert served.encoder is not None
    return served.encoder.label_trie


def _token_text(tokenizer: PreTrainedTokenizerBase, token: Token, offset: int) -> TokenText:
    read: Callable[[int], str] = lambda id: str(tokenizer.decode([id], clean_up_tokenization_spaces=False))  # noqa: E731
    top = tuple((read(id), logprob) for id, logprob in token.top)
    return TokenText(read(token.id), offset, token.logprob or 0.0, top)
