"""The routes of a replica that answer: OpenAI's, and classification. Invalid requests get a 4xx error in OpenAI's format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from ptuning.inference.types import EngineBusy
from ptuning.serving.classification import classify
from ptuning.serving.completion import Generation, GenerationRequest, Piece
from ptuning.serving.http_request import (
    BUSY,
    REFUSED,
    ApiError,
    Asked,
    as_api_error,
    authorize,
    parse_body,
    read_body,
    refuse,
    too_large,
)
from ptuning.serving.loading import Served
from ptuning.serving.metrics import REQUESTS
from ptuning.serving.protocol import Body, ChatRequest, ClassifyRequest, CompletionRequest
from ptuning.serving.questions import Questions
from ptuning.serving.replies import ChatReply, CompletionReply, json_response, merged, usage
from ptuning.serving.request_record import Record, record_of
from ptuning.serving.response_items import ResponsesReply, ResponsesRequest
from ptuning.serving.service import Service


class Api:
    """The answering routes of one replica."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine
        self._limits = service.limits
        self._base = service.models.base_id
        self._questions = Questions(service.engine, service.limits)

    async def completions(self, request: Request) -> Response:
        return await self._handle(request, "completions", CompletionRequest, self._complete)

    async def chat(self, request: Request) -> Response:
        return await self._handle(request, "chat", ChatRequest, self._chat)

    async def responses(self, request: Request) -> Response:
        return await self._handle(request, "responses", ResponsesRequest, self._respond)

    async def classify(self, request: Request) -> Response:
        return await self._handle(request, "classify", ClassifyRequest, self._classify)

    async def line(self, endpoint: str, content: bytes, record: Record) -> Response:
        """The answer to a line of a batch, as its route would give it, when no client waits. `content`: the body."""
        record.route = "batch"
        try:
            if self._service.draining:
                raise ApiError(503, "this server is stopping; ask again in a moment", "server_error")
            if len(content) > self._limits.max_body_kb * 1024:
                raise too_large(self._limits)
            shape, answer = self._lines[endpoint]
            body = parse_body(content, shape)

            async def work() -> Response:
                record.began = time.monotonic()  # how long it waited for clients is no latency
                return await self._answer(body, answer, record)

            return await self._service.lane.run(work)
        except Exception as error:  # any error must become a response in OpenAI's format
            return as_api_error(error).response()

    @property
    def _lines(self) -> dict[str, tuple[type[Any], Callable[[Any, Served, Record], Awaitable[Response]]]]:
        return {
            "/v1/completions": (CompletionRequest, self._complete),
            "/v1/chat/completions": (ChatRequest, self._chat),
            "/v1/responses": (ResponsesRequest, self._respond),
            "/v1/classify": (ClassifyRequest, self._classify),
        }

    async def _answer(
        self, body: Asked, answer: Callable[[Asked, Served, Record], Awaitable[Response]], record: Record
    ) -> Response:
        served = await self._service.models.bring(body.model)  # type: ignore[attr-defined]  # every request type has it
        record.served = served
        async with self._service.models.held(served):  # what it starts in the engine is held there
            return await answer(body, served, record)

    async def _complete(self, body: CompletionRequest, served: Served, record: Record) -> Response:
        questions = await self._questions.completion(body, served)
        reply = CompletionReply(served, self._base, told(questions), body.stream_options)
        return await self._reply(body, served, questions, reply, record)

    async def _chat(self, body: ChatRequest, served: Served, record: Record) -> Response:
        questions = await self._questions.chat(body, served)
        reply = ChatReply(served, self._base, told(questions), body.stream_options, questions[0].form.tool)
        return await self._reply(body, served, questions, reply, record)

    async def _respond(self, body: ResponsesRequest, served: Served, record: Record) -> Response:
        chat = body.as_chat()
        questions = await self._questions.chat(chat, served)
        reply = ResponsesReply(served, self._base, told(questions), body, questions[0].form.tool)
        return await self._reply(chat, served, questions, reply, record)

    async def _classify(self, body: ClassifyRequest, served: Served, record: Record) -> Response:
        return json_response(await classify(body, served, self._base, self._engine, self._limits, record))

    async def _reply(
        self, body: Body, served: Served, questions: list[GenerationRequest], reply: CompletionReply, record: Record
    ) -> Response:
        n = body.n or 1
        answers: list[Generation] = []
        record.answers, record.n = answers, n
        try:
            for question in questions:
                for number in range(n):
                    first = answers[-number] if number else None
                    answers.append(Generation(self._engine, question, number, first))
            if body.stream:
                events = self._stream(served, answers, reply, record)
                answers = []  # the stream closes them
                return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            pieces: list[list[Piece]] = [[] for _ in answers]
            async with asyncio.timeout(self._limits.deadline_s):
                async for index, piece in merged(answers):
                    pieces[index].append(piece)
            return json_response(reply.whole(pieces, usage(served, answers, n)))
        finally:
            for answer in answers:
                answer.close()

    async def _stream(
        self, served: Served, answers: list[Generation], reply: CompletionReply, record: Record
    ) -> AsyncIterator[bytes]:
        """Server-sent events. If the client disconnects, the generator is closed, and with it the answers."""
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                if opening := reply.begin():
                    yield opening
                async for index, piece in merged(answers):
                    if sent := reply.chunk(index, piece, usage(served, answers, record.n) if reply.continuous else None):
                        yield sent
            yield reply.end(usage(served, answers, record.n))
        except Exception as error:  # the status is already sent, so the error is sent as an event
            told = as_api_error(error)
            record.failed = told.status
            yield reply.failed(told.body)
        finally:
            for answer in answers:
                answer.close()

    async def _handle(
        self,
        request: Request,
        route: str,
        shape: type[Asked],
        answer: Callable[[Asked, Served, Record], Awaitable[Response]],
    ) -> Response:
        """What every request goes through."""
        record = record_of(request)
        record.route = route
        try:
            if self._service.draining:
                raise ApiError(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
            authorize(request, self._service.keys, "inference")
            record.waits = self._service.lane.enter()
            spared = request.headers.get(REFUSED, "")
            if spared.isdigit() and len(spared) < 7:
                self._service.metrics.add(REQUESTS, int(spared), "none", route, "429")
            if route != "classify" and self._engine.full:  # before the body is read: refusing must be cheap
                refusal = as_api_error(EngineBusy("all places are taken; ask again later"))
                refusal.headers[BUSY] = "1"
                raise refusal
            body = await read_body(request, shape, self._limits)
            response = await self._answer(body, answer, record)
        except Exception as error:  # any error must become a response in OpenAI's format
            response = await refuse(request, error, 4 * self._limits.max_body_kb * 1024)
        return response


def told(questions: list[GenerationRequest]) -> bool:
    """Whether log-probabilities are reported."""
    return questions[0].sampling.top is not None
