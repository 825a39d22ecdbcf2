"""What a request was and how long it took: for the metrics, when its last byte is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning import tracing
from ptuning.serving import metrics
from ptuning.serving.completion import Generation
from ptuning.serving.http_request import request_id
from ptuning.serving.loading import Served
from ptuning.serving.metrics import Metrics
from ptuning.serving.replies import usage
from ptuning.serving.request_trace import trace
from ptuning.serving.service import Service

_KEY = "ptuning.record"
LEFT = 499
"""The status of a request whose client has left before the end of the answer."""


class Record:
    """A request to a replica, filled in while it is answered."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.route = ""
        """Empty: it asks for no answer, and is not counted."""
        self.waits = False
        """A client waits for the answer: lines of batches do not start."""
        self.served: Served | None = None
        self.answers: Sequence[Generation] = ()
        self.n = 1
        """Answers to one prompt."""
        self.prompts: Sequence[int] = ()
        """Tokens of texts that are classified."""
        self.queued_s: float | None = None
        """Seconds until the first of them was."""
        self.failed: int | None = None
        """The status of an error that was sent after the status of the answer."""

    def end(self, to: Metrics, status: int) -> None:
        """Count the request. Its answers end, if they have not."""
        for answer in self.answers:
            answer.close()
        if not self.route:
            return
        status = self.failed or status
        model = to.label(self.served.id) if self.served else "none"
        to.add(metrics.REQUESTS, 1, model, self.route, str(status))
        if status == 200:
            to.observe(metrics.LATENCY, [time.monotonic() - self.began], model, self.route)
        if self.served and self.answers:
            self._count_answers(to, self.served, model)
        if self.prompts:
            to.observe(metrics.PROMPT, self.prompts, model)
            to.add(metrics.PROMPT_TOKENS, sum(self.prompts), model)
            to.observe(metrics.QUEUE, [] if self.queued_s is None else [self.queued_s], model)

    def _count_answers(self, to: Metrics, served: Served, model: str) -> None:
        answers = self.answers
        spent = usage(served, answers, self.n)
        to.add(metrics.PROMPT_TOKENS, spent.prompt_tokens, model)
        to.add(metrics.CACHED_TOKENS, spent.prompt_tokens_details.cached_tokens, model)
        to.add(metrics.GENERATION_TOKENS, spent.completion_tokens, model)
        to.observe(metrics.PROMPT, [answer.prompt_tokens for answer in answers[:: self.n]], model)
        to.observe(metrics.FIRST, [answer.first - self.began for answer in answers if answer.first], model)
        to.observe(metrics.QUEUE, [answer.queued_s for answer in answers if answer.queued_s is not None], model)
        for answer in answers:
            to.observe(metrics.BETWEEN, answer.intervals, model)
            to.add(metrics.ANSWERS, 1, model, answer.finish or "abort")
            if answer.finish:
                to.observe(metrics.GENERATED, [answer.completion_tokens], model)


def record_of(request: Request) -> Record:
    """The record of a request."""
    record = request.scope[_KEY]
    assert isinstance(record, Record)
    return record


class Recorded:
    """Middleware: a record for every request, and the number of open ones, until the last byte of their answer. Requests that a
    stopping replica refuses are not open."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, counts = Record(), not self._service.draining
        status, whole = 500, False

        async def note(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                whole = True
            await send(message)

        self._service.open += counts
        try:
            await self._app({**scope, _KEY: record}, receive, note)
            status = status if whole else LEFT
        except (asyncio.CancelledError, ClientDisconnect, OSError):
            status = LEFT
            raise
        finally:
            self._service.open -= counts
            if record.waits:
                self._service.lane.leave()
            record.end(self._service.metrics, status)
            if record.route and tracing.enabled():
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
                tracing.send(trace(record, record.failed or status, request_id()), headers)
