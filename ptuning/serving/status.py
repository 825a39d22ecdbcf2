"""What is served, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ptuning.errors import UserError
from ptuning.inference.types import EngineBusy, EngineStopped
from ptuning.serving.answers import Model, Models
from ptuning.serving.http_request import ApiError, as_api_error, authorize
from ptuning.serving.loading import Entry, Served
from ptuning.serving.metrics import CONTENT_TYPE, exposition
from ptuning.serving.protocol import Shape
from ptuning.serving.replies import json_response
from ptuning.serving.service import Reloaded, Service

WHOLE, PIECE = 1000, 200
"""Versions up to which their list is written at once, and those of a piece of a longer one."""

Method = Literal["collect", "reload"]
Replicas = Callable[[Method], Awaitable[list[Any]]]
"""Calls a method of every replica: `collect` returns its metrics, `reload` a `Reloaded`. May raise TimeoutError."""


class ReloadedAnswer(Shape):
    changed: bool
    served: list[str]
    """By all replicas."""
    refused: dict[str, str]
    """By any replica, with the reasons."""
    replicas: int


class Status:
    """The routes of one replica that ask for no answer."""

    def __init__(self, service: Service, replicas: Replicas | None = None) -> None:
        """`replicas`: how all of them are reached; None: there is one."""
        self._service = service
        self._replicas = replicas or self._alone

    async def _alone(self, method: Method) -> list[Any]:
        return [await asyncio.to_thread(self._service.metrics.collect if method == "collect" else self._service.reload)]

    async def _all(self, method: Method) -> list[Any]:
        try:
            return await self._replicas(method)
        except TimeoutError:
            message = "a replica does not respond; ask again in a moment"
            raise ApiError(503, message, "server_error", retry_after="5") from None

    async def models(self, request: Request) -> Response:
        authorize(request, self._service.keys, "inference")
        models = self._service.models
        if models.versions <= WHOLE:
            return json_response(Models(data=list(self._models())))
        return StreamingResponse(self._written(), media_type="application/json")

    def _models(self) -> Iterator[Model]:
        models = self._service.models
        yield self._model(models.base_id, models.find(models.base_id))
        for name, entry, served in models.listed():
            yield self._model(name, served) if served else self._unbrought(name, entry)

    async def _written(self) -> AsyncIterator[bytes]:
        """A long list in pieces, so that other requests are answered in between."""
        yield b'{"object":"list","data":['
        every, pieces = self._models(), 0
        while piece := list(islice(every, PIECE)):
            text = ",".join(model.model_dump_json() for model in piece)
            yield f"{',' if pieces else ''}{text}".encode()
            pieces += 1
            await asyncio.sleep(0)
        yield b"]}"

    async def model(self, name: str, request: Request) -> Response:
        authorize(request, self._service.keys, "inference")
        try:
            return json_response(self._model(name, await self._service.models.bring(name)))
        except (UserError, EngineBusy, EngineStopped) as error:
            return as_api_error(error).response()

    def _unbrought(self, name: str, entry: Entry) -> Model:
        """What is known without bringing it."""
        return Model(
            id=name,
            created=entry.created_ms // 1000,
            owned_by="ptuning",
            max_model_len=self._service.engine.longest - entry.length,
            soft_prompt=str(entry),
            content_hash=entry.content_hash,
            length=entry.length or None,
            metrics=dict([entry.metric]) if entry.metric else None,
        )

    def _model(self, name: str, served: Served) -> Model:
        card = served.card
        return Model(
            id=name,
            created=served.created,
            owned_by="ptuning",
            max_model_len=self._service.engine.longest - served.length,
            soft_prompt=served.id if served.prompt else None,
            content_hash=served.content_hash,
            length=served.length or None,
            labels=list(served.labels) or None,
            template=("chat" if card.template.is_chat else card.template.input) if card and card.template else None,
            metrics=card.metrics if card else None,
        )

    async def reload(self, request: Request) -> Response:
        """All replicas check the registry now; returns the versions that all of them serve, and those that one has refused."""
        authorize(request, self._service.keys, "admin")
        found: list[Reloaded] = await self._all("reload")
        if not all(each.reached for each in found):
            message = "the registry does not respond, the served versions stay; see the server's log"
            raise ApiError(503, message, "server_error", retry_after="5")
        refused: dict[str, str] = {}
        for each in found:
            refused |= each.refused
        served = await asyncio.to_thread(lambda: sorted(frozenset.intersection(*(each.served for each in found))))
        changed = any(each.changed for each in found)
        return json_response(ReloadedAnswer(changed=changed, served=served, refused=refused, replicas=len(found)))

    async def look(self) -> None:
        """All replicas check the registry now, as far as they respond."""
        with suppress(ApiError):
            await self._all("reload")

    async def metrics(self, request: Request) -> Response:
        """The metrics of all replicas."""
        authorize(request, self._service.keys, "admin")
        found = await self._all("collect")
        return Response(await asyncio.to_thread(exposition, found), media_type=CONTENT_TYPE)

    async def livez(self) -> Response:
        return JSONResponse({"alive": self._service.alive}, 200 if self._service.alive else 503)

    async def readyz(self) -> Response:
        """Ready: the base is loaded, a test generation has succeeded, and the engine is running."""
        service = self._service
        ready = service.ready and service.alive and not service.draining
        models = service.models
        known = {"ready": ready, "soft_prompts": models.versions, "refused": len(models.refused)}
        known |= {"resident": len(models.residency)}
        return JSONResponse(known, 200 if ready else 503)
