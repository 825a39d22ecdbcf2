"""The HTTP face of a replica: OpenAI's routes, classification, health and metrics. Everything that is wrong with a request is
an OpenAI-shaped 4xx.

Bodies are read and parsed here and not by FastAPI: bounded while they arrive, without a detour through Python objects that
JSON cannot hold (lone surrogates, NaN), and refused in one sentence that names the parameter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Send

from ptuning.config import UserError
from ptuning.data.dataset import Encoder
from ptuning.inference.engine import LABEL_TOKENS, EngineBusy, EngineStopped
from ptuning.inference.sampling import Sampling
from ptuning.model.label_trie import LabelTrie
from ptuning.redaction import logger, placeless
from ptuning.serving import proxy
from ptuning.serving.auth import Scope, scope_of
from ptuning.serving.completion import (
    Answer,
    AnswerFailed,
    Piece,
    Question,
    chat_ids,
    fields_of,
    probabilities,
    raw_ids,
    row_ids,
    too_long,
)
from ptuning.serving.protocol import (
    Body,
    ChatCompletion,
    ChatRequest,
    Classification,
    ClassifyRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
    Label,
    Model,
    Models,
    Usage,
    complaint,
)
from ptuning.serving.responses import ChatReply, CompletionReply, Reply, envelope, usage
from ptuning.serving.served_models import Served, UnknownModel
from ptuning.serving.service import Service

log = logger(__name__)

Asked = TypeVar("Asked", bound=BaseModel)
BUSY, REFUSED = proxy.BUSY.decode(), proxy.REFUSED.decode()
DRAIN_S = 1.0
"""Seconds for the rest of a body that is refused."""
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256
"""Most new tokens where neither the request nor the soft prompt's card says."""


class Refusal(Exception):
    """A request that is not answered, and how that is said."""

    def __init__(
        self, status: int, message: str, kind: str, param: str | None = None, *, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code or _CODES.get(status)))

    def response(self) -> Response:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


_CODES = {401: "invalid_api_key", 413: "body_too_large", 429: "rate_limit_exceeded"}
_ROUTES = {
    404: "there is no such route; /openapi.json lists those there are",
    405: "this route is not asked by this method; /openapi.json lists those there are",
}


def as_refusal(error: Exception) -> Refusal:
    """Any error as the client is to see it: never the text of an exception that was not written for people."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UnknownModel):
        return Refusal(404, str(error), "invalid_request_error", "model", code="model_not_found")
    if isinstance(error, UserError):
        return Refusal(400, placeless(str(error)), "invalid_request_error")
    if isinstance(error, EngineBusy):
        return Refusal(429, str(error), "rate_limit_error", retry_after="1")
    if isinstance(error, EngineStopped):
        return Refusal(503, str(error), "server_error", retry_after="5")
    if isinstance(error, TimeoutError):
        # OpenAI's clients repeat what has timed out, twice, unless they are told not to.
        return Refusal(
            408,
            "the answer took longer than is allowed here; ask for less",
            "timeout",
            x_should_retry="false",
        )
    if isinstance(error, HTTPException):
        message = _ROUTES.get(error.status_code, "the request cannot be answered; change it")
        return Refusal(error.status_code, message, "invalid_request_error", **_named(error.headers))
    if not isinstance(error, AnswerFailed):
        log.error("a request failed", exc_info=error)
    message = placeless(str(error)) if isinstance(error, AnswerFailed) else "something went wrong here; see the server's log"
    return Refusal(500, message, "server_error", x_should_retry="false")


def build_app(service: Service) -> FastAPI:
    """The application over a service."""
    app = FastAPI(title="ptuning", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    api = Api(service)
    shapes: list[type[BaseModel]] = []

    def post(path: str, handler: Callable[..., Any], shape: type[BaseModel], answer: type[BaseModel]) -> None:
        shapes.append(shape)
        schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        app.post(path, responses={200: {"model": answer}, **_errors()}, openapi_extra=body)(handler)

    post("/v1/completions", api.completions, CompletionRequest, Completion)
    post("/v1/chat/completions", api.chat, ChatRequest, ChatCompletion)
    post("/v1/classify", api.classify, ClassifyRequest, Classification)
    app.get("/v1/models", responses={200: {"model": Models}, **_errors()})(api.models)
    app.get("/v1/models/{name:path}", responses={200: {"model": Model}, **_errors()})(api.model)
    app.post("/v1/admin/reload", responses=_errors())(api.reload)
    app.get("/metrics", responses=_errors())(api.metrics)
    app.get("/livez", responses={503: {"description": "must be replaced"}})(api.livez)
    app.get("/readyz", responses={503: {"description": "not yet"}})(api.readyz)

    app.add_middleware(_Counted, service=service)

    async def refuse(request: Request, error: Exception) -> Response:
        return as_refusal(error).response()

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(Refusal, refuse)
    app.add_exception_handler(Exception, refuse)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for shape in shapes:
            schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {}) | {shape.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of extending it
    return app


def _errors() -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)}


class _Counted:
    """Counts the requests that are open, to the last byte of their answers. What is refused by who stops does not count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if self._service.draining or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._service.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.open -= 1


