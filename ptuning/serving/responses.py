"""Responses in OpenAI's format: complete, or as a stream of chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from ptuning.serving.completion import Generation, Piece
from ptuning.serving.detokenizer import TokenText
from ptuning.serving.protocol import (
    Answered,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Envelope,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from ptuning.serving.served_models import Served


def envelope(served: Served, base: str, prefix: str) -> dict[str, Any]:
    """Fields of every response: its id, its time, and the version that answered."""
    soft_prompt = served.id if served.handle else None
    answered = Answered(soft_prompt=soft_prompt, content_hash=served.content_hash, base=base)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": served.id,
        "system_fingerprint": (served.content_hash or "base")[:16],
        "answered_by": answered,
    }


def usage(served: Served, answers: Sequence[Generation], n: int) -> Usage:
    """Tokens of a request. Each prompt counts once, regardless of n."""
    prompt = sum(answer.prompt_tokens for answer in answers[::n])
    completion = sum(answer.completion_tokens for answer in answers)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        virtual_tokens=served.length,
        prompt_tokens_details={"cached_tokens": sum(answer.cached_tokens for answer in answers)},
    )


class CompletionReply:
    """/v1/completions."""

    def __init__(self, served: Served, base: str, told: bool) -> None:
        self._envelope = envelope(served, base, "cmpl")
        self._told = told

    def whole(self, answers: Sequence[Sequence[Piece]], spent: Usage) -> Envelope:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        return Completion(**self._envelope, choices=choices, usage=spent)

    def first(self, index: int) -> Envelope | None:
        """The first chunk of a stream."""
        return None

    def chunk(self, index: int, piece: Piece) -> Envelope:
        return Completion(**self._envelope, choices=[self._choice(index, [piece])])

    def last(self, spent: Usage) -> Envelope:
        return Completion(**self._envelope, choices=[], usage=spent)

    def _choice(self, index: int, pieces: Sequence[Piece]) -> CompletionChoice:
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[{text: logprob for text, _, logprob in token.top} for token in tokens],
            text_offset=[token.offset for token in tokens],
        )
        return CompletionChoice(
            index=index,
            text="".join(piece.text for piece in pieces),
            finish_reason=pieces[-1].finish,
            logprobs=logprobs if self._told else None,
        )


class ChatReply:
    """/v1/chat/completions."""

    def __init__(self, served: Served, base: str, told: bool) -> None:
        self._envelope = envelope(served, base, "chatcmpl")
        self._told = told

    def whole(self, answers: Sequence[Sequence[Piece]], spent: Usage) -> Envelope:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(piece.text for piece in pieces)),
                finish_reason=pieces[-1].finish,
                logprobs=self._logprobs(pieces),
            )
            for index, pieces in enumerate(answers)
        ]
        return ChatCompletion(**self._envelope, choices=choices, usage=spent)

    def first(self, index: int) -> Envelope | None:
        delta = Delta(role="assistant", content="")
        return ChatChunk(**self._envelope, choices=[ChunkChoice(index=index, delta=delta)])

    def chunk(self, index: int, piece: Piece) -> Envelope:
        choice = ChunkChoice(
            index=index, delta=Delta(content=piece.text), finish_reason=piece.finish, logprobs=self._logprobs([piece])
        )
        return ChatChunk(**self._envelope, choices=[choice])

    def last(self, spent: Usage) -> Envelope:
        return ChatChunk(**self._envelope, choices=[], usage=spent)

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._told:
            return None
        return ChatLogprobs(content=[_chat_logprob(token) for piece in pieces for token in piece.tokens])


Reply = ChatReply | CompletionReply


def _chat_logprob(token: TokenText) -> TokenLogprob:
    top = [TopLogprob(token=text, logprob=logprob, bytes=list(content)) for text, content, logprob in token.top]
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


def server_sent_event(answer: BaseModel) -> bytes:
    return f"data: {answer.model_dump_json()}\n\n".encode()
