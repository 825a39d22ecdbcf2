"""Answers in OpenAI's format: complete, or as a stream of events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Response
from pydantic import BaseModel
from pydantic_core import to_json

from ptuning.serving.answers import (
    Answered,
    Call,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ErrorBody,
    FunctionCall,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from ptuning.serving.completion import Generation, Piece
from ptuning.serving.detokenizer import TokenText
from ptuning.serving.loading import Served
from ptuning.serving.protocol import StreamOptions
from ptuning.serving.structured import Tool

DONE = b"data: [DONE]\n\n"


def envelope(served: Served, base: str, prefix: str) -> dict[str, Any]:
    """Fields of every response: its id, its time, and the version that answered."""
    soft_prompt = served.id if served.prompt else None
    answered = Answered(soft_prompt=soft_prompt, content_hash=served.content_hash, base=base)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": served.id,
        "system_fingerprint": (served.content_hash or "base")[:16],
        "answered_by": answered,
    }


def usage(served: Served, answers: Sequence[Generation], n: int) -> Usage:
    """Tokens of a request. Each prompt counts once, regardless of n, and so do its tokens that were in the cache."""
    prompt = sum(answer.prompt_tokens for answer in answers[::n])
    completion = sum(answer.completion_tokens for answer in answers)
    cached = [min(answer.cached_tokens for answer in answers[at : at + n]) for at in range(0, len(answers), n)]
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(cached), virtual_tokens=served.length * len(cached)),
    )


class CompletionReply:
    """/v1/completions."""

    kind, prefix, chunks = "text_completion", "cmpl", "text_completion"

    def __init__(
        self, served: Served, base: str, told: bool, options: StreamOptions | None = None, tool: Tool | None = None
    ) -> None:
        self._envelope = envelope(served, base, self.prefix)
        self._told = told
        self._tool = tool
        self._options = options or StreamOptions()
        self.continuous = bool(self._options.include_usage and self._options.continuous_usage_stats)
        """Every chunk contains the usage."""
        shared = {key: value for key, value in self._envelope.items() if key != "answered_by"}
        self._head = b"data: " + to_json({"object": self.chunks} | shared)[:-1]
        self._named = False

    def whole(self, answers: Sequence[Sequence[Piece]], spent: Usage) -> BaseModel:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        return Completion(**self._envelope, choices=choices, usage=spent)

    def begin(self) -> bytes:
        """What a stream sends before the first token."""
        return b""

    def chunk(self, index: int, piece: Piece, spent: Usage | None = None) -> bytes:
        choice = self._choice(index, [piece]).model_dump()
        if not self._told:
            del choice["logprobs"]
        return self._event([choice], spent)

    def end(self, spent: Usage) -> bytes:
        """What a stream sends after the last token."""
        return (self._event([], spent) if self._options.include_usage else b"") + DONE

    def failed(self, error: ErrorBody) -> bytes:
        """What a stream ends with if it fails: the status is already sent."""
        return b"data: " + to_json(error) + b"\n\n"

    def _event(self, choices: list[dict[str, Any]], spent: Usage | None) -> bytes:
        more = {"choices": choices} | ({"usage": spent} if spent else {})
        if not self._named:  # only once: the rest of the stream has the same sender
            more["answered_by"] = self._envelope["answered_by"]
            self._named = True
        return self._head + b"," + to_json(more)[1:] + b"\n\n"

    def _choice(self, index: int, pieces: Sequence[Piece]) -> CompletionChoice:
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_top(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )
        return CompletionChoice(
            index=index,
            text="".join(piece.text for piece in pieces),
            finish_reason=pieces[-1].finish,
            logprobs=logprobs if self._told else None,
        )


class ChatReply(CompletionReply):
    """/v1/chat/completions."""

    kind, prefix, chunks = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Sequence[Piece]], spent: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=self._message("".join(piece.text for piece in pieces)),
                finish_reason=self._finish(pieces[-1]),
                logprobs=self._logprobs(pieces),
            )
            for index, pieces in enumerate(answers)
        ]
        return ChatCompletion(**self._envelope, choices=choices, usage=spent)

    def chunk(self, index: int, piece: Piece, spent: Usage | None = None) -> bytes:
        # The role comes with the first text: a chunk without text would count as the first token in clients that measure.
        first = index not in self._begun
        self._begun.add(index)
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if self._tool is None:
            delta["content"] = piece.text
        else:
            begin = {"id": call_id(), "type": "function"} if first else {}
            function = {"name": self._tool.name} if first else {}
            if first:
                delta["content"] = None
            delta["tool_calls"] = [{"index": 0, **begin, "function": function | {"arguments": piece.text}}]
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": self._finish(piece)}
        if self._told:
            choice["logprobs"] = self._logprobs([piece])
        return self._event([choice], spent)

    def _message(self, text: str) -> ChatMessage:
        if self._tool is None:
            return ChatMessage(content=text)
        call = Call(id=call_id(), type="function", function=FunctionCall(name=self._tool.name, arguments=text))
        return ChatMessage(content=None, tool_calls=[call])

    def _finish(self, piece: Piece) -> Any:
        required = self._tool is not None and not self._tool.named
        return "tool_calls" if required and piece.finish == "stop" else piece.finish

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._told:
            return None
        return ChatLogprobs(content=[chat_logprob(token) for piece in pieces for token in piece.tokens])


def call_id() -> str:
    """An id of the call of a function."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _top(token: TokenText) -> dict[str, float] | None:
    """Without any other: the token itself, as in OpenAI's API."""
    if token.logprob is None:
        return None
    return {text: logprob for text, _, logprob in token.top} or {token.text: token.logprob}


def chat_logprob(token: TokenText) -> TokenLogprob:
    """A token with its log-probability, as in chat completions."""
    top = [TopLogprob(token=text, logprob=logprob, bytes=list(content)) for text, content, logprob in token.top]
    assert token.logprob is not None
    return TokenLogprob(token=token.text, logprob=token.logprob, bytes=list(token.content), top_logprobs=top)


async def merged(answers: list[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all answers as they are generated, each with the index of its answer."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    pieces: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def pump(index: int, answer: Generation) -> None:
        try:
            async for piece in answer.pieces():
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:  # raised again by the reader
            pieces.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, new = await pieces.get()
            if isinstance(new, Exception):
                raise new
            if new is None:
                left -= 1
            else:
                yield index, new
    finally:
        for task in tasks:
            task.cancel()


def json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