def _named(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers as `Refusal` takes them."""
    return {name.replace("-", "_"): value for name, value in (headers or {}).items()}


class Api:
    """The routes of one replica."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine
        self._limits = service.limits

    # -- answers -----------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._guarded(request, "completions", CompletionRequest, self._complete)

    async def chat(self, request: Request) -> Response:
        return await self._guarded(request, "chat", ChatRequest, self._chat)

    async def classify(self, request: Request) -> Response:
        return await self._guarded(request, "classify", ClassifyRequest, self._classify)

    async def _complete(self, body: CompletionRequest, served: Served, began: float) -> Response:
        constrain, new = self._constrain(body, served), self._new_tokens(body, served, body.max_tokens, COMPLETION_TOKENS)
        prompts: list[Any] = [body.prompt] if _is_one(body.prompt) else list(body.prompt)
        room = self._room(served, served.raw, body.max_tokens, constrain)
        ids = [await self._ids(served, prompt, room) for prompt in prompts]
        questions = [self._question(body, served, each, new, constrain, body.logprobs, strip=False) for each in ids]
        return await self._reply(body, served, questions, CompletionReply, began)

    async def _chat(self, body: ChatRequest, served: Served, began: float) -> Response:
        asked = body.max_completion_tokens or body.max_tokens
        constrain, new = self._constrain(body, served), self._new_tokens(body, served, asked, CHAT_TOKENS)
        # In a thread, because a megabyte of text is tokenised in more than an instant.
        room = self._room(served, served.encoder or served.raw, asked, constrain)
        ids = await asyncio.to_thread(chat_ids, served, body, room)
        told = (body.top_logprobs or 0) if body.logprobs else None
        question = self._question(body, served, ids, new, constrain, told, strip=True)
        return await self._reply(body, served, [question], ChatReply, began)

    async def _classify(self, body: ClassifyRequest, served: Served, began: float) -> Response:
        encoder = served.encoder
        if encoder is None or not served.labels:
            raise Refusal(400, f"{served.id} has no labels; use /v1/chat/completions", "invalid_request_error", "model")
        texts: list[str | dict[str, str]] = [body.input] if isinstance(body.input, str | dict) else list(body.input)
        if len(texts) > self._limits.waiting:
            raise Refusal(
                400, f"input: {len(texts)} texts, at most {self._limits.waiting} at once", "invalid_request_error", "input"
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
        answer = Classification(**envelope(served, self._service.catalogue.base_id, "classify"), data=data, usage=spent)
        return _json(answer)

    async def _scores(self, served: Served, rows: list[list[int]], trie: LabelTrie) -> list[list[float]]:
        """Log-probabilities of the labels behind rows, in portions of one pass each, so that generation goes on in between."""
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
            return await asyncio.to_thread(raw_ids, served, prompt, room)
        if len(prompt) > room:
            raise too_long(len(prompt), room)
        return prompt

    def _constrain(self, body: Body, served: Served) -> bool:
        if body.constrain and not served.labels:
            raise Refusal(400, f"constrain: {served.id} has no labels; remove it", "invalid_request_error", "constrain")
        return bool(served.labels) if body.constrain is None else body.constrain

    def _new_tokens(self, body: Body, served: Served, asked: int | None, default: int) -> int:
        if asked is not None and asked > self._limits.max_new_tokens:
            message = f"max_tokens: {asked} is more than the {self._limits.max_new_tokens} that are allowed here; lower it"
            raise Refusal(400, message, "invalid_request_error", "max_tokens")
        return min(asked or (served.card and served.card.max_new_tokens) or default, self._limits.max_new_tokens)

    def _room(self, served: Served, encoder: Encoder, asked: int | None, constrain: bool) -> int:
        """Most tokens of the text: what training left it, and what the context leaves it. The default of max_tokens is no
        demand: a long text leaves fewer new tokens, down to what the soft prompt was trained to say."""
        if constrain and served.encoder:
            return served.encoder.input_room
        usual = (served.card and served.card.max_new_tokens) or 1
        return max(0, min(encoder.limit - usual, self._engine.longest - served.length - (asked or usual)))

    def _question(
        self, body: Body, served: Served, ids: list[int], new: int, constrain: bool, told: int | None, strip: bool
    ) -> Question:
        temperature = body.temperature if body.temperature is not None else (0.0 if served.labels else 1.0)
        sampling = Sampling(temperature, body.top_p or 1.0, body.seed, told)
        new = min(new, self._engine.longest - served.length - len(ids))
        return Question(served, ids, new, sampling, tuple(body.stop or ()), constrain, strip)

    async def _reply(self, body: Body, served: Served, questions: list[Question], kind: type[Reply], began: float) -> Response:
        n = body.n or 1
        if n * len(questions) > self._limits.max_answers:
            message = f"n: {n * len(questions)} answers, at most {self._limits.max_answers} to one request; lower it"
            raise Refusal(400, message, "invalid_request_error", "n")
        reply = kind(served, self._service.catalogue.base_id, questions[0].sampling.top is not None)
        answers: list[Answer] = []
        try:
            for question in questions:
                for number in range(n):
                    answers.append(Answer(self._engine, question, number))
            if body.stream:
                events = self._stream(body, served, answers, reply, began, n)
                answers = []  # theirs to close
                return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            pieces: list[list[Piece]] = [[] for _ in answers]
            first = 0.0
            async with asyncio.timeout(self._limits.deadline_s):
                async for index, piece in _merged(answers):
                    first = first or time.monotonic()
                    pieces[index].append(piece)
            spent = usage(served, answers, n)
            self._count(served, spent, began, first)
            return _json(reply.whole(pieces, spent))
        finally:
            for answer in answers:
                answer.close()

    async def _stream(
        self, body: Body, served: Served, answers: list[Answer], reply: Reply, began: float, n: int
    ) -> AsyncIterator[bytes]:
        """Server-sent events. When the client has gone, the generator is closed, and with it the answers."""
        first = 0.0
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                for index in range(len(answers)):
                    if opening := reply.first(index):
                        yield _event(opening)
                async for index, piece in _merged(answers):
                    first = first or time.monotonic()
                    yield _event(reply.chunk(index, piece))
            spent = usage(served, answers, n)
            self._count(served, spent, began, first)
            if body.stream_options and body.stream_options.include_usage:
                yield _event(reply.last(spent))
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is sent already: the client is told by an event
            yield _event(as_refusal(error).body)
        finally:
            for answer in answers:
                answer.close()

    # -- models, health, metrics -------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        self._admit(request, "inference")
        names = self._service.catalogue.names
        return _json(Models(data=[self._model(name, served) for name, served in names.items()]))

    async def model(self, name: str, request: Request) -> Response:
        self._admit(request, "inference")
        try:
            return _json(self._model(name, self._service.catalogue.find(name)))
        except UnknownModel as error:
            return as_refusal(error).response()

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
            template=card.template.input if card and card.template else None,
            metrics=card.metrics if card else None,
        )

    async def reload(self, request: Request) -> Response:
        """Look at the registry now, and say what is served and what was refused."""
        self._admit(request, "admin")
        try:
            changed = await asyncio.to_thread(self._service.catalogue.sync)
        except UserError as error:
            log.warning("the registry does not answer, what is served stays: %s", error)
            message = "the registry does not answer, what is served stays; see the server's log"
            return Refusal(503, message, "server_error", retry_after="5").response()
        catalogue = self._service.catalogue
        return JSONResponse({"changed": changed, "served": sorted(catalogue.names), "refused": dict(catalogue.refused)})

    async def metrics(self, request: Request) -> Response:
        self._admit(request, "admin")
        return Response(self._service.gauges.text(), media_type="text/plain; version=0.0.4")

    async def livez(self) -> Response:
        return JSONResponse({"alive": self._service.alive}, 200 if self._service.alive else 503)

    async def readyz(self) -> Response:
        """Ready: the base is loaded, one real generation is done, and the engine runs."""
        ready = self._service.ready and self._service.alive and not self._service.draining
        known = {"ready": ready, "soft_prompts": self._engine.residents, "refused": len(self._service.catalogue.refused)}
        return JSONResponse(known, 200 if ready else 503)

    # -- what every request goes through -----------------------------------------------------------------------------

    async def _guarded(
        self,
        request: Request,
        route: str,
        shape: type[Asked],
        answer: Callable[[Asked, Served, float], Awaitable[Response]],
    ) -> Response:
        began, model = time.monotonic(), "none"
        try:
            if self._service.draining:
                raise Refusal(503, "this server is stopping; ask again in a moment", "server_error", retry_after="1")
            self._admit(request, "inference")
            spared = request.headers.get(REFUSED, "")
            if spared.isdigit() and len(spared) < 7:
                self._service.gauges.answered(model, route, 429, int(spared))
            if route != "classify" and self._engine.full:  # before anything is read: what is refused must cost next to nothing
                refusal = as_refusal(EngineBusy("all places are taken; ask again later"))
                refusal.headers[BUSY] = "1"
                raise refusal
            body = await self._body(request, shape)
            served = self._service.catalogue.find(body.model)  # type: ignore[attr-defined]  # every shape has it
            model = served.id
            response = await answer(body, served, began)
        except Exception as error:  # the edge: whatever it is, the client gets an OpenAI-shaped answer
            response = as_refusal(error).response()
            if not await self._drain(request):
                # Said, not left to the keep-alive timer: bytes that come behind the answer stop that timer for good
                # (uvicorn 0.54, data_received), and the connection would stay for as long as the client likes.
                response.headers["connection"] = "close"
        self._service.gauges.answered(model, route, response.status_code)
        return response

    def _admit(self, request: Request, wanted: Scope) -> None:
        scope = scope_of(request.headers.get("authorization"), self._service.keys)
        if scope is None:
            message = "the API key is missing or unknown; send Authorization: Bearer KEY"
            raise Refusal(401, message, "authentication_error", www_authenticate="Bearer")
        if wanted == "admin" and scope != "admin":
            raise Refusal(403, "this API key may ask but not administrate; use one with the scope admin", "permission_error")

    async def _body(self, request: Request, shape: type[Asked]) -> Asked:
        # A web page may send forms and plain text to a local server without asking; JSON only with leave.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "the body must be plain application/json; set Content-Type", "invalid_request_error")
        most = self._limits.max_body_kb * 1024
        declared = request.headers.get("content-length", "")
        size, chunks = int(declared) if declared.isdigit() else 0, []
        if size <= most:
            size = 0
            async with asyncio.timeout(self._limits.deadline_s):  # a body that never ends, drop by drop
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        break
                    chunks.append(chunk)
        if size > most:
            raise Refusal(413, f"the body is larger than {self._limits.max_body_kb} KiB; send less", "invalid_request_error")
        try:
            return shape.model_validate_json(b"".join(chunks))
        except ValidationError as error:
            message, param = complaint(error)
            raise Refusal(400, message, "invalid_request_error", param) from None

    async def _drain(self, request: Request) -> bool:
        """Read on for a while: a connection that is closed with an unread body is reset, and the answer lost with it.

        Returns: whether the body has come to its end.
        """
        size = 0
        try:
            async with asyncio.timeout(DRAIN_S):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > 4 * self._limits.max_body_kb * 1024:
                        return False
        except TimeoutError:
            return False
        except (RuntimeError, ClientDisconnect):  # RuntimeError: it has been read already
            pass
        return True

    def _count(self, served: Served, spent: Usage, began: float, first: float) -> None:
        now, gauges = time.monotonic(), self._service.gauges
        cached = (spent.prompt_tokens_details or {}).get("cached_tokens", 0)
        gauges.tokens(served.id, prompt=spent.prompt_tokens, completion=spent.completion_tokens, cached=cached)
        if spent.completion_tokens:
            gauges.timing(served.id, first - began, now - began, spent.completion_tokens)


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all answers as they come, each with its answer's place."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    pieces: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:  # raised again where it is read
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


def _is_one(prompt: str | list[str] | list[int] | list[list[int]]) -> bool:
    return isinstance(prompt, str) or isinstance(prompt[0], int)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _event(answer: BaseModel) -> bytes:
    return f"data: {answer.model_dump_json()}\n\n".encode()
