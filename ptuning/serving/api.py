"""The HTTP API of a replica: OpenAI's routes, classification, health and metrics. Invalid requests get a 4xx error in OpenAI's
format.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ptuning.data.encoder import Encoder
from ptuning.errors import UserError
from ptuning.inference.inputs import fields_of, row_ids, too_long
from ptuning.inference.label_scorer import LABEL_TOKENS, probabilities
from ptuning.inference.sampling import Sampling
from ptuning.inference.types import EngineBusy
from ptuning.model.label_trie import LabelTrie
from ptuning.redaction import logger
from ptuning.serving.completion import Generation, GenerationRequest, Piece
from ptuning.serving.http_request import BUSY, REFUSED, ApiError, Asked, as_api_error, authorize, drain, read_body
from ptuning.serving.input_processor import chat_ids, text_ids
from ptuning.serving.protocol import (
    Body,
    ChatRequest,
    Classification,
    ClassifyRequest,
    CompletionRequest,
    Conversation,
    Label,
    Model,
    Models,
    Usage,
)
from ptuning.serving.responses import (
    ChatReply,
    CompletionReply,
    Reply,
    envelope,
    json_response,
    merged,
    server_sent_event,
    usage,
)
from ptuning.serving.served_models import Served, UnknownModel
from ptuning.serving.service import Service

log = logger(__name__)

COMPLETION_TOKENS, CHAT_TOKENS = 16, 256
"""Maximum new tokens if neither the request nor the soft prompt's card gives a number."""


class Api:
    """The routes of one replica."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine
        self._limits = service.limits

    # -- answers -----------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._handle(request, "completions", CompletionRequest, self._complete)

    async def chat(self, request: Request) -> Response:
        return await self._handle(request, "chat", ChatRequest, self._chat)

    async def classify(self, request: Request) -> Response:
        return await self._handle(request, "classify", ClassifyRequest, self._classify)

    async def _complete(self, body: CompletionRequest, served: Served, began: float) -> Response:
        constrain, new = self._constrain(body, served), self._new_tokens(body, served, body.max_tokens, COMPLETION_TOKENS)
        prompts: list[Any] = [body.prompt] if _is_one(body.prompt) else list(body.prompt)
        room = self._room(served, (served.conversation and served.encoder) or served.raw, body.max_tokens, constrain)
        ids = [await self._ids(served, prompt, room) for prompt in prompts]
        questions = [self._question(body, served, each, new, constrain, body.logprobs, strip=False) for each in ids]
        return await self._reply(body, served, questions, CompletionReply, began)

    async def _chat(self, body: ChatRequest, served: Served, began: float) -> Response:
        asked = body.max_completion_tokens or body.max_tokens
        constrain, new = self._constrain(body, served), self._new_tokens(body, served, asked, CHAT_TOKENS)
        if body.continue_final_message and constrain:
            message = "continue_final_message: an answer that is a label has no begin; send constrain = false, or leave it out"
            raise ApiError(400, message, "invalid_request_error", "continue_final_message")
        # In a thread, because tokenising a megabyte of text takes a while.
        room = self._room(served, served.encoder or served.raw, asked, constrain)
        ids = await asyncio.to_thread(chat_ids, served, body, room, self._limits.chat)
        told = (body.top_logprobs or 0) if body.logprobs else None
        question = self._question(body, served, ids, new, constrain, told, strip=True)
        return await self._reply(body, served, [question], ChatReply, began)

    async def _classify(self, body: ClassifyRequest, served: Served, began: float) -> Response:
        encoder = served.encoder
        if encoder is None or not served.labels:
            raise ApiError(400, f"{served.id} has no labels; use /v1/chat/completions", "invalid_request_error", "model")
        given = body.input if isinstance(body.input, list) else [body.input]
        texts = [each.fields() if isinstance(each, Conversation) else each for each in given]
        if len(texts) > self._limits.waiting:
            raise ApiError(
                400,
                f"input: {len(texts)} texts, at most {self._limits.waiting} are allowed; send fewer",
                "invalid_request_error",
                "input",
            )

        def encode() -> list[list[int]]:
            return [row_ids(encoder, fields_of(encoder, text), encoder.input_room, body.truncate) for text in texts]

        rows = await asyncio.to_thread(encode)
        scores = await self._scores(served, rows, encoder.label_trie)
        data = []
        for index, each in enumerate(scores):
            shares = probabilities(each, served.labels)
            label = max(shares, key=lambda name: shares[name])
            data.append(Label(index=index, label=label, probability=shares[label], probabilities=shares))
        tokens = sum(map(len, rows))
        spent = Usage(prompt_tokens=tokens, total_tokens=tokens, virtual_tokens=served.length)
        self._count(served, spent, began, began)
        answer = Classification(**envelope(served, self._service.models.base_id, "classify"), data=data, usage=spent)
        return json_response(answer)

    async def _scores(self, served: Served, rows: list[list[int]], trie: LabelTrie) -> list[list[float]]:
        """Log-probabilities of the labels after rows, one pass at a time, so that generation continues in between."""
        portions: list[list[list[int]]] = []
        tokens = LABEL_TOKENS
        for row in rows:
            tokens += len(row) + len(trie.tokens)
            if tokens > LABEL_TOKENS:
                portions.append([])
                tokens = len(row) + len(trie.tokens)
            portions[-1].append(row)
        futures: list[Any] = []
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                futures += [self._engine.choose(served.handle, portion, trie) for portion in portions]
                found = [await asyncio.wrap_future(future) for future in futures]
        finally:
            for future in futures:
                future.cancel()
        return [row for portion in found for row in portion]

    async def _ids(self, served: Served, prompt: str | list[int], room: int) -> list[int]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(text_ids, served, prompt, room)
        if len(prompt) > room:
            raise too_long(len(prompt), room)
        return prompt

    def _constrain(self, body: Body, served: Served) -> bool:
        if body.constrain and not served.labels:
            raise ApiError(400, f"constrain: {served.id} has no labels; remove it", "invalid_request_error", "constrain")
        return bool(served.labels) if body.constrain is None else body.constrain

    def _new_tokens(self, body: Body, served: Served, asked: int | None, default: int) -> int:
        if asked is not None and asked > self._limits.max_new_tokens:
            message = f"max_tokens: {asked} is more than the {self._limits.max_new_tokens} allowed by this server; lower it"
            raise ApiError(400, message, "invalid_request_error", "max_tokens")
        return min(asked or (served.card and served.card.max_new_tokens) or default, self._limits.max_new_tokens)

    def _room(self, served: Served, encoder: Encoder, asked: int | None, constrain: bool) -> int:
        """Maximum tokens of the text, from the limit of training and from the context. If max_tokens is not given, a long text
        may reduce the number of new tokens, down to the longest target that the soft prompt was trained on."""
        if constrain and served.encoder:
            return served.encoder.input_room
        usual = (served.card and served.card.max_new_tokens) or 1
        return max(0, min(encoder.limit - usual, self._engine.longest - served.length - (asked or usual)))

    def _question(
        self, body: Body, served: Served, ids: list[int], new: int, constrain: bool, told: int | None, strip: bool
    ) -> GenerationRequest:
        temperature = body.temperature if body.temperature is not None else (0.0 if served.labels else 1.0)
        sampling = Sampling(temperature, body.top_p or 1.0, body.seed, told)
        new = min(new, self._engine.longest - served.length - len(ids))
        ends = served.ends if strip or served.encoder else ()
        return GenerationRequest(served, ids, new, sampling, tuple(body.stop or ()), constrain, strip, ends)

    async def _reply(
        self, body: Body, served: Served, questions: list[GenerationRequest], kind: type[Reply], began: float
    ) -> Response:
        n = body.n or 1
        if n * len(questions) > self._limits.max_answers:
            message = f"n: {n * len(questions)} answers, at most {self._limits.max_answers} per request; lower it"
            raise ApiError(400, message, "invalid_request_error", "n")
        reply = kind(served, self._service.models.base_id, questions[0].sampling.top is not None)
        answers: list[Generation] = []
        try:
            for question in questions:
                for number in range(n):
                    answers.append(Generation(self._engine, question, number))
            if body.stream:
                events = self._stream(body, served, answers, reply, began, n)
                answers = []  # the stream closes them
                return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            pieces: list[list[Piece]] = [[] for _ in answers]
            first = 0.0
            async with asyncio.timeout(self._limits.deadline_s):
                async for index, piece in merged(answers):
                    first = first or time.monotonic()
                    pieces[index].append(piece)
            spent = usage(served, answers, n)
            self._count(served, spent, began, first)
            return json_response(reply.whole(pieces, spent))
        finally:
            for answer in answers:
                answer.close()

    async def _stream(
        self, body: Body, served: Served, answers: list[Generation], reply: Reply, began: float, n: int
    ) -> AsyncIterator[bytes]:
        """Server-sent events. If the client disconnects, the generator is closed, and with it the answers."""
        first = 0.0
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                for index in range(len(answers)):
                    if opening := reply.first(index):
                        yield server_sent_event(opening)
                async for index, piece in merged(answers):
                    first = first or time.monotonic()
                    yield server_sent_event(reply.chunk(index, piece))
            spent = usage(served, answers, n)
            self._count(served, spent, began, first)
            if body.stream_options and body.stream_options.include_usage:
                yield server_sent_event(reply.last(spent))
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is already sent, so the error is sent as an event
            yield server_sent_event(as_api_error(error).body)
        finally:
            for answer in answers:
                answer.close()

    # -- models, health, metrics -------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        authorize(request, self._service.keys, "inference")
        names = self._service.models.names
        return json_response(Models(data=[self._model(name, served) for name, served in names.items()]))

    async def model(self, name: str, request: Request) -> Response:
        authorize(request, self._service.keys, "inference")
        try:
            return json_response(self._model(name, self._service.models.find(name)))
        except UnknownModel as error:
            return as_api_error(error).response()

    def _model(self, name: str, served: Served) -> Model:
        card = served.card
        return Model(
            id=name,
            created=served.created,
            owned_by="ptuning",
            soft_prompt=served.id if served.handle else None,
            content_hash=served.content_hash,
            length=served.length or None,
            labels=list(served.labels) or None,
            template=("chat" if card.template.is_chat else card.template.input) if card and card.template else None,
            metrics=card.metrics if card else None,
        )

    async def reload(self, request: Request) -> Response:
        """Check the registry now; returns the served and the refused versions."""
        authorize(request, self._service.keys, "admin")
        try:
            changed = await asyncio.to_thread(self._service.models.sync)
        except UserError as error:
            log.warning("the registry does not respond, the served versions stay: %s", error)
            message = "the registry does not respond, the served versions stay; see the server's log"
            return ApiError(503, message, "server_error", retry_after="5").response()
        models = self._service.models
        return JSONResponse({"changed": changed, "served": sorted(models.names), "refused": dict(models.refused)})

    async def metrics(self, request: Request) -> Response:
        authorize(request, self._service.keys, "admin")
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def livez(self) -> Response:
        return JSONResponse({"alive": self._service.alive}, 200 if self._service.alive else 503)

    async def readyz(self) -> Response:
        """Ready: the base is loaded, a test generation has succeeded, and the engine is running."""
        ready = self._service.ready and self._service.alive and not self._service.draining
        known = {"ready": ready, "soft_prompts": self._engine.residents, "refused": len(self._service.models.refused)}
        return JSONResponse(known, 200 if ready else 503)

    # -- what every request goes through -----------------------------------------------------------------------------

    async def _handle(
        self,
        request: Request,
        route: str,
        shape: type[Asked],
        answer: Callable[[Asked, Served, float], Awaitable[Response]],
    ) -> Response:
        began, model = time.monotonic(), "none"
        try:
            if self._service.draining:
                raise ApiError(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
            authorize(request, self._service.keys, "inference")
            spared = request.headers.get(REFUSED, "")
            if spared.isdigit() and len(spared) < 7:
                self._service.metrics.answered(model, route, 429, int(spared))
            if route != "classify" and self._engine.full:  # before the body is read: refusing must be cheap
                refusal = as_api_error(EngineBusy("all places are taken; ask again later"))
                refusal.headers[BUSY] = "1"
                raise refusal
            body = await read_body(request, shape, self._limits)
            served = self._service.models.find(body.model)  # type: ignore[attr-defined]  # every request type has it
            model = served.id
            response = await answer(body, served, began)
        except Exception as error:  # any error must become a response in OpenAI's format
            response = as_api_error(error).response()
            if not await drain(request, self._limits):
                # Closed explicitly instead of by the keep-alive timer: bytes that arrive after the answer stop that timer for
                # good (uvicorn 0.54, data_received), and the client could keep the connection open for ever.
                response.headers["connection"] = "close"
        self._service.metrics.answered(model, route, response.status_code)
        return response

    def _count(self, served: Served, spent: Usage, began: float, first: float) -> None:
        now, metrics = time.monotonic(), self._service.metrics
        cached = (spent.prompt_tokens_details or {}).get("cached_tokens", 0)
        metrics.tokens(served.id, prompt=spent.prompt_tokens, completion=spent.completion_tokens, cached=cached)
        if spent.completion_tokens:
            metrics.timing(served.id, first - began, now - began, spent.completion_tokens)


def _is_one(prompt: str | list[str] | list[int] | list[list[int]]) -> bool:
    return isinstance(prompt, str) or isinstance(prompt[0], int)
